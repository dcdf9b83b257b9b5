"""The doctor's look at prompts, chat template and settings before the first step of a run that samples."""

import re
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from lowmem_grpo.checkup.training import OF_ANY, having_looked, learnt_by_heart, mostly_dropped, seen
from lowmem_grpo.data.gold import COLUMNS
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.data.questions import CHOICES
from lowmem_grpo.doctor.doctor import Doctor, Finding
from lowmem_grpo.errors import counted
from lowmem_grpo.inputs.prompts import Inputs
from lowmem_grpo.inputs.rewards import parameters_of
from lowmem_grpo.model.find import beyond_context, ends_of_model
from lowmem_grpo.model.turn_end import named_ends, turn_end, unseen_turn_end
from lowmem_grpo.preview.prompts import MARKS, read_gold
from lowmem_grpo.rewards import reads_gold
from lowmem_grpo.rewards.compare import compare

MOST_REPEATED = 0.1  # of the prompts; GSM8K's training set repeats none of 7,473
TEMPERATURES = (0.1, 2.0)  # below, a prompt's completions are nearly the same; above, they are mostly noise
NUM_GOLDS = 64  # whose lengths are looked at
WORD = re.compile(r"[\wĠ▁]+")  # of letters and digits, with the marks that tokenizers write for a space
LEAST_GOLDS = 8  # fewer rows may have one answer by chance
MARKER, ANSWER = "\ue000", "\ue001"  # stand for words of a message, and of an answer


class Look:
    """A run's inputs, and what several situations look at."""

    def __init__(self, inputs: Inputs):
        self.inputs, self.config, self.tokenizer = inputs, inputs.config, inputs.tokenizer
        self.prompts = inputs.prompts
        self.has_chats = any(not isinstance(prompt.text, str) for prompt in self.prompts)

    @cached_property
    def keys(self) -> list[tuple]:
        """A key of each prompt that its repetitions share, whatever a template makes of it."""
        return [(*prompt.ids, repr(prompt.text), _situation(prompt)) for prompt in self.prompts]

    @cached_property
    def golds(self) -> list[str | None]:
        """Each prompt's gold answer; none where no reward function reads a column of them."""
        functions = self.inputs.rewards.functions
        are_read = any(parameters_of(function) & set(COLUMNS) for function in functions)
        return [read_gold(prompt.columns) if are_read else None for prompt in self.prompts]

    @cached_property
    def chat(self) -> list[dict[str, Any]]:
        """The messages of the first chat, each of whose words are a marker; a lone question where others speak."""
        roles = [message["role"] for message in next(p.text for p in self.prompts if not isinstance(p.text, str))]
        roles = roles if set(roles) <= {"system", "user", "assistant"} else ["user"]
        return [{"role": role, "content": f"{MARKER}{place}{MARKER}"} for place, role in enumerate(roles)]

    @cached_property
    def ends_of_model(self) -> set[int]:
        """Ids that end a sequence by the model's own settings."""
        return ends_of_model(self.inputs.model, self.config)

    @property
    def ends(self) -> set[int]:
        """Ids that end a sequence by the model's settings or the tokenizer's."""
        return self.ends_of_model | named_ends(self.tokenizer)

    def rendered(self, messages: list[dict], **settings: Any) -> str:
        """Render messages by the chat template; an empty text where it refuses them."""
        given = {**(self.config.chat_template_kwargs or {}), **settings}
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **given)
        except Exception:  # of whatever the template asks for
            return ""


def doctor_of(inputs: Inputs, of_preview: Sequence[Finding] = ()) -> Doctor:
    """The doctor of a run that samples, who has looked at its inputs and knows what the preview found.

    Raises:
        UnhealthyRunError: doctor="stop", and something was found.
    """
    return having_looked(inputs, lambda: [*of_preview, *findings(inputs)], inputs.rewards.names)


def findings(inputs: Inputs) -> list[Finding]:
    """List what keeps a run with these inputs from learning the right thing; no weights are read."""
    return [*seen(SITUATIONS, Look(inputs)), *seen(OF_ANY, inputs)]


def evaluated_on_training_prompts(look: Look) -> str | None:
    """Say how many evaluation prompts are trained on."""
    measured, learnt = (
        [(*prompt.ids, _situation(prompt)) for prompt in prompts]
        for prompts in (look.inputs.eval_prompts, look.prompts)
    )
    return learnt_by_heart("prompts", learnt, measured)


def _situation(prompt: Prompt) -> str:
    """The row that its environment is reset with, which may be another game with the same prompt."""
    return "" if prompt.scene is None else repr(prompt.scene.row)


def one_prompt(look: Look) -> str | None:
    """Say that every step has one prompt alone."""
    if len(set(look.keys)) > 1:
        return None
    return "there is only one prompt, which every step repeats: the policy learns its answer by heart; give it more"


def repeated_prompts(look: Look) -> str | None:
    """Say how many prompts have come before."""
    prompts, different = len(look.prompts), len(set(look.keys))
    if different == 1 or prompts - different <= MOST_REPEATED * prompts:
        return None
    return (
        f"{prompts - different} of {prompts} prompts repeat an earlier one, and are trained on that much more often; "
        "leave the repetitions out if that is not meant"
    )


def contradicting_golds(look: Look) -> str | None:
    """Say for how many prompts the rows have several gold answers."""
    golds = defaultdict(dict)  # one of each way to write them
    for key, gold in zip(look.keys, look.golds, strict=True):
        if gold is not None:
            golds[key][_plain(gold)] = gold
    # What math-verify would have to compare counts as another answer.
    several = sum(
        any(compare(first, other) is not True for other in others)
        for first, *others in (of_prompt.values() for of_prompt in golds.values())
    )
    if not several:
        return None
    return (
        f"{counted(several, 'prompt comes', 'prompts come')} several times, with gold answers that differ: "
        "what is right once is wrong the next time; keep one row of each"
    )


def same_gold(look: Look) -> str | None:
    """Say that all rows have one gold answer."""
    golds = {key: _plain(gold) for key, gold in zip(look.keys, look.golds, strict=True) if gold is not None}
    if len(set(golds.values())) != 1 or len(golds) < LEAST_GOLDS:
        return None
    return (
        f"every row has the gold answer {golds.popitem()[1][:40]!r}, which the policy will give whatever it is asked; "
        "see whether solution or answer is the column that you mean"
    )


def golds_begin_with_zero(look: Look) -> str | None:
    """Say how many gold answers are digits behind a zero, which are compared as they are written."""
    found = [gold for gold in look.golds if gold is not None and re.fullmatch(r"0\d+", gold)]
    if not found or not any(reads_gold(function) for function in look.inputs.rewards.functions):
        return None
    return (
        f"{counted(len(found), 'gold answer begins', 'gold answers begin')} with a zero, such as {found[0]!r}, and the "
        "number without it is not paid; leave the zeros out, unless they are a part of it, as in a binary number"
    )


def gold_is_an_index(look: Look) -> str | None:
    """Say that gold answers are places in a row's list of choices, as MMLU has them."""
    of_rows = zip(look.prompts, look.golds, strict=True)
    places = sum(gold is not None and _is_a_place(prompt, gold) for prompt, gold in of_rows)
    if places < len(look.prompts) or places < LEAST_GOLDS:
        return None
    return (
        f"the gold answers of all {places} rows are places in their choices, of which the first is 0, and a completion "
        "that gives the choice or its letter is not paid; make each the letter that the prompt shows, or the choice"
    )


def _is_a_place(prompt: Prompt, gold: str) -> bool:
    """True where a gold answer counts a row's choices from 0, none is that number, and no prompt numbers them so."""
    choices = next((prompt.columns[name] for name in CHOICES if prompt.columns.get(name)), None)
    if not isinstance(choices, list) or not gold.isdecimal() or int(gold) >= len(choices):
        return False
    return gold not in map(str, choices) and not re.search(r"\b0[.):]", str(prompt.text))


def answer_in_prompt(look: Look) -> str | None:
    """Say how many prompts hold their own answer, marked as one."""
    given = 0
    for prompt, gold in zip(look.prompts, look.golds, strict=True):
        text = prompt.text if isinstance(prompt.text, str) else "\n".join(str(m.get("content")) for m in prompt.text)
        given += gold is not None and any(mark % gold in text for mark in MARKS.values())
    if given <= len(look.prompts) / 2:
        return None
    return (
        f"{given} of {len(look.prompts)} prompts hold their own gold answer, marked as in a solution, which can be "
        "copied; leave it out of the prompt"
    )


def fewer_prompts_than_a_step(look: Look) -> str | None:
    """Say that a step takes a prompt more than once."""
    prompts, wanted = len(look.prompts), look.config.prompts_per_step
    if prompts >= wanted or prompts == 1:
        return None
    return (
        f"a step takes prompts_per_step={wanted} prompts, and there are {prompts}, so that each comes several times "
        f"in a step; give more prompts, or set prompts_per_step={prompts} and raise num_generations"
    )


def most_prompts_dropped(look: Look) -> str | None:
    """Say that most of the data is too long for max_prompt_length."""
    return mostly_dropped(look.inputs, "prompts", "max_prompt_length")


def beyond_the_context(look: Look) -> str | None:
    """Say that a prompt and its completion may go beyond the positions that the model was made for."""
    longest = max(len(prompt.ids) for prompt in look.prompts + look.inputs.eval_prompts)
    return beyond_context(look.inputs.model, look.config, longest + look.config.max_completion_length)


def odd_end_of_sequence(look: Look) -> str | None:
    """Say that completions end with no token that the model was taught to end with."""
    named, of_model = look.tokenizer.eos_token_id, look.ends_of_model
    if named in of_model:
        return None
    remedy = "set tokenizer.eos_token, or eos_token in tokenizer_config.json, to the token that ends a turn"
    token = None if named is None else look.tokenizer.convert_ids_to_tokens(named)
    if token is not None and WORD.fullmatch(token):
        return f"the tokenizer ends sequences with {token!r}, at which completions are cut short; {remedy}"
    is_made_up = named is None or named == look.tokenizer.unk_token_id or named >= look.tokenizer.vocab_size
    of_turn = turn_end(look.tokenizer, look.ends) if look.has_chats else None
    if of_model or not is_made_up or (of_turn is not None and of_turn.token_id is not None):
        return None
    return (
        f"neither the model nor its vocabulary has an end-of-sequence token, and {token!r} is one that it never "
        f"learnt, so that no completion will end; {remedy}"
    )


def unseen_end_of_turn(look: Look) -> str | None:
    """Say that sampling does not stop where the chat template ends a turn."""
    if not look.has_chats:
        return None
    return unseen_turn_end(look.tokenizer, look.ends, look.config.stop_strings or [])


def no_chat_template(look: Look) -> str | None:
    """Say that chats are written as a transcript."""
    if look.tokenizer.chat_template is not None or not look.has_chats:
        return None
    return (
        "the tokenizer has no chat template, so that chats become a transcript that ends in 'Assistant:'; a model that "
        "was taught a template needs the tokenizer that has it, and a base model may get its prompts as plain texts"
    )


def no_generation_prompt(look: Look) -> str | None:
    """Say that the chat template does not begin the assistant's turn."""
    if look.tokenizer.chat_template is None or not look.has_chats or look.chat[-1]["role"] == "assistant":
        return None
    plain, prompted = (look.rendered(look.chat, add_generation_prompt=value) for value in (False, True))
    before, words, _ = look.rendered([*look.chat, {"role": "assistant", "content": ANSWER}]).partition(ANSWER)
    begun = before.removeprefix(plain).strip() if words and before.startswith(plain) else ""
    if prompted != plain or not begun:  # the user's turn ends where an answer begins, as in Llama 2's and Mistral's
        return None
    return (
        f"the chat template does not look at add_generation_prompt, so that a prompt ends before {begun!r}, and the "
        "policy may go on with the user's words; mend tokenizer.chat_template"
    )


def template_drops_messages(look: Look) -> str | None:
    """Say which roles' words the chat template leaves out."""
    if look.tokenizer.chat_template is None or not look.has_chats:
        return None
    rendered = look.rendered(look.chat, add_generation_prompt=True)
    dropped = dict.fromkeys(message["role"] for message in look.chat if message["content"] not in rendered)
    if not dropped or not rendered:
        return None
    return (
        f"the chat template leaves out what {' and '.join(dropped)} says, so that the policy never sees it; mend "
        "tokenizer.chat_template, or say it in another role"
    )


def implausible_temperature(look: Look) -> str | None:
    """Say that completions will be all the same, or noise."""
    temperature, (low, high) = look.config.temperature, TEMPERATURES
    if low <= temperature <= high:
        return None
    what = "all completions of a prompt are the same" if temperature < low else "completions are mostly noise"
    return f"at temperature={temperature:g} {what}, and there is little to learn from; set it near 1"


def one_token_to_choose(look: Look) -> str | None:
    """Say that truncation leaves the likeliest token alone, whatever the temperature."""
    given = {"top_k": look.config.top_k, "min_p": look.config.min_p}
    found = next((f"{name}={value:g}" for name, value in given.items() if value == 1), None)
    if found is None:
        return None
    return (
        f"{found} leaves one token to choose, so that all completions of a prompt are the same, and there is little to "
        "learn from; leave it out"
    )


def reward_without_weight(look: Look) -> str | None:
    """Say which reward functions count for nothing."""
    weights = look.config.reward_weights or []
    idle = [name for name, weight in zip(look.inputs.rewards.names, weights, strict=False) if weight == 0]
    if not idle or not any(weights):  # beside a teacher, rewards may be measured alone
        return None
    return f"reward_weights gives {' and '.join(idle)} no weight: logged alone, and nothing is learnt from it"


def answers_do_not_fit(look: Look) -> str | None:
    """Say that gold answers have more tokens than a completion may have."""
    limit = look.config.max_completion_length
    golds = [gold for gold in look.golds if gold is not None][:NUM_GOLDS]
    ids = look.tokenizer(golds, add_special_tokens=False)["input_ids"] if golds else []
    long = sum(len(of_gold) > limit for of_gold in ids)
    if not long:
        return None
    return (
        f"max_completion_length={limit} has no room for {long} of the first {len(golds)} gold answers, which can never "
        "be given; raise it"
    )


def _plain(gold: str) -> str:
    """A gold answer without what two writings of one answer differ in most: white space, case, commas, dollar signs."""
    return re.sub(r"[\s,$]|\\[!,;]", "", gold).lower()


SITUATIONS = (
    evaluated_on_training_prompts, one_prompt, repeated_prompts, contradicting_golds, same_gold,
    golds_begin_with_zero, gold_is_an_index, answer_in_prompt, fewer_prompts_than_a_step, most_prompts_dropped,
    beyond_the_context, odd_end_of_sequence, unseen_end_of_turn, no_chat_template, no_generation_prompt,
    template_drops_messages, implausible_temperature, one_token_to_choose, reward_without_weight, answers_do_not_fit,
)  # fmt: skip

"""The data preview: prompts as the model gets them, and what the rewards say of gold answers.

It is made of the first rows, before any weights are read. Where the gold answer itself does not earn the most, a run
cannot learn to give it.
"""

import contextlib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from lowmem_grpo.data.chats import closing_of
from lowmem_grpo.data.gold import COLUMNS, gold_of
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.distributed import by_main
from lowmem_grpo.doctor.doctor import Finding
from lowmem_grpo.errors import InputError, counted, printable
from lowmem_grpo.inputs.prompts import Inputs
from lowmem_grpo.inputs.rewards import parameters_of
from lowmem_grpo.preview.show import MOST_CHARACTERS, cut, show_and_write
from lowmem_grpo.rewards import BUILT_IN, RewardRunner, reads_gold
from lowmem_grpo.rewards.accuracy import gold_answer
from lowmem_grpo.rewards.route import inner_of
from lowmem_grpo.rollout.metrics import in_words
from lowmem_grpo.run.randomness import same_randomness
from lowmem_grpo.terminal import indented

NUM_ROWS = 4  # that are looked at; a run shows the first
SLOW_S = 0.05  # for a completion, of a function of the user's
# How an answer is marked, by what a prompt that asks for it says.
MARKS = {"\\boxed": "\\boxed{%s}", "<answer>": "<answer>%s</answer>", "####": "#### %s"}
UNASKED = ("%s", *MARKS.values())  # the forms where a prompt names none of these
OPENS = re.compile(r"<(\w+)>")  # a tag of the prompt's own, as <SOLUTION> and </SOLUTION>
MOST_TAGS = 4
THOUGHTS = "<think></think>"
# Built-in rewards that are 1 for a right answer in their form.
AT_BEST_1 = [f for name, f in BUILT_IN.items() if name not in ("language_consistency_reward", "code_reward")]


@dataclass(frozen=True)
class Preview:
    """One row: its prompt, its gold answer as a completion, and what the rewards say."""

    prompt: str  # as the model gets it, special tokens included
    num_tokens: int
    gold: str | None  # as accuracy_reward reads it
    answer: str | None  # a completion that is the gold answer, in the form that the prompt asks for
    is_asked_for: bool  # False where the prompt names no form, and the answer is in the one that earns most
    rewards: dict[str, tuple[float, float]]  # by function, for that answer and for an empty completion; NaN for none
    bare: dict[str, float]  # by function, for the gold answer without a mark; of prompts that name no form
    of_teacher: str | None = None  # the prompt as a teacher reads it, where that is something else


@by_main
def show_preview(inputs: Inputs) -> list[Finding]:
    """Print the first row's preview on standard error, and write it to output_dir/data_preview.txt.

    Returns where a gold answer does not earn the most. A run that is resumed has been shown it.
    """
    if inputs.resume is not None:
        return []
    previews = make_previews(inputs, NUM_ROWS)
    found = faults(inputs.rewards, previews)
    said = remarks(inputs.rewards, previews)  # the doctor says what was found
    text = "\n".join([as_text(inputs, previews[:1]), *(fault.text for fault in found), *said])
    show_and_write(inputs, text, "\n".join([as_text(inputs, previews[:1], MOST_CHARACTERS), *said]))
    return found


def make_previews(inputs: Inputs, count: int) -> list[Preview]:
    """Previews of the first training prompts, by one call of each reward. Random generators stay where they are."""
    tried = [function for function in inputs.rewards.functions if why_not_tried(function, inputs) is None]
    rewards, tokenizer = RewardRunner(tried, inputs.rewards.timeout_s), inputs.tokenizer
    prompts = inputs.prompts[:count]
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    rendered = [decode(prompt.ids) for prompt in prompts]
    golds = [read_gold(prompt.columns) for prompt in prompts]
    asked_for = [[mark for mark in MARKS if mark in text] for text in rendered]
    answers = [_answers(*row) for row in zip(rendered, prompts, golds, asked_for, strict=True)]
    # Of each prompt an empty completion, its gold answer in every form, and what makes whole groups of them.
    size = inputs.config.num_generations
    texts = [[prompt.said, *own] for prompt, own in zip(prompts, answers, strict=True)]
    filled = [own + [own[0]] * (-len(own) % size) for own in texts]
    asked_of = [(prompt, text) for prompt, own in zip(prompts, filled, strict=True) for text in own]
    with same_randomness():
        values = iter(_rewards(asked_of, tokenizer, rewards))
    previews = []
    for prompt, text, gold, asked, own, group in zip(prompts, rendered, golds, asked_for, answers, filled, strict=True):
        of_nothing, *of_answers = [next(values) for _ in group][: 1 + len(own)]
        best = max(range(len(own)), key=lambda place: _total(of_answers[place]), default=None)
        of_best = [math.nan] * len(tried) if best is None else of_answers[best]
        verdicts = dict(zip(rewards.names, zip(of_best, of_nothing, strict=True), strict=True))
        bare = [] if asked else of_answers[:: len(_forms(text, asked))]
        of_bare = {name: max(of_name) for name, *of_name in zip(rewards.names, *bare, strict=True)} if bare else {}
        answer = None if best is None else own[best]
        theirs = None if prompt.teacher_ids is None else decode(prompt.teacher_ids)
        previews.append(Preview(text, len(prompt.ids), gold, answer, bool(asked), verdicts, of_bare, theirs))
    return previews


def _rewards(texts: list[tuple[Prompt, str]], tokenizer: Any, rewards: RewardRunner) -> list[list[float]]:
    """The rewards of each text as a completion of its prompt, one a function."""
    if not texts or not rewards.functions:
        return [[] for _ in texts]
    completions, ids = [], []
    for prompt, text in texts:
        completions.append(text if isinstance(prompt.text, str) else [{"role": "assistant", "content": text}])
        ids.append(tokenizer(text.removeprefix(prompt.said), add_special_tokens=False)["input_ids"])
    columns = {key: [prompt.columns[key] for prompt, _ in texts] for key in texts[0][0].columns}
    by_function = rewards.rewards_of([prompt.text for prompt, _ in texts], completions, ids, columns)
    return [list(of_text) for of_text in zip(*by_function, strict=True)]


def _total(rewards: Iterable[float]) -> float:
    return sum(reward for reward in rewards if not math.isnan(reward))


def read_gold(columns: dict[str, Any]) -> str | None:
    """The gold answer of a row as accuracy_reward reads it, or one of countdown's solutions; None without one."""
    try:
        gold = gold_of(columns)
    except InputError:  # of a form that only a reward of the user's reads
        gold = None
    return gold_answer(columns.get("one_solution") if gold is None else gold) or None


def _answers(rendered: str, prompt: Prompt, gold: str | None, asked_for: list[str]) -> list[str]:
    """The gold answer as completions: in the forms that the prompt asks for, else in all."""
    if gold is None:
        return []
    forms = _forms(rendered, asked_for)
    if prompt.said:
        begins = [prompt.said + closing_of(prompt.said)]
    elif "<think>" in rendered:
        begins = [THOUGHTS]
    else:
        begins = ["", THOUGHTS]
    return [begin + form.replace("%s", gold) for begin in begins for form in forms]


def _forms(rendered: str, asked_for: list[str]) -> list[str]:
    """The forms that a prompt asks for; where it names no known one, all of them and its own tags."""
    if asked_for:
        return [MARKS[mark] for mark in asked_for]
    opened = [tag for tag in dict.fromkeys(OPENS.findall(rendered)) if tag != "think"]
    tags = [tag for tag in opened if f"</{tag}>" in rendered.partition(f"<{tag}>")[2]]
    return [*UNASKED, *(f"<{tag}>%s</{tag}>" for tag in tags[:MOST_TAGS])]


def why_not_tried(function: Callable, inputs: Inputs) -> str | None:
    """Why a reward function is not called for a preview, or None where it is."""
    function = inner_of(function)
    built_in = function in AT_BEST_1 or reads_gold(function)
    if hasattr(function, "bind") or any(isinstance(value, nn.Module) for value in _held(function)):
        return "it asks a model"
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        return "it is async, as those that ask a server are"
    if "tests" in parameters_of(function):
        return "it runs programs"
    if not built_in and any(prompt.scene is not None for prompt in (inputs.prompts or inputs.eval_prompts)[:1]):
        return "it may ask environments"
    seconds = inputs.rewards.trial_s.get(_name(function), 0.0)
    if seconds > SLOW_S and not built_in:
        return f"it took {seconds:.1f} s for each made-up completion"
    return None


def _name(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _held(function: Any) -> Iterator[Any]:
    """The values of a function's closure, of a partial's arguments and of an object's attributes."""
    if isinstance(function, partial):
        yield from (*function.args, *function.keywords.values(), *_held(function.func))
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # of a name that is not set yet
            yield cell.cell_contents
    yield from getattr(getattr(function, "__self__", function), "__dict__", {}).values()


def faults(rewards: RewardRunner, previews: list[Preview]) -> list[Finding]:
    """A finding for each reward function to which a gold answer is not worth the most.

    That is 1 to a built-in function, and to one of the user's that reads a column of gold answers more than an empty
    completion. A built-in one should give it without a mark, too, where no prompt asks for one, and no empty completion
    1, as where a prompt is a whole chat, with its answer.
    """
    found: list[Finding] = []
    for function, name in zip(rewards.functions, rewards.names, strict=True):
        shown = [one for one in previews if one.answer is not None and name in one.rewards]
        worth_less = [one for one in shown if _is_worth_less(function, *one.rewards[name])]
        if worth_less and (function in AT_BEST_1 or any(one.is_asked_for for one in worth_less)):
            found.append(Finding(f"gold_not_paid/{name}", _not_paid(name, worth_less, len(shown))))
            continue
        for_nothing = [one for one in shown if reads_gold(function) and one.rewards[name][1] >= 1]
        if for_nothing:
            of = "its only row" if len(shown) == 1 else f"{len(for_nothing)} of the first {len(shown)} rows"
            text = (
                f"{name} gives an empty completion the most, in {of}: the "
                f"prompt ends with the answer, {for_nothing[0].prompt[-40:]!r}; leave out the assistant's last message"
            )
            found.append(Finding(f"nothing_paid/{name}", text))
            continue
        unpaid = [one for one in shown if function in AT_BEST_1 and reads_gold(function) and one.bare.get(name, 1) < 1]
        if unpaid:
            first = unpaid[0]
            text = (
                f"{name} pays the gold answer only where it is marked, and {len(unpaid)} of the first {len(shown)} "
                f"prompts ask for no mark: {first.gold!r} has {in_words(first.bare[name], '.3f')}, and "
                f"{first.answer!r} {in_words(first.rewards[name][0], '.3f')}; ask for that form in the prompts or in "
                "system_prompt"
            )
            found.append(Finding(f"gold_paid_if_marked/{name}", text))
    return found


def remarks(rewards: RewardRunner, previews: list[Preview]) -> list[str]:
    """A sentence for each function of the user's that pays a gold answer in no known form.

    It is no finding, where no prompt names a form: the function may look for one of its own.
    """
    said = []
    for function, name in zip(rewards.functions, rewards.names, strict=True):
        shown = [one for one in previews if one.answer is not None and name in one.rewards]
        worth_less = [one for one in shown if _is_worth_less(function, *one.rewards[name])]
        if worth_less and function not in AT_BEST_1 and not any(one.is_asked_for for one in worth_less):
            said.append(f"{_not_paid(name, worth_less, len(shown))}, or ignore this if that form is one of its own")
    return said


def _not_paid(name: str, worth_less: list[Preview], count: int) -> str:
    first = worth_less[0]
    value, of = first.rewards[name][0], f"{len(worth_less)} of the first {count} rows" if count > 1 else "its only row"
    has = "gets no reward" if math.isnan(value) else f"has {in_words(value, '.3f')}"
    return (
        f"{name} does not give the gold answer the most, in {of}: {first.answer!r} {has}; see whether it reads the "
        "right column, and whether the prompt asks for answers in the form that it looks for"
    )


def _is_worth_less(function: Callable, of_gold: float, of_nothing: float) -> bool:
    if function in AT_BEST_1:
        return not of_gold >= 1  # NaN, where it says nothing, is less, too
    return bool(parameters_of(function) & set(COLUMNS)) and not of_gold > of_nothing


def as_text(inputs: Inputs, previews: list[Preview], most_characters: int | None = None) -> str:
    """Previews for a person, in which nothing foreign moves a terminal's cursor; long prompts cut in their middle."""
    lines = []
    for number, one in enumerate(previews, 1):
        lines.append(
            f"data preview: prompt {number} of {len(inputs.prompts)} as the model gets it, "
            f"{counted(one.num_tokens, 'token')}"
        )
        lines += indented(cut(one.prompt, most_characters))
        if one.of_teacher is not None:
            lines += ["  as the teacher reads it", *indented(cut(one.of_teacher, most_characters))]
        lines += (
            ["  gold answer: none that the built-in rewards read"]
            if one.gold is None
            else ["  gold answer, as it is read", *indented(cut(one.gold, most_characters))]
        )
        if one.answer is not None:
            form = (
                "that the prompt asks for"
                if one.is_asked_for
                else "that earns most, since the prompt names none that is known"
            )
            lines += [
                f"  a completion that is the gold answer, in the form {form}",
                *indented(cut(one.answer, most_characters)),
            ]
        for function, name in zip(inputs.rewards.functions, inputs.rewards.names, strict=True):
            reason = why_not_tried(function, inputs)
            if reason:
                lines.append(f"  {printable(name)}: not called for this, since {reason}")
                continue
            of_gold, of_nothing = (in_words(value, ".3f") for value in one.rewards[name])
            gold = "" if one.answer is None else f"{of_gold} for the gold answer, "
            lines.append(f"  {printable(name)}: {gold}{of_nothing} for an empty completion")
    return "\n".join(lines)

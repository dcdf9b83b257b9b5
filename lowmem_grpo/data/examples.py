"""Examples to imitate: rows to tokens, and which of them are learnt.

A row has `prompt` and `completion`, texts or lists of messages; or a chat, as `messages` or, with from and value, as
`conversations`; or a `text`; or, as Alpaca has them, an instruction and an output. Tools and template settings are a
row's own as for prompts. A message of weight 0, as in SlimOrca and OpenAI's files, is read and not learnt; so is, where
messages of a chat have weights, one without that is not the assistant's.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Generic, TypeVar

from datasets import Dataset

from lowmem_grpo.config.sections import ExampleFields
from lowmem_grpo.data.chats import OPENING, Template, read_chat, read_text, with_system
from lowmem_grpo.data.order import Order, index_at, mixed_index_at, shares_of
from lowmem_grpo.data.prompts import refuse_settings_of_text, template_settings
from lowmem_grpo.data.questions import ANSWERS, INSTRUCTIONS, question_of
from lowmem_grpo.data.text import ended, text_ids
from lowmem_grpo.errors import InputError
from lowmem_grpo.output.saved import whole

FORMS = ("prompt", "completion"), ("messages",), ("conversations",), ("text",), *product(INSTRUCTIONS, ANSWERS)
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
MOST_WEIGHT = 1e6  # fp32 sums numbers that are as far apart as this and its inverse
T = TypeVar("T")  # an example, or a pair
GENERATION = re.compile(r"\{%-?\s*generation\b")  # what a template marks an assistant's words with
REMEDY = "mark the assistant's words in the chat template with {% generation %}"


@dataclass(frozen=True)
class Example:
    """One row, tokenized."""

    ids: list[int]
    counted: list[bool]  # whether each token is learnt; the first never is, since nothing predicts it
    weight: float = 1.0  # of each of its tokens in the loss

    @property
    def start(self) -> int:
        """The place of the first token that is learnt."""
        return self.counted.index(True)


@dataclass
class Examples(Generic[T]):
    """A run's examples, or pairs, and its place in the endless stream of epochs of them. A part of a checkpoint."""

    all: list[T]  # of several datasets one after the other
    config: Order
    position: int = 0  # of the next example
    sizes: list[int] = field(default_factory=list)  # of several datasets: how many are of each
    weights: list[float] | None = None  # with which they are mixed; else they are one

    def take(self, count: int) -> list[T]:
        """The next examples of the stream."""
        places = range(self.position, self.position + count)
        self.position = places.stop
        return [self.all[self._index_at(place)] for place in places]

    def _index_at(self, place: int) -> int:
        if self.weights is None:
            return index_at(place, len(self.all), self.config)
        return mixed_index_at(place, self.sizes, self.weights, self.config)

    def epochs_of(self, count: int) -> list[float]:
        """How often each dataset is gone through in `count` examples of the stream: [0.5, 4.0]."""
        parts = shares_of(len(self.all), self.weights or self.sizes)
        return [count / len(self.all) * part / size for part, size in zip(parts, self.sizes, strict=True)]

    def state(self) -> dict[str, Any]:
        """The position."""
        return {"position": self.position}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what state() returned."""
        self.position = whole(state["position"], "position")


def tokenize_examples(
    rows: Dataset, tokenizer: Any, config: ExampleFields, *, name: str = "train_dataset"
) -> tuple[list[Example], int]:
    """The rows' examples, and how many were dropped for having more than max_length tokens.

    Raises:
        InputError: a row is of no known form, the tokens to learn cannot be told, or no example is left.
    """
    form = _form(rows.column_names, config, name)
    reader = _Reader(tokenizer, config)
    read = {
        "prompt": reader.pair, "messages": reader.chat, "conversations": reader.chat, "text": reader.text,
    }.get(form, reader.answer)  # fmt: skip
    examples = []
    given: list[Any] = list(rows)
    for index, row in enumerate(given):
        where = f"row {index} of {name}"
        ids, counted = read(row, where)
        counted[:1] = [False]
        if not any(counted):
            raise InputError(f"{where} has no token to learn; leave it out")
        examples.append(Example(ids, counted, _weight(row, where)))
    short = [one for one in examples if config.max_length is None or len(one.ids) <= config.max_length]
    if not short:
        shortest = min(len(one.ids) for one in examples)
        raise InputError(
            f"every row of {name} is longer than max_length={config.max_length}; the shortest has {shortest} tokens; "
            "raise it"
        )
    if not any(one.weight for one in short):
        raise InputError(f"every row of {name} has the weight 0, so that nothing would be learned; give one another")
    return short, len(examples) - len(short)


def form_of(columns: list[str]) -> tuple[str, ...] | None:
    """The columns of FORMS by which rows are read; None where they are of no known form."""
    return next((form for form in FORMS if set(form) <= set(columns)), None)


def _form(columns: list[str], config: ExampleFields, name: str) -> str:
    """The first column of the rows' form. Raise InputError where there is none, or a mask does not apply to it."""
    form = form_of(columns)
    if form is None:
        raise InputError(
            f"{name} has neither prompt and completion nor messages, conversations, text or instruction and output, "
            f"only {', '.join(columns)}; rename its columns"
        )
    if form == ("text",) and "role" in columns:
        raise InputError(
            f"{name} has one message of a chat a row, by its column role; make each chat a row, with a list of its "
            "messages as messages, or remove the column"
        )
    if len(form) == 1 and config.completion_only_loss:
        raise InputError(f"completion_only_loss is for rows with prompt and completion, and {name} has {form[0]}")
    if form[0] == "text" and config.assistant_only_loss:
        raise InputError(f"assistant_only_loss is for chats, and {name} has texts; leave it out")
    return form[0]


class _Reader:
    """Reads rows with a tokenizer, each to its ids, and to a truth value a token: is it learnt?"""

    def __init__(self, tokenizer: Any, config: ExampleFields):
        self.tokenizer, self.config = tokenizer, config
        self.template = Template(tokenizer)

    def text(self, row: dict, where: str) -> tuple[list[int], list[bool]]:
        """A text, of which every token is learnt, its end too."""
        refuse_settings_of_text(row, where)
        ids = text_ids(self.tokenizer, ended(self.tokenizer, read_text(row["text"], "text", where)))
        return ids, [True] * len(ids)

    def pair(self, row: dict, where: str) -> tuple[list[int], list[bool]]:
        """A prompt, as a training by rewards gives it, and a completion with its end."""
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return self._chat(read_chat(prompt, where), read_chat(completion, where, "completion"), row, where)
        if isinstance(prompt, list) or isinstance(completion, list):
            raise InputError(f"{where} has a text and a list of messages side by side; make both the same")
        if self.config.assistant_only_loss:
            raise InputError(f"{where} has texts, and assistant_only_loss is for chats; leave it out")
        refuse_settings_of_text(row, where)
        prompt, completion = read_text(prompt, "prompt", where), read_text(completion, "completion", where)
        before = text_ids(self.tokenizer, prompt)
        ids = text_ids(self.tokenizer, prompt + ended(self.tokenizer, completion))
        ids = self._continued(before, ids, ended(self.tokenizer, completion), where)
        return ids, self._after(len(before), len(ids))

    def answer(self, row: dict, where: str) -> tuple[list[int], list[bool]]:
        """An instruction, with its input, and what answers it, as a chat."""
        ask, answer = (next(one for one in columns if one in row) for columns in (INSTRUCTIONS, ANSWERS))
        prompt = [{"role": "user", "content": question_of(row, ask, where)}]
        completion = [{"role": "assistant", "content": read_text(row[answer], answer, where)}]
        return self._chat(prompt, completion, row, where)

    def chat(self, row: dict, where: str) -> tuple[list[int], list[bool]]:
        """A chat, of which every turn is learnt, or with assistant_only_loss the assistant's."""
        column = "conversations" if row.get("messages") is None else "messages"
        given = _from_share_gpt(row.get(column)) if column == "conversations" else row[column]
        return self._chat([], read_chat(given, where, column), row, where)

    def _chat(self, prompt: list[dict], completion: list[dict], row: dict, where: str) -> tuple[list[int], list[bool]]:
        settings = template_settings(row, self.template, self.config, where)
        if prompt:
            prompt = with_system(prompt, row, self.config.system_prompt)
        else:
            completion = with_system(completion, row, self.config.system_prompt)
        is_open = bool(prompt) and {prompt[-1]["role"], completion[0]["role"]} == {"assistant"}
        if is_open:  # the completion goes on with the prompt's last words
            words = f"{prompt[-1].get('content', '')}{completion[0].get('content', '')}"
            messages = [*prompt[:-1], {**completion[0], "content": words}, *completion[1:]]
        else:
            messages = [*prompt, *completion]
        skipped = _not_learnt(messages, where)
        prompt, messages = ([_without_weight(one) for one in several] for several in (prompt, messages))
        whole = self.template.whole(messages, settings, where)
        whole = whole if self.tokenizer.chat_template is not None else ended(self.tokenizer, whole)
        ids = self.template.ids(whole)
        counted = [True] * len(ids)
        if prompt:
            is_closed = prompt[-1]["role"] == "assistant" and not is_open
            render = self.template.whole if is_closed else self._opened
            text = render(prompt, settings, where)
            if not whole.startswith(text):
                raise InputError(
                    f"{where} has a prompt that the chat template ends with {text[-40:]!r}, which its completion does "
                    "not go on from; give the template one way to begin an answer"
                )
            before = self.template.ids(text)
            ids = self._continued(before, ids, whole[len(text) :], where)
            counted = self._after(len(before), len(ids))
        if self.config.assistant_only_loss:
            said = self._said(messages, settings, whole, ids, where)
            counted = [a and b for a, b in zip(counted, said, strict=True)]
            skipped = [place for place in skipped if messages[place]["role"] == "assistant"]
        if any(counted) and skipped:
            left_out = self._within(self._whole_turns(skipped, messages, settings, whole, where), whole, ids, where)
            counted = [a and not b for a, b in zip(counted, left_out, strict=True)]
        return ids, counted

    def _opened(self, prompt: list[dict], settings: dict, where: str) -> str:
        """A prompt as training by rewards gives it, from which an answer goes on."""
        return self.template.render(prompt, settings, where)[0]

    def _closed(self, messages: list[dict], settings: dict, where: str) -> str:
        """A chat's beginning, without the opening of an answer that a transcript ends with."""
        text = self.template.whole(messages, settings, where)
        return text.removesuffix(OPENING) if self.tokenizer.chat_template is None else text

    def _after(self, start: int, count: int) -> list[bool]:
        """Learn the tokens from `start` on, or all with completion_only_loss=False."""
        start = 0 if self.config.completion_only_loss is False else start
        return [False] * start + [True] * (count - start)

    def _continued(self, before: list[int], ids: list[int], rest: str, where: str) -> list[int]:
        """Join a prompt and what follows as a policy would write it: no token reaches across.

        Where one does in the ids of both together, the rest is tokenized by itself.
        """
        if ids[: len(before)] == before:
            return ids
        apart = before + self.tokenizer(rest, add_special_tokens=False)["input_ids"]
        if self.tokenizer.decode(apart) != self.tokenizer.decode(ids):
            raise InputError(
                f"{where} has a token that reaches from the end of the prompt into the completion's beginning, "
                f"{rest[:20]!r}; move the white space between them to the completion's side"
            )
        return apart

    def _said(self, messages: list[dict], settings: dict, whole: str, ids: list[int], where: str) -> list[bool]:
        """Whether each token is the assistant's, with the end of its turn."""
        if self.tokenizer.chat_template is not None and GENERATION.search(self.tokenizer.chat_template):
            found = self.tokenizer.apply_chat_template(
                messages, **{**settings, "return_dict": True, "return_assistant_tokens_mask": True}
            )
            if found["input_ids"] == ids:
                return [bool(value) for value in found["assistant_masks"]]
        return self._within(self._turns(messages, settings, whole, where), whole, ids, where)

    def _within(self, parts: Iterable[tuple[int, int]], whole: str, ids: list[int], where: str) -> list[bool]:
        """Whether each token of a rendered chat is within one of its parts, given by where they begin and end."""
        within = [False] * len(ids)
        for part in parts:
            bounds = [self.template.ids(whole[:place]) for place in part]
            if any(ids[: len(bound)] != bound for bound in bounds):
                raise InputError(
                    f"{where} has a turn whose bounds are within a token, so that it cannot be learnt, or left out, by "
                    f"itself; {REMEDY}"
                )
            within[len(bounds[0]) : len(bounds[1])] = [True] * (len(bounds[1]) - len(bounds[0]))
        return within

    def _turns(self, messages: list[dict], settings: dict, whole: str, where: str) -> Iterator[tuple[int, int]]:
        """Find where each turn of the assistant begins and ends in the rendered chat, less the white space after it."""
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._opened(messages[:place], settings, where)
            after = self.template.whole(messages[: place + 1], settings, where)
            if not (whole.startswith(after) and after.startswith(before)):
                raise InputError(
                    f"{where} is rendered otherwise as it grows, so that assistant_only_loss cannot tell turn {place}; "
                    f"{REMEDY}"
                )
            yield len(before), len(after.rstrip())

    def _whole_turns(
        self, places: list[int], messages: list[dict], settings: dict, whole: str, where: str
    ) -> Iterator[tuple[int, int]]:
        """Find where turns begin and end in the rendered chat, with what the template puts around them."""
        for place in places:
            before, after = (self._closed(messages[:end], settings, where) if end else "" for end in (place, place + 1))
            if not (whole.startswith(after) and after.startswith(before)):
                raise InputError(
                    f"{where} is rendered otherwise as it grows, so that turn {place}, of weight 0, cannot be left "
                    "out; remove the weights, or leave the row out"
                )
            yield len(before), len(after)


def _from_share_gpt(value: Any) -> Any:
    """Messages of a list of {"from", "value"}, or the value as it is."""
    if not isinstance(value, list) or not all(
        isinstance(one, dict) and isinstance(one.get("from"), str) and "value" in one for one in value
    ):
        return value
    return [
        {"role": ROLES.get(one["from"], one["from"]), "content": one["value"], "weight": one.get("weight")}
        for one in value
    ]


def _not_learnt(messages: list[dict], where: str) -> list[int]:
    """Places of messages of weight 0, and in a chat with any weights of those without that are not the assistant's."""
    weights = [message.get("weight") for message in messages]
    for weight in weights:
        if weight not in (None, 0, 1):
            raise InputError(
                f"{where} has a message of weight {weight!r:.60}; it has to be 1, or 0 for one that is read and not "
                "learnt"
            )
    if all(weight is None for weight in weights):
        return []
    own = [int(message["role"] == "assistant") for message in messages]
    return [i for i, weight in enumerate(weights) if not (own[i] if weight is None else weight)]


def _without_weight(message: dict) -> dict:
    return {name: value for name, value in message.items() if name != "weight"}


def _weight(row: dict, where: str) -> float:
    weight = row.get("weight")
    if weight is None:
        return 1.0
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not is_number or not (weight == 0 or 1 / MOST_WEIGHT <= weight <= MOST_WEIGHT):
        raise InputError(f"{where} has the weight {weight!r}; it has to be 0, or a number from 1e-6 to 1e6")
    return float(weight)

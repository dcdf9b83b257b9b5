"""Pairs of a better and a worse text: rows to tokens, in the forms of TRL's RewardTrainer.

A row has `chosen` and `rejected`, and optionally a `prompt` before both: texts or lists of messages. Chats may show the
prompt themselves, and a `question` in its place makes chats of texts that do not show it. An optional `margin` says by
how much the one is better. Tools and template settings are a row's own as for prompts.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

from datasets import Dataset

from lowmem_grpo.config.sections import PairFields
from lowmem_grpo.data.chats import Template, is_text, read_chat, refuse_chat_as_text, with_system
from lowmem_grpo.data.prompts import refuse_settings_of_text, template_settings
from lowmem_grpo.data.questions import INSTRUCTIONS, question_of
from lowmem_grpo.data.text import ended, text_ids
from lowmem_grpo.errors import InputError

ASK = (*INSTRUCTIONS, "input")  # what stands before two texts where there is no prompt, as in Orca's pairs
MOST_MARGIN = 1e6  # scores are of the order of 1


@dataclass(frozen=True)
class Pair:
    """One row, tokenized: both texts whole, each with its prompt."""

    chosen: list[int]
    rejected: list[int]
    margin: float = 0.0

    @cached_property
    def num_shared(self) -> int:
        """How many tokens both texts begin with, such as a prompt's."""
        both = zip(self.chosen, self.rejected, strict=False)
        return sum(1 for _ in takewhile(lambda ids: ids[0] == ids[1], both))

    @property
    def texts(self) -> tuple[list[int], list[int]]:
        """The better text and the worse one."""
        return self.chosen, self.rejected


def tokenize_pairs(
    rows: Dataset, tokenizer: Any, config: PairFields, *, name: str = "train_dataset"
) -> tuple[list[Pair], int]:
    """The rows' pairs, and how many were dropped since either text has more than max_length tokens.

    Texts end with the end-of-sequence token; chats as their template ends them.

    Raises:
        InputError: a row is of no known form, or no pair is left.
    """
    if not {"chosen", "rejected"} <= set(rows.column_names):
        raise InputError(f"{name} has no chosen and rejected, only {', '.join(rows.column_names)}; rename its columns")
    given: list[Any] = list(rows)
    reader = _Reader(tokenizer, config, asks=not all(map(_is_shown, given)))
    pairs = [reader.pair(row, f"row {index} of {name}") for index, row in enumerate(given)]
    short = [pair for pair in pairs if max(map(len, pair.texts)) <= (config.max_length or math.inf)]
    if not short:
        shortest = min(max(map(len, pair.texts)) for pair in pairs)
        raise InputError(
            f"every pair of {name} has a text longer than max_length={config.max_length}; of the shortest it has "
            f"{shortest} tokens; raise it"
        )
    return short, len(pairs) - len(short)


class _Reader:
    """Reads rows with a tokenizer, each to a Pair."""

    def __init__(self, tokenizer: Any, config: PairFields, asks: bool):
        self.tokenizer, self.config = tokenizer, config
        self.asks = asks  # what stands in columns of ASK, since not all texts show it
        self.template = Template(tokenizer)

    def pair(self, row: dict, where: str) -> Pair:
        """A row's pair."""
        values = {name: row[name] for name in ("prompt", "chosen", "rejected") if row.get(name) is not None}
        if row.get("chosen") is None or row.get("rejected") is None:
            raise InputError(f"{where} lacks chosen or rejected; fill both, or leave the row out")
        for column, value in values.items():
            if not isinstance(value, list) and not is_text(value):
                raise InputError(
                    f"{where} has the {column} {str(value)[:60]!r}; it has to be a text or a list of messages"
                )
        are_chats = [isinstance(row[column], list) for column in ("chosen", "rejected")]
        if len(set(are_chats)) > 1 or (not are_chats[0] and isinstance(row.get("prompt"), list)):
            raise InputError(f"{where} has texts and lists of messages side by side; make all of them the same")
        asks = _ask_of(row)
        if self.asks and asks is not None and "prompt" not in row:
            answers = [_as_answer(row[column], where) for column in ("chosen", "rejected")]
            if all(answers):
                row = {**row, **dict(zip(("chosen", "rejected"), answers, strict=True))}
                row["prompt"] = question_of(row, asks, where)
        read = self._chat if isinstance(row["chosen"], list) else self._text
        return Pair(read(row, "chosen", where), read(row, "rejected", where), _margin(row, where))

    def _text(self, row: dict, column: str, where: str) -> list[int]:
        text, before = _plain(row[column], where), "" if row.get("prompt") is None else _plain(row["prompt"], where)
        refuse_settings_of_text(row, where)
        return _not_empty(text_ids(self.tokenizer, before + ended(self.tokenizer, text)), column, where)

    def _chat(self, row: dict, column: str, where: str) -> list[int]:
        messages = _joined(row.get("prompt"), read_chat(row[column], where, column), where)
        messages = with_system(messages, row, self.config.system_prompt)
        whole = self.template.whole(messages, template_settings(row, self.template, self.config, where), where)
        whole = whole if self.tokenizer.chat_template is not None else ended(self.tokenizer, whole)
        return _not_empty(self.template.ids(whole), column, where)


def _not_empty(ids: list[int], column: str, where: str) -> list[int]:
    if not ids:
        raise InputError(f"{where} has a {column} without a single token; leave the row out")
    return ids


def _plain(value: Any, where: str) -> str:
    refuse_chat_as_text(str(value), where)
    return str(value)


def _ask_of(row: dict) -> str | None:
    """The column of a row's question, if it has one."""
    return next((column for column in ASK if row.get(column) not in (None, "")), None)


def _is_shown(row: dict) -> bool:
    """Tell whether two texts show their row's question in what they begin with alike; of chats False."""
    question = str(row.get(_ask_of(row) or "", ""))
    before, found, _ = str(row["chosen"]).partition(question) if question else ("", "", "")
    return not isinstance(row["chosen"], list) and str(row["rejected"]).startswith(before + found) and found == question


def _as_answer(value: Any, where: str) -> list | None:
    """A text, or a chat that begins with the assistant, as a chat; None of one that asks."""
    if not isinstance(value, list):
        return [{"role": "assistant", "content": _plain(value, where)}]
    return value if value and read_chat(value, where)[0]["role"] == "assistant" else None


def _joined(prompt: Any, chat: list[dict], where: str) -> list[dict]:
    """A chat with the prompt before it, unless it shows that already, as UltraFeedback's do.

    Raises:
        InputError: the prompt is none, or a text beside a chat of the user's that does not show it.
    """
    if prompt is None:
        return chat
    is_chat = isinstance(prompt, list)
    asked = read_chat(prompt, where) if is_chat else [{"role": "user", "content": _plain(prompt, where)}]
    system, said = asked[: asked[0]["role"] == "system"], asked[asked[0]["role"] == "system" :]
    begins = next((message["role"] for message in chat if message["role"] != "system"), None)
    if said and begins != "assistant" and all(message in chat for message in said):
        return chat if chat[0]["role"] == "system" else [*system, *chat]
    if not is_chat and begins != "assistant":
        raise InputError(f"{where} has a prompt that its chats do not show; make it a list of messages, or remove it")
    return [*asked, *chat]


def _margin(row: dict, where: str) -> float:
    margin = row.get("margin")
    if margin is None:
        return 0.0
    is_number = isinstance(margin, (int, float)) and not isinstance(margin, bool)
    if not is_number or not -MOST_MARGIN <= margin <= MOST_MARGIN:
        raise InputError(f"{where} has the margin {margin!r}; it has to be a number from -1e6 to 1e6")
    return float(margin)

"""Texts of rows from which the wrong thing is learnt: empty, run together, or without a part of the question."""

import re
from collections.abc import Iterable
from itertools import islice
from typing import Any

from datasets import Dataset

from lowmem_grpo.data.chats import SYSTEMS, with_system
from lowmem_grpo.data.examples import ROLES
from lowmem_grpo.data.pairs import ASK
from lowmem_grpo.data.questions import ASKED_WITH

NUM_LOOKED_AT = 64  # rows
# Of rows without a prompt: where data sets have what a text should end with.
ANSWERS = ("output", "response", "completion", "answer", "code")
NAMES = ("role", "from")  # of who says a message
JOINED = re.compile(r"[A-Za-z0-9.?!][A-Za-z0-9]")


def unseen_columns(rows: Dataset) -> list[str]:
    """The columns of the question, `input` say, that most of the first rows do not show in their text."""
    shown_in = next((one for one in ("prompt", "chosen", "text") if one in rows.column_names), None)
    if shown_in is None or (shown_in == "chosen" and set(ASK) & set(rows.column_names)):  # which are read
        return []
    looked_for = [*ASKED_WITH, *SYSTEMS, *(ANSWERS if shown_in == "text" else ())]
    first: list[Any] = list(islice(rows, NUM_LOOKED_AT))
    return [
        column
        for column in (one for one in looked_for if one in rows.column_names)
        if sum(not _shows(row, shown_in, row[column]) for row in first) > len(first) / 2
    ]


def _shows(row: dict, column: str, value: Any) -> bool:
    """True where a row's text or chat holds a column's text, or each of its list; of no text True."""
    given, values = row[column], value if isinstance(value, list) else [value]
    if isinstance(given, list) and all(isinstance(one, dict) and "role" in one for one in given) and given:
        given = "\n".join(str(one.get("content")) for one in with_system(given, row, None))
    return all(one.strip() in str(given) for one in values if isinstance(one, str))


def empty_texts(rows: Dataset, columns: Iterable[str]) -> dict[str, int]:
    """How many rows have an empty text, or an assistant who says nothing, by column: {"chosen": 3}."""
    counts = {column: sum(_is_empty(value, column) for value in rows[column]) for column in columns}
    return {column: count for column, count in counts.items() if count}


def _is_empty(value: Any, column: str) -> bool:
    if not isinstance(value, list):
        return value is not None and not str(value).strip()  # of what may be missing, as a prompt before whole texts
    says = [any(map(_is_said, (one[key] for key in one if key not in NAMES))) for one in value]
    who = [one.get("role") or one.get("from") for one in value]
    answers = [said for said, role in zip(says, who, strict=True) if ROLES.get(str(role), role) == "assistant"]
    return not any(says) or (column != "prompt" and not all(answers))  # a prompt may open an answer


def _is_said(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else isinstance(value, list | dict) and bool(value)


def run_together(rows: Dataset, after: str) -> bool:
    """True where most of the first prompts and what follows have no space between two words: `hi?Yes`."""
    if not {"prompt", after} <= set(rows.column_names):
        return False
    first: list[Any] = list(islice(rows, NUM_LOOKED_AT))
    both = [(row["prompt"], row[after]) for row in first]
    joined = [isinstance(a, str) and isinstance(b, str) and bool(JOINED.fullmatch(f"{a[-1:]}{b[:1]}")) for a, b in both]
    return sum(joined) > len(first) / 2

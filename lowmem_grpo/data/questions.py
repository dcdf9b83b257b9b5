"""Questions in columns of their own to one text, and the letter of the right choice."""

import re
from collections.abc import Mapping
from typing import Any

from lowmem_grpo.data.chats import is_text, refuse_chat_as_text, refuse_missing
from lowmem_grpo.data.gold import COLUMNS, gold_of, is_marked
from lowmem_grpo.errors import InputError, shown

ASKS = ("question", "problem")  # GSM8K's and MATH's column
INSTRUCTIONS = ("instruction", *ASKS)  # Alpaca's, and of examples these, too
ANSWERS = ("output", "response")  # of instructions: Alpaca's, Dolly's and OpenOrca's columns
BEFORE, AFTER = ("context", "passage", "article"), ("input",)  # what a question is about, and what it is asked of
CHOICES = ("choices", "options")
KEY = "answerKey"  # the label of the right choice, as ARC has it
ASKED_WITH = (*BEFORE, *AFTER, *CHOICES)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def question_of(row: Mapping[str, Any], column: str, where: str) -> str:
    """A row's question as one text, with a passage before it, an input and choices after it: "A. Paris".

    Raises:
        InputError: the column that asks has no text, or the choices have no known form.
    """
    refuse_missing(row[column], column, where)
    if not is_text(row[column]):
        raise InputError(f"{where} has the {column} {shown(row[column])}; it has to be a text")
    refuse_chat_as_text(str(row[column]), where)
    before, after = (
        [row[one] for one in names if one != column and isinstance(row.get(one), str)] for names in (BEFORE, AFTER)
    )
    choices = choices_of(row, where)
    are_labelled = all(re.match(rf"\(?{re.escape(label)}[).:]", str(text)) for label, text in choices.items())  # A) 21
    lines = [str(text) if are_labelled else f"{label}. {text}" for label, text in choices.items()]
    parts = [*before, str(row[column]), *after, "\n".join(lines)]
    return "\n\n".join(part for part in parts if part.strip())


def choices_of(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The choices of a row by their labels, `{"A": "Paris", "B": "Rome"}`; none where it has none.

    They are a list, an object of letters, or an object of the lists `label` and `text`.

    Raises:
        InputError: they have no known form.
    """
    column = next((one for one in CHOICES if row.get(one)), None)
    if column is None:
        return {}
    given: Any = row[column]
    if isinstance(given, Mapping) and {"label", "text"} <= set(given):
        labels, texts = given["label"] or [], given["text"] or []
        given = dict(zip(labels, texts, strict=False)) if len(set(labels)) == len(texts) else None
    elif isinstance(given, list) and len(given) <= len(LETTERS):
        given = dict(zip(LETTERS, given, strict=False))
    if not isinstance(given, Mapping) or not all(len(str(label)) == 1 for label in given):
        raise InputError(
            f"{where} has the {column} {shown(row[column])}; choices are a list of texts, or an object of a text for "
            "each letter; make them so, or rename the column"
        )
    choices = {str(label): text for label, text in given.items() if text is not None}  # Arrow adds None
    if not all(map(is_text, choices.values())):
        raise InputError(f"{where} has the {column} {shown(given)}, which are not all texts; make them texts")
    return choices


def right_labels(rows: list[Mapping[str, Any]], name: str) -> list[str | None]:
    """The label of each row's right choice; None of a row without choices or gold answer.

    A gold answer is a label, a choice, or a choice's place counted from 0: whichever it can be in every row.

    Raises:
        InputError: a row's gold answer is no choice, or may be either of two.
    """
    given = {}
    for index, row in enumerate(rows):
        where = f"row {index} of {name}"
        choices, gold = choices_of(row, where), _gold_of(row, where)
        if choices and gold is not None and not is_marked(gold):
            given[index] = gold, choices
    read = [{index: way(*pair) for index, pair in given.items()} for way in (_by_label, _by_choice, _by_place)]
    whole = [labels for labels in read if None not in labels.values()]
    fit = whole or [max(read, key=lambda labels: sum(map(bool, labels.values())))]
    for index, (gold, choices) in given.items():
        labels = {way[index] for way in fit}
        if len(labels) > 1 or None in labels:
            what = "one of its choices, and the place of another" if len(labels) > 1 else "none of its choices"
            raise InputError(
                f"row {index} of {name} has the gold answer {shown(gold)}, which is {what}: "
                f"{shown(list(choices.values()))}; make it a letter such as {next(iter(choices))}"
            )
    return [fit[0].get(index) for index in range(len(rows))]


def _gold_of(row: Mapping[str, Any], where: str) -> Any:
    try:
        gold = gold_of({column: row.get(column) for column in COLUMNS})
    except InputError as error:
        raise InputError(f"{where} has no gold answer: {error}") from error
    return row.get(KEY) if gold is None else gold


def _by_label(gold: Any, choices: dict[str, Any]) -> str | None:
    label = str(gold).strip().strip("().")
    return label if isinstance(gold, str) and label in choices else None


def _by_choice(gold: Any, choices: dict[str, Any]) -> str | None:
    found = [label for label, text in choices.items() if text == gold]
    return found[0] if len(found) == 1 else None


def _by_place(gold: Any, choices: dict[str, Any]) -> str | None:
    is_place = str(gold).isdecimal() and int(gold) < len(choices)
    return list(choices)[int(gold)] if is_place and not any(map(str.isdecimal, choices)) else None

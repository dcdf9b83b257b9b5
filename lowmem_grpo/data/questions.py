"""Questions in columns of their own to one text, and the letter of the right choice."""

import re
from collections.abc import Mapping
from typing import Any

from lowmem_grpo.data.chats import is_text, read_text
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
    question, choices = read_text(row[column], column, where), choices_of(row, where)
    before, after = (
        [str(row[one]) for one in names if one != column and is_text(row.get(one))]
        for names in (BEFORE, (*AFTER, *CHOICES))
    )
    before = [text for text in before if text not in question]
    after = [text for text in after if f"\n{text}\n" not in f"\n{question}\n"]  # a short one may be a word of it
    are_labelled = all(_begins_with(label, text) for label, text in choices.items())  # A) 21
    lines = [str(text) if are_labelled else f"{label}. {text}" for label, text in choices.items()]
    parts = [*before, question, *after, "" if _are_listed(choices, question) else "\n".join(lines)]
    return "\n\n".join(part for part in parts if part.strip())


def _begins_with(label: str, text: Any) -> re.Match | None:
    """The label that a choice's text begins with, as in `A) 21`."""
    return re.match(rf"\s*\(?{re.escape(label)}[).:]+\s*", str(text))


def _are_listed(choices: Mapping[str, Any], question: str) -> bool:
    """Tell whether a question has its choices in it, each behind its label."""
    return all(
        str(text) in question if _begins_with(label, text) else
        re.search(rf"\b{re.escape(label)}\b\W{{1,4}}{re.escape(str(text))}(?!\w)", question)
        for label, text in choices.items()
    )  # fmt: skip


def choices_of(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The choices of a row by their labels, `{"A": "Paris", "B": "Rome"}`; none where it has none.

    They are a list, an object of letters, or an object of the lists `label` and `text`. A text is not looked into.

    Raises:
        InputError: they have no known form.
    """
    column = next((one for one in CHOICES if row.get(one)), None)
    if column is None:
        return {}
    given: Any = row[column]
    if isinstance(given, str) and not given.lstrip().startswith(("[", "{")):  # which a CSV makes of lists
        return {}
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

    A gold answer is a label, a choice, or a choice's place counted from 0: whichever it can be in every row. Where it
    can be none in every row, each is a label or a choice, whatever its case and style.

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
    fit = [labels for labels in read if None not in labels.values()] or read[:2]
    found = {
        index: {labels[index] for labels in fit} - {None} or {_by_words(*pair)} - {None}
        for index, pair in given.items()
    }
    # Rows that are read in no way come first: a place beyond the end tells more than one that might be one.
    for index in sorted(given, key=lambda index: bool(found[index]) or read[2][index] is not None):
        gold, choices = given[index]
        if len(found[index]) != 1:
            several = list(choices.values()).count(gold) > 1
            what = "one of its choices, and the place of another" if found[index] else "none of its choices"
            raise InputError(
                f"row {index} of {name} has the gold answer {shown(gold)}, which is "
                f"{'two of its choices' if several else what}: {shown(list(choices.values()))}; make it a letter such "
                f"as {next(iter(choices))}, or leave the row out"
            )
    return [next(iter(found.get(index, [None]))) for index in range(len(rows))]


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
    place = _number(gold)
    if place is None or place not in range(len(choices)) or any(map(str.isdecimal, choices)):
        return None
    return list(choices)[int(place)]


def _by_words(gold: Any, choices: dict[str, Any]) -> str | None:
    """The label that a gold answer has, or its choice, or both: `b`, `rome.`, `B) Rome`, and 7 of the text 7."""
    found = []
    for label, text in choices.items():
        prefix = _begins_with(label, text)
        bare = str(text)[prefix.end() :] if prefix else str(text)
        if _plain(gold) in map(_plain, (label, bare, f"{label}. {bare}")):
            found.append(label)
    return found[0] if len(found) == 1 else None


def _plain(value: Any) -> str:
    """A text without what its writings differ in most: case, white space, and marks behind words."""
    number = _number(value)
    return str(number) if number is not None else " ".join(re.sub(r"[().:](?!\d)", " ", str(value)).casefold().split())


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None

"""The gold answer of a row: which of its columns has it, and how it is read."""

import ast
import json
import re
from collections.abc import Mapping
from numbers import Number
from typing import Any

from lowmem_grpo.errors import InputError

# Where data sets have a gold answer; reward_model is verl's, an object with a ground_truth. files.py keeps the rest as
# they are written.
ANSWERS = ("answer", "final_answer", "expected_answer", "ground_truth", "reward_model")
COLUMNS = ("solution", *ANSWERS)
BOX = re.compile(r"\\boxed\s*\{\s*[^\s}]")
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|(?<![\\A-Za-z])[^\W\d_]{2,}")  # of Chinese and Japanese a character
FEW_WORDS = 4  # of an answer in words; an explanation has more
OBJECT = re.compile(r"\s*\{.*[\"']ground_truth[\"']\s*:.*\}\s*", re.DOTALL)


def gold_column(columns: Mapping[str, list | None]) -> list | None:
    """The gold answer of each row: a text, a number or None.

    None in place of the list where no column of COLUMNS is given.

    Raises:
        InputError: a row's gold answer is of a form that is not known.
    """
    given = {name: columns[name] for name in COLUMNS if columns.get(name) is not None}
    if not given:
        return None
    return [gold_of(dict(zip(given, row, strict=True))) for row in zip(*given.values(), strict=True)]  # type: ignore[arg-type]


def gold_of(row: Mapping[str, Any]) -> Any:
    """The gold answer of a row, a text or a number; None without one.

    Of `solution` and the first of ANSWERS that is given, it is the one that marks an answer, as in MATH; `solution`
    where both do; where none does `solution` only beside an explanation.

    Raises:
        InputError: the row has a gold answer, but of a form that is not known.
    """
    known, errors = {}, []
    for name in [name for name in COLUMNS if row.get(name) is not None]:
        try:
            known[name] = _read(row[name], needs_object=name == "reward_model")
        except InputError as error:
            errors.append(InputError(f"the column {name} has {error}"))
    solution = known.get("solution")
    answer = next((known[name] for name in ANSWERS if known.get(name) is not None), None)
    if solution is None and answer is None and errors:
        raise errors[0]
    return solution if answer is None or (solution is not None and is_better(solution, answer)) else answer


def is_better(solution: Any, answer: Any) -> bool:
    """Tell whether the first of two texts or numbers is the gold answer, and not the second."""
    if solution == answer or is_marked(solution) or is_marked(answer):
        return solution == answer or is_marked(solution)
    return _is_explanation(answer) and not _is_explanation(solution)


def is_marked(gold: Any) -> bool:
    r"""Tell whether a text marks an answer in it, by `\boxed{}`, an answer tag or a last line of `####`."""
    text = str(gold).strip()
    _, hashes, after = text[text.rfind("\n") + 1 :].rpartition("####")
    tagged = text.partition("<answer>")[2].rpartition("</answer>")[0]
    return bool(BOX.search(text) or tagged.strip() or (hashes and after.strip()))


def _is_explanation(gold: Any) -> bool:
    return len(WORD.findall(str(gold))) > FEW_WORDS


def _read(value: Any, needs_object: bool = False) -> Any:
    """A column's value as a text or a number; None for null, NaN, white space and an empty list.

    An object has it under `ground_truth`, and so has one that a CSV made a text of; a list has to be of one value.
    """
    if isinstance(value, str) and OBJECT.fullmatch(value):
        value = _parsed(value, Mapping)
    if isinstance(value, Mapping) and value.get("ground_truth") is not None:
        return _read(_parsed(value["ground_truth"], list))  # verl's own are lists as JSON, where they are lists
    if needs_object and not isinstance(value, Mapping):  # the name of a model, say
        return None
    if hasattr(value, "tolist"):  # of NumPy
        value = value.tolist()  # type: ignore[union-attr]
    if isinstance(value, (list, tuple)) and len(value) == 1:
        return _read(value[0])
    if value is None or value == [] or value != value or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str) or (isinstance(value, Number) and not isinstance(value, bool)):
        return value
    raise InputError(f"{str(value)[:60]!r}, which is neither a text nor a number; make it one of them")


def _parsed(text: Any, kind: type) -> Any:
    """The JSON or Python literal of a kind that a text is; anything else unchanged."""
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(value, kind):
            return value
    return text

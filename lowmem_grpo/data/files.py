"""JSONL, JSON, CSV and Parquet files to rows, whose prompts and gold answers are as they are written.

`datasets` guesses the types of what it reads: an answer 2023-01-02 becomes a datetime, 0110 the number 110, and 7 in a
column with 2.5 becomes 7.0 (https://github.com/huggingface/datasets/issues/7664). So Python's own json and csv read
these files here. A Parquet file has types, which `datasets` keeps.
"""

import csv
import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from math import isfinite
from pathlib import Path
from typing import Any, TextIO

from datasets import Dataset, Features, IterableDataset, Json, concatenate_datasets, load_dataset
from pyarrow.parquet import read_metadata

from lowmem_grpo.config.fields import named_once
from lowmem_grpo.data.gold import COLUMNS
from lowmem_grpo.data.questions import AFTER, ANSWERS, BEFORE, INSTRUCTIONS
from lowmem_grpo.errors import InputError, cause, counted, printable, shown

# The columns that are texts in a CSV, and of one kind in all rows; and all of which a text or a number is as it is
# written, in prompts, texts that are learnt, and rewards.
TEXTS = ("prompt", "question", "problem", "completion", "text", *COLUMNS)
AS_WRITTEN = (*TEXTS, *INSTRUCTIONS[:1], *BEFORE, *AFTER, *ANSWERS, "chosen", "rejected")
KINDS = {bool: "true or false", list: "a list", dict: "an object"}
INT64 = range(-(2**63), 2**63)  # Arrow's whole numbers
MOST_DIGITS = 4300  # of a whole number that Python reads
MOST_LEVELS = 100  # of lists and objects in each other; Python's copies of them recurse
LARGEST_CELL = 2**31 - 1  # characters; by default csv refuses more than 131,072
# What files of other kinds begin with, whatever their names.
MAGIC = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip or Excel", b"PAR1\x15": "Parquet", b"\xfd7zXZ": "xz"}
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}  # of Excel where commas are decimal, and of others


def read_files(paths: Sequence[Path], name: str, first: int | None = None, *, folder: str | None = None) -> Dataset:
    """The rows, or the first ones, of a JSONL, JSON or CSV file, or of several in their order.

    A number in a column of AS_WRITTEN stays one where all are, and are the same as numbers: 7, 12. Else it is its text:
    7, 2.50. A CSV's cells of TEXTS are texts. Its other columns are numbers where all of a column are.

    Raises:
        InputError: a file cannot be read; the sentence has the number of the row, of which the first is 0.
    """
    where = f"{name} {str(folder or paths[0])!r}"
    is_csv = paths[0].suffix.lower() == ".csv"
    rows = list(islice((row for path in paths for row in _rows(path, name)), first))
    columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    for key, values in columns.items():
        if is_csv:
            columns[key] = values if key in TEXTS else _numbers(values, of_one_type=key in AS_WRITTEN)
        elif key in TEXTS or (key in AS_WRITTEN and len(_kinds(values)) == 1):
            columns[key] = _as_written(values, f"the {key} of row {{}} of {where}")
        else:
            columns[key] = _plain(values)
    return to_dataset(columns, where)


def _rows(path: Path, name: str) -> Iterator[dict]:
    where, suffix = f"{name} {str(path)!r}", path.suffix.lower()
    read = _csv_rows if suffix == ".csv" else _json_lines if suffix == ".jsonl" else _json_rows
    try:
        with path.open("rb") as file:
            start = file.read(8)
        kind = next((words for mark, words in MAGIC.items() if start.startswith(mark)), None)
        if kind is not None:
            raise InputError(f"{where} is a {kind} file by what it begins with; unpack it, or name it for what it is")
        # What is no UTF-8 becomes a surrogate, of which the row is known.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from read(file, where)
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error}") from error


def read_parquet(path: Path, name: str, **streaming: bool) -> Dataset | IterableDataset:
    """The rows of a Parquet file.

    Raises:
        InputError: the file cannot be read, has no rows, or has two columns of one name.
    """
    try:
        described = read_metadata(path)
        names = described.schema.to_arrow_schema().names
        twice = next((column for column in names if names.count(column) > 1), None)
        if twice is None and described.num_rows:
            return load_dataset("parquet", data_files=str(path), split="train", **streaming)  # type: ignore[return-value]
    except Exception as error:
        raise InputError(f"{name} {str(path)!r} cannot be read as parquet: {cause(error)}") from error
    if twice is None:
        raise InputError(f"{name} {str(path)!r} is empty; it needs at least one row")
    raise InputError(f"{name} {str(path)!r} has two columns named {twice!r}; rename one")


def to_dataset(columns: dict[str, list], where: str) -> Dataset:
    """Columns of Python values as a Dataset, in which lists and objects stay as they are.

    Raises:
        InputError: a value of no type that Arrow has, or of another one than those above it; with the row's number.
    """
    try:
        return _to_arrow(columns)
    except Exception as error:  # pyarrow's exceptions have no common base
        key = next((key for key, values in columns.items() if _why_not_arrow(key, values)), None)
        if key is None:
            raise InputError(f"{where} cannot be read: {cause(error)}") from error
        values = columns[key]
        index = bisect_left(range(len(values)), True, key=lambda last: bool(_why_not_arrow(key, values[: last + 1])))
        alone = _why_not_arrow(key, values[index : index + 1])
        what = "of a kind that rows cannot hold" if alone else "of another type than that of rows before"
        remedy = "make it a text or a number" if alone else "give the values of a column one type"
        raise InputError(
            f"the {printable(key)} of row {index} of {where} is {shown(values[index])}, {what} "
            f"({alone or cause(error)}); {remedy}"
        ) from error


def _why_not_arrow(key: str, values: list) -> str:
    try:
        _to_arrow({key: values})
    except Exception as error:
        return cause(error)
    return ""


def _to_arrow(columns: dict[str, list]) -> Dataset:
    """Columns as a Dataset. Raises what pyarrow raises for a column of several types.

    Arrow would give all objects of a column the same names, and the values below a name one type. So such columns are
    stored as JSON. It is made here, since the feature takes a text that can be read as JSON, such as 7, for JSON.
    """
    flat, nested = {}, {}
    for key, values in columns.items():
        kinds = {isinstance(value, (list, dict)) for value in values if value is not None}
        if {bytes, str} <= {*map(type, values)}:  # Arrow would make bytes of the texts
            raise TypeError("bytes and texts")
        try:  # a prompt or a gold answer is of one kind
            is_nested = kinds == {True} or (len(kinds) == 2 and key not in TEXTS)
            nested |= {key: [_as_json(value) for value in values]} if is_nested else {}
        except (TypeError, ValueError):  # of what JSON has not, such as bytes
            pass
        flat |= {} if key in nested else {key: values}
    parts = [Dataset.from_dict(flat)] if flat else []
    parts += [Dataset.from_dict({key: values}, Features({key: Json()})) for key, values in nested.items()]
    return concatenate_datasets(parts, axis=1) if parts else Dataset.from_dict({})


def _as_json(value: Any) -> str | None:
    if _levels(value) > MOST_LEVELS:
        raise RecursionError(f"more than {MOST_LEVELS} lists or objects in each other")
    if value is None:
        return None
    text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    text.encode()  # a lone surrogate raises here, where datasets would write it in another way
    return text


def _levels(value: Any, most: int = MOST_LEVELS + 1) -> int:
    """How many lists and objects there are in each other, counted up to `most`."""
    if not most or not isinstance(value, (list, dict)):
        return 0
    below = value.values() if isinstance(value, dict) else value
    return 1 + max((_levels(one, most - 1) for one in below), default=0)


class Number(str):
    """A number as it is written in a file."""

    def read(self) -> int | float | None:
        """The number itself, or None for one that Python writes in another way, such as 1.50, 1e5 or 007."""
        try:
            value = int(self) if self.lstrip("-").isdigit() else float(self)
        except ValueError:  # no number, or a whole one of more digits than int() takes
            return None
        is_kept = str(value) == self and (value in INT64 if isinstance(value, int) else isfinite(value))
        return value if is_kept else None


def _json_lines(lines: Iterable[str], where: str) -> Iterator[dict]:
    for index, line in enumerate(line for line in lines if line.strip()):
        at = f"row {index} of {where}"
        if index == 0 and line.lstrip().startswith("["):
            raise InputError(f"{at} begins a list; a file of one list is named .json, and .jsonl has an object a line")
        yield _json_row(_json(line, at), at)


def _json_rows(file: TextIO, where: str) -> Iterator[dict]:
    """The rows of an array of objects, of a single object, or of lines, as `datasets` writes .json files."""
    text = file.read()
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and lines[0].lstrip().startswith("{") and lines[0].rstrip().endswith("}"):
        yield from _json_lines(lines, where)
        return
    whole = _json(text, where)
    for index, row in enumerate(whole if isinstance(whole, list) else [whole]):
        yield _json_row(row, f"row {index} of {where}")


def _json(text: str, where: str) -> Any:
    def constant(name: str) -> Number | None:
        return None if name == "NaN" else Number(name)  # NaN is what is missing, to NumPy and pandas

    try:
        return json.loads(
            text, parse_int=Number, parse_float=Number, parse_constant=constant, object_pairs_hook=named_once
        )
    except (ValueError, RecursionError) as error:
        _check_characters(text, where)
        why = str(error)
        if isinstance(error, json.JSONDecodeError) and "\n" not in text.strip():  # a line of many
            why = f"{error.msg} at its character {error.colno}"
        raise InputError(f"{where} cannot be read as json: {why}; mend it") from error


def _json_row(row: Any, where: str) -> dict:
    if not isinstance(row, dict):
        raise InputError(f"{where} is no object with a name for each value: {str(row)[:60]!r}")
    if _levels(row) > MOST_LEVELS:
        raise InputError(f"{where} has more than {MOST_LEVELS} lists or objects in each other; make it flatter")
    _check_characters(json.dumps(row, ensure_ascii=False), where)
    return row


def _csv_rows(file: TextIO, where: str) -> Iterator[dict]:
    limit = csv.field_size_limit(LARGEST_CELL)
    try:
        lines = (cells for cells in csv.reader(file, strict=True) if cells)  # a blank line is none
        names: list[str] = []
        for index in count(-1):
            at = f"row {index} of {where}" if names else f"the line of names in {where}"
            try:
                cells = next(lines, None)
            except csv.Error as error:
                raise InputError(f"{at} cannot be read as csv: {error}") from error
            if cells is None:
                return
            _check_characters("".join(cells), at)
            if names and len(cells) != len(names):
                sizes = f"{counted(len(cells), 'cell')} for {counted(len(names), 'column')}"
                raise InputError(f"{at} has {sizes}; quote a cell with commas")
            if not names:
                _refuse_names(cells, at)
            if names:
                yield dict(zip(names, cells, strict=True))
            names = names or cells
    finally:
        csv.field_size_limit(limit)


def _refuse_names(names: list[str], where: str) -> None:
    """Raise InputError for a CSV's names that are separated by something else than commas, or are not unlike."""
    between = [words for mark, words in SEPARATORS.items() if len(names) == 1 and mark in names[0]]
    if between:
        raise InputError(f"{where} is separated by {between[0]}; write the file with commas")
    if names[0].lower().startswith("sep="):
        raise InputError(f"{where} is a mark for Excel, {shown(names[0])}; remove that line")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{where} has {shown(twice)} twice; " + ("rename a column" if twice else "name each column"))


def _check_characters(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} has a character that UTF-8 has not; write the file in UTF-8") from error


def _as_written(values: list, where: str) -> list:
    """A column's values as they are written, all of one kind.

    `where` has a place for the number of a row.
    """
    kinds = _kinds(values)
    if len(kinds) > 1:
        (first, _), (kind, index) = list(kinds.items())[:2]
        raise InputError(f"{where.format(index)} is {kind}, and that of a row before is {first}; make them alike")
    kept = [value.read() if isinstance(value, Number) else None for value in values if value is not None]
    if None in kept or len(set(map(type, kept))) > 1:  # in one column 7 beside 2.5 would become 7.0
        return [str(value) if isinstance(value, str) else _without_number(value) for value in values]
    return _plain(values)


def _kinds(values: list) -> dict[str, int]:
    """The kinds of a column's values, in words, and the first row of each."""
    kinds: dict[str, int] = {}
    for index, value in enumerate(values):
        if value is not None:
            kinds.setdefault(KINDS.get(type(value), "a text or a number"), index)
    return kinds


def _plain(values: list) -> list:
    """A column's values without Number: numbers, or beside texts the numbers' texts."""
    given = [value for value in values if value is not None]
    if all(isinstance(value, str) for value in given) and not all(isinstance(value, Number) for value in given):
        return [None if value is None else str(value) for value in values]
    return [_without_number(value) for value in values]


def _without_number(value: Any) -> Any:
    if isinstance(value, Number):
        return json.loads(value) if len(value) <= MOST_DIGITS else str(value)
    if isinstance(value, list):
        return [_without_number(one) for one in value]
    if isinstance(value, dict):
        return {key: _without_number(one) for key, one in value.items()}
    return str(value) if isinstance(value, str) else value


def _numbers(cells: list[Any], of_one_type: bool) -> list:
    """A CSV's column as numbers where each cell is one, with None for an empty cell; else the texts."""
    numbers = [Number(cell).read() if cell else None for cell in cells]
    is_text = any(cell and number is None for cell, number in zip(cells, numbers, strict=True))
    is_text |= of_one_type and {int, float} <= {*map(type, numbers)}
    return cells if is_text or not any(cells) else numbers

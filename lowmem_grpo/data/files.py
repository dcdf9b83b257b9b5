"""JSONL, JSON and CSV files to rows, whose prompts and gold answers are as they are written.

`datasets` guesses the types of what it reads: an answer 2023-01-02 becomes a datetime, 0110 the number 110, and 7 in a
column with 2.5 becomes 7.0 (https://github.com/huggingface/datasets/issues/7664). So Python's own json and csv read
these files here.
"""

import csv
import json
from collections.abc import Iterable, Iterator
from itertools import count, islice
from math import isfinite
from pathlib import Path
from typing import Any, TextIO

from datasets import Dataset, Features, Json, concatenate_datasets

from lowmem_grpo.data.gold import COLUMNS
from lowmem_grpo.errors import InputError, cause

FILES = (".jsonl", ".json", ".csv")
# The columns of which a text or a number reaches prompts and rewards as it is written.
AS_WRITTEN = ("prompt", "question", "problem", *COLUMNS)
KINDS = {bool: "true or false", list: "a list", dict: "an object"}
INT64 = range(-(2**63), 2**63)  # Arrow's whole numbers
MOST_DIGITS = 4300  # of a whole number that Python reads
LARGEST_CELL = 2**31 - 1  # characters; by default csv refuses more than 131,072


def read_file(path: Path, name: str, first: int | None = None) -> Dataset:
    """The rows of a JSONL, JSON or CSV file, or its first ones.

    A number in a column of AS_WRITTEN stays one where all are, and are the same as numbers: 7, 12. Else it is its text:
    7, 2.50. A CSV's cells there are texts. Its other columns are numbers where all of a column are.

    Raises:
        InputError: the file cannot be read; the sentence has the number of the row, of which the first is 0.
    """
    where = f"{name} {str(path)!r}"
    is_csv, is_lines = path.suffix.lower() == ".csv", path.suffix.lower() == ".jsonl"
    read = _csv_rows if is_csv else _json_lines if is_lines else _json_rows
    try:
        # What is no UTF-8 becomes a surrogate, of which the row is known.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = list(islice(read(file, where), first))
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error}") from error
    columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    for key, values in columns.items():
        if key in AS_WRITTEN:
            columns[key] = values if is_csv else _as_written(values, f"the {key} of row {{}} of {where}")
        else:
            columns[key] = _numbers(values) if is_csv else _plain(values)
    try:
        return to_dataset(columns)
    except Exception as error:  # pyarrow's exceptions have no common base
        raise InputError(f"{where} cannot be read: {cause(error)}; give the values of a column one type") from error


def to_dataset(columns: dict[str, list]) -> Dataset:
    """Columns of Python values as a Dataset, in which lists and objects stay as they are.

    Arrow would give all objects of a column the same names, and the values below a name one type. So such columns are
    stored as JSON. It is made here, since the feature takes a text that can be read as JSON, such as 7, for JSON.
    Raises what pyarrow raises for a column of several types.
    """
    flat, nested = {}, {}
    for key, values in columns.items():
        kinds = {isinstance(value, (list, dict)) for value in values if value is not None}
        try:  # a prompt or a gold answer is of one kind
            is_nested = kinds == {True} or (len(kinds) == 2 and key not in AS_WRITTEN)
            nested |= {key: [_as_json(value) for value in values]} if is_nested else {}
        except (TypeError, ValueError):  # of what JSON has not, such as bytes
            pass
        flat |= {} if key in nested else {key: values}
    parts = [Dataset.from_dict(flat)] if flat else []
    parts += [Dataset.from_dict({key: values}, Features({key: Json()})) for key, values in nested.items()]
    return concatenate_datasets(parts, axis=1) if parts else Dataset.from_dict({})


def _as_json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, allow_nan=False)


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
        yield _json_row(_json(line, f"row {index} of {where}"), f"row {index} of {where}")


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
        return json.loads(text, parse_int=Number, parse_float=Number, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} cannot be read as json: {error}") from error


def _json_row(row: Any, where: str) -> dict:
    if not isinstance(row, dict):
        raise InputError(f"{where} is no object with a name for each value: {str(row)[:60]!r}")
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
                raise InputError(f"{at} has {len(cells)} cells for {len(names)} columns; quote a cell with commas")
            if not names and len(set(cells)) < len(cells):
                raise InputError(f"{at} has one twice; rename a column")
            if names:
                yield dict(zip(names, cells, strict=True))
            names = names or cells
    finally:
        csv.field_size_limit(limit)


def _check_characters(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} has a character that UTF-8 has not; write the file in UTF-8") from error


def _as_written(values: list, where: str) -> list:
    """A column's values as they are written, all of one kind.

    `where` has a place for the number of a row.
    """
    kinds = [None if value is None else KINDS.get(type(value), "a text or a number") for value in values]
    first = next(filter(None, kinds), None)
    for index, kind in enumerate(kinds):
        if kind not in (None, first):
            raise InputError(f"{where.format(index)} is {kind}, and that of a row before is {first}; make them alike")
    kept = [value.read() if isinstance(value, Number) else None for value in values if value is not None]
    if None in kept or len(set(map(type, kept))) > 1:  # in one column 7 beside 2.5 would become 7.0
        return [str(value) if isinstance(value, str) else _without_number(value) for value in values]
    return _plain(values)


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


def _numbers(cells: list[Any]) -> list:
    """A CSV's column as numbers where each cell is one, with None for an empty cell; else the texts."""
    numbers = [Number(cell).read() if cell else None for cell in cells]
    is_text = any(cell and number is None for cell, number in zip(cells, numbers, strict=True))
    return cells if is_text or not any(cells) else numbers

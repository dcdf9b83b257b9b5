"""Rows of which some are malformed: each of these costs one completion its reward."""

from collections.abc import Callable, Iterable
from typing import Any


def of_each(function: Callable, *columns: list) -> list[Any]:
    """The function's value for each row, with the exception in place of a row for which it raises one."""
    return [_tried(function, row) for row in zip(*columns, strict=True)]


def sound(rows: list[Any]) -> list[Any]:
    """The rows that are no exceptions."""
    return [row for row in rows if not isinstance(row, Exception)]


def in_place(values: Iterable[Any], rows: list[Any]) -> list[Any]:
    """The rows with a value in the place of each that is no exception."""
    left = iter(values)
    return [row if isinstance(row, Exception) else next(left) for row in rows]


def _tried(function: Callable, row: tuple) -> Any:
    try:
        return function(*row)
    except Exception as error:
        return error

"""of_each(): a malformed row costs one completion its reward."""

from collections.abc import Callable
from typing import Any


def of_each(function: Callable, *columns: list) -> list[Any]:
    """The function's value for each row, with the exception in place of a row for which it raises one."""
    return [_tried(function, row) for row in zip(*columns, strict=True)]


def _tried(function: Callable, row: tuple) -> Any:
    try:
        return function(*row)
    except Exception as error:
        return error

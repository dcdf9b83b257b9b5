"""Values of a checkpoint's JSON, tested as they are read, since a file may have been written by hand."""

from typing import Any


def whole(value: Any, name: str) -> int:
    """A value that is a whole number from 0 on. Raise ValueError for any other."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is {value!r}, which is no whole number from 0 on")
    return value


def number(value: Any, name: str) -> float:
    """A value that is a number from 0 on, which may be infinite. Raise ValueError for any other."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"{name} is {value!r}, which is no number from 0 on")
    return value

"""JSON that a run saves, and tests as it reads it again. A file may be damaged, or written by hand."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COUNTS = ("step", "skipped_steps")  # of a line, which are read again
LAST_STEP = 10**9  # that a file may name


def as_json(value: Any) -> Any:
    """A value as JSON holds it: a date as a text, and None for a number that is not finite."""
    if isinstance(value, dict):
        return {str(name): as_json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


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


def measured(metrics: dict[str, Any]) -> dict[str, float | None]:
    """A step's metrics, each a number, or None for the mean of nothing. Raise ValueError for any other."""
    for name, value in metrics.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"{name} is {value!r}, which is no number")
    return metrics


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a metrics.jsonl, if there is one, and how many of them cannot be read.

    A last line without an end, which a kill cut short, is none of those.
    """
    try:
        *lines, cut_short = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], 0
    except OSError:  # a folder
        return [], 1
    found = [line for line in map(read_line, lines) if line is not None]
    last = read_line(cut_short)
    return found + ([] if last is None else [last]), len(lines) - len(found)


def read_object(path: Path) -> dict[str, Any]:
    """The object of a file of JSON; an empty one where there is none, or none that can be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_line(text: bytes) -> dict[str, Any] | None:
    """An object with a step, as a run writes one, or None for anything else."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_line = isinstance(line, dict) and "step" in line and all(type(line.get(name, 0)) is int for name in COUNTS)
    return line if is_line and 0 <= line["step"] <= LAST_STEP else None


def is_evaluation(line: Mapping[str, Any]) -> bool:
    """Tell whether a line of metrics.jsonl is of an evaluation."""
    return any(name.startswith("eval_") for name in line)

"""Options in a task's name, written as in an address: `?size=5000&seed=1`."""

import json
from collections.abc import Iterable
from typing import Any
from urllib.parse import parse_qsl

from lowmem_grpo.errors import InputError, did_you_mean

MOST_PROBLEMS = 50_000  # made at the start of a run, at about 0.3 ms each; other seeds make others
MOST_HELD_OUT = 5_000  # an eighth of all problems are of those


def options_of(name: str, query: str) -> dict[str, Any]:
    """The options behind the question mark; a value is JSON (4, true, [1, 2]) where it can be read so.

    Raises:
        InputError: something that is not `option=value`, or an option given twice.
    """
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise InputError(f"{name!r} has options that are not option=value, joined by &") from error
    options = {key: _value(text) for key, text in pairs}
    if len(options) < len(pairs):
        raise InputError(f"{name!r} gives an option twice; keep one")
    return options


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def refuse_unknown_options(name: str, options: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for option in options:
        if option not in known:
            hint = did_you_mean(option, known, f"the options are {', '.join(known)}")
            raise InputError(f"{name!r} has no option {option!r}; {hint}")


def check_count(name: str, value: Any, at_least: int = 1, at_most: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise InputError(f"{name}={value!r:.60} must be a whole number of at least {at_least}")
    if at_most is not None and value > at_most:
        raise InputError(f"{name}={value!r:.60} is more than {at_most}, which are made in about a minute; lower it")

"""A field of a configuration: help text, range, type in words, value read from text. Standard library only."""

import dataclasses
import json
import math
import types
import typing
from functools import cache
from operator import ge, gt, le, lt
from typing import Any, Literal

from lowmem_grpo.errors import InputError, shown

WHERE = ("output_dir", "resume_from_checkpoint", "output")  # which say nothing of a run itself
SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # of fp32's normal numbers
MOST = 10**9  # of what is counted, steps or tokens or rows, where its field says nothing else
MOST_VALUES = 10_000  # within one mapping, so that anchors of a YAML file cannot make it endless
MOST_CHARACTERS = 100_000  # of a text
DEEPEST = 20  # lists and mappings within each other
BOUNDS = {
    "above": (gt, "greater than"),
    "at_least": (ge, "at least"),
    "below": (lt, "below"),
    "at_most": (le, "at most"),
}


def option(
    default: Any, help: str, *, common: bool = False, may_change: bool = False, may_be_empty: bool = False,
    by_content: bool = False, **bounds: float,
) -> Any:  # fmt: skip
    """A dataclass field with a help text, and the bounds of its numbers by BOUNDS' names: `above=0, at_most=1`.

    A whole number is at most MOST, where no other end is given. --help shows the `common` fields, and --help_all every
    field. What has `may_change`, a resumed run may change: where and how long it runs, what it reports, and how it fits
    into memory. A model that is `by_content` may have another name there, and what it holds is compared as it is found.
    An empty text is refused, unless it `may_be_empty`.
    """
    assert bounds.keys() <= BOUNDS.keys()
    metadata = {
        "help": help, "common": common, "may_change": may_change, "may_be_empty": may_be_empty,
        "by_content": by_content, "bounds": bounds,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


@cache
def field_types(config: type) -> dict[str, Any]:
    """Annotations of a configuration's fields, by name."""
    return typing.get_type_hints(config)


def check_value(field: dataclasses.Field, annotation: Any, value: Any) -> None:
    """Raise InputError for what is not of the field's type, breaks a bound, or cannot be saved."""
    if not _fits(value, annotation):
        raise InputError(f"{field.name}={shown(value)} is not {describe(annotation)}")
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, (int, float)) and not isinstance(one, bool):
            _check_number(field, one, is_count=int in _members(annotation))
        elif why := no_json(one):
            raise InputError(f"{field.name} has {why}, which a file of JSON cannot hold; remove it")
        elif isinstance(one, str):
            _check_text(field, one)


def _check_text(field: dataclasses.Field, text: str) -> None:
    if not text and not field.metadata.get("may_be_empty"):
        raise InputError(f"{field.name} has an empty text; remove it")
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"{field.name} has a text of {len(text)} characters; shorten it to {MOST_CHARACTERS}")
    if "\0" in text:
        raise InputError(f"{field.name}={shown(text)} has a null character; remove it")


def _check_number(field: dataclasses.Field, number: float, is_count: bool) -> None:
    if number and not SMALLEST <= abs(number) <= LARGEST:
        raise InputError(
            f"{field.name}={shown(number)} is out of reach of fp32, in which a step is computed: what is not 0 must be "
            f"between {SMALLEST:.2g} and {LARGEST:.2g}"
        )
    bounds = field.metadata.get("bounds", {})
    for bound, limit in ({"at_most": MOST, **bounds} if is_count else bounds).items():
        holds, words = BOUNDS[bound]
        if not holds(number, limit):
            raise InputError(f"{field.name} must be {words} {limit}, not {number}; the default is {field.default}")


def no_json(value: Any) -> str | None:
    """The first thing in a value that a file of JSON cannot hold, in words; or None."""
    left, count = [(value, 0)], 0
    while left:
        one, depth = left.pop()
        count += 1
        if depth > DEEPEST:
            return f"lists or mappings more than {DEEPEST} deep"
        if count > MOST_VALUES:
            return f"more than {MOST_VALUES} values"
        if isinstance(one, dict):
            wrong = [key for key in one if not isinstance(key, str)]
            if wrong:
                return f"the name {shown(wrong[0])}, which is no text"
            left += [(part, depth + 1) for pair in one.items() for part in pair]
        elif isinstance(one, (list, tuple)):
            left += [(part, depth + 1) for part in one]
        elif isinstance(one, str):
            if not _is_unicode(one):
                return f"half a character, in {shown(one)}"
        elif isinstance(one, (int, float)):
            if not -LARGEST <= one <= LARGEST:  # NaN is not
                return f"the number {shown(one)}"
        elif one is not None:
            return shown(one)
    return None


def _is_unicode(text: str) -> bool:
    """Tell whether a text has no lone surrogate, as Python writes bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def from_text(config: type, name: str, value: Any) -> Any:
    """A field's value from a command line or a YAML file, where 1e-5 may arrive as a string.

    `value` is a string, a list of strings, or anything YAML makes. Raise InputError when it does not fit the field.
    """
    annotation = field_types(config)[name]
    if name == "lora_target_modules" and isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        # all-linear, or a regular expression: a text to peft, where a module's name is a list of one
        value = value if value[0].isidentifier() else value[0]
    for member in _members(annotation):
        read = _READ.get(typing.get_origin(member) or member)
        try:
            converted = read(value, member) if read else value
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            continue
        if _fits(converted, member):
            return converted
    raise InputError(f"{name}: {shown(value)} is not {describe(annotation)}")


def describe(annotation: Any) -> str:
    """An annotation in words: `a number or none`."""
    words = [_WORDS.get(m) or f"one of {', '.join(typing.get_args(m))}" for m in _members(annotation, in_order=True)]
    return " or ".join(words)


def _members(annotation: Any, in_order: bool = False) -> list[Any]:
    """The members of a union; strict types first, since every text is a str."""
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    members = list(typing.get_args(annotation)) if union else [annotation]
    return members if in_order else sorted(members, key=lambda member: member is str)


def _fits(value: Any, annotation: Any) -> bool:
    """Tell whether a value belongs to an annotation; an int serves as a float, a bool never as a number."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, member) for member in arguments)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if annotation is float:
        # Not by math.isfinite, which has no answer to 10**400; out of fp32's reach is another refusal.
        return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or annotation)


def _read_list(value: Any, annotation: Any) -> list:
    item = typing.get_args(annotation)[0]
    if not isinstance(value, list):
        raise TypeError("not a list")
    return [float(one) if isinstance(one, str) else one for one in value] if item is float else value


def _read_dict(value: Any, annotation: Any) -> dict:
    return value if isinstance(value, dict) else json.loads(value, object_pairs_hook=named_once)


def named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of names and values. Raise ValueError for a name twice, of which Python's json keeps the last."""
    named = dict(pairs)
    if len(named) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has {twice!r} twice")
    return named


_READ: dict[Any, typing.Callable[[Any, Any], Any]] = {
    bool: lambda value, _: value if isinstance(value, bool) else {"true": True, "false": False}[value.lower()],
    int: lambda value, _: int(value) if isinstance(value, str) else value,
    float: lambda value, _: float(value) if isinstance(value, str) else value,
    types.NoneType: lambda value, _: {"none": None, "null": None}[value.lower()] if value is not None else None,
    list: _read_list,
    dict: _read_dict,
}
_WORDS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a text", types.NoneType: "none",
    list[str]: "a list of texts", list[float]: "a list of numbers", dict[str, Any]: "a mapping (JSON in a command)",
}  # fmt: skip


def refuse_changes(
    config: Any, saved: dict[str, Any], otherwise: str = "start a new run from the adapter"
) -> list[str]:
    """The settings that a resumed run changes and may change, in words: `max_steps 10 (was 5)`.

    `otherwise` is what to do for other settings.

    Raises:
        InputError: a setting that decides the result differs from the one that the checkpoint's run had.
    """
    now = dataclasses.asdict(config)
    unknown = sorted(now.keys() ^ saved.keys())
    if unknown:
        raise InputError(
            f"the run to resume and this version differ in the settings that they know: {', '.join(unknown)}; resume "
            f"with the version that began it, or {otherwise}"
        )
    changed = []
    for field in dataclasses.fields(config):
        value, before = now[field.name], saved[field.name]
        is_moved = field.metadata.get("by_content") and None not in (value, before)
        if value != before and not is_moved and not field.metadata.get("may_change"):
            raise InputError(
                f"{field.name} is {value!r}, and was {before!r} in the run to resume; set it back, or {otherwise}"
            )
        if value != before and field.name not in WHERE:
            changed.append(f"{field.name} {value} (was {before})")
    return changed

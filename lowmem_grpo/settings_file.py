"""A file of settings in YAML, in which a value is what its reader would say that it is.

YAML 1.1, which PyYAML reads, takes 1:30 for 90, 010 for 8, yes for true, 2024-01-01 for a date, 1e-5 for a text, and of
two equal names the last. Here numbers are decimal, truth values are true and false, and a name stands there once.
"""

import re
from typing import Any

import yaml

from lowmem_grpo.errors import InputError, in_a_line, shown
from lowmem_grpo.paths import expanded

MOST_CHARACTERS = 2**20  # of a file
MOST_VALUES = 10_000  # those of an anchor counted wherever it is named
MOST_DIGITS = 400  # of a whole number: fp32 ends at 39
DEEPEST = 20  # lists and mappings within each other
# The tags that PyYAML gives by itself. What a file may write is more: !!python/name, !!binary, !!set.
TAGS = {
    f"tag:yaml.org,2002:{kind}"
    for kind in ["null", "bool", "int", "float", "str", "timestamp", "value", "merge", "seq", "map"]
}
WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
INTEGER = re.compile(r"[-+]?[0-9]+")
NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


def read_settings_file(path: str) -> dict[str, Any]:
    """The mapping of names to values that a YAML file holds.

    Raises:
        InputError: a file that cannot be read, or says something twice, or holds something else.
    """
    try:
        with open(expanded(path), encoding="utf-8-sig") as file:
            text = file.read(MOST_CHARACTERS + 1)
        if len(text) > MOST_CHARACTERS:
            raise InputError(f"it has more than {MOST_CHARACTERS} characters")
        document = yaml.compose(text, yaml.SafeLoader)
        settings = None if document is None else _Reader().value(document)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"config file {shown(path)} cannot be read: {_words(error)}") from error
    if not isinstance(settings, dict):
        raise InputError(f"config file {shown(path)} must be a mapping of settings, such as `learning_rate: 1e-5`")
    return settings


class _Reader:
    """Makes values of PyYAML's nodes, and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def value(self, node: yaml.Node, depth: int = 0) -> Any:
        """The text, number, truth value, list or mapping of a node, or None."""
        self.count += 1
        line = f"line {node.start_mark.line + 1}"
        if self.count > MOST_VALUES or depth > DEEPEST:  # also where an anchor is within itself
            raise InputError(f"{line}: it has more than {MOST_VALUES} values, or more than {DEEPEST} in each other")
        if node.tag not in TAGS:
            raise InputError(f"{line}: it has the tag {shown(node.tag)}; write a text, a number, a list or a mapping")
        if isinstance(node, yaml.SequenceNode):
            return [self.value(one, depth + 1) for one in node.value]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, depth)
        assert isinstance(node, yaml.ScalarNode)
        return node.value if node.style else plain_value(node.value)  # in quotes, or over several lines

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        """A mapping, whose names are texts, as they are written, and each there once."""
        found: dict[str, Any] = {}
        for name, value in node.value:
            line = f"line {name.start_mark.line + 1}"
            if not isinstance(name, yaml.ScalarNode):
                raise InputError(f"{line}: it has a list or mapping for a name; write a text")
            if name.tag == "tag:yaml.org,2002:merge":
                raise InputError(f"{line}: << merges no mapping here; write its settings out")
            if name.value in found:
                raise InputError(f"{line}: {shown(name.value)} stands there a second time; keep one")
            found[name.value] = self.value(value, depth + 1)
        return found


def plain_value(text: str) -> Any:
    """The meaning of a text without quotes: 1e-5, 010 and 1.5 are numbers; 1:30, 0x10, yes and 2024-01-01 are texts."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    if INTEGER.fullmatch(text):
        return int(text) if len(text) <= MOST_DIGITS else text
    return float(text) if NUMBER.fullmatch(text) else text


def _words(error: Exception) -> str:
    """The reason why a file cannot be read, with its line where PyYAML knows it."""
    if isinstance(error, RecursionError):
        return f"it has more than {DEEPEST} lists or mappings in each other"
    mark = getattr(error, "problem_mark", None)
    if isinstance(error, yaml.MarkedYAMLError) and mark is not None:
        return f"line {mark.line + 1}: {in_a_line(Exception(error.problem))}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return in_a_line(error)

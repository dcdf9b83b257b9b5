"""Folders and files of this machine, by names that say nothing of it, for what others read.

A path may hold a person's name, a customer's or a machine's. What is uploaded has its end alone: "./sums.jsonl" of
/Users/me/data/sums.jsonl. So it can be no repository's name, and a command with it runs where such a file lies.
"""

import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# A path that says where it begins: /a/b, ~/a, $A/b, ../a or C:\a, on a server //a/b or \\a\b, or a URL file:///a. One
# such as data/a.jsonl is a user's own word for it, and $a/b$ a formula.
VARIABLE = r"\$(?:[A-Za-z_]\w*|\{\w+\})(?![^\n]*\$(?![A-Za-z_{]))"
ELSEWHERE = rf"~(?:[A-Za-z_][\w.-]*)?|{VARIABLE}|\.\.|[A-Za-z]:"
HOST = r"[A-Za-z][\w.-]+"
PART = r"[^\s/\\'\"`,;:()\[\]{}<>|]+"
URL = r"file://"
# Backslashes are doubled in a text within a text, and so they are in a regular expression there: \\d\\w is none.
# Nor is the end of a line in LaTeX with a command after it: \\quad\text{if}.
SERVER = rf"(?://{HOST}/|\\\\{HOST}\\(?![A-Za-z]+{{)|\\\\\\\\{HOST}\\\\)(?=[^/\\])"
BARE = (
    rf"(?<![\w.~/<>\\)\]}}-])(?:{URL}/?|(?:(?<!:){SERVER}|/{PART}[\\/]|(?:{ELSEWHERE})[\\/]))"  # no </a>, 3/4, http://a/b
    rf"{PART}(?:[\\/]+{PART})*[\\/]?"
)
LOOSE = rf"(?:{URL}|{SERVER}|(?:/[^/\n'\"]+|{ELSEWHERE})[\\/])"  # may have spaces, where something says where it ends
QUOTED = rf"""(?P<quote>['"])(?P<path>{LOOSE}(?:(?!(?P=quote)).)+)(?P=quote)"""
ALONE = rf"(?<=['\"=])/{PART}(?=['\"\s,;)&]|$)"  # a path if it is there, as "/data"
WHOLE = re.compile(rf"(?=\S+[\\/]){LOOSE}[^\n]*")  # no "/no_think Answer with yes and/or no"
WITHIN = re.compile(f"{QUOTED}|{BARE}|(?P<alone>{ALONE})")
OF_ONE_PART = re.compile(rf"/{PART}/?|~[A-Za-z_][\w.-]*")
CACHED = re.compile(r"(?:models|datasets)--(.+)")  # a folder of the hub's cache
PROGRAM = "lowmem-grpo "  # the beginning of a command
OF_RUNS = re.compile(r"adapter|best|checkpoint-[0-9]+")  # folders of every run, which say nothing without the run's
OF_CONFIGS = ("config.json", ".index.json")  # ends of the JSON files whose values are tested as they are uploaded


def public_name(name: str) -> str:
    """A model's or a dataset's name for others: of a path "./" and its end.

    A folder of the hub's cache has the name of its repository. A relative path stays whole behind "./", and any
    other name as it is.
    """
    if _is_place(name) or os.path.isabs(name):
        parts = [part for part in re.split(r"[\\/]+", name) if part not in ("", ".", "..") and part[0] not in "~$"]
        cached = next((found[1] for part in parts if (found := CACHED.fullmatch(part))), None)
        if cached is not None:
            return cached.replace("--", "/")
        return "./" + "/".join(parts[-2 if OF_RUNS.fullmatch(parts[-1]) else -1 :]) if parts else "."
    is_bare = os.path.exists(name) and not name.startswith(".")
    return f"./{name}" if is_bare else name


def without_places(value: Any) -> Any:
    """Settings or other values as JSON has them, with the public_name() for each path in a text, however deep."""
    if isinstance(value, Mapping):
        return {name: without_places(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(one) for one in value]
    if not isinstance(value, str):
        return value
    return _of_command(value) if value.startswith(PROGRAM) else _of_text(value)


def _of_command(command: str) -> str:
    """A command line whose arguments, and what follows the = of one, are each a text of their own."""
    try:
        arguments = [re.match(r"(?s)(--\w+=)?(.*)", one) for one in shlex.split(command)]
    except ValueError:  # a quote that is not closed
        return _of_text(command)
    return shlex.join(f"{one[1] or ''}{_of_text(one[2])}" for one in arguments if one)


def _of_text(text: str) -> str:
    home = os.path.expanduser("~")
    text = text.replace(home, "~") if home.count(os.sep) > 1 else text  # which may have a space within
    return public_name(text) if _is_place(text) else WITHIN.sub(_named, text)


def _is_place(text: str) -> bool:
    """Tell whether a text is a path as a whole. One of a single part, as /data or ~al, is one if it is there."""
    is_there = OF_ONE_PART.fullmatch(text) and os.path.exists(os.path.expanduser(text))
    return bool(WHOLE.fullmatch(text) or is_there)


def _named(found: re.Match[str]) -> str:
    quote, path = found["quote"], found["path"]
    if found["alone"] and not _is_place(found["alone"]):
        return found[0]
    return f"{quote}{public_name(path)}{quote}" if quote else public_name(found[0])


def content_for_others(path: Path) -> bytes | Path:
    """The file to upload itself, or of a configuration that names a path, its text with public_name()s."""
    if not path.name.endswith(OF_CONFIGS):
        return path
    try:
        given = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return path
    found = _of_config(given)
    return path if found == given else f"{json.dumps(found, indent=2)}\n".encode()


def _of_config(value: Any, name: str = "") -> Any:
    """A configuration with public_name()s, where a text is a path as a whole or its name says so."""
    if isinstance(value, Mapping):
        return {name: _of_config(one, str(name)) for name, one in value.items()}
    if isinstance(value, list):
        return [_of_config(one) for one in value]
    is_place = isinstance(value, str) and (name.endswith("name_or_path") or _is_place(value))
    return public_name(value) if is_place else value

"""Folders and files of this machine, by names that say nothing of it, for what others read.

A path may hold a person's name, a customer's or a machine's. What is uploaded has its end alone: "./sums.jsonl" of
/Users/me/data/sums.jsonl. So it can be no repository's name, and a command with it runs where such a file lies.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# A path that says where it begins: /a/b, ~/a, ../a or C:\a. One such as data/a.jsonl is a user's own word for it.
ELSEWHERE = r"~(?:[A-Za-z_][\w.-]*)?|\.\.|[A-Za-z]:"
PART = r"[^\s/\\'\"`,;:()\[\]{}<>|]+"
BARE = rf"(?<![\w.~/<>\\)\]}}-])(?:(?:file://)?/{PART}|{ELSEWHERE})(?:[\\/]{PART})+[\\/]?"  # no </a>, 3/4, http://a/b
LOOSE = rf"(?:(?:file://)?/[^/\n'\"]+|{ELSEWHERE})[\\/]"  # may have spaces, where something says where it ends
QUOTED = rf"""(?P<quote>['"])(?P<path>{LOOSE}(?:(?!(?P=quote)).)+)(?P=quote)"""
WHOLE = re.compile(rf"(?=\S+[\\/]){LOOSE}[^\n]*")  # no "/no_think Answer with yes and/or no"
WITHIN = re.compile(f"{QUOTED}|{BARE}")
CACHED = re.compile(r"(?:models|datasets)--(.+)")  # a folder of the hub's cache
OF_RUNS = re.compile(r"adapter|best|checkpoint-[0-9]+")  # folders of every run, which say nothing without the run's
OF_CONFIGS = ("config.json", ".index.json")  # ends of the JSON files whose values are tested as they are uploaded


def public_name(name: str) -> str:
    """A model's or a dataset's name for others: of a path "./" and its end.

    A folder of the hub's cache has the name of its repository. A relative path stays whole behind "./", and any
    other name as it is.
    """
    if WHOLE.fullmatch(name) or os.path.isabs(name):
        parts = [part for part in re.split(r"[\\/]+", name) if part not in ("", ".", "..")]
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
    return _of_text(value) if isinstance(value, str) else value


def _of_text(text: str) -> str:
    home = os.path.expanduser("~")
    text = text.replace(home, "~") if home.count(os.sep) > 1 else text  # which may have a space within
    return public_name(text) if WHOLE.fullmatch(text) else WITHIN.sub(_named, text)


def _named(found: re.Match[str]) -> str:
    quote, path = found["quote"], found["path"]
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
    is_place = isinstance(value, str) and (name.endswith("name_or_path") or WHOLE.fullmatch(value))
    return public_name(value) if is_place else value

"""Tokens, keys and passwords, left out of what a run writes for others to read."""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "..."
WORDS = ("token", "key", "password", "secret")  # the last word of a name whose value is nobody's to read
NAME = rf"(?:\w+_)?(?:{'|'.join(WORDS)})"
# In a command: "token": "hf_..." as in JSON, and token=... as of a flag or of a call's argument.
IN_JSON = re.compile(rf"""(["']{NAME}["']\s*:\s*)(["'])(?:(?!\2).)*\2""", re.IGNORECASE)
IN_CALL = re.compile(rf"""\b({NAME}=)(["']?)[^"'\s,;)}}]+\2""", re.IGNORECASE)
IN_URL = re.compile(r"(?<=://)[^/@\s]+@")  # user:password


def without_secrets(value: Any) -> Any:
    """Settings or other values as JSON has them, with HIDDEN for each secret, however deep."""
    if isinstance(value, Mapping):
        return {
            name: HIDDEN if one and str(name).lower().rpartition("_")[2] in WORDS else without_secrets(one)
            for name, one in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(one) for one in value]
    return IN_URL.sub(f"{HIDDEN}@", value) if isinstance(value, str) else value


def command_without_secrets(words: list[str]) -> list[str]:
    """A command line with HIDDEN for each secret: of a flag, in JSON, and of a call."""
    found = list(words)
    for place, word in enumerate(words[:-1]):
        if re.fullmatch(f"--{NAME}", word.replace("-", "_").replace("__", "--", 1), re.IGNORECASE):
            found[place + 1] = HIDDEN
    return [without_secrets(IN_CALL.sub(rf"\1{HIDDEN}", IN_JSON.sub(rf"\1\2{HIDDEN}\2", word))) for word in found]

"""Task, the value that describes a task."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Task:
    rows: Any  # to train on: a list of rows with a `prompt`, or anything else that load_rows takes
    reward: Callable  # its verifier, a reward function that reads the rows' other columns
    eval_rows: Any = None  # held out, likewise; None where nothing is
    system_prompt: str | None = None  # how to answer, where the prompts are chats that do not say
    stop_strings: list[str] | None = None  # what ends an answer, where a model knows no other end
    whole: Any = None  # rows and eval_rows together, where they are parts of one file

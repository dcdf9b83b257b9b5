"""Markdown of texts that anybody may have written: each stays within its code span, its cell or its block."""

import re
from collections.abc import Iterable, Sequence

from lowmem_grpo.errors import printable, printable_text

MOST_CHARACTERS = 200  # of a code span


def code(text: object) -> str:
    """A text as a code span in one line, cut off after MOST_CHARACTERS."""
    line = printable(str(text)).replace("\t", " ")
    line = line if len(line) <= MOST_CHARACTERS else f"{line[:MOST_CHARACTERS]}..."
    ticks = "`" * (_longest_ticks(line) + 1)
    pad = " " if not line.strip() or "`" in (line[0], line[-1]) else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def block(text: str, language: str) -> str:
    """A text of several lines as a block of code."""
    ticks = "`" * max(3, _longest_ticks(text) + 1)
    return f"{ticks}{language}\n{printable_text(text)}\n{ticks}"


def _longest_ticks(text: str) -> int:
    """The most backticks in a row."""
    return max(map(len, re.findall("`+", text)), default=0)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table. A vertical bar within a cell, in code too, is escaped, which GitHub's Markdown undoes."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |" for cells in lines)


def points(lines: Sequence[str]) -> str:
    """Sentences as a list, one below the other."""
    return "\n".join(f"* {line}" for line in lines)

"""Texts and tables as wide as the terminal that they are printed on. In a file or a pipe no line is broken."""

import math
import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Any, TextIO

from rich.cells import cell_len

from lowmem_grpo.errors import printable, printable_text

USUAL = 80  # columns of a terminal that does not say how many it has
NARROWEST = 20  # columns that a text is fitted to
DEEPER = 4  # columns by which a line goes on further in than it began
GAP = 2  # columns between those of a table
LEAST_NAME = 16  # columns of a table's first one, if what it names is longer and there is no room
WORD = re.compile(r" *[^ ]+")


def columns_of(file: Any) -> int | None:
    """The number of columns of a terminal; None of a file or a pipe, whose lines have no limit."""
    try:
        return max(NARROWEST, os.get_terminal_size(file.fileno()).columns or USUAL) if file.isatty() else None
    except (AttributeError, OSError, ValueError):  # a file that is closed, or none of the system's
        return None


def is_ascii(file: Any) -> bool:
    """True where a file's encoding has no signs to draw with."""
    return not (getattr(file, "encoding", None) or "ascii").lower().startswith("utf")


def show(text: str, file: TextIO | None = None) -> None:
    """Print a text, fitted to the terminal, whoever wrote it; on standard output or another file."""
    file = sys.stdout if file is None else file
    print(fitted(printable_text(text), columns_of(file)), file=file, flush=True)


def fitted(text: str, width: int | None) -> str:
    """A text in lines of at most `width` columns, broken between words; None is no limit.

    A word that is longer, as a path may be, is left whole, so that it can be copied.
    """
    return text if width is None else "\n".join(part for line in text.split("\n") for part in _fitted(line, width))


def _fitted(line: str, width: int) -> Iterator[str]:
    if cell_len(line) <= width:
        yield line
        return
    indent = " " * (len(line) - len(line.lstrip(" ")) + DEEPER)
    yield from flowed(WORD.findall(line), width, indent if len(indent) < width // 2 else "")


def indented(text: str) -> list[str]:
    """The lines of a text that stands below its heading, in which nothing foreign moves a terminal's cursor."""
    return [f"    {line}" for line in printable_text(text).split("\n")]


def flowed(parts: Sequence[str], width: int | None, indent: str = "") -> Iterator[str]:
    """Lines of whole parts one after another, of which all but the first begin with an indent."""
    line = ""
    for part in parts:
        if width is not None and line.strip() and cell_len(line) + cell_len(part) > width:
            yield line
            line = indent + part.lstrip(" ")
        else:
            line += part
    yield line


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None, *, left: Collection[str] = ()
) -> str:
    """A table in lines of at most `width` columns of a terminal; None is no limit.

    The first column names the rows. Columns that have no room beside it come below, with the names again, and a name
    that has no room beside its cells has a line of its own. Cells stand to the right, but in the columns of `left`.
    """
    lines = [[printable(cell) for cell in row] for row in [header, *rows]]
    wide = [max(map(cell_len, cells)) for cells in zip(*lines, strict=True)]
    least = min(wide[0], LEAST_NAME)
    blocks: list[list[int]] = [[]]
    for place in range(1, len(header)):
        beside = least + sum(wide[one] + GAP for one in [*blocks[-1], place])
        if width is not None and blocks[-1] and beside > width:
            blocks.append([])
        blocks[-1].append(place)
    shown = []
    for block in blocks:
        taken = sum(wide[place] + GAP for place in block)
        room = wide[0] if width is None else min(wide[0], max(0, width - taken))
        for row in lines:
            name = _padded(row[0], room)
            cells = "".join(
                " " * GAP + _padded(row[place], wide[place], to_right=header[place] not in left) for place in block
            )
            if cell_len(row[0]) > room:
                shown += [row[0], fitted(" " * room + cells, width)]
            else:
                shown.append(fitted(name + cells, width))
        shown.append("")
    return "\n".join(line.rstrip() for line in shown[:-1])


def _padded(text: str, width: int, *, to_right: bool = False) -> str:
    blank = " " * (width - cell_len(text))
    return blank + text if to_right else text + blank


def bar(share: float, width: int, *, is_ascii: bool) -> str:
    """A bar of `width` characters, filled by a share from 0 to 1."""
    done = math.floor(max(0.0, min(share, 1.0)) * width)
    full, empty = ("=", "-") if is_ascii else ("━", "─")
    return full * done + empty * (width - done)

"""Curves as lines of characters: dots of Braille, eight to a character, or stars where a terminal has only ASCII."""

from collections.abc import Sequence
from itertools import pairwise

BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.:-=+*#"
# Bits of U+2800's eight dots, by column and by row from the top.
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
Points = Sequence[tuple[float, float]]  # (step, value), in the order of steps


def chart(points: Points, width: int, height: int, *, is_ascii: bool) -> list[str]:
    """A curve in `height` lines of `width` characters, from its least value at the bottom to its greatest."""
    across, down = (1, 1) if is_ascii else (2, 4)
    columns, rows = width * across, height * down
    values = in_columns(points, columns)
    known = [value for value in values if value is not None]
    if not known:
        return [" " * width] * height
    low, high = min(known), max(known)
    places = [None if value is None else _row(value, low, high, rows) for value in values]
    is_set = [[False] * columns for _ in range(rows)]
    before: int | None = None
    for column, place in enumerate(places):
        if place is None:
            before = None
            continue
        nearest = place if before is None else before + (place > before) - (place < before)
        for row in range(min(nearest, place), max(nearest, place) + 1):
            is_set[row][column] = True
        before = place
    return [
        "".join(_character(is_set, row * down, column * across, is_ascii=is_ascii) for column in range(width))
        for row in range(height)
    ]


def _row(value: float, low: float, high: float, rows: int) -> int:
    """The row of a value, 0 at the top; the middle one where all values are alike."""
    return rows // 2 if high == low else round((high - value) / (high - low) * (rows - 1))


def _character(is_set: list[list[bool]], top: int, left: int, *, is_ascii: bool) -> str:
    if is_ascii:
        return "*" if is_set[top][left] else " "
    bits = sum(DOTS[x][y] for x in range(2) for y in range(4) if is_set[top + y][left + x])
    return chr(0x2800 + bits) if bits else " "


def in_columns(points: Points, columns: int) -> list[float | None]:
    """The mean of a curve in each of so many columns; between points that are further apart, what lies between."""
    if not points:
        return [None] * columns
    first, last = points[0][0], points[-1][0]
    sums, counts = [0.0] * columns, [0] * columns
    for step, value in points:
        column = 0 if last == first else min(columns - 1, int((step - first) / (last - first) * (columns - 1) + 0.5))
        sums[column] += value
        counts[column] += 1
    found: list[float | None] = [sums[i] / counts[i] if counts[i] else None for i in range(columns)]
    known = [i for i in range(columns) if counts[i]]
    for left, right in pairwise(known):
        a, b = sums[left] / counts[left], sums[right] / counts[right]
        for between in range(left + 1, right):
            found[between] = a + (b - a) * (between - left) / (right - left)
    return found


def sparkline(points: Points, width: int, *, is_ascii: bool) -> str:
    """A curve in one line of at most `width` characters."""
    bars = ASCII_BARS if is_ascii else BARS
    values = in_columns(points, max(1, min(width, len(points))))
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    return "".join(
        " " if value is None else bars[len(bars) - 1 - _row(value, low, high, len(bars))] for value in values
    )

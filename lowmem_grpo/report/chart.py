"""Line charts over a run's steps, as numbers and texts that a template draws as SVG: nothing here is markup.

A picture has at most COLUMNS points a line, however many steps a run has: of more steps the mean of each column is
drawn, over a band from their least to their greatest value.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 440, 210  # of the picture, in units of its viewBox
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 10, 24  # margins
COLUMNS = 190
STRIPS = 95  # that show their values under a pointer
FEWEST_SMOOTHED = 16  # points, from which on a line is a mean over neighbours
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A metric over steps."""

    label: str
    points: Sequence[tuple[int, float]]  # (step, value)
    band: tuple[Sequence[tuple[int, float]], Sequence[tuple[int, float]]] | None = None  # least and greatest


@dataclass(frozen=True)
class Dot:
    """A value at a step with its interval, as of an evaluation."""

    step: int
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """A series as it is drawn: `points` of SVG's polylines, one for each stretch without a gap."""

    label: str
    paths: list[str]
    pale: list[str]  # each value, where the line is a mean over neighbours
    band: list[str]  # polygons
    ends: list[Point]  # where a single point makes a stretch
    last: str  # the last value, in words


@dataclass(frozen=True)
class Chart:
    """A picture of one or several series."""

    title: str
    unit: str
    lines: list[Line]
    dots: list[dict[str, float]]
    dots_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    strips: list[tuple[float, float, str]]  # left, width, words
    summary: str  # of the values, in words
    notes: list[str] = field(default_factory=list)
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    dots: Sequence[Dot] = (),
    dots_label: str = "",
    from_zero: bool = False,  # of what is never negative
    smooth: bool = True,  # False for what has no noise
) -> Chart | None:
    """The picture of series and dots; None where no series has two points and there is no dot."""
    series = [one for one in series if one.points]
    if not any(len(one.points) > 1 for one in series) and not dots:
        return None
    steps = [step for one in series for step, _ in one.points] + [dot.step for dot in dots]
    x = Axis(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    bands = [points for one in series if one.band for points in one.band]
    shown = [value for points in [*(one.points for one in series), *bands] for _, value in points]
    exact = [value for dot in dots for value in (dot.value, dot.low, dot.high) if value is not None]
    low, high = limits(shown)
    low, high = min([low, *exact]), max([high, *exact])
    if from_zero:
        low = min(low, 0.0)
    y_ticks, y_texts = ticks(low, high, 5)
    y = Axis(min(low, y_ticks[0]), max(high, y_ticks[-1]), HEIGHT - BOTTOM, TOP)
    x_ticks, x_texts = ticks(x.low, x.high, 6, whole=True)
    outside = [value for value in shown if not y.low <= value <= y.high]
    notes = [f"outside the picture: {_range(outside)}"] if outside else []
    return Chart(
        title=title, unit=unit, lines=[_drawn(one, x, y, len(series) == 1, smooth) for one in series],
        dots=[_placed(dot, x, y) for dot in dots], dots_label=dots_label if dots else "",
        x_ticks=_of_steps([(x(at), text) for at, text in zip(x_ticks, x_texts, strict=True) if x.low <= at <= x.high]),
        y_ticks=[(y(tick), text) for tick, text in zip(y_ticks, y_texts, strict=True)],
        strips=_strips(series, dots, x, dots_label), summary=_summary(title, series, dots, dots_label), notes=notes,
    )  # fmt: skip


def _of_steps(placed: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """The ticks of the lower edge, of which the first says that steps are counted."""
    return [(at, text if place else f"step {text}") for place, (at, text) in enumerate(placed)]


@dataclass(frozen=True)
class Axis:
    """Places values on a stretch of the picture, the lowest at `start`; what is outside lies at its end."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(self.start + min(max(share, 0.0), 1.0) * (self.end - self.start), 1)


def ticks(low: float, high: float, most: int, *, whole: bool = False) -> tuple[list[float], list[str]]:
    """Round numbers at equal distances around a range, at most `most` + 1, and how they are written."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = (low, low) if whole else (low - pad, high + pad)
    if low == high:
        return [low], [f"{low:.0f}"]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    distance = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    if whole:
        distance = max(1.0, distance)
    first, last = math.floor(low / distance + 1e-9), math.ceil(high / distance - 1e-9)
    found = [number * distance for number in range(first, last + 1)]
    size = max(abs(found[0]), abs(found[-1]))
    decimals = max(0, -math.floor(math.log10(distance) + 1e-9))
    form = ",.0f" if whole else ".1e" if size >= 1e5 or size < 1e-2 else f".{decimals}f"
    return found, [_short(format(value, form)) for value in found]


def limits(values: Sequence[float]) -> tuple[float, float]:
    """The least and the greatest value; a few that are far outside of all others are left out."""
    if not values:
        return math.inf, -math.inf
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    if len(ordered) >= 20:
        least, most = ordered[len(ordered) // 50], ordered[-1 - len(ordered) // 50]
        room = 4 * (most - least)
        low = least - room / 8 if room and low < least - room else low
        high = most + room / 8 if room and high > most + room else high
    return low, high


def smoothing(count: int) -> int:
    """The odd number of points that each of a line of `count` points is a mean over; 1 of few."""
    return 1 if count < FEWEST_SMOOTHED else count // 24 * 2 + 3


def smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The mean of each point and its neighbours, of which the first and the last have half as many."""
    half = smoothing(len(points)) // 2
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    found = []
    for place, (step, _) in enumerate(points):
        first, end = max(0, place - half), min(len(points), place + half + 1)
        found.append((step, (sums[end] - sums[first]) / (end - first)))
    return found


def in_words(value: float) -> str:
    """A number of four digits that count: 0.1234, 12.34, 1.234e-06."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _short(text: str) -> str:
    """A number in exponents without what says nothing: 5e-7 for 5.0e-07, and 0 for 0.0e+00."""
    digits, e, power = text.partition("e")
    digits = digits.removesuffix(".0") if e else digits
    return f"{digits}e{int(power)}" if e and digits != "0" else digits


def _range(values: Sequence[float]) -> str:
    low, high = in_words(min(values)), in_words(max(values))
    return low if low == high else f"{low} to {high}"


def _columns(points: Sequence[tuple[int, float]], count: int) -> list[list[tuple[int, float]]]:
    """Points in at most `count` columns of equal width in steps; empty ones are left out."""
    if not points:
        return []
    first, last = points[0][0], points[-1][0]
    width = max(1.0, (last - first + 1) / count)
    columns: dict[int, list[tuple[int, float]]] = {}
    for step, value in points:
        columns.setdefault(int((step - first) / width), []).append((step, value))
    return list(columns.values())


def _means(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """The mean step and value of each column."""
    return [
        (sum(step for step, _ in column) / len(column), sum(value for _, value in column) / len(column))
        for column in _columns(points, COLUMNS)
    ]


def _drawn(series: Series, x: Axis, y: Axis, is_alone: bool, smooth: bool) -> Line:
    points = series.points
    is_smooth, is_thinned = smooth and smoothing(len(points)) > 1, len(points) > COLUMNS
    line = _means(smoothed(points) if is_smooth else points)
    band, pale = [], []
    if series.band:
        low, high = map(_means, series.band)
        band = [_joined(low, x, y) + " " + _joined(high[::-1], x, y)] if len(low) > 1 else []
    elif is_thinned and is_alone:
        columns = _columns(points, COLUMNS)
        edges = [[(column[0][0], pick(value for _, value in column)) for column in columns] for pick in (min, max)]
        band = [_joined(edges[0], x, y) + " " + _joined(edges[1][::-1], x, y)]
    elif is_smooth and is_alone:
        pale = [_joined(points, x, y)]
    stretches = [line] if len(line) > 1 else []
    ends = [(x(line[0][0]), y(line[0][1]))] if len(line) == 1 else []
    return Line(series.label, [_joined(one, x, y) for one in stretches], pale, band, ends, in_words(points[-1][1]))


def _joined(points: Sequence[Point] | Sequence[tuple[int, float]], x: Axis, y: Axis) -> str:
    return " ".join(f"{x(step):g},{y(value):g}" for step, value in points)


def _placed(dot: Dot, x: Axis, y: Axis) -> dict[str, float]:
    low, high = (dot.value if end is None else end for end in (dot.low, dot.high))
    return {"x": x(dot.step), "y": y(dot.value), "low": y(low), "high": y(high)}


def _strips(series: Sequence[Series], dots: Sequence[Dot], x: Axis, dots_label: str) -> list[tuple[float, float, str]]:
    """Upright strips of the picture, and the values in each, in words."""
    span = x.high - x.low + 1
    count = min(STRIPS, int(span))
    told: dict[int, list[str]] = {}
    steps: dict[int, list[int]] = {}

    def column(step: float) -> int:
        return min(count - 1, int((step - x.low) / span * count))

    for one in series:
        of_columns: dict[int, list[float]] = {}
        for step, value in one.points:
            of_columns.setdefault(column(step), []).append(value)
            steps.setdefault(column(step), []).append(step)
        for place, values in of_columns.items():
            between = f" ({_range(values)})" if min(values) < max(values) else ""
            told.setdefault(place, []).append(f"{one.label} {in_words(sum(values) / len(values))}{between}")
    for dot in dots:
        steps.setdefault(column(dot.step), []).append(dot.step)
        told.setdefault(column(dot.step), []).append(f"{dots_label} {dot_in_words(dot)}")
    width = (WIDTH - RIGHT - LEFT) / count
    return [
        (round(LEFT + place * width, 1), round(width, 1), f"step {_steps(steps[place])}: {'; '.join(words)}")
        for place, words in sorted(told.items())
    ]


def dot_in_words(dot: Dot) -> str:
    """A value with its interval: "0.310 [0.250, 0.377]"."""
    if dot.low is None or dot.high is None:
        return in_digits(dot.value)
    return f"{in_digits(dot.value)} [{in_digits(dot.low)}, {in_digits(dot.high)}]"


def in_digits(value: float, sign: str = "") -> str:
    """A number with three decimals, or if it is tiny or great three digits: 0.250, 10.0, 212; "+" shows its sign."""
    size = abs(value)
    near = ",.0f" if size >= 100 else ".1f" if size >= 10 else ".3f"
    return format(value, sign + (".3g" if 0 < size < 0.01 else near))


def _steps(steps: Sequence[int]) -> str:
    return f"{min(steps)}" if min(steps) == max(steps) else f"{min(steps)} to {max(steps)}"


def _summary(title: str, series: Sequence[Series], dots: Sequence[Dot], dots_label: str) -> str:
    """The values of a picture in words, for whoever does not see it."""
    words = []
    for one in series:
        (first, begin), (last, end) = one.points[0], one.points[-1]
        values = [value for _, value in one.points]
        words.append(
            f"{one.label}: {in_words(begin)} at step {first}, {in_words(end)} at step {last}, between "
            f"{in_words(min(values))} and {in_words(max(values))}"
        )
    words += [f"{dots_label} at step {dot.step}: {dot_in_words(dot)}" for dot in dots[:20]]
    return f"{title}. {'; '.join(words)}."

"""A metrics.jsonl that grows while it is read: only what is new, into memory that does not grow with it."""

import json
import math
import os
from collections import deque
from pathlib import Path
from typing import Any

from lowmem_grpo.output.saved import is_evaluation, read_line
from lowmem_grpo.report.reading import number

MOST_POINTS = 600  # of a curve
MOST_BYTES = 6 * 2**20  # of a log that is there already, whose steps are all read; of a longer one a part of them
CHUNK = 2**20
RECENT = 20  # steps that the time a step is the mean of
CURVES = (
    "reward", "loss", "accuracy", "mean_token_accuracy", "completions/mean_length", "completions/clipped_ratio", "kl",
    "entropy", "margin", "teacher_kl", "grad_norm", "value_loss",
)  # fmt: skip


class Curve:
    """A metric over steps: at most MOST_POINTS means of neighbours, each over a power of two steps."""

    def __init__(self):
        self.steps_a_point = 1
        self.points: list[list[float]] = []  # [step // steps_a_point, sum, count]

    def add(self, step: int, value: float) -> None:
        place = step // self.steps_a_point
        if self.points and self.points[-1][0] >= place:  # of a log out of order, too
            self.points[-1][1] += value
            self.points[-1][2] += 1
            return
        self.points.append([place, value, 1])
        if len(self.points) > MOST_POINTS:
            self.steps_a_point *= 2
            before, self.points = self.points, []
            for place, total, count in before:
                if self.points and self.points[-1][0] == place // 2:
                    self.points[-1][1] += total
                    self.points[-1][2] += count
                else:
                    self.points.append([place // 2, total, count])

    def values(self) -> list[tuple[float, float]]:
        """The curve as (step, value)."""
        return [(place * self.steps_a_point, total / count) for place, total, count in self.points]


class Log:
    """A metrics.jsonl, followed.

    Attributes:
        last: the last step's line.
        evaluations: the first line of an evaluation, and the last.
        findings: the doctor's lines.
        peaks: by phase, the most MiB that a step has taken.
    """

    def __init__(self, path: Path):
        self.path = path
        self._begin(None)

    def _begin(self, identity: tuple[int, int] | None) -> None:
        self.identity, self.offset, self.rest = identity, 0, b""
        self.curves: dict[str, Curve] = {}
        self.last: dict[str, Any] = {}
        self.evaluations: list[dict[str, Any]] = []
        self.findings: list[dict[str, Any]] = []
        self.peaks: dict[str, float] = {}
        self.times: deque[float] = deque(maxlen=RECENT)  # s, of the last steps
        self.is_thinned = False

    def read(self) -> bool:
        """Read what is new; True where there is something. A file that was replaced or cut is read anew."""
        try:
            found = os.stat(self.path)
            identity = (found.st_dev, found.st_ino)
            if identity != self.identity or found.st_size < self.offset:
                self._begin(identity)
            if found.st_size == self.offset:
                return False
            with self.path.open("rb") as file:
                file.seek(self.offset)
                self._take(file, found.st_size - self.offset)
        except OSError:  # gone for a moment, or a folder
            return False
        return True

    def _take(self, file: Any, size: int) -> None:
        """Read lines up to the last whole one. Of too many steps every n-th and the last are read."""
        every = math.ceil(size / MOST_BYTES)
        self.is_thinned |= every > 1
        count, skipped = 0, b""
        while chunk := file.read(CHUNK):
            self.offset += len(chunk)
            *lines, self.rest = (self.rest + chunk).split(b"\n")
            for text in lines:
                count += 1
                if every > 1 and count % every and b'"eval_' not in text and b'"doctor"' not in text:
                    skipped = text
                    continue
                self._line(text)
                skipped = b""
        if skipped:
            self._line(skipped)

    def _line(self, text: bytes) -> None:
        line = read_line(text)
        if line is None:  # damaged
            return
        if isinstance(line.get("doctor"), str):
            self.findings.append(line)
        elif is_evaluation(line):
            self.evaluations = [*self.evaluations[:1], line]
        else:
            self._step(line)

    def _step(self, line: dict[str, Any]) -> None:
        self.last = line
        for name, value in line.items():
            value = number(value)
            if value is None:
                continue
            if name in CURVES or (name.startswith("rewards/") and name.endswith("/mean")):
                self.curves.setdefault(name, Curve()).add(line["step"], value)
            elif name.startswith("memory/") and name.endswith("/peak_mib"):
                phase = name.split("/")[1]
                self.peaks[phase] = max(self.peaks.get(phase, 0.0), value)
            elif name == "step_time":
                self.times.append(value)

    @property
    def step_time(self) -> float | None:
        """Seconds a step, of the last RECENT ones."""
        return sum(self.times) / len(self.times) if self.times else None


class SavedObject:
    """A file of JSON that is read again where it has changed; an empty object where it is none."""

    def __init__(self, path: Path):
        self.path = path
        self.seen: tuple[int, int] | None = None
        self.value: dict[str, Any] = {}

    def read(self) -> dict[str, Any]:
        try:
            found = os.stat(self.path)
            seen = (found.st_mtime_ns, found.st_ino)
            if seen != self.seen:
                value = json.loads(self.path.read_bytes())
                self.value, self.seen = (value if isinstance(value, dict) else {}), seen
        except (OSError, ValueError, RecursionError):
            self.value, self.seen = {}, None
        return self.value

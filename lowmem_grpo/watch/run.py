"""A run as its folder tells it while it goes on, and a pipeline's phases."""

import contextlib
import datetime
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lowmem_grpo.data.text import as_read
from lowmem_grpo.errors import counted
from lowmem_grpo.output.lock import NAME as LOCK
from lowmem_grpo.output.lock import is_in_use
from lowmem_grpo.output.saved import LAST_STEP, read_lines
from lowmem_grpo.report.reading import (
    CONFIGS,
    DONE,
    OF_THE_BASE,
    kind_of,
    mapping,
    number,
    phases_of,
    standing_of,
    texts,
)
from lowmem_grpo.watch.log import Log, SavedObject

MOST_ROWS = 64  # of a step's table of completions that are looked at


class State(NamedTuple):
    """Whether a run goes on, in a word and the rest of a sentence."""

    word: str
    text: str
    is_over: bool


class Sample(NamedTuple):
    """A completion with its prompt and its rewards."""

    prompt: str
    completion: str
    rewards: dict[str, float | None]


class WatchedRun:
    """A run's folder, of which refresh() reads what has changed. It is never written to, and never locked."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.log = Log(folder / "metrics.jsonl")
        self.files = {name: SavedObject(folder / f"{name}.json") for name in ("run", "plan", *_configs())}
        self.samples: list[Sample] = []
        self.samples_of = ""  # where the samples are from, in words
        self.seen: Any = None  # of the file that they were read from
        self.is_running = False

    def refresh(self) -> None:
        self.log.read()
        for file in self.files.values():
            file.read()
        self.is_running = is_in_use(self.folder)
        self._read_samples()

    @property
    def about(self) -> dict[str, Any]:
        """The content of run.json."""
        return self.files["run"].value

    @property
    def plan(self) -> dict[str, Any]:
        """The content of plan.json."""
        return self.files["plan"].value

    @property
    def kind(self) -> str:
        """The kind of training: grpo, sft or reward, or an empty text where nothing says it."""
        return kind_of(self.about, (one for one in CONFIGS if self.files[f"{one}_config"].value))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the configuration, as it was given."""
        return self.files[f"{self.kind}_config"].value if self.kind else {}

    @property
    def step(self) -> int:
        """The last step that is done."""
        return self.log.last.get("step", 0)

    @property
    def total_steps(self) -> int | None:
        """How many steps the run is to have, if that is known."""
        for value in (self.about.get("total_steps"), self.settings.get("max_steps")):
            if type(value) is int and 0 < value <= LAST_STEP:
                return value
        return None

    @property
    def state(self) -> State:
        """How the run stands."""
        ended = mapping(self.about.get("ended"))
        word, why = standing_of(self.about, is_running=self.is_running), str(ended.get("why") or "")
        if self.is_running and (not self.about or self._is_before_the_lock(ended)):
            return State("starting", "to read its model and data", is_over=False)
        if word == "running":
            return State(word, "", is_over=False)
        if word == "cut off":
            return State(word, f"after step {self.step}: killed, or on another machine", is_over=True)
        if not word:  # of an earlier version, or one that did not begin
            return State("not running", f"after step {self.step}" if self.step else "and not begun", is_over=True)
        done = f"after {counted(self.step, 'step')}" if word == "finished" else f"after step {self.step}"
        return State(word, f"{done}: {why}" if why else done, is_over=True)

    def _is_before_the_lock(self, ended: dict[str, Any]) -> bool:
        """True where the lock is of a run that began after the one that run.json is of has ended."""
        try:
            end = datetime.datetime.fromisoformat(ended["at"]).timestamp()
            return os.stat(self.folder / LOCK).st_mtime > end + 1
        except (OSError, KeyError, TypeError, ValueError):
            return False

    @property
    def silence(self) -> float | None:
        """Seconds since something was logged."""
        try:
            return max(0.0, time.time() - os.stat(self.folder / "metrics.jsonl").st_mtime)
        except OSError:
            return None

    def _read_samples(self) -> None:
        """Read the last step's completions where they are logged, else those of the last evaluation."""
        step = self.step
        for path, read in (
            (self.folder / "completions" / f"completions_{step:05d}.parquet", self._of_step),
            (self.folder / "samples.jsonl", self._of_evaluation),
        ):
            try:
                found = os.stat(path)
            except OSError:
                continue
            seen = (path.name, found.st_mtime_ns, found.st_ino)
            if seen != self.seen:
                self.samples, self.seen = read(path), seen
            return

    def _of_step(self, path: Path) -> list[Sample]:
        """The best and the worst completion of a step's first prompt."""
        rows, names = _first_rows(path), texts(self.about.get("rewards"))
        group = [row for row in rows if row.get("prompt") == rows[0].get("prompt")]
        group.sort(key=lambda row: -(number(row.get("advantage")) or 0.0))
        chosen = [group[0], group[-1]] if len(group) > 1 else group
        self.samples_of = f"step {self.step}: of the first prompt, the best and the worst completion of {len(group)}"
        return [
            Sample(
                as_text(row.get("prompt")), as_text(row.get("completion")),
                {name: number(row.get(name)) for name in names if name in row},
            )
            for row in chosen
        ]  # fmt: skip

    def _of_evaluation(self, path: Path) -> list[Sample]:
        lines = read_lines(path)[0]
        last = max((line["step"] for line in lines), default=0)
        self.samples_of = f"held out, {f'at step {last}' if last else 'before training'}"
        return [
            Sample(
                as_text(line.get("prompt")), as_text(line.get("completion")),
                {str(name): number(value) for name, value in mapping(line.get("rewards")).items()},
            )
            for line in lines
            if line["step"] == last
        ]  # fmt: skip


def _configs() -> Iterator[str]:
    return (f"{kind}_config" for kind in CONFIGS)


def _first_rows(path: Path) -> list[dict[str, Any]]:
    """The first rows of a Parquet file; none of one that cannot be read."""
    from pyarrow import parquet  # which takes 0.2 CPU s, where completions are logged

    try:
        with parquet.ParquetFile(path) as file:
            return next(file.iter_batches(batch_size=MOST_ROWS)).to_pylist()
    except Exception:  # whatever Arrow raises on a damaged file, or one of no rows
        return []


def as_text(value: Any) -> str:
    """A prompt or a completion to be read: the text, or what is said in the messages of a chat."""
    if isinstance(value, list):
        with contextlib.suppress(Exception):  # of a damaged file, which may hold anything
            return as_read(value)
        said = [str(mapping(message).get("content") or "") for message in value]
        return "\n".join(said)
    return "" if value is None else str(value)


def active_phase(folder: Path) -> Path | None:
    """The phase of a pipeline that goes on, or else the last one there. None where no phase has begun."""
    phases = [path for path in phases_of(folder) if path.is_dir() and path.name != OF_THE_BASE]
    going = [path for path in phases if is_in_use(path)]
    undone = [path for path in phases if not (path / DONE).is_file()]
    return next(iter([*going, *undone, *reversed(phases)]), None)

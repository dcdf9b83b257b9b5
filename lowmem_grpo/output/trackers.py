"""Trackers such as TensorBoard and W&B, through accelerate's classes: they get each line of metrics.jsonl.

Each tracker has a thread of its own. What it waits for holds up no step, and what it raises costs no run.
"""

import contextlib
import io
import json
import logging
import math
import os
import queue
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from accelerate import tracking
from accelerate.logging import MultiProcessAdapter
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from lowmem_grpo.errors import InputError, did_you_mean, in_a_line, shown
from lowmem_grpo.output.folder import write_file
from lowmem_grpo.output.saved import is_evaluation, read_object

T = TypeVar("T")
START_S = 30.0  # that a run waits for a tracker to start, and at its end for what is still to be sent
FILE = "trackers.json"  # of an output folder: by tracker, what it knows the run by


@dataclass(frozen=True)
class Place:
    """The run that a tracker is to show, and where it stands as the tracker starts."""

    folder: Path
    project: str
    run_name: str
    id: str | None  # by which the tracker knows the run already; None for a new one
    first_step: int  # the last step whose line is not sent again
    space_id: str | None = None  # of trackio, on the hub

    @property
    def purge_step(self) -> int:
        """The first step of which the tracker forgets what it may hold."""
        return 0 if self.id is None else self.first_step + 1


@dataclass(frozen=True)
class Kind:
    """One of accelerate's trackers: how it is begun, and gone on with."""

    module: str  # to import
    arguments: Callable[[Place], dict[str, Any]]  # of accelerate's class; `run_name` is what it calls the project
    id_of: Callable[[Any], str] = lambda tracker: "-"  # of a started one, which a resumed run goes on with
    reads_text: bool = False
    plain_names: bool = False  # of metrics: letters, digits, spaces and _-./
    purges: bool = False  # what it holds of steps that a resumed run takes again


def _new_id(place: Place) -> str:
    """The id of a run where a client chooses it. From the system's randomness, which no seed rules."""
    return place.id or uuid.uuid4().hex


def _of_wandb(place: Place) -> dict[str, Any]:
    from wandb import Settings  # pyright: ignore[reportMissingImports] # it is the user's to install

    return {
        "run_name": os.environ.get("WANDB_PROJECT", place.project), "name": place.run_name, "dir": str(place.folder),
        "id": os.environ.get("WANDB_RUN_ID", _new_id(place)[:16]), "resume": "allow",
        "settings": Settings(init_timeout=START_S / 2),
    }  # fmt: skip


def _of_comet(place: Place) -> dict[str, Any]:
    from comet_ml import ExperimentConfig  # pyright: ignore[reportMissingImports] # it is the user's to install

    named = ExperimentConfig(name=place.run_name)
    return {"run_name": place.project, "experiment_key": _new_id(place), "experiment_config": named}


KINDS = {
    "tensorboard": Kind(
        "tensorboard", reads_text=True, purges=True,
        arguments=lambda place: {"run_name": "", "logging_dir": place.folder / "runs", "purge_step": place.purge_step},
    ),
    "wandb": Kind("wandb", reads_text=True, id_of=lambda tracker: tracker.tracker.id, arguments=_of_wandb),
    "trackio": Kind(
        "trackio", reads_text=True, id_of=lambda tracker: tracker.tracker.name,
        arguments=lambda place: {
            "run_name": place.project, "name": place.id or place.run_name,
            "resume": "never" if place.id is None else "allow", "space_id": place.space_id,
        },
    ),
    "mlflow": Kind(
        "mlflow", plain_names=True, id_of=lambda tracker: tracker.tracker.info.run_id,
        arguments=lambda place: {"experiment_name": place.project, "run_name": place.run_name, "run_id": place.id},
    ),
    "comet_ml": Kind("comet_ml", reads_text=True, id_of=lambda tracker: tracker.tracker.get_key(), arguments=_of_comet),
    "aim": Kind(
        "aim", id_of=lambda tracker: tracker.tracker.hash,
        arguments=lambda place: {
            "run_name": place.run_name, "logging_dir": ".", "experiment": place.project, "run_hash": place.id,
            "capture_terminal_logs": False,
        },
    ),
    "clearml": Kind(
        "clearml", id_of=lambda tracker: tracker.tracker.id,
        arguments=lambda place: {
            "project_name": place.project, "task_name": place.run_name, "reuse_last_task_id": place.id or False,
            "continue_last_task": False if place.id is None else 0,  # 0 has its steps as they are given
            "auto_connect_frameworks": False,  # else it takes part in what torch and TensorBoard write
        },
    ),
    "dvclive": Kind(
        "dvclive",
        arguments=lambda place: {
            "dir": str(place.folder / "dvclive"), "resume": place.id is not None, "exp_name": place.run_name,
        },
    ),
    "swanlab": Kind(
        "swanlab", plain_names=True, id_of=lambda tracker: tracker.init_kwargs["id"],
        arguments=lambda place: {
            "run_name": place.project, "experiment_name": place.run_name, "id": _new_id(place)[:21],
            "resume": "allow", "logdir": str(place.folder / "swanlog"),
        },
    ),
}  # fmt: skip


def tracker_names(names: Sequence[str]) -> list[str]:
    """The trackers by these names, of which "all" is each of accelerate's that is installed.

    Raises:
        InputError: one is unknown, or is not installed.
    """
    if "all" in names:
        return sorted({*(str(one) for one in get_available_trackers()), *(n for n in names if n != "all")})
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            hint = did_you_mean(name, LOGGER_TYPE_TO_CLASS, f"the trackers are {', '.join(LOGGER_TYPE_TO_CLASS)}")
            raise InputError(f"report_to={shown(name)} is no tracker of accelerate's; {hint}")
        kind = KINDS.get(name)
        if kind is not None and find_spec(kind.module) is None:
            raise InputError(
                f"report_to={name!r} needs {kind.module}, which is not installed; `pip install {kind.module}`, or "
                "leave it out"
            )
    return [*names]


class Trackers:
    """The trackers of a run. None of its methods raises what a tracker does: `news()` tells it."""

    def __init__(
        self, names: Collection[str], place: Place, *, is_resumed: bool, known: Collection[Mapping[str, Any]] = ()
    ):
        """Prepare trackers by their names.

        Args:
            names: as tracker_names() returns them.
            place: of the run, with the id None.
            is_resumed: where the folder's trackers.json says what each knows the run by.
            known: lines that an earlier process of the run has sent, of steps that are taken again. They are not sent
                twice to a tracker that goes on, unless it forgets them.
        """
        self.path = place.folder / FILE
        ids = read_object(self.path) if is_resumed else {}
        self.ids = {name: value for name, value in ids.items() if isinstance(value, str)}
        self.feeds = [Feed(name, place, self.ids.get(name), {_which(line) for line in known}) for name in names]
        self.told: list[str] = []

    def start(self, settings: Mapping[str, Any]) -> None:
        """Start each tracker, and give it the run's settings. Waits at most START_S seconds.

        Meanwhile there is no standard input, so that none asks for a key, and what they print goes to standard error.
        """
        if not self.feeds:
            return
        tracking.logger = _Log(logging.getLogger(tracking.__name__), {})
        given = {
            name: value if isinstance(value, (str, int, float)) else _text(value) for name, value in settings.items()
        }
        with _without_input(), contextlib.redirect_stdout(sys.stderr):
            for feed in self.feeds:
                feed.start(given)
            _wait([feed.is_started for feed in self.feeds])
        self._keep_ids()

    def log(self, line: Mapping[str, Any]) -> None:
        """Send a line of metrics.jsonl, without waiting."""
        for feed in self.feeds:
            feed.log(line)

    def news(self) -> list[str]:
        """Sentences on what has failed since the last call, at most one of each tracker."""
        told, self.told = self.told, []
        return told + [text for feed in self.feeds for text in feed.news()]

    def finish(self) -> None:
        """End each tracker. Waits at most START_S seconds for what is still to be sent."""
        with contextlib.redirect_stdout(sys.stderr):
            for feed in self.feeds:
                feed.queue.put(None)
            _wait([feed.is_ended for feed in self.feeds if feed.is_started.is_set()])
        for feed in self.feeds:
            feed.is_late = not feed.is_ended.is_set()
        self._keep_ids()  # also of a tracker that was late to start

    def _keep_ids(self) -> None:
        """Write what each started tracker knows the run by, where that is new."""
        ids = {**self.ids, **{feed.name: feed.id for feed in self.feeds if feed.id is not None}}
        if ids == self.ids:
            return
        self.ids = ids
        try:
            write_file(self.path, json.dumps(ids, indent=1))
        except OSError as error:
            self.told.append(f"{self.path} cannot be written ({error.strerror}); a resumed run is a new one there")


class _Log(MultiProcessAdapter):
    """The log of accelerate's trackers, written by the process that has them.

    Accelerate's own wants a PartialState first, which joins a process group where torchrun started one process alone,
    leaves that behind, and raises on some pairs of GPUs.
    """

    def log(self, level: int, msg: object, *args: Any, **kwargs: Any) -> None:
        """Log as Python does."""
        self.logger.log(level, msg, *args, **kwargs)


class Feed:
    """One tracker, and the thread in which everything of it is called."""

    def __init__(self, name: str, place: Place, known_id: str | None, known: Collection[tuple]):
        kind = KINDS.get(name)
        self.name = name
        self.place = replace(place, id=known_id)
        self.kind = kind or Kind(name, lambda place: {})
        self.is_own = kind is None  # a class that the user registered
        self.known = set() if known_id is None or self.kind.purges else set(known)
        self.id: str | None = None
        self.queue: queue.SimpleQueue[tuple[dict[str, Any], int] | None] = queue.SimpleQueue()
        self.is_started, self.is_ended = threading.Event(), threading.Event()
        self.failure = ""
        self.is_late = False  # at the end
        self.is_told = False

    def start(self, settings: Mapping[str, Any]) -> None:
        """Start the thread, which starts the tracker."""
        # A daemon: a tracker that never returns does not keep the process.
        threading.Thread(target=self._run, args=[dict(settings)], name=f"tracker {self.name}", daemon=True).start()

    def log(self, line: Mapping[str, Any]) -> None:
        """Put a line of metrics.jsonl into the queue."""
        values = as_tracked(line, texts=self.kind.reads_text)
        if self.kind.plain_names:
            values = {re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII): value for name, value in values.items()}
        if values and _which(line) not in self.known:
            self.queue.put((values, line["step"]))

    def news(self) -> list[str]:
        """A sentence on what has failed, the first time that it is asked for."""
        if self.failure:
            why = f"{self.name} has failed ({self.failure})"
        elif not self.is_started.is_set():
            why = f"{self.name} has not started within {START_S:g} s"
        elif self.is_late:
            why = f"{self.name} has not taken everything within {START_S:g} s"
        else:
            return []
        told, self.is_told = self.is_told, True
        return [] if told else [f"{why}; the run goes on, and metrics.jsonl has everything"]

    def _run(self, settings: dict[str, Any]) -> None:
        tracker = self._try(self._started, settings)
        self.is_started.set()
        if tracker is not None:
            while (work := self.queue.get()) is not None:
                self._try(tracker.log, work[0], step=work[1])
            self._try(tracker.finish)
        self.is_ended.set()

    def _started(self, settings: dict[str, Any]) -> GeneralTracker:
        made = LOGGER_TYPE_TO_CLASS[self.name]
        if self.is_own:
            needs_folder = made.requires_logging_directory
            tracker = made(self.place.project, *([str(self.place.folder)] if needs_folder else []))
        else:
            tracker = made(**self.kind.arguments(self.place))
        # The caller is the one process that reports; accelerate need not ask which that is.
        tracker.main_process_only = False
        tracker.start()
        if self.name == "tensorboard":
            _store_in_tensorboard(tracker.tracker, settings)
        else:
            tracker.store_init_configuration(settings)
        self.id = self.kind.id_of(tracker)
        return tracker

    def _try(self, call: Callable[..., T], *arguments: Any, **named: Any) -> T | None:
        """Call what may raise anything; the first time that it does is kept as the tracker's failure."""
        try:
            return call(*arguments, **named)
        except BaseException as error:  # such as a panic of Rust's; Ctrl-C comes to the main thread alone
            self.failure = self.failure or in_a_line(error)
            return None


def as_tracked(line: Mapping[str, Any], *, texts: bool) -> dict[str, Any]:
    """A line of metrics.jsonl under transformers' names of metrics: eval_loss as eval/loss, and loss as train/loss.

    What is not finite is left out. Of what the doctor found there is its text, where the tracker reads `texts`.
    """
    if "doctor" in line:
        return {f"doctor/{line['doctor']}": line["text"]} if texts else {}
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in line.items()
        if name != "step" and isinstance(value, (int, float)) and math.isfinite(value)
    }


def _which(line: Mapping[str, Any]) -> tuple:
    """The step of a line and of what it is, which tell it from the other lines of its run."""
    return line["step"], line.get("doctor"), is_evaluation(line)


def _text(value: Any) -> str:
    return "None" if value is None else json.dumps(value, default=str)


def _store_in_tensorboard(writer: Any, settings: dict[str, Any]) -> None:
    """Write the settings as hyperparameters into the run's own file: accelerate's writes them as runs of their own."""
    from torch.utils.tensorboard.summary import hparams

    for summary in hparams(settings, {}):
        writer.file_writer.add_summary(summary)


def _wait(events: list[threading.Event]) -> None:
    """Wait for all events, at most START_S seconds together."""
    end = time.monotonic() + START_S
    for event in events:
        event.wait(max(0.0, end - time.monotonic()))


@contextlib.contextmanager
def _without_input() -> Iterator[None]:
    """An empty standard input, which is no terminal."""
    before, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = before

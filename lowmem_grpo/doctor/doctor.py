"""The doctor: looks at a run's numbers while it goes on, and says once what keeps it from learning."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from lowmem_grpo.config.training import TrainingConfig
from lowmem_grpo.doctor.symptoms import Course, symptoms
from lowmem_grpo.errors import UnhealthyRunError
from lowmem_grpo.output.saved import measured, whole


class Finding(NamedTuple):
    """A situation in which a run does not learn what it should, in words."""

    name: str  # of the situation, as the log has it: all_truncated
    text: str  # a sentence: what is seen, the likely cause, the remedy


class Doctor:
    """The doctor of a run, who looks at its inputs and at each step. A part of a checkpoint.

    Attributes:
        found: a line of metrics.jsonl for each finding, {"step", "doctor", "text"}, each situation once.
    """

    def __init__(
        self, config: TrainingConfig, total_steps: int, rewards: Sequence[str] = (),
        look_for: Callable[[Course, int], dict[str, str]] = symptoms,
    ):  # fmt: skip
        """look_for(course, total_steps) finds situations, each with its sentence; rewards are the functions' names."""
        self.course, self.total_steps = Course(config, [*rewards], first=[], last=[]), total_steps
        self.look_for = look_for
        self.found: list[dict[str, Any]] = []
        self.standing: list[Finding] = []  # of the last look, said before or not

    @property
    def is_off(self) -> bool:
        """True where nothing is looked at."""
        return self.course.config.doctor == "off"

    def look(self, step: int, metrics: Mapping[str, float]) -> list[dict[str, Any]]:
        """The lines of what is new in a step's metrics."""
        if self.is_off:
            return []
        self.course = self.course.after(metrics)
        return self.note(step, itertools.starmap(Finding, self.look_for(self.course, self.total_steps).items()))

    def note(self, step: int, findings: Iterable[Finding]) -> list[dict[str, Any]]:
        """The lines of those findings that were not said before."""
        self.standing = list(findings)
        known = {line["doctor"] for line in self.found}
        lines = [{"step": step, "doctor": name, "text": text} for name, text in self.standing if name not in known]
        self.found = [*self.found, *lines]
        return lines

    def refuse(self) -> None:
        """Raise UnhealthyRunError where doctor="stop" and the last look found something, said before or not."""
        if self.course.config.doctor == "stop" and self.standing:
            text = "; and ".join(finding.text for finding in self.standing)
            raise UnhealthyRunError(f"doctor='stop': {text}; set doctor='warn' to go on all the same")

    def summary(self) -> str:
        """All findings of the run, a line each."""
        lines = [f"  step {line['step']}, {line['doctor']}: {line['text']}" for line in self.found]
        return "\n".join(["the doctor found:", *lines])

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run must know: findings, and the steps that the next look goes back to."""
        return {"found": self.found, "first": self.course.first, "last": self.course.last}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what state() returned. Raise ValueError, or what Python raises, for anything else."""
        self.found = [
            {"step": whole(line["step"], "step"), "doctor": str(line["doctor"]), "text": str(line["text"])}
            for line in state["found"]
        ]
        first, last = ([measured(step) for step in state[name]] for name in ("first", "last"))
        self.course = replace(self.course, first=first, last=last)

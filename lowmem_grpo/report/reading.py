"""A run read from the files of its folder, whatever of them is missing or damaged."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.reward import RewardConfig
from lowmem_grpo.config.sft import SFTConfig
from lowmem_grpo.errors import InputError, printable_text
from lowmem_grpo.output.lock import is_in_use
from lowmem_grpo.output.places import without_places
from lowmem_grpo.output.saved import is_evaluation, read_lines, read_object
from lowmem_grpo.output.secrets import without_secrets

CONFIGS: dict[str, type] = {"grpo": GRPOConfig, "sft": SFTConfig, "reward": RewardConfig}
OF_A_PHASE = re.compile(r"(\d\d+)-([A-Za-z0-9_-]+)")  # the name of a phase's folder; one that is set aside has a dot
UNSAID = ("output_dir", "resume_from_checkpoint")  # settings that say nothing of a run
JOINER = "\u200d"  # within an emoji of several: the only invisible character that is kept
PIPELINE = "pipeline.json"  # the phases that a pipeline is to have, in its folder
OF_THE_BASE = "00-base"  # the folder, beside those of the phases, of the model that a pipeline is given
DONE = "done.json"  # in a phase's folder, once it has come to its end
EVALUATION = "evaluation.json"  # in a phase's folder
FILES_OF_A_RUN = ("metrics.jsonl", "run.json", *(f"{kind}_config.json" for kind in CONFIGS))


@dataclass(frozen=True)
class RunFiles:
    """A run, as its folder tells it. Each part is empty where its file is missing or cannot be read."""

    folder: Path
    kind: str  # grpo, sft or reward
    about: dict[str, Any]  # run.json
    settings: dict[str, Any]  # of the configuration, as it was given
    plan: dict[str, Any]  # plan.json
    steps: list[dict[str, Any]]  # of metrics.jsonl, the lines of steps
    evaluations: list[dict[str, Any]]  # the lines of evaluations, each under its step once
    findings: list[dict[str, Any]]  # the doctor's
    samples: list[dict[str, Any]]  # samples.jsonl
    num_damaged: int  # lines of either file that cannot be read
    is_running: bool
    best: dict[str, Any] = field(default_factory=dict)  # best/best.json: step, metric and value of the best evaluation

    def values(self, name: str, lines: Iterable[Mapping[str, Any]] | None = None) -> list[tuple[int, float]]:
        """A metric as (step, value), of the steps or other lines that have a finite one."""
        found = ((line["step"], number(line.get(name))) for line in (self.steps if lines is None else lines))
        return [(step, value) for step, value in found if value is not None]

    def names(self, pattern: str) -> list[str]:
        """The names of the steps' metrics that match a regular expression as a whole, in the order of the log."""
        known = dict.fromkeys(name for line in self.steps for name in line)
        return [name for name in known if re.fullmatch(pattern, name)]


def number(value: Any) -> float | None:
    """A finite number, or None for anything else that a file may hold."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e300 else None


def texts(value: Any) -> list[str]:
    """A text, or a list of several, as a list of texts."""
    found = value if isinstance(value, list) else [value]
    return [str(one) for one in found if one is not None]


def mapping(value: Any) -> dict[str, Any]:
    """A mapping, or an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def readable(text: str) -> str:
    """A text in which characters that turn lines around, or that no file can hold, are written out."""
    return JOINER.join(map(printable_text, text.split(JOINER)))


def kind_of(about: Mapping[str, Any], there: Iterable[str]) -> str:
    """The kind of a run: as run.json says, or the first whose settings are `there`, or an empty text."""
    return next((kind for kind in [about.get("kind"), *there] if isinstance(kind, str) and kind in CONFIGS), "")


def resumes_of(about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The times that a run went on, as run.json has them, each with "started" and "step"."""
    found = about.get("resumed")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def standing_of(about: Mapping[str, Any], *, is_running: bool) -> str:
    """How a run stands: finished, stopped, failed, running or cut off; an empty text where nothing says it."""
    how = mapping(about.get("ended")).get("how")
    if isinstance(how, str) and how in ("finished", "stopped", "failed"):
        return how
    return "running" if is_running else "cut off" if about else ""


def is_run(folder: Path) -> bool:
    """Tell whether a folder is a run's, finished or not."""
    return any((folder / name).is_file() for name in FILES_OF_A_RUN)


def phases_of(folder: Path) -> list[Path]:
    """The folders of a pipeline's phases, in their order, those to come too; none where the folder is no pipeline's."""
    if not folder.is_dir() or is_run(folder):
        return []
    there = [path for path in folder.iterdir() if path.is_dir() and OF_A_PHASE.fullmatch(path.name)]
    return sorted({*there, *phases_to_come(folder)}, key=lambda path: (int(path.name.partition("-")[0]), path.name))


def phases_to_come(folder: Path) -> dict[Path, dict[str, Any]]:
    """The phases of a pipeline, begun or not, by folder; each with the "kind" and "from" that pipeline.json has."""
    found = read_object(folder / PIPELINE).get("phases")
    rows = [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
    return {folder / str(row["folder"]): row for row in rows if OF_A_PHASE.fullmatch(str(row.get("folder")))}


def read_run(folder: Path) -> RunFiles:
    """The run of a folder.

    Raises:
        InputError: nothing of a run is there.
    """
    if not is_run(folder):
        raise InputError(
            f"{folder} holds no run: it has neither metrics.jsonl nor run.json; give the output_dir of a training or "
            "of a pipeline"
        )
    about = read_object(folder / "run.json")
    there = [kind for kind in CONFIGS if (folder / f"{kind}_config.json").is_file()]
    kind = kind_of(about, there) or "grpo"
    lines, of_log = read_lines(folder / "metrics.jsonl")
    samples, of_samples = read_lines(folder / "samples.jsonl")
    evaluations = {line["step"]: line for line in lines if is_evaluation(line)}
    steps = {line["step"]: line for line in lines if "loss" in line}
    return RunFiles(
        folder=folder, kind=kind, about=about, settings=read_object(folder / f"{kind}_config.json"),
        plan=read_object(folder / "plan.json"), steps=[steps[step] for step in sorted(steps)],
        evaluations=[evaluations[step] for step in sorted(evaluations)],
        findings=[line for line in lines if isinstance(line.get("doctor"), str)], samples=samples,
        best=read_object(folder / "best/best.json"), num_damaged=of_log + of_samples, is_running=is_in_use(folder),
    )  # fmt: skip


def for_others(run: RunFiles) -> RunFiles:
    """A run for others to read, with the public_name() of each path in what it was given."""
    names = ("about", "settings", "plan", "findings")
    return replace(run, **{name: without_places(getattr(run, name)) for name in names})


def changed_settings(run: RunFiles) -> list[tuple[str, Any, Any]]:
    """The settings of a run that are not their defaults, as (name, value, default), in the order of --help.

    Tokens and keys in them are left out.
    """
    found = []
    for one in fields(CONFIGS[run.kind]):
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        value = run.settings.get(one.name, default)
        if value != default and one.name not in UNSAID:
            found.append((one.name, without_secrets(value), default))
    return found


def mean(values: Iterable[float]) -> float | None:
    """The mean, or None of nothing."""
    found = list(values)
    return math.fsum(found) / len(found) if found else None

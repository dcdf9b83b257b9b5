"""Phases of a pipeline as runs: which model, which settings, which folder, what each is made from."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_grpo.config.fields import from_text
from lowmem_grpo.config.grpo import EVAL_FIELDS, GRPOConfig
from lowmem_grpo.config.sections import CALLED, AdapterFields
from lowmem_grpo.config.trl import known_fields
from lowmem_grpo.errors import (
    InputError,
    NotFiniteError,
    NotSavedError,
    UnansweredError,
    UnhealthyRunError,
    did_you_mean,
    shown,
)
from lowmem_grpo.inputs.names import look_up_inputs
from lowmem_grpo.lookup import is_adapter
from lowmem_grpo.paths import expanded
from lowmem_grpo.pipeline.file import Phase
from lowmem_grpo.pipeline.kinds import KINDS, Kind, entries
from lowmem_grpo.report.reading import DONE

STAND_IN = "accuracy_reward"  # for a reward that an earlier phase is to make
BASE = "base"  # in the place of a phase's name: the model that the pipeline is given
QUOTED = re.compile(r"(['\"])(.*?)\1")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
OF_ADAPTERS = tuple(field.name for field in dataclasses.fields(AdapterFields))
OF_PYTHON = ("model", "peft_config", "tokenizer", "callbacks", "train_dataset")  # arguments of train() and sft()
NAMED = (InputError, NotFiniteError, NotSavedError, UnansweredError, UnhealthyRunError)  # errors that are one sentence


@dataclass(frozen=True, eq=False)
class PhaseRun:
    """The run that a phase is: its folder and its checked settings."""

    name: str
    kind: Kind
    folder: Path
    origin: "PhaseRun | None"  # whose adapter it goes on with; None for the pipeline's own model
    config: Any  # of the kind's type
    adapter_fields: dict[str, Any]  # by which the adapter that it trains is begun
    inputs: dict[str, Any]  # datasets and rewards as they are written, by the kind's names for them

    @property
    def output(self) -> Path:
        """The adapter's folder, or the file of rows, that it makes."""
        return self.folder / self.kind.output


@dataclass(frozen=True)
class Evaluation:
    """The evaluation before the first phase, and after each that trains the policy."""

    dataset: Any
    reward_funcs: Any
    called: dict[str, Any]  # tools and environment_factory, where they are given
    config: GRPOConfig
    vram_budget: str | None  # of the common settings


@dataclass(frozen=True)
class Pipeline:
    """A pipeline whose names and settings are checked, and nothing else yet."""

    model: str
    output_dir: Path
    runs: list[PhaseRun]
    evaluation: Evaluation | None

    def model_of(self, run: PhaseRun) -> str:
        """The model that a phase begins with: the pipeline's, or the adapter of a phase before it."""
        return self.model if run.origin is None else str(run.origin.output)

    def named(self, run: PhaseRun, value: Any) -> list[PhaseRun]:
        """The phases before `run` that an input of it names: one by itself, or some in quotes within a call."""
        if not isinstance(value, str):
            return []
        quoted = {text for _, text in QUOTED.findall(value)} if value.endswith(")") else {value}
        return [one for one in self.runs[: self.runs.index(run)] if one.name in quoted]

    def filled(self, run: PhaseRun, value: Any, text_of: Callable[[PhaseRun], str]) -> Any:
        """An input of `run` with texts in place of the names of phases, or unchanged where it names none."""
        for one in self.named(run, value):
            text, name = text_of(one), re.escape(one.name)
            value = text if value == one.name else re.sub(rf"(['\"]){name}\1", lambda _, text=text: repr(text), value)
        return value

    def needed(self, run: PhaseRun) -> list[PhaseRun]:
        """The phases that a phase is made from: that of its adapter, and those that its inputs name."""
        named = [one for value in run.inputs.values() for entry in entries(value) for one in self.named(run, entry)]
        return named if run.origin is None else [run.origin, *named]


@contextlib.contextmanager
def naming(whose: str) -> Iterator[None]:
    """Have an error of ours within begin with what it is about, as `phase sft`."""
    try:
        yield
    except NAMED as error:
        raise type(error)(f"{whose}: {error}") from error


def resolve(
    model: Any, phases: Sequence[Phase], output_dir: Any, common: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> Pipeline:  # fmt: skip
    """A pipeline with every name and setting checked, before any file is read.

    Raises:
        InputError: a name, kind or setting is none, in a sentence that begins with the phase's name.
    """
    if not isinstance(model, (str, Path)) or not str(model).strip():
        raise InputError(f"model is {shown(model)}; give a hub id or a folder, since each phase loads it anew")
    if not isinstance(output_dir, (str, Path)) or not str(output_dir).strip():
        raise InputError(f"output_dir is {shown(output_dir)}; give a folder, in which each phase has its own")
    name, folder, common = str(Path(expanded(model))), Path(expanded(output_dir)), dict(common or {})
    _refuse_names(phases)
    _refuse_unused(common, phases, evaluation)
    runs: list[PhaseRun] = []
    for number, phase in enumerate(phases, 1):
        with naming(f"phase {phase.name}"):
            runs.append(_resolved(phase, folder / f"{number:02}-{phase.name}", runs, common, is_adapter(name)))
    return Pipeline(name, folder, runs, _evaluation(evaluation, common))


def up_to(pipeline: Pipeline, until: str | None) -> list[PhaseRun]:
    """The phases to the one that is the last to run, that one too."""
    return pipeline.runs if until is None else pipeline.runs[: _index_of(pipeline, until, "until") + 1]


def begun_anew(pipeline: Pipeline, name: str | None, wanted: list[PhaseRun]) -> list[PhaseRun]:
    """The phases that are to be done anew."""
    if name is None:
        return []
    index = _index_of(pipeline, name, "from")
    if index >= len(wanted):
        raise InputError(f"--from {name} is after --until {wanted[-1].name}; name one that comes before it")
    return pipeline.runs[index:]


def _index_of(pipeline: Pipeline, name: str, flag: str) -> int:
    """The place of a phase that a flag names. Raise InputError where it names none."""
    names = [run.name for run in pipeline.runs]
    if name not in names:
        hint = did_you_mean(name, names, f"they are {', '.join(names)}")
        raise InputError(f"--{flag} {shown(name)} is none of the phases; {hint}")
    return names.index(name)


def look_up(pipeline: Pipeline, model: str, until: str | None, begin_at: str | None) -> None:
    """Raise InputError for a model, dataset or reward that phases to do name and that is not there.

    `model` is the pipeline's as it was given: of Path("./model") its text would be a hub id.
    """
    wanted = up_to(pipeline, until)
    anew = begun_anew(pipeline, begin_at, wanted)
    to_do = [run for run in wanted if run in anew or not (run.folder / DONE).is_file()]
    for run in to_do:
        inputs: dict[str, Any] = {"model": model} if run.origin is None else {}
        for name, value in run.inputs.items():
            given = entries(value)
            if name == "reward_funcs":  # one that is still to be made counts, too
                inputs[name] = [STAND_IN if pipeline.named(run, one) else one for one in given]
            elif name != "critic_init":
                given = [one for one in given if not pipeline.named(run, one)]
                inputs[name] = given[0] if len(given) == 1 else given
        if run.kind.has_model:
            with naming(f"phase {run.name}"):
                look_up_inputs(inputs, run.config, needs_rewards=run.kind.config is GRPOConfig)
    if pipeline.evaluation is not None and to_do:
        of = pipeline.evaluation
        named = {"eval_dataset": of.dataset, "reward_funcs": of.reward_funcs, **of.called}
        with naming("eval"):
            look_up_inputs(named, pipeline.evaluation.config, needs_rewards=True)


def _resolved(
    phase: Phase, folder: Path, before: list[PhaseRun], common: Mapping[str, Any], model_is_adapter: bool
) -> PhaseRun:
    kind, origin, settings = KINDS[phase.kind], _origin(phase, before), dict(phase.settings)
    inputs = {name: settings.pop(name) for name in kind.inputs if settings.get(name) is not None}
    places = kind.places(folder)
    if "dataset" not in inputs:
        raise InputError("dataset is missing; name what it reads")
    for name in settings:
        if name in places:
            raise InputError(f"{name} is the pipeline's to give; leave it out")
        if name in OF_PYTHON:
            raise InputError(f"a phase takes no {name}; leave it out, or do this phase by itself")
        if name in OF_ADAPTERS and origin is not None:
            raise InputError(f"{name} is fixed by the phase that begins the adapter; leave it out here")
    _refuse_other_outputs(kind, inputs, before)
    known = [field.name for field in dataclasses.fields(kind.config)]
    settings = {**{name: value for name, value in common.items() if name in known}, **settings}
    known_settings = known_fields(settings, kind.config)
    settings = {name: from_text(kind.config, name, value) for name, value in known_settings.items()}
    adapter_fields = {name: value for name, value in settings.items() if name in OF_ADAPTERS}
    if origin is not None:
        adapter_fields = origin.adapter_fields
        settings = {name: value for name, value in settings.items() if name not in OF_ADAPTERS}
    if kind.config is GRPOConfig and settings.get("beta") and (origin is not None or model_is_adapter):
        settings = {"reference": "initial", **settings}  # the KL is to hold it near what it goes on from
    config = kind.config(**settings, **places)
    if "critic_init" in inputs:
        dataclasses.replace(config, critic_init=inputs["critic_init"])  # refused where there is no critic
    taken = {None, *(run.config.hub_model_id for run in before if getattr(run.config, "push_to_hub", False))}
    if getattr(config, "push_to_hub", False) and config.hub_model_id in taken:
        raise InputError("push_to_hub needs a repository that no other phase uploads to; give it a hub_model_id here")
    return PhaseRun(phase.name, kind, folder, origin, config, adapter_fields, inputs)


def _refuse_other_outputs(kind: Kind, inputs: Mapping[str, Any], before: Sequence[PhaseRun]) -> None:
    """Raise InputError for an input by the name of a phase that makes something else than what is read there."""
    made = {run.name: run.kind.makes for run in before}
    for name, value in inputs.items():
        for one in entries(value):
            if isinstance(one, str) and made.get(one, kind.reads[name][0]) not in kind.reads[name]:
                wanted = " or ".join(kind.reads[name])
                raise InputError(f"{name} is the phase {one}, which makes {made[one]}; name one that makes {wanted}")


def _origin(phase: Phase, before: list[PhaseRun]) -> PhaseRun | None:
    """The phase whose adapter a phase goes on with, or None for the pipeline's model."""
    trained = [run for run in before if run.kind.trains_policy]
    if phase.from_ is None:
        return trained[-1] if trained and KINDS[phase.kind].has_model else None
    if not KINDS[phase.kind].has_model:
        raise InputError(f"from: {shown(phase.from_)} is of no use to the kind {phase.kind}, which has no model")
    if phase.from_ == BASE:
        return None
    for run in trained:
        if run.name == phase.from_:
            return run
    words = ", ".join([BASE, *(run.name for run in trained)])
    raise InputError(f"from: {shown(phase.from_)} is no phase before it that trains the policy; it may be {words}")


def _refuse_names(phases: Sequence[Phase]) -> None:
    """Raise InputError for a phase whose name or kind is none, or a name that stands twice."""
    if not phases or not all(isinstance(phase, Phase) for phase in phases):
        raise InputError(f"phases is {shown(phases)}; give a list of at least one Phase")
    seen = {BASE}
    for phase in phases:
        if not isinstance(phase.name, str) or not NAME.fullmatch(phase.name):
            raise InputError(
                f"phase {shown(phase.name)} cannot be named so, since its folder is; use letters, digits, - and _"
            )
        if phase.name in seen:
            whose = "what every pipeline begins with" if phase.name == BASE else "the name of two phases"
            raise InputError(f"{phase.name} is {whose}; give each a name of its own")
        if phase.kind not in KINDS:
            hint = did_you_mean(str(phase.kind), KINDS, f"it may be {', '.join(KINDS)}")
            raise InputError(f"phase {phase.name}: kind {shown(phase.kind)} is none; {hint}")
        seen.add(phase.name)


def _refuse_unused(common: Mapping[str, Any], phases: Sequence[Phase], evaluation: Mapping[str, Any] | None) -> None:
    """Raise InputError for a common setting that nothing here reads."""
    kinds = [KINDS[phase.kind] for phase in phases]
    known = {field.name for kind in kinds for field in dataclasses.fields(kind.config)}
    for name in common:
        if any(name in kind.places(Path()) for kind in kinds):
            raise InputError(f"common has {name}, which is the pipeline's to give; leave it out")
        if name not in known | (EVAL_FIELDS if evaluation is not None else set()):
            hint = did_you_mean(name, known, "give it to the phases that it is for")
            raise InputError(f"common has {shown(name)}, a setting of none of the phases; {hint}")


def _evaluation(given: Mapping[str, Any] | None, common: Mapping[str, Any]) -> Evaluation | None:
    if given is None:
        return None
    settings = dict(given)
    dataset, rewards = (settings.pop(name, None) for name in ("dataset", "reward_funcs"))
    named = {name: settings.pop(name, None) for name in CALLED}
    called = {name: value for name, value in named.items() if value is not None}
    if dataset is None:
        raise InputError("eval has no dataset; name what to evaluate on, or leave eval out")
    for name in settings:
        if name not in EVAL_FIELDS:
            hint = did_you_mean(name, EVAL_FIELDS, "leave it out")
            raise InputError(f"eval has {shown(name)}, which no evaluation reads; {hint}")
    settings = {**{name: value for name, value in common.items() if name in EVAL_FIELDS}, **settings}
    config = GRPOConfig(**{name: from_text(GRPOConfig, name, value) for name, value in settings.items()})
    return Evaluation(dataset, rewards, called, config, common.get("vram_budget"))

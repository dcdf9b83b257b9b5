"""Checks of phases before any long work: of all that their runs check before they read weights."""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_grpo.config.sample import SampleConfig
from lowmem_grpo.data.rows import load_rows, read_rows
from lowmem_grpo.errors import InputError, counted, shown
from lowmem_grpo.inputs.prompts import read_evaluation_inputs
from lowmem_grpo.model.find import adapter_config, find_model, read_config
from lowmem_grpo.model.load import run_device
from lowmem_grpo.output.lock import releasing_locks
from lowmem_grpo.pipeline.kinds import SCORER, Outlook, entries
from lowmem_grpo.pipeline.phases import Evaluation, PhaseRun, Pipeline, naming
from lowmem_grpo.planner.plan import plan, plan_to_fit
from lowmem_grpo.tasks import find_task, held_out, is_task_name

OF_ONE_DATASET = ("dataset_config", "dataset_split", "dataset_streaming", "dataset_take")
REWARD_RULES = ("min_reward", "min_pass_rate", "max_pass_rate")  # of a selection: they read rewards
SOURCE = "dataset"  # the column that says which of several datasets a row is of


def check(pipeline: Pipeline, run: PhaseRun, to_do: list[PhaseRun], *, planned: bool) -> Outlook:
    """Check a phase as its run will, in a temporary folder.

    Data that phases in `to_do` will make is left out. With `planned`, memory is planned even where there is no
    vram_budget.

    Raises:
        InputError: bad input, in one sentence with the remedy.
    """
    config, model = run.config, pipeline.model_of(run)
    if run.origin in to_do:
        config, model = _with_fields(config, run.adapter_fields), pipeline.model

    _refuse_without_rewards(pipeline, run)

    def made(one: PhaseRun) -> str:
        return AWAITED if one in to_do and one.kind.makes == SCORER else str(one.output)

    inputs, awaited = {}, []
    for name, value in run.inputs.items():
        kept: list[Any] = []
        for one in entries(value):
            named = pipeline.named(run, one)  # of a routed reward, also the datasets that it is for
            late = [other for other in named if other in to_do and other.kind.makes in run.kind.reads[name]]
            awaited += [f"{name} is still to be made by {other.name}" for other in late]
            if not late or name == "reward_funcs":
                kept.append(pipeline.filled(run, one, made))
        if kept:
            inputs[name] = kept if len(kept) > 1 else kept[0]
    weights, several = getattr(config, "dataset_weights", None), entries(run.inputs["dataset"])
    if weights is not None and len(weights) != len(several):
        raise InputError(
            f"dataset_weights has {counted(len(weights), 'weight')} for {counted(len(several), 'dataset')}; "
            "give one for each"
        )
    if weights is not None and awaited:
        config = dataclasses.replace(config, dataset_weights=None)  # they are for all of the datasets
    with tempfile.TemporaryDirectory() as folder, releasing_locks():
        config = dataclasses.replace(config, **run.kind.places(Path(folder)))
        if "dataset" in inputs:
            found = run.kind.check(model, config, **with_datasets(run, inputs))
        elif run.kind.has_model:
            find_model(model, config)
            run_device(config)
            found = Outlook()
        else:
            found = Outlook()
        plan_found = found.plan
        if plan_found is None and hasattr(config, "vram_budget"):
            fitting = plan_to_fit if config.vram_budget is not None else plan if planned else None
            if fitting is not None:
                of_plan = config.for_sampler() if isinstance(config, SampleConfig) else config
                of_plan = _with_fields(of_plan, run.adapter_fields)
                plan_found = fitting(read_config(model, of_plan), of_plan, adapter_config(model, of_plan))
    facts = found.facts[1:] if any(one.startswith("dataset ") for one in awaited) else found.facts  # not all the rows
    return Outlook([*facts, *dict.fromkeys(awaited)], plan_found)


def _refuse_without_rewards(pipeline: Pipeline, run: PhaseRun) -> None:
    """Raise InputError where a phase chooses by rewards among completions that no phase before it scores."""
    rules = [name for name in REWARD_RULES if getattr(run.config, name, None) is not None]
    if run.kind.name != "pairs" and not rules:
        return
    sampled, left = [], [run]
    while left:
        named = [(one, pipeline.named(left[0], one)) for one in entries(left[0].inputs["dataset"])]
        if not all(phases for _, phases in named):
            return  # a file, which is looked at by itself
        left = [*left[1:], *(one for _, phases in named for one in phases if one.kind.name == "select")]
        sampled += [one for _, phases in named for one in phases if one.kind.name == "sample"]
    what = rules[0] if rules else "a pair"
    if not any("reward_funcs" in one.inputs or is_task_name(str(one.inputs["dataset"])) for one in sampled):
        raise InputError(f"{what} needs rewards, and {sampled[0].name} has no reward_funcs; give it some")
    if run.kind.name == "pairs" and all(one.config.num_generations == 1 for one in sampled):
        raise InputError(f"a pair needs two completions; {sampled[0].name} has num_generations=1, so raise it")


def awaited_reward(completions: list, **columns: Any) -> list[float]:
    """Stand in for a reward that an earlier phase is to make."""
    return [0.0] * len(completions)


def _with_fields(config: Any, fields: Mapping[str, Any]) -> Any:
    """The configuration with those of the fields that it has."""
    own = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{name: value for name, value in fields.items() if name in own})


AWAITED = f"{__name__}.{awaited_reward.__name__}"


def with_datasets(run: PhaseRun, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a run; several datasets become one list, whose rows say in `dataset` whose they are."""
    several = [name for name in run.kind.joined if name in inputs and len(entries(run.inputs[name])) > 1]
    joined = {name: _joined(run, name, entries(inputs[name])) for name in several}
    return {**inputs, **joined}


def _joined(run: PhaseRun, name: str, datasets: list[Any]) -> list[dict[str, Any]]:
    for setting in OF_ONE_DATASET:
        value, default = getattr(run.config, setting), getattr(type(run.config), setting)
        if value != default:
            raise InputError(f"{setting}={shown(value)} is for one dataset, and {name} has several; leave it out")
    rows: list[dict[str, Any]] = []
    for number, dataset in enumerate(datasets, 1):
        task, label = find_task(dataset), dataset if isinstance(dataset, str) else f"dataset {number}"
        if task is not None:
            dataset = held_out(task) if name == "eval_dataset" else task.whole or task.rows
        split = "test" if name == "eval_dataset" else None
        read = load_rows if run.kind.has_prompts else read_rows
        found = read(dataset, run.config, name=name, split=split)
        rows += [{SOURCE: label, **row} for row in found.to_list()]
    return rows


def check_evaluation(pipeline: Pipeline, evaluation: Evaluation) -> Outlook:
    """Check what is evaluated on before any weights are read. Raise InputError for bad input."""
    with naming("eval"):
        found = read_evaluation_inputs(
            pipeline.model, evaluation.reward_funcs, evaluation.dataset, evaluation.config, **evaluation.called
        )
    return Outlook([counted(len(found.eval_prompts), "prompt"), *found.notes])

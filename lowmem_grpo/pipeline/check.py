"""Checks of phases before any long work: of all that their runs check before they read weights."""

import dataclasses
import tempfile
from dataclasses import dataclass, field
from typing import Any

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.data.examples import FORMS
from lowmem_grpo.errors import InputError, shown
from lowmem_grpo.inputs import read_evaluation_inputs
from lowmem_grpo.model.find import adapter_config, find_model, read_config
from lowmem_grpo.model.load import run_device
from lowmem_grpo.output.lock import releasing_locks
from lowmem_grpo.pipeline.phases import Evaluation, PhaseRun, Pipeline
from lowmem_grpo.pipeline.record import entries
from lowmem_grpo.planner.plan import Plan, plan, plan_to_fit
from lowmem_grpo.tasks import find_task, held_out

OF_ONE_DATASET = ("dataset_config", "dataset_split", "dataset_streaming", "dataset_take")
SOURCE = "dataset"  # the column that says which of several datasets a row is of


@dataclass(frozen=True)
class Outlook:
    """The knowledge of a phase that is still to do."""

    facts: list[str] = field(default_factory=list)  # sentences for whoever watches
    plan: Plan | None = None


def check(pipeline: Pipeline, run: PhaseRun, to_do: list[PhaseRun], *, planned: bool) -> Outlook:
    """Check a phase as its run will, in a temporary folder.

    Inputs that phases in `to_do` will make are left out. With `planned`, memory is planned even where there is
    no vram_budget.

    Raises:
        InputError: bad input, in one sentence with the remedy.
    """
    config, model = run.config, pipeline.model_of(run)
    if run.origin in to_do:
        config, model = dataclasses.replace(config, **run.adapter_fields), pipeline.model
    inputs, awaited = {}, []
    for name, value in run.inputs.items():
        kept: list[Any] = []
        for one in entries(value):
            named = pipeline.named(run, one)
            if named in to_do:
                awaited.append(f"{one}, which is made before it")
                kept += [_awaited_reward(one)] if name == "reward_funcs" else []
            else:
                kept.append(one if named is None else str(named.output))
        if kept:
            inputs[name] = kept if len(kept) > 1 else kept[0]
    with tempfile.TemporaryDirectory() as folder, releasing_locks():
        config = dataclasses.replace(config, output_dir=folder, resume_from_checkpoint=None)
        if "dataset" not in inputs:
            found, facts = _plan_without_data(model, config, planned), []
        else:
            checked = run.kind.check(model, config, **with_datasets(run, inputs))
            found = checked.plan
            facts = [f"{checked.num_rows} rows, {checked.total_steps} steps"] if not awaited else []
            facts += checked.notes
            if found is None and planned:
                found = plan(read_config(model, config), config, adapter_config(model, config))
    return Outlook([*facts, *(f"with {what}" for what in awaited)], found)


def _plan_without_data(model: str, config: Any, planned: bool) -> Plan | None:
    """The plan of a phase whose data is still to be made. Raise InputError for a model or device that cannot serve."""
    find_model(model, config)
    run_device(config)
    if config.vram_budget is None and not planned:
        return None
    fitting = plan if config.vram_budget is None else plan_to_fit
    return fitting(read_config(model, config), config, adapter_config(model, config))


def _awaited_reward(name: str) -> Any:
    """A stand-in for the reward that an earlier phase is to make."""

    def reward(completions: list, **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    reward.__name__ = name
    return reward


def with_datasets(run: PhaseRun, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a run, several datasets made one list of rows, which say in `dataset` what they are of."""
    names = [name for name in ("dataset", "eval_dataset") if len(entries(inputs.get(name))) > 1]
    joined = {name: _joined(run, name, inputs[name]) for name in names}
    return {**inputs, **joined}


def _joined(run: PhaseRun, name: str, datasets: list[Any]) -> list[dict[str, Any]]:
    for setting in OF_ONE_DATASET:
        value, default = getattr(run.config, setting), getattr(type(run.config), setting)
        if value != default:
            raise InputError(f"{setting}={shown(value)} is for one dataset, and {name} has several; leave it out")
    rows: list[dict[str, Any]] = []
    forms: dict[str, str] = {}
    for number, dataset in enumerate(datasets, 1):
        task, label = find_task(dataset), dataset if isinstance(dataset, str) else f"dataset {number}"
        if task is not None:
            dataset = held_out(task) if name == "eval_dataset" else task.whole or task.rows
        split = "test" if name == "eval_dataset" else None
        found = run.kind.read(dataset, run.config, name=name, split=split)
        form = next((" and ".join(form) for form in FORMS if set(form) <= set(found.column_names)), "prompt")
        forms.setdefault(form, label)
        rows += [{SOURCE: label, **row} for row in found.to_list()]
    if run.kind.config is not GRPOConfig and len(forms) > 1:
        words = ", ".join(f"{label} has {form}" for form, label in forms.items())
        raise InputError(f"{name} has rows of several forms: {words}; rewrite them in one")
    return rows


def check_evaluation(pipeline: Pipeline, evaluation: Evaluation) -> Outlook:
    """Check what is evaluated on before any weights are read. Raise InputError for bad input."""
    try:
        found = read_evaluation_inputs(pipeline.model, evaluation.reward_funcs, evaluation.dataset, evaluation.config)
    except InputError as error:
        raise InputError(f"eval: {error}") from error
    return Outlook([f"{len(found.eval_prompts)} prompts", *found.notes])

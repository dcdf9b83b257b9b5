"""The kinds of phases, a row each: their settings, what they read and make, how they are checked and run.

What checks and runs them is imported as it is called, so that a pipeline's names are refused without what computes.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.pairs import PairsConfig
from lowmem_grpo.config.reward import RewardConfig
from lowmem_grpo.config.sample import SampleConfig
from lowmem_grpo.config.sections import CALLED
from lowmem_grpo.config.select import SelectConfig
from lowmem_grpo.config.sft import SFTConfig
from lowmem_grpo.errors import InputError, counted, shown
from lowmem_grpo.pipeline.pairs import pairs
from lowmem_grpo.pipeline.sampled import Row, read_sampled
from lowmem_grpo.pipeline.select import as_text, select, write_rows
from lowmem_grpo.terminal import show

if TYPE_CHECKING:
    from lowmem_grpo.inputs.training import RunInputs
    from lowmem_grpo.planner.plan import Plan


@dataclass(frozen=True)
class Outlook:
    """The knowledge of a phase that is still to do."""

    facts: list[str] = field(default_factory=list)  # sentences for whoever watches
    plan: "Plan | None" = None


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of phase. Whatever a phase names besides settings is passed to `check` and `run` by name."""

    name: str
    config: type  # of its settings
    places: Callable[[Path], dict[str, Any]]  # the settings that the pipeline gives, by the phase's folder
    inputs: tuple[str, ...]  # what it may name besides settings: datasets and rewards; `dataset` is needed
    output: str  # in its folder, what it makes: an adapter, or a file of rows
    makes: str  # what that is, in words: see `reads`
    reads: Mapping[str, tuple[str, ...]]  # by those of `inputs` that may name phases before it: what those may make
    trains_policy: bool = False  # True where later phases go on with its adapter
    has_model: bool = True  # False where it works on rows alone
    joined: tuple[str, ...] = ("dataset", "eval_dataset")  # those of `inputs` of which it reads one dataset alone
    has_prompts: bool = True  # False where its rows are examples or pairs
    check: Callable[..., Outlook]  # of (model, config, **inputs), before any weights are read
    run: Callable[..., dict[str, Any]]  # of (model, config, output, **inputs); the metrics of its last step


def entries(value: Any) -> list[Any]:
    """The datasets or rewards that an input names: several of a list, but one of a list of rows."""
    is_several = isinstance(value, (list, tuple)) and not all(isinstance(one, Mapping) for one in value)
    return list(value) if is_several else [value]


def _of_a_run(folder: Path) -> dict[str, Any]:
    return {"output_dir": str(folder), "resume_from_checkpoint": "auto"}


def _outlook(found: "RunInputs") -> Outlook:
    sizes = f"{counted(found.num_rows, 'row')}, {counted(found.total_steps, 'step')}"
    return Outlook([sizes, *found.notes], found.plan)


def _check_sft(model: Any, config: SFTConfig, dataset: Any, eval_dataset: Any = None) -> Outlook:
    from lowmem_grpo.inputs.examples import read_example_inputs

    return _outlook(read_example_inputs(model, dataset, eval_dataset, config))


def _run_sft(model: Any, config: SFTConfig, output: Path, dataset: Any, eval_dataset: Any = None) -> dict[str, Any]:
    from lowmem_grpo.loops.sft import sft

    return sft(model, dataset, eval_dataset, config).history[-1]


def _check_grpo(
    model: Any, config: GRPOConfig, dataset: Any, reward_funcs: Any = None, eval_dataset: Any = None,
    critic_init: Any = None, **called: Any,
) -> Outlook:  # fmt: skip
    from lowmem_grpo.inputs.prompts import read_training_inputs

    config = _with_critic(config, critic_init)
    return _outlook(read_training_inputs(model, reward_funcs, dataset, eval_dataset, config, **called))


def _run_grpo(
    model: Any, config: GRPOConfig, output: Path, dataset: Any, reward_funcs: Any = None, eval_dataset: Any = None,
    critic_init: Any = None, **called: Any,
) -> dict[str, Any]:  # fmt: skip
    from lowmem_grpo.loops.grpo import train

    config = _with_critic(config, critic_init)
    return train(model, reward_funcs, dataset, eval_dataset, config, **called).history[-1]


def _with_critic(config: GRPOConfig, critic_init: Any) -> GRPOConfig:
    """The configuration with what its critic begins as, a setting that may name a phase before."""
    return config if critic_init is None else dataclasses.replace(config, critic_init=critic_init)


def _check_reward(model: Any, config: RewardConfig, dataset: Any, eval_dataset: Any = None) -> Outlook:
    from lowmem_grpo.inputs.pairs import read_pair_inputs

    return _outlook(read_pair_inputs(model, dataset, eval_dataset, config))


def _run_reward(
    model: Any, config: RewardConfig, output: Path, dataset: Any, eval_dataset: Any = None
) -> dict[str, Any]:
    from lowmem_grpo.loops.reward import train_reward_model

    return train_reward_model(model, dataset, eval_dataset, config).history[-1]


def _check_sample(model: Any, config: SampleConfig, dataset: Any, reward_funcs: Any = None) -> Outlook:
    from lowmem_grpo.pipeline.sample import read_inputs

    found = read_inputs(model, dataset, reward_funcs, config)
    completions = counted(config.num_generations, "completion")
    return Outlook([f"{counted(len(found.prompts), 'prompt')}, {completions} of each", *found.notes])


def _run_sample(
    model: Any, config: SampleConfig, output: Path, dataset: Any, reward_funcs: Any = None
) -> dict[str, Any]:
    from lowmem_grpo.pipeline.sample import sample

    return sample(model, dataset, reward_funcs, config).metrics


def _check_select(model: Any, config: SelectConfig, dataset: Any) -> Outlook:
    return Outlook(as_text(select(_sampled(dataset), config).funnel).splitlines())


def _run_select(model: Any, config: SelectConfig, output: Path, dataset: Any) -> dict[str, Any]:
    found = select(_sampled(dataset), config)
    show(as_text(found.funnel), sys.stderr)
    write_rows(output, found.rows, entries(dataset))
    return {left.rule: left.num_completions for left in found.funnel}


def _check_pairs(model: Any, config: PairsConfig, dataset: Any) -> Outlook:
    return Outlook([counted(len(pairs(_sampled(dataset), config.min_margin)), "pair")])


def _run_pairs(model: Any, config: PairsConfig, output: Path, dataset: Any) -> dict[str, Any]:
    found = pairs(_sampled(dataset), config.min_margin)
    write_rows(output, found, entries(dataset))
    return {"pairs": len(found)}


def _sampled(dataset: Any) -> list[Row]:
    """The rows of one or several sampled files."""
    for path in entries(dataset):
        if not isinstance(path, str):
            raise InputError(f"dataset is {shown(path)}; name a phase of the kind sample, or a file that it wrote")
    return [row for path in entries(dataset) for row in read_sampled(path)]


POLICY, SCORER, COMPLETIONS, PREFERENCES = "a policy", "a reward model", "completions", "pairs"  # what phases make
PROMPTS = (COMPLETIONS, PREFERENCES)

KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            name="sft", config=SFTConfig, places=_of_a_run, inputs=("dataset", "eval_dataset"), output="adapter",
            makes=POLICY, reads={"dataset": (COMPLETIONS,), "eval_dataset": (COMPLETIONS,)}, trains_policy=True,
            joined=("eval_dataset",), has_prompts=False, check=_check_sft, run=_run_sft,
        ),
        Kind(
            name="grpo", config=GRPOConfig, places=_of_a_run,
            inputs=("dataset", "eval_dataset", "reward_funcs", "critic_init", *CALLED), output="adapter", makes=POLICY,
            reads={
                "dataset": PROMPTS, "eval_dataset": PROMPTS, "reward_funcs": (SCORER,), "critic_init": (SCORER,),
                **{name: (name,) for name in CALLED},  # as no phase makes them
            },
            trains_policy=True, check=_check_grpo, run=_run_grpo,
        ),
        Kind(
            name="reward", config=RewardConfig, places=_of_a_run, inputs=("dataset", "eval_dataset"), output="adapter",
            makes=SCORER, reads={"dataset": (PREFERENCES,), "eval_dataset": (PREFERENCES,)}, has_prompts=False,
            check=_check_reward, run=_run_reward,
        ),
        Kind(
            name="sample", config=SampleConfig, places=lambda folder: {"output": str(folder / "sampled.jsonl")},
            inputs=("dataset", "reward_funcs"), output="sampled.jsonl", makes=COMPLETIONS,
            reads={"dataset": PROMPTS, "reward_funcs": (SCORER,)}, check=_check_sample, run=_run_sample,
        ),
        Kind(
            name="select", config=SelectConfig, places=lambda folder: {}, inputs=("dataset",), output="selected.jsonl",
            makes=COMPLETIONS, reads={"dataset": (COMPLETIONS,)}, has_model=False, joined=(),
            check=_check_select, run=_run_select,
        ),
        Kind(
            name="pairs", config=PairsConfig, places=lambda folder: {}, inputs=("dataset",), output="pairs.jsonl",
            makes=PREFERENCES, reads={"dataset": (COMPLETIONS,)}, has_model=False, joined=(),
            check=_check_pairs, run=_run_pairs,
        ),
    )
}  # fmt: skip

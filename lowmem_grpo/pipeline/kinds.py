"""The kinds of phases, a row each: their settings, what they read and make, how they are checked and run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.sft import SFTConfig
from lowmem_grpo.data.rows import load_rows, read_rows
from lowmem_grpo.example_inputs import read_example_inputs
from lowmem_grpo.inputs import RunInputs, read_training_inputs
from lowmem_grpo.loops.grpo import train
from lowmem_grpo.loops.sft import sft


@dataclass(frozen=True)
class Kind:
    """A kind of phase. Whatever it names besides settings is passed to `check` and `run` by name."""

    name: str
    config: type  # of its settings
    inputs: tuple[str, ...]  # what it may name besides: datasets and rewards
    needs: tuple[str, ...]  # those of `inputs` that it cannot do without
    output: str  # in its folder, what it makes: an adapter, or a file of rows
    trains_policy: bool  # True where later phases go on with its adapter
    read: Callable[..., Dataset]  # rows of one dataset, as its training reads them
    check: Callable[..., RunInputs]  # (model, config, **inputs): what is wrong with them, before any weights are read
    run: Callable[..., dict[str, Any]]  # (model, config, **inputs): the metrics of its last step


def _check_sft(model: Any, config: SFTConfig, dataset: Any, eval_dataset: Any = None) -> RunInputs:
    return read_example_inputs(model, dataset, eval_dataset, config)


def _run_sft(model: Any, config: SFTConfig, dataset: Any, eval_dataset: Any = None) -> dict[str, Any]:
    return sft(model, dataset, eval_dataset, config).history[-1]


def _check_grpo(
    model: Any, config: GRPOConfig, dataset: Any, reward_funcs: Any = None, eval_dataset: Any = None
) -> RunInputs:
    return read_training_inputs(model, reward_funcs, dataset, eval_dataset, config)


def _run_grpo(
    model: Any, config: GRPOConfig, dataset: Any, reward_funcs: Any = None, eval_dataset: Any = None
) -> dict[str, Any]:
    return train(model, reward_funcs, dataset, eval_dataset, config).history[-1]


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "sft", SFTConfig, inputs=("dataset", "eval_dataset"), needs=("dataset",), output="adapter",
            trains_policy=True, read=read_rows, check=_check_sft, run=_run_sft,
        ),
        Kind(
            "grpo", GRPOConfig, inputs=("dataset", "eval_dataset", "reward_funcs"), needs=("dataset",),
            output="adapter", trains_policy=True, read=load_rows, check=_check_grpo, run=_run_grpo,
        ),
    )
}  # fmt: skip

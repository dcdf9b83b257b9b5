"""The evaluations of a run: before training, every eval_steps, and after; each with its difference from the first."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.evaluation.evaluate import Evaluation, measure
from lowmem_grpo.evaluation.statistics import differences
from lowmem_grpo.generate.sample import Sampler
from lowmem_grpo.inputs import Inputs
from lowmem_grpo.planner.plan import for_evaluation


class Evaluations:
    """Measures a policy at a step, and compares with the evaluation before training. A part of a checkpoint."""

    def __init__(self, measure: Callable[[int], Evaluation], prompts: list[Prompt], num_generations: int | None):
        """Take measure(step), which evaluates; prompts and num_generations identify it in a checkpoint."""
        self.measure = measure
        rows = [[prompt.ids, prompt.columns] for prompt in prompts]
        self.data = hashlib.sha256(json.dumps([num_generations, rows], default=str).encode()).hexdigest()
        self.first: dict[str, list[float]] = {}  # of the evaluation before training: each prompt's values, by metric
        self.first_data = self.data  # what those are of

    @property
    def have_changed(self) -> bool:
        """True where this run measures something else than the evaluation before training did."""
        return self.first_data != self.data

    def at(self, step: int, shown: list[str]) -> dict[str, float]:
        """The metrics at a step; of those named, also the differences from the evaluation before training."""
        found = self.measure(step)
        if step == 0:
            self.first = found.values
            return found.metrics
        if self.have_changed:
            return found.metrics
        return found.metrics | differences(
            self.first, {name: found.values[name] for name in shown if name in found.values}
        )

    def state(self) -> dict[str, Any]:
        """Each prompt's values in the evaluation before training, (P,) fp64 by metric, and what they are of."""
        if not self.first:
            return {}
        return {"data": self.first_data, **{n: torch.tensor(v, dtype=torch.float64) for n, v in self.first.items()}}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what state() returned."""
        if state:
            self.first_data = state["data"]
            self.first = {name: values.tolist() for name, values in state.items() if name != "data"}


def evaluations_of(inputs: Inputs, sampler: Sampler) -> Evaluations | None:
    """The evaluations of a run's eval_dataset by its rewards, or None where there is no eval_dataset."""
    prompts, config = inputs.eval_prompts, inputs.config
    if not prompts:
        return None
    evaluate = partial(measure, sampler, prompts, inputs.rewards, for_evaluation(inputs.plan, config))
    return Evaluations(evaluate, prompts, config.num_generations_eval)

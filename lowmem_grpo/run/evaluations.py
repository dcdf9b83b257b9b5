"""The evaluations of a run: before training, every eval_steps, and after; each with its difference from the first."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from lowmem_grpo.distributed import share, sum_over_ranks
from lowmem_grpo.evaluation.evaluate import measure
from lowmem_grpo.evaluation.statistics import confidence_interval, differences
from lowmem_grpo.generate.sample import Sampler
from lowmem_grpo.inputs.examples import ExampleInputs
from lowmem_grpo.inputs.pairs import PairInputs
from lowmem_grpo.inputs.prompts import Inputs
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.out_of_memory import TokenBudget
from lowmem_grpo.planner.plan import for_evaluation
from lowmem_grpo.update.nll import nll_and_accuracy
from lowmem_grpo.update.pair_metrics import correlation, score_metrics
from lowmem_grpo.update.pairs import mean_loss, scores_of_all


class Measured(Protocol):
    """The results of an evaluation."""

    @property
    def metrics(self) -> dict[str, float]: ...
    @property
    def values(self) -> dict[str, list[float]]: ...  # of the metrics that are means over prompts
    def samples(self) -> list[dict[str, Any]]: ...  # a few of what was sampled, as samples.jsonl has it


class Evaluations:
    """Measures a policy at a step, and compares with the evaluation before training. A part of a checkpoint."""

    def __init__(self, measure: Callable[[int], Measured] | None, data: Any):
        """measure(step) evaluates; data, as JSON has it, tells whether a resumed run measures the same.

        Without measure nothing is evaluated, and the values of an earlier run are carried on.
        """
        self.measure = measure
        self.data = hashlib.sha256(json.dumps(data, default=str).encode()).hexdigest()
        # Of the evaluation before training: each prompt's value, (P,) fp64 by metric, and what those are of.
        self.first: dict[str, torch.Tensor] = {}
        self.first_data = self.data
        self.samples: list[dict[str, Any]] = []  # of the last evaluation

    @property
    def are_off(self) -> bool:
        """True where nothing is evaluated."""
        return self.measure is None

    @property
    def have_changed(self) -> bool:
        """True where this run measures something else than the evaluation before training did."""
        return not self.are_off and self.first_data != self.data

    def at(self, step: int, shown: list[str]) -> dict[str, float]:
        """The metrics at a step; of those named, also the differences from the evaluation before training."""
        assert self.measure is not None
        found = self.measure(step)
        self.samples = found.samples()
        if step == 0:
            self.first = {name: torch.tensor(values, dtype=torch.float64) for name, values in found.values.items()}
            return found.metrics
        if self.have_changed:
            return found.metrics
        before = {name: values.tolist() for name, values in self.first.items()}
        return found.metrics | differences(before, {name: found.values[name] for name in shown if name in found.values})

    def state(self) -> dict[str, Any]:
        """The values of the evaluation before training, and what they are of."""
        return {"data": self.first_data, **self.first} if self.first else {}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what state() returned."""
        if state:
            self.first_data = state["data"]
            self.first = {name: values for name, values in state.items() if name != "data"}


def evaluations_of(inputs: Inputs, sampler: Sampler) -> Evaluations:
    """The evaluations of a run's eval_dataset by its rewards; they are off where there is none."""
    prompts, config = inputs.eval_prompts, inputs.config
    evaluate = partial(measure, sampler, prompts, inputs.rewards, for_evaluation(inputs.plan, config))
    rows = [[prompt.ids, prompt.columns] for prompt in prompts]
    return Evaluations(evaluate if prompts else None, [config.num_generations_eval, rows])


@dataclass(frozen=True)
class Losses:
    """An evaluation of examples, or of pairs."""

    metrics: dict[str, float]
    values: dict[str, list[float]] = field(default_factory=dict)  # none of examples: a mean over tokens is none of them

    def samples(self) -> list[dict[str, Any]]:
        """Nothing, since nothing is sampled."""
        return []


def losses_of(inputs: ExampleInputs, policy: Policy) -> Evaluations:
    """The evaluations of a run's eval_dataset by loss and accuracy; they are off where there is none."""
    examples, config = inputs.eval_examples, inputs.config

    def measure(step: int) -> Losses:
        budget = TokenBudget(config.token_budget)
        lengths = [len(one.ids) for one in examples]
        work = partial(nll_and_accuracy, policy, examples, share(lengths), config)
        nll, accuracy = budget.fit(work, lengths)
        sum_over_ranks([nll, accuracy])
        return Losses({"eval_loss": nll.item(), "eval_mean_token_accuracy": accuracy.item()})

    rows = [[one.ids, one.counted, one.weight] for one in examples]
    return Evaluations(measure if examples else None, rows)


def accuracies_of(inputs: PairInputs, policy: Policy) -> Evaluations:
    """The evaluations of a run's eval_dataset by the scores of its pairs; they are off where there is none.

    eval_accuracy has Wilson's interval, and eval_length_correlation is that of scores with numbers of tokens.
    """
    pairs, config = inputs.eval_pairs, inputs.config
    lengths = [len(text) for pair in pairs for text in pair.texts]

    def measure(step: int) -> Losses:
        budget = TokenBudget(config.token_budget)
        scores = scores_of_all(policy, pairs, budget, config).cpu()
        right = (scores[:, 0] > scores[:, 1]).double().tolist()
        low, high = confidence_interval(right)
        metrics = {f"eval_{name}": value for name, value in score_metrics(scores).items()}
        metrics |= {"eval_accuracy/ci_low": low, "eval_accuracy/ci_high": high}
        metrics["eval_loss"] = mean_loss(scores, pairs, config).item()
        metrics["eval_length_correlation"] = correlation(scores.flatten(), torch.tensor(lengths))
        return Losses(metrics, {"eval_accuracy": right})

    return Evaluations(measure if pairs else None, [[pair.chosen, pair.rejected, pair.margin] for pair in pairs])

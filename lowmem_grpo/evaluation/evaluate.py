"""Evaluation on held-out prompts: one greedy completion each, or k sampled ones; with 95 % intervals.

A completion is *correct* when its first reward function says at least 1. Over prompts, each of which counts once:

    mean@k   mean of the first reward function over the k completions
    pass@j   chance that one of j completions is correct, 1 - C(n - c, j) / C(n, j) for c correct ones of n
             (https://arxiv.org/abs/2107.03374)
    maj@k    how often the most common answer is correct; answers that are equally common share the vote
"""

import logging
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.data.text import as_read, completion_text
from lowmem_grpo.distributed import world_size
from lowmem_grpo.evaluation.statistics import confidence_interval, differences, shares
from lowmem_grpo.generate.completion import Completion
from lowmem_grpo.generate.sample import Sampled, Sampler
from lowmem_grpo.inputs.prompts import read_evaluation_inputs
from lowmem_grpo.lookup import is_adapter
from lowmem_grpo.objective.advantages import weighted_rewards
from lowmem_grpo.progress_bars import without_progress_bars
from lowmem_grpo.rewards import RewardRunner
from lowmem_grpo.rewards.final_answer import extract_answer
from lowmem_grpo.rollout.metrics import length_metrics, tool_metrics
from lowmem_grpo.rollout.scoring import complete_and_score
from lowmem_grpo.tools.conversation import sampler_of

log = logging.getLogger(__name__)
TOTAL = "total"  # among an evaluation's rewards, the weighted sum
NUM_SAMPLES = 8  # prompts whose completions are kept


@dataclass(frozen=True)
class Evaluation:
    """The results of P prompts with k completions each, group after group."""

    metrics: dict[str, float]
    values: dict[str, list[float]]  # of the metrics that are means over prompts, P each; NaN where nothing applies
    prompts: list[Prompt]  # P
    completions: list[Completion]  # P k
    texts: list  # P k, as reward functions get them
    rewards: dict[str, list[float]]  # P k each, by reward function; and of several the `total`, weighted

    def samples(self) -> list[dict[str, Any]]:
        """The first completion of each of the first NUM_SAMPLES prompts, with its rewards, as samples.jsonl has it."""
        k = len(self.completions) // len(self.prompts)
        rewards = {name: values for name, values in self.rewards.items() if name != TOTAL or len(self.rewards) == 1}
        total = self.rewards.get(TOTAL) or next(iter(self.rewards.values()))
        return [
            {
                "prompt": chat_as_text(prompt.text),
                "completion": as_read(self.texts[place]),
                "reward": total[place],
                "rewards": {name: values[place] for name, values in rewards.items()},
                "cut_off": self.completions[place].finish == "length",
            }
            for place, prompt in zip(range(0, k * NUM_SAMPLES, k), self.prompts, strict=False)
        ]


def measure(
    sampler: Sampler, prompts: list[Prompt], rewards: RewardRunner, config: GRPOConfig, step: int
) -> Evaluation:
    """Sample and score completions; metrics have training's names with `eval_` before them, and pass@j.

    The same seed in every evaluation, so that two of them differ by the policy alone; torch's generator stays where it
    was. A reward is called with about as many completions as a step has, so that reward_timeout says the same of both.
    """
    k = config.num_generations_eval or 1
    sample = partial(_sampled, sampler, prompts, config)
    per_call = max(config.prompts_per_step * config.num_generations // (k * world_size()), 1)
    completions, texts, scores, _ = complete_and_score(sampler.policy, prompts, sample, rewards, step, per_call)
    total = weighted_rewards(scores.rewards, config.reward_weights)
    answers = [extract_answer(completion_text(text)) for text in texts]
    values = {"reward": total.view(-1, k).nanmean(dim=1).tolist(), **shares(scores.rewards[:, 0], answers, k)}
    metrics = {}
    for name, of_prompts in values.items():
        known = [value for value in of_prompts if not math.isnan(value)]
        low, high = confidence_interval(known)
        mean = sum(known) / len(known) if known else math.nan
        metrics |= {name: mean, f"{name}/ci_low": low, f"{name}/ci_high": high}
    metrics["reward"] = total.nanmean().item()  # over completions, as in training; the interval is over prompts
    means = dict(zip(rewards.names, scores.rewards.nanmean(dim=0).tolist(), strict=True))
    metrics |= {f"rewards/{name}/mean": mean for name, mean in means.items()}
    metrics |= length_metrics(completions) | tool_metrics(completions)
    of_rewards = dict(zip(rewards.names, scores.rewards.T, strict=True))
    of_completions = {
        **{f"rewards/{name}/mean": of for name, of in of_rewards.items()},
        "completions/mean_length": torch.tensor([float(c.num_sampled) for c in completions]),
        "completions/clipped_ratio": torch.tensor([float(c.finish == "length") for c in completions]),
    }
    values |= {name: of.view(-1, k).nanmean(dim=1).tolist() for name, of in of_completions.items()}
    if len(of_rewards) > 1 or config.reward_weights is not None:
        of_rewards = {TOTAL: total, **of_rewards}
    return Evaluation(
        metrics={f"eval_{name}": value for name, value in metrics.items()},
        values={f"eval_{name}": of_prompts for name, of_prompts in values.items()},
        prompts=prompts, completions=completions, texts=texts,
        rewards={name: of.tolist() for name, of in of_rewards.items()},
    )  # fmt: skip


def chat_as_text(prompt: str | list[dict]) -> str:
    """The text of a prompt for a reader; of several messages each after who says it."""
    if isinstance(prompt, str):
        return prompt
    contents = [str(message.get("content") or "") for message in prompt]
    if len(prompt) == 1:
        return contents[0]
    return "\n".join(f"{message['role']}: {content}" for message, content in zip(prompt, contents, strict=True))


def _sampled(sampler: Sampler, prompts: list[Prompt], config: GRPOConfig, share: range) -> Sampled:
    """num_generations_eval completions a prompt, drawn as in training; one greedy one where it is None."""
    at_most = config.rollout_token_budget
    if config.num_generations_eval is None:
        return sampler.complete_greedily(prompts[share.start : share.stop], at_most=at_most)
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)
        return sampler.complete(prompts, config.num_generations_eval, share, at_most=at_most)


@without_progress_bars
def evaluate(
    model: str, reward_funcs: Any = None, dataset: Any = None, config: GRPOConfig | None = None, tools: Any = None,
    environment_factory: Any = None,
) -> dict[str, Evaluation]:  # fmt: skip
    """The evaluation of a model, {"model": ...}, or of an adapter folder, {"base": ..., "adapter": ...}.

    The base is the same model with the adapter switched off; the adapter's metrics have their differences from it.

    Args:
        model: hub id, model folder, adapter folder, or a loaded model, which is changed in place.
        reward_funcs: in any form that train() takes; None for a task or environments that have their own.
        dataset: in any form that train() takes; of a hub dataset the `test` split, and of a task what it holds out.
        config: settings, of which those of sampling and loading are read; GRPOConfig() by default.
        tools, environment_factory: in any form that train() takes.

    Raises:
        InputError: bad input, in one sentence with the remedy, before any weights are read.
    """
    config = GRPOConfig() if config is None else config
    inputs = read_evaluation_inputs(model, reward_funcs, dataset, config, tools, environment_factory)
    for note in inputs.notes:
        log.warning(note)
    prompts, rewards, config, policy = inputs.eval_prompts, inputs.rewards, inputs.config, inputs.load_policy()
    sampler = sampler_of(policy, config, inputs.toolbox)
    if not is_adapter(inputs.model):
        return {"model": measure(sampler, prompts, rewards, config, step=0)}
    with policy.as_reference():
        base = measure(sampler, prompts, rewards, config, step=0)
    adapter = measure(sampler, prompts, rewards, config, step=0)
    return {
        "base": base,
        "adapter": replace(adapter, metrics=adapter.metrics | differences(base.values, adapter.values)),
    }

"""Metrics of completions and their rewards, under TRL's names, and a metric in words."""

import math

import torch
from torch import Tensor

from lowmem_grpo.generate.completion import Completion
from lowmem_grpo.objective.advantages import Advantages, nanstd
from lowmem_grpo.rollout.rollout import Rollout


def length_metrics(completions: list[Completion]) -> dict[str, float]:
    """Mean, least and greatest number of sampled tokens, of all completions and of those that ended; or NaN."""
    lengths = torch.tensor([c.num_sampled for c in completions], dtype=torch.float32)
    ended = torch.tensor([c.finish != "length" for c in completions])
    terminated = lengths[ended] if ended.any() else torch.full((1,), torch.nan)
    return {
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": 1 - ended.float().mean().item(),
        "completions/mean_terminated_length": terminated.mean().item(),
        "completions/min_terminated_length": terminated.min().item(),
        "completions/max_terminated_length": terminated.max().item(),
    }


def tool_metrics(completions: list[Completion]) -> dict[str, float]:
    """Calls of tools for each completion, and the share of them that failed: 0 without any. Nothing without tools."""
    talks = [completion.conversation for completion in completions if completion.conversation is not None]
    if not talks:
        return {}
    num_calls = sum(talk.num_calls for talk in talks)
    return {
        "tools/call_frequency": num_calls / len(talks),
        "tools/failure_frequency": sum(talk.num_failures for talk in talks) / max(1, num_calls),
    }


def reward_metrics(names: list[str], rewards: Tensor, advantages: Advantages) -> dict[str, float]:
    """Means and deviations of rewards (B, R): NaN where no completion has a reward, or only one to deviate.

    There is nothing to report where there are no reward functions.
    """
    if not names:
        return {}
    columns = torch.cat([rewards, advantages.rewards[:, None]], dim=1)
    several = columns.isnan().logical_not().sum(dim=0) > 1
    means, deviations = columns.nanmean(dim=0), nanstd(columns, dim=0).where(several, torch.nan)
    metrics = {}
    for name, mean, deviation in zip(names, means.tolist(), deviations.tolist(), strict=False):
        metrics |= {f"rewards/{name}/mean": mean, f"rewards/{name}/std": deviation}
    return metrics | {
        "reward": means[-1].item(),
        "reward_std": deviations[-1].item(),
        "frac_reward_zero_std": advantages.zero_std.float().mean().item(),
    }


def in_words(value: float | None, form: str) -> str:
    """A metric for people, formatted as `.3f` says; - where it is the mean of nothing."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def remarks(metrics: dict[str, float], rollout: Rollout) -> list[str]:
    """Hints for a person who sees a step teach little."""
    differs = rollout.has_advantage
    found = []
    if not differs.any():
        found.append("no difference in any group")
    elif not (differs & rollout.completion_mask).any():
        found.append("all that differ are masked")
    cut_off = metrics["completions/clipped_ratio"]
    if cut_off > 0.5:
        found.append(f"{100 * cut_off:.0f} % cut off at max_completion_length")
    return found

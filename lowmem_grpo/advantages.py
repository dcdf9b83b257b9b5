"""Group-relative advantages: how much better a completion is than the others of its prompt."""

from typing import NamedTuple

import torch
from torch import Tensor

STD_FLOOR = 1e-4  # added to the standard deviation, as TRL does


class Advantages(NamedTuple):
    advantages: Tensor  # (B,) fp32; 0 where no reward function applied
    rewards: Tensor  # (B,) fp32 weighted sums; NaN where no reward function applied
    zero_std: Tensor  # (B,) bool: the deviation that divides is 0, so the completion teaches nothing


def group_advantages(
    rewards: Tensor,  # (B, R), NaN where a reward function does not apply
    *,
    num_generations: int,
    reward_weights: list[float] | None,
    scale_rewards: str,  # "group", "batch" or "none"
) -> Advantages:
    """Reward minus its group's mean, divided by the deviation (n - 1) of the group, of the batch, or by nothing."""
    total = weighted_rewards(rewards, reward_weights)
    groups = total.view(-1, num_generations)
    centered = groups - groups.nanmean(dim=1, keepdim=True)
    deviation = nanstd(groups, dim=1, keepdim=True)
    if scale_rewards == "batch":
        deviation = nanstd(groups.flatten(), dim=0, keepdim=True)
    deviation = deviation.expand_as(groups)
    scaled = centered if scale_rewards == "none" else centered / (deviation + STD_FLOOR)
    zero_std = torch.isclose(deviation, torch.zeros_like(deviation))
    return Advantages(scaled.nan_to_num(0.0).flatten(), total, zero_std.flatten())


def weighted_rewards(rewards: Tensor, reward_weights: list[float] | None) -> Tensor:
    """(B, R) -> (B,): the weighted sum of the rewards that apply, NaN where none does."""
    weights = torch.ones(rewards.shape[1]) if reward_weights is None else torch.tensor(reward_weights)
    return (rewards * weights).nansum(dim=1).masked_fill(rewards.isnan().all(dim=1), torch.nan)


def nanstd(values: Tensor, *, dim: int, keepdim: bool = False) -> Tensor:
    """Standard deviation with n - 1 that leaves NaN out; 0 where fewer than two values are left."""
    count = values.isnan().logical_not().sum(dim=dim, keepdim=keepdim)
    squares = (values - values.nanmean(dim=dim, keepdim=True)).square().nansum(dim=dim, keepdim=keepdim)
    return (squares / (count - 1).clamp(min=1)).sqrt()

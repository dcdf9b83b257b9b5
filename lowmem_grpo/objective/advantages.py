"""Advantages: how much better a completion is than what it is compared with. Pure functions of the rewards."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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
    penalty: Tensor | float = 0.0,  # (B,) taken from each sum, such as a KL
) -> Advantages:
    """Reward minus its group's mean, divided by the deviation (n - 1) of the group, of the batch, or by nothing."""
    total = weighted_rewards(rewards, reward_weights)
    groups = (total - penalty).view(-1, num_generations)
    centered = from_mean(groups, dim=1)
    deviation = nanstd(groups, dim=1, keepdim=True)
    if scale_rewards == "batch":
        deviation = nanstd(groups.flatten(), dim=0, keepdim=True)
    deviation = deviation.expand_as(groups)
    scaled = centered if scale_rewards == "none" else centered / (deviation + STD_FLOOR)
    return Advantages(_where_rewarded(scaled.flatten(), total), total, _is_zero(deviation).flatten())


def gdpo_advantages(
    rewards: Tensor,  # (B, R)
    *,
    num_generations: int,
    reward_weights: list[float] | None,
    penalty: Tensor | float = 0.0,
) -> Advantages:
    """Each reward scaled in its group, then their weighted sum in the batch (GDPO, https://arxiv.org/abs/2601.05242).

    So a reward of small numbers weighs as much as one of large numbers.
    """
    groups = rewards.view(-1, num_generations, rewards.shape[1])
    scaled = from_mean(groups, dim=1) / (nanstd(groups, dim=1, keepdim=True) + STD_FLOOR)
    total = weighted_rewards(scaled.flatten(0, 1), reward_weights)
    return _over_batch(total - penalty, weighted_rewards(rewards, reward_weights))


def rloo_advantages(
    rewards: Tensor,  # (B, R)
    *,
    num_generations: int,
    reward_weights: list[float] | None,
    penalty: Tensor | float = 0.0,
) -> Advantages:
    """Reward minus the mean of the group's other rewards (RLOO, https://arxiv.org/abs/2402.14740)."""
    total = weighted_rewards(rewards, reward_weights)
    groups = (total - penalty).view(-1, num_generations)
    count = groups.isnan().logical_not().sum(dim=1, keepdim=True)
    # r - (sum - r) / (n - 1), where nobody else has a reward there is nothing to compare with.
    compared = from_mean(groups, dim=1) * (count / (count - 1).clamp(min=1))
    deviation = nanstd(groups, dim=1, keepdim=True).expand_as(groups)
    return Advantages(_where_rewarded(compared.flatten(), total), total, _is_zero(deviation).flatten())


def reinforce_plus_plus_advantages(
    rewards: Tensor,  # (B, R)
    *,
    num_generations: int,
    reward_weights: list[float] | None,
    group_baseline: bool,
    penalty: Tensor | float = 0.0,
) -> Advantages:
    """Reward, or its distance from the group's mean, scaled in the batch (REINFORCE++, https://arxiv.org/abs/2501.03262)."""
    total = weighted_rewards(rewards, reward_weights)
    own = total - penalty
    if group_baseline:
        own = from_mean(own.view(-1, num_generations), dim=1).flatten()
    return _over_batch(own, total)


def scores_alone(
    rewards: Tensor,  # (B, R)
    *,
    num_generations: int,
    reward_weights: list[float] | None,
    penalty: Tensor | float = 0.0,
) -> Advantages:
    """Reward as it is, compared with nothing yet: gae.py makes it an advantage of each token."""
    total = weighted_rewards(rewards, reward_weights)
    deviation = nanstd(total, dim=0, keepdim=True).expand_as(total)
    return Advantages(_where_rewarded(total - penalty, total), total, _is_zero(deviation))


def compare(
    rewards: Tensor, *, num_generations: int, reward_weights: list[float] | None, adv_estimator: str,
    scale_rewards: str, multi_objective_aggregation: str, penalty: Tensor | float = 0.0,
) -> Advantages:  # fmt: skip
    """The advantages that a configuration asks for; 0 where its weights are, and rewards are measured alone."""
    given: dict[str, Any] = dict(num_generations=num_generations, reward_weights=reward_weights, penalty=penalty)
    if multi_objective_aggregation == "normalize_then_sum":
        found = gdpo_advantages(rewards, **given)
    else:
        found = _ESTIMATORS[adv_estimator](scale_rewards)(rewards, **given)
    if reward_weights is None or any(reward_weights):
        return found
    return found._replace(advantages=torch.zeros_like(found.advantages))


_ESTIMATORS: dict[str, Callable[[str], Callable[..., Advantages]]] = {  # by scale_rewards, which only the first reads
    "grpo": lambda scale_rewards: partial(group_advantages, scale_rewards=scale_rewards),
    "rloo": lambda _: rloo_advantages,
    "reinforce_plus_plus": lambda _: partial(reinforce_plus_plus_advantages, group_baseline=False),
    "reinforce_plus_plus_baseline": lambda _: partial(reinforce_plus_plus_advantages, group_baseline=True),
    "gae": lambda _: scores_alone,
}


def _over_batch(values: Tensor, rewards: Tensor) -> Advantages:
    deviation = nanstd(values, dim=0, keepdim=True).expand_as(values)
    scaled = from_mean(values, dim=0) / (deviation + STD_FLOOR)
    return Advantages(_where_rewarded(scaled, rewards), rewards, _is_zero(deviation))


def _where_rewarded(advantages: Tensor, rewards: Tensor) -> Tensor:
    """0 where nothing was rewarded (NaN). Another NaN, such as of a KL that is not finite, has to show in the loss."""
    return advantages.masked_fill(rewards.isnan(), 0.0)


def _is_zero(deviation: Tensor) -> Tensor:
    return torch.isclose(deviation, torch.zeros_like(deviation))


def weighted_rewards(rewards: Tensor, reward_weights: list[float] | None) -> Tensor:
    """(B, R) -> (B,): the weighted sum of the rewards that apply, NaN where none does.

    Without weights, or with none but 0, it is the plain sum.
    """
    weights = torch.tensor(reward_weights) if any(reward_weights or []) else torch.ones(rewards.shape[1])
    return (rewards * weights).nansum(dim=1).masked_fill(rewards.isnan().all(dim=1), torch.nan)


def from_mean(values: Tensor, *, dim: int) -> Tensor:
    """Each value less the mean along dim, which leaves NaN out; exactly 0 where all values are equal.

    The mean of eight 0.1 is not 0.1 in fp32. What is left over, 7e-9 / STD_FLOOR, would count as a difference, and
    Adam makes a whole step of a gradient however small.
    """
    above = values - values.masked_fill(values.isnan(), torch.inf).amin(dim=dim, keepdim=True)
    return above - above.nanmean(dim=dim, keepdim=True)


def nanstd(values: Tensor, *, dim: int, keepdim: bool = False) -> Tensor:
    """Standard deviation with n - 1 that leaves NaN out; 0 where fewer than two values are left.

    In fp64 on the way: in fp32 squares of 2e19 are infinite, and an advantage divided by that is 0.
    """
    count = values.isnan().logical_not().sum(dim=dim, keepdim=keepdim)
    squares = from_mean(values, dim=dim).double().square().nansum(dim=dim, keepdim=keepdim)
    return (squares / (count - 1).clamp(min=1)).sqrt().to(values.dtype)

"""The critic's loss, and how much of the returns it explains. Pure functions of tensors."""

import torch
from torch import Tensor

from lowmem_grpo.objective.formulas import clip


def value_losses(
    values: Tensor,  # (N,) of the critic now; carries the gradient
    old_values: Tensor,  # (N,) of the critic before the update
    returns: Tensor,  # (N,)
    *,
    cliprange: float | None,
) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic loss of each token's value, (N,), and whether the clipped value decided it, (N,) bool.

        0.5 max((v - R)^2, (clip(v, V - c, V + c) - R)^2)

    The clip is of PPO's first code and not of its paper, which has the squared error alone, as there is without a
    cliprange (https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details).
    """
    errors = (values - returns).square()
    if cliprange is None:
        return 0.5 * errors, torch.zeros_like(errors, dtype=torch.bool)
    clipped = clip(values, old_values - cliprange, old_values + cliprange)
    bounded = (clipped - returns).square()
    return 0.5 * torch.max(errors, bounded), bounded > errors


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(R - V) / Var(R): 1 where values (M,) tell the returns, 0 where a constant would do as well.

    NaN where there is nothing to explain: all returns are equal, or there are fewer than two.
    """
    if len(returns) < 2:
        return float("nan")
    variance = returns.var()
    return (1 - (returns - values).var() / variance).item() if variance > 0 else float("nan")

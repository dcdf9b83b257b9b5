"""Generalized advantage estimation: what each token of a completion was worth. Pure functions of rewards and values.

A rollout has B completions and M tokens, completion after completion; those of completion b are at offsets[b] up to
offsets[b + 1]. The value of a token is what is expected from it on, before it is drawn:

    d_t = r_t + gamma V_{t+1} - V_t          A_t = d_t + gamma lam A_{t+1}          R_t = A_t + V_t

V and A are 0 after a completion's last token, also where it was cut off (https://arxiv.org/abs/1506.02438).
"""

import torch
from torch import Tensor

from lowmem_grpo.objective.advantages import from_mean, nanstd


def token_rewards(
    scores: Tensor,  # (B,) of the completions
    offsets: Tensor,  # (B + 1,) int64
    penalty: Tensor | None,  # (M,) taken from each token's reward, such as beta times a KL
) -> Tensor:
    """The reward of each token, (M,): a completion's score at its last token, and minus the penalty at each."""
    rewards = torch.zeros(int(offsets[-1])) if penalty is None else -penalty
    is_there = offsets.diff() > 0
    rewards[offsets[1:][is_there] - 1] += scores[is_there]
    return rewards


def gae(
    rewards: Tensor,  # (M,)
    values: Tensor,  # (M,)
    offsets: Tensor,  # (B + 1,) int64
    *,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Advantages A and returns R of each token, (M,) each, in the values' dtype.

    In fp64 on the way: with gamma and lam of 1 a return is the reward, whatever the values are, and rewards that are
    alike would differ by 1e-7 in fp32.
    """
    dtype, rewards, values = values.dtype, rewards.double(), values.double()
    lengths = offsets.diff()
    following = torch.cat([values[1:], values.new_zeros(1)])[: len(values)]
    following[offsets[1:][lengths > 0] - 1] = 0
    errors = rewards + gamma * following - values
    # A row a completion, filled up with 0 at its end, where a sum from the end is 0 still.
    tokens = torch.arange(int(lengths.max()))[None] < lengths[:, None]  # (B, T)
    columns = errors.new_zeros(tokens.shape).masked_scatter(tokens, errors).unbind(dim=1)
    sums, found = errors.new_zeros(len(lengths)), []
    for column in reversed(columns):
        sums = column + gamma * lam * sums
        found.append(sums)
    advantages = torch.stack(found[::-1], dim=1)[tokens]
    return advantages.to(dtype), (advantages + values).to(dtype)


def whiten(advantages: Tensor, counted: Tensor) -> Tensor:
    """Advantages (M,) of mean 0 and variance 1 over the counted tokens, (M,) bool; 0 at all others.

    Divided by sqrt(variance + 1e-8), the variance with n - 1, as in TRL's PPO.
    """
    if not counted.any():
        return torch.zeros_like(advantages)
    own = advantages[counted]
    scale = (nanstd(own, dim=0).square() + 1e-8).sqrt()
    return torch.zeros_like(advantages).masked_scatter(counted, from_mean(own, dim=0) / scale)

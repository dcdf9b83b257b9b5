"""The clipped policy objective and its KL term, per token, from log-probabilities: nothing here knows the vocabulary.

    r = exp(logp - old)     loss_t = -min(min(r, delta) A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A) + beta kl
    kl = exp(ref - logp) - (ref - logp) - 1, times r with bias correction        (k3, http://joschu.net/blog/kl-approx.html)
    loss = sum_t weight_t loss_t                                                 (PPO, https://arxiv.org/abs/1707.06347)

All tensors are (N,) fp32, one entry for each token that counts; the weights carry the normalisation.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class TokenStats(NamedTuple):
    """What happened to each token, (N,) each, without gradient."""

    kl: Tensor | None  # fp32, as it enters the loss; None without a reference
    clipped_low: Tensor  # bool: the ratio fell below the interval while the advantage is negative
    clipped_high: Tensor  # bool: the ratio rose above it while the advantage is positive


def policy_loss(
    logprobs: Tensor,  # (N,) fp32, carries the gradient
    old_logprobs: Tensor,  # (N,) of the policy that the rollout was sampled from
    ref_logprobs: Tensor | None,  # (N,) of the reference; needed where beta is not 0
    advantages: Tensor,  # (N,) each token's own
    weights: Tensor,  # (N,)
    *,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None,
    beta: float,
    use_bias_correction_kl: bool,
) -> tuple[Tensor, TokenStats]:
    """Scalar loss, the weighted sum over tokens, and what happened to each of them.

    Raises:
        ValueError: beta is not 0 and there are no reference log-probabilities.
    """
    if beta != 0 and ref_logprobs is None:
        raise ValueError(f"beta={beta} needs ref_logprobs")
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    token_loss = -torch.minimum(bounded * advantages, clipped * advantages)
    kl = None
    if ref_logprobs is not None:
        gap = ref_logprobs - logprobs
        kl = torch.exp(gap) - gap - 1
        kl = kl * ratio if use_bias_correction_kl else kl
        token_loss = token_loss + beta * kl
    stats = TokenStats(
        kl=None if kl is None else kl.detach(),
        clipped_low=(ratio.detach() < 1 - epsilon_low) & (advantages < 0),
        clipped_high=(ratio.detach() > 1 + epsilon_high) & (advantages > 0),
    )
    return (weights * token_loss).sum(), stats

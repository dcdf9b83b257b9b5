"""The objectives: how token losses are weighted. The token loss itself is kernels/policy_loss.py."""

import torch
from torch import Tensor

from lowmem_grpo.kernels.policy_loss import TokenStats, policy_loss

__all__ = ["TokenStats", "policy_loss", "token_weights"]


def token_weights(
    lengths: Tensor,  # (B,) int64, tokens of each completion of the step
    completion_mask: Tensor,  # (B,) bool, which of them count
    *,
    loss_type: str,
    max_completion_length: int,
) -> Tensor:
    """Weight of each token of a completion, (B,) fp32: a step's loss is the sum of weight times token loss.

    The divisor is the whole step's, so that micro-batches cannot change it.

    grpo      1 / (B length)                a mean over completions of their token means (https://arxiv.org/abs/2402.03300)
    dapo      1 / counted tokens            every token weighs the same (https://arxiv.org/abs/2503.14476)
    bnpo      1 / counted tokens            dapo's, where the batch is the whole step, as it is here
    dr_grpo   1 / (B max_completion_length) no length bias (https://arxiv.org/abs/2503.20783)

    A completion that is masked out still counts in B, as in TRL.
    """
    counted = lengths * completion_mask
    completions = lengths.shape[0]
    if loss_type == "grpo":
        weights = 1.0 / (completions * counted.clamp(min=1))
    elif loss_type in ("dapo", "bnpo"):
        weights = torch.ones_like(lengths) / counted.sum().clamp(min=1)
    elif loss_type == "dr_grpo":
        weights = torch.full(lengths.shape, 1.0 / (completions * max_completion_length), device=lengths.device)
    else:
        raise ValueError(f"loss_type {loss_type!r} is not one of grpo, dapo, bnpo, dr_grpo")
    return weights.float() * completion_mask

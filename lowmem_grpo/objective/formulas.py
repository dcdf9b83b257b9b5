"""The objectives: pure functions of per-token log-probabilities. The clipped token loss is kernels/policy_loss.py too.

A micro-batch has N tokens of whole completions, and the step B completions; `sequences` says which completion each
token is of. What multiplies the policy's part of a token's loss (an importance weight, a mask) multiplies its advantage
here, which is the same in every objective: they are linear in it, but for its sign.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

LOWEST = math.log(1e-8)  # VESPO's bounds on a log-ratio, as in TRL
HIGHEST = 20.0


def clip(x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Numbers within [low, high], with the gradient of x at a bound, too: torch's clamp has none there from 2.14 on."""
    return torch.where(x > high, high, torch.where(x < low, low, x))


def token_weights(
    lengths: Tensor,  # (B,) int64, tokens of each completion of the step
    completion_mask: Tensor,  # (B,) bool, which of them count
    *,
    aggregation: str,
    max_completion_length: int,
) -> Tensor:
    """Weight of each token of a completion, (B,) fp32: a step's loss is the sum of weight times token loss.

    The divisor is the whole step's, so that micro-batches cannot change it.

    grpo      1 / (B length)                a mean over completions of their token means (https://arxiv.org/abs/2402.03300)
    dapo      1 / counted tokens            every token weighs the same (https://arxiv.org/abs/2503.14476)
    dr_grpo   1 / (B max_completion_length) no length bias (https://arxiv.org/abs/2503.20783)
    luspo     1 / B                         a completion weighs as long as it is (https://arxiv.org/abs/2602.05261)

    A completion that is masked out still counts in B, as in TRL.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation {aggregation!r} is not one of {', '.join(AGGREGATIONS)}")
    weights = AGGREGATIONS[aggregation](lengths * completion_mask, max_completion_length)
    return weights.float() * completion_mask


# Of counted tokens (B,) int64 of each completion, and max_completion_length.
AGGREGATIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "grpo": lambda counted, longest: 1.0 / (len(counted) * counted.clamp(min=1)),
    "dapo": lambda counted, longest: torch.ones_like(counted) / counted.sum().clamp(min=1),
    "dr_grpo": lambda counted, longest: torch.full_like(counted, 1.0 / (len(counted) * longest), dtype=torch.float32),
    "luspo": lambda counted, longest: torch.full_like(counted, 1.0 / len(counted), dtype=torch.float32),
}


def sequence_sum(values: Tensor, sequences: Tensor, num_completions: int) -> Tensor:
    """The sum over each token's completion, (N,)."""
    return values.new_zeros(num_completions).index_add(0, sequences, values)[sequences]


def sequence_mean(values: Tensor, sequences: Tensor, num_completions: int) -> Tensor:
    """The mean over each token's completion, (N,)."""
    count = sequence_sum(torch.ones_like(values), sequences, num_completions)
    return sequence_sum(values, sequences, num_completions) / count


def log_ratios(
    logprobs: Tensor,  # (N,), carries the gradient
    old_logprobs: Tensor,  # (N,)
    sequences: Tensor,  # (N,)
    num_completions: int,
    *,
    level: str,
) -> Tensor:
    """Log of new policy over old at each token, (N,), of the token or of its completion, with its gradient.

    token            the token's own
    sequence         the mean over its completion (GSPO, https://arxiv.org/abs/2507.18071)
    sequence_token   the value of sequence and the gradient of token (GSPO-token, the same paper)
    """
    own = logprobs - old_logprobs
    if level == "token":
        return own
    mean = sequence_mean(own, sequences, num_completions)
    if level == "sequence":
        return mean
    if level == "sequence_token":
        return mean.detach() + (logprobs - logprobs.detach())
    raise ValueError(f"importance_sampling_level {level!r} is not one of token, sequence, sequence_token")


def clipped_loss(
    ratio: Tensor,  # (N,)
    advantages: Tensor,  # (N,)
    *,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None,
) -> Tensor:
    """PPO's pessimistic loss (N,), -min(r A, clip(r) A), whose unclipped ratio is at most delta.

    delta is the dual clip (https://arxiv.org/abs/1912.09729): with A < 0 the loss is at most -delta A.
    """
    clipped = clip(ratio, 1 - epsilon_low, 1 + epsilon_high)
    bounded = ratio if delta is None else clip(ratio, -math.inf, delta)
    return -torch.min(bounded * advantages, clipped * advantages)


def cispo_loss(logprobs: Tensor, ratio: Tensor, advantages: Tensor, *, epsilon_high: float) -> Tensor:
    """REINFORCE weighted by min(r, epsilon_high), (N,): no token loses its gradient (https://arxiv.org/abs/2506.13585)."""
    return -ratio.detach().clamp(max=epsilon_high) * advantages * logprobs


def sapo_loss(ratio: Tensor, advantages: Tensor, *, temperature_pos: float, temperature_neg: float) -> Tensor:
    """A smooth gate in the place of the clip, (N,): 4 / tau sigmoid(tau (r - 1)) A (https://arxiv.org/abs/2511.20347)."""
    temperature = torch.where(advantages > 0, temperature_pos, temperature_neg)
    return -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantages


def vespo_weights(
    log_ratio: Tensor,  # (N,) of the tokens
    advantages: Tensor,  # (N,)
    log_importance_weights: Tensor | None,  # (N,) log of old policy to sampler, of the completion
    sequences: Tensor,
    num_completions: int,
    *,
    k_pos: float,
    lambda_pos: float,
    k_neg: float,
    lambda_neg: float,
) -> Tensor:
    """VESPO's phi(w) = e^lambda w^k e^(-lambda w) of the completion's ratio w, (N,), without gradient.

    https://arxiv.org/abs/2602.10693
    """
    log_w = sequence_sum(log_ratio.detach().clamp(-HIGHEST, HIGHEST), sequences, num_completions)
    log_w = (log_w if log_importance_weights is None else log_w + log_importance_weights).clamp(LOWEST, HIGHEST)
    k = torch.where(advantages >= 0, k_pos, k_neg)
    scale = torch.where(advantages >= 0, lambda_pos, lambda_neg).clamp(min=1e-4)
    return (scale + k * log_w - scale * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def vespo_loss(logprobs: Tensor, weights: Tensor, advantages: Tensor) -> Tensor:
    """REINFORCE weighted by vespo_weights, (N,)."""
    return -weights * advantages * logprobs


def gmpo_loss(
    log_ratio: Tensor,  # (N,) of the tokens
    advantages: Tensor,  # (N,)
    learn_mask: Tensor | None,  # (N,) bool, the tokens that the mean is over; None: all
    sequences: Tensor,
    num_completions: int,
    *,
    epsilon_low: float,
    epsilon_high: float,
) -> Tensor:
    """The geometric mean of a completion's clipped token ratios times -A, at each of its tokens (N,).

    Ratios are clipped to [exp(-epsilon_low), exp(epsilon_high)] (https://arxiv.org/abs/2507.20673).
    """
    bounded = clip(log_ratio, -epsilon_low, epsilon_high)
    chosen = torch.where(advantages > 0, torch.minimum(log_ratio, bounded), torch.maximum(log_ratio, bounded))
    counted = torch.ones_like(chosen) if learn_mask is None else learn_mask.to(chosen.dtype)
    count = sequence_sum(counted, sequences, num_completions).clamp(min=1)
    return -(sequence_sum(chosen * counted, sequences, num_completions) / count).exp() * advantages


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str) -> Tensor:
    """An estimate of KL(policy, reference) from each sampled token, (N,) (http://joschu.net/blog/kl-approx.html).

    With d = logp - ref: k1 is d; k2 is d^2 / 2; k3 is exp(-d) - 1 + d, unbiased and never negative; abs is |d|. In a
    loss over tokens of the policy, the gradient is in the mean that of the KL for k2, 0 for k1, and that of
    KL(reference, policy) for k3; with the estimate times the ratio it is that of the KL for k1 and k3.
    """
    if estimator not in KL_ESTIMATES:
        raise ValueError(f"kl_estimator {estimator!r} is not one of {', '.join(KL_ESTIMATES)}")
    return KL_ESTIMATES[estimator](logprobs - ref_logprobs)


KL_ESTIMATES: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: torch.expm1(-d) + d,
    "abs": lambda d: d.abs(),
}


def low_divergence(
    logprobs: Tensor,  # (N,)
    sampling_logprobs: Tensor,  # (N,) of the policy that drew the tokens
    advantages: Tensor,  # (N,)
    sequences: Tensor,
    num_completions: int,
    *,
    threshold: float,
) -> Tensor:
    """Off-policy sequence mask, (N,) bool: completions with A < 0 count only at a low mean log(old / new).

    DeepSeek-V3.2, https://arxiv.org/abs/2512.02556
    """
    divergence = sequence_mean(sampling_logprobs - logprobs.detach(), sequences, num_completions)
    return (advantages >= 0) | (divergence <= threshold)


def importance_weights(
    old_logprobs: Tensor,  # (N,) of the policy, as training computes them
    proposal_logprobs: Tensor,  # (N,) of the distribution that the tokens were drawn from
    sequences: Tensor,
    num_completions: int,
    *,
    mode: str,
    clip_min: float | None,
    clip_max: float | None,
) -> Tensor:
    """Importance weights (N,), old policy over the distribution drawn from, of each token or its completion.

    {token,sequence}_truncate bounds the ratio, {token,sequence}_mask makes those outside of the bounds 0.
    """
    level, _, bound = mode.partition("_")
    if level not in ("token", "sequence") or bound not in ("truncate", "mask"):
        raise ValueError(
            f"importance_sampling_mode {mode!r} is not one of token_truncate, token_mask, sequence_truncate, "
            "sequence_mask"
        )
    log_ratio = old_logprobs.detach() - proposal_logprobs
    ratio = (sequence_sum(log_ratio, sequences, num_completions) if level == "sequence" else log_ratio).exp()
    bounded = ratio.clamp(clip_min, clip_max) if (clip_min, clip_max) != (None, None) else ratio
    return bounded if bound == "truncate" else torch.where(bounded == ratio, ratio, 0)


def pair_losses(
    chosen: Tensor,  # (P,) fp32, scores of the better texts
    rejected: Tensor,  # (P,) fp32, scores of the worse ones
    margins: Tensor,  # (P,) fp32, by how much each should be better
    *,
    center: float,
) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) + center (chosen + rejected)^2 of each pair, (P,) fp32.

    Bradley and Terry's likelihood, and what draws scores towards 0 (https://arxiv.org/abs/2312.09244, eq. 2). Of the
    scores 1 and 0 it is 0.313262, and with a center of 0.01 0.323262.
    """
    return -F.logsigmoid(chosen - rejected - margins) + center * (chosen + rejected) ** 2

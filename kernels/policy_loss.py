"""The clipped policy objective and its KL term, per token, from log-probabilities: nothing here knows the vocabulary.

    r = exp(logp - old)     loss_t = -min(min(r, delta) A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A) + beta kl
    kl = exp(ref - logp) - (ref - logp) - 1, times r with bias correction        (k3, http://joschu.net/blog/kl-approx.html)
    loss = sum_t weight_t loss_t                                                 (PPO, https://arxiv.org/abs/1707.06347)

    logprobs, old, ref, advantages, loss_weights (N,)  ->  loss (), TokenStats (N,) each

One pass makes the loss, the metrics and d loss / d logp, which the backward only scales, in place:

    d(-min(...)) / d logp = -A r where the minimum is r A, else 0
    d kl / d logp = 1 - exp(ref - logp), or with bias correction -r (ref - logp), in which nothing cancels

A ratio that is exactly a bound (1 - epsilon_low, 1 + epsilon_high, delta) counts as inside it, with the gradient -A r.
Autograd of the formula says the same, except where r A and the bound times A only round to one number: there torch.min
halves the gradient between its arguments, and here the ratios decide, not the products.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem_grpo.kernels.backend import Backend, runs_by_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # the plain-PyTorch twin needs none of it
    triton: Any = None

BLOCK = 256  # tokens of a program: 2 a thread in its 4 warps


class TokenStats(NamedTuple):
    """Statistics of each token, (N,) each, without gradient. A token of weight 0: ratio 1, kl 0, not clipped."""

    kl: Tensor | None  # fp32, as it enters the loss; None without a reference
    ratio: Tensor  # fp32, new policy to old, before any bound
    clipped_low: Tensor  # bool: the ratio fell below the interval while the advantage is negative
    clipped_high: Tensor  # bool: the ratio rose above it while the advantage is positive


class _Settings(NamedTuple):
    low: float  # 1 - epsilon_low
    high: float  # 1 + epsilon_high
    delta: float | None
    beta: float
    bias_correction: bool


if triton is not None:

    @triton.jit
    def _excess(x):
        """exp(x) - 1 - x. Below 1 by its series, whose terms from x^12 / 12! on are under 2^-24 of the sum."""
        series = 1.0 + x * (1 / 11)
        series = 1.0 + x * (1 / 10) * series
        series = 1.0 + x * (1 / 9) * series
        series = 1.0 + x * (1 / 8) * series
        series = 1.0 + x * (1 / 7) * series
        series = 1.0 + x * (1 / 6) * series
        series = 1.0 + x * (1 / 5) * series
        series = 1.0 + x * (1 / 4) * series
        series = 1.0 + x * (1 / 3) * series
        return tl.where(tl.abs(x) < 1.0, 0.5 * x * x * series, tl.exp(x) - 1.0 - x)

    @triton.jit(do_not_specialize=["tokens"])
    def _policy_loss_kernel(
        logprobs_ptr,  # (N,) inputs, fp32 or narrower
        old_ptr,  # or None: the ratio is 1
        ref_ptr,  # or None, as kl_ptr then is
        advantages_ptr,
        weights_ptr,
        logprobs_stride,
        old_stride,
        ref_stride,
        advantages_stride,
        weights_stride,
        partials_ptr,  # (blocks,) fp32, each program's share of the loss
        slope_ptr,  # (N,) fp32 d loss / d logp, or None
        kl_ptr,  # (N,) fp32
        ratio_ptr,  # (N,) fp32
        clipped_low_ptr,  # (N,) bool
        clipped_high_ptr,  # (N,) bool
        low,
        high,
        delta,  # or None
        beta,
        tokens,
        BIAS_CORRECTION: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        # Python floats are fp32 here, but fp64 under torch.compile.
        low, high, beta = tl.cast(low, tl.float32), tl.cast(high, tl.float32), tl.cast(beta, tl.float32)
        block = tl.program_id(0).to(tl.int64)
        token = block * BLOCK + tl.arange(0, BLOCK)
        inside = token < tokens
        weight = tl.load(weights_ptr + token * weights_stride, mask=inside, other=0.0).to(tl.float32)
        # A token of weight 0 is not read at all, whatever NaN stands there.
        live = inside & (weight != 0)
        logprob = tl.load(logprobs_ptr + token * logprobs_stride, mask=live, other=0.0).to(tl.float32)
        advantage = tl.load(advantages_ptr + token * advantages_stride, mask=live, other=0.0).to(tl.float32)
        if old_ptr is None:
            log_ratio = tl.zeros_like(logprob)
        else:
            log_ratio = logprob - tl.load(old_ptr + token * old_stride, mask=live, other=0.0).to(tl.float32)

        # Bounds by tl.where: tl.minimum and tl.clamp would drop a NaN, which must show in the loss.
        ratio = tl.exp(log_ratio)
        clipped = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
        bounded = ratio
        if delta is not None:
            delta = tl.cast(delta, tl.float32)
            bounded = tl.where(ratio > delta, delta, ratio)
        use_clipped = ((advantage > 0) & (clipped < bounded)) | ((advantage < 0) & (clipped > bounded))
        chosen = tl.where(use_clipped, clipped, bounded)
        loss = -chosen * advantage
        slope = tl.where((chosen < ratio) | (chosen > ratio), 0.0, -ratio * advantage)

        if ref_ptr is not None:
            gap = tl.load(ref_ptr + token * ref_stride, mask=live, other=0.0).to(tl.float32) - logprob
            kl = _excess(gap)
            kl_slope = -(kl + gap)
            if BIAS_CORRECTION:
                kl = kl * ratio
                kl_slope = -gap * ratio
            loss += beta * kl
            slope += beta * kl_slope
            tl.store(kl_ptr + token, kl, mask=inside)

        tl.store(partials_ptr + block, tl.sum(weight * loss))
        if slope_ptr is not None:
            tl.store(slope_ptr + token, weight * slope, mask=inside)
        tl.store(ratio_ptr + token, ratio, mask=inside)
        tl.store(clipped_low_ptr + token, (ratio < low) & (advantage < 0), mask=inside)
        tl.store(clipped_high_ptr + token, (ratio > high) & (advantage > 0), mask=inside)


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, old_logprobs, ref_logprobs, advantages, loss_weights, settings, forward):
        loss, slope, stats = forward(logprobs, old_logprobs, ref_logprobs, advantages, loss_weights, settings, True)
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(*(value for value in stats if value is not None))
        ctx.set_materialize_grads(False)
        return loss, *stats

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if torch.is_grad_enabled():
            raise RuntimeError("policy_loss has no second derivative: differentiate without create_graph=True")
        (slope,) = ctx.saved_tensors
        return slope.mul_(grad_loss), *[None] * 6  # in place, which a second backward detects


def policy_loss(
    logprobs: Tensor,  # (N,) fp32, carries the gradient
    old_logprobs: Tensor | None,  # (N,) of the policy that the rollout was sampled from; None: of this one, r is 1
    ref_logprobs: Tensor | None,  # (N,) of the reference; needed where beta is not 0
    advantages: Tensor,  # (N,) each token's own
    loss_weights: Tensor,  # (N,) the normalisation; a token of weight 0 is left out, NaN or not
    *,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None,
    beta: float,
    use_bias_correction_kl: bool,
    backend: Backend = "auto",
) -> tuple[Tensor, TokenStats]:
    """The loss, a scalar weighted sum over tokens, and the TokenStats of each.

    Deterministic: sums of fixed blocks, no atomics. auto is the Triton kernel for fp32 on a GPU, else its twin in plain
    PyTorch, which also computes in fp64. A forward that will be differentiated keeps (N,) numbers; the backward
    overwrites them, so a second one raises.

    Raises:
        ValueError: beta is not 0 and there are no reference log-probabilities, shapes, devices or dtypes that do not
            belong together.
        RuntimeError: backend="triton" where it cannot run.
    """
    if beta != 0 and ref_logprobs is None:
        raise ValueError(f"beta={beta} needs ref_logprobs")
    _check(
        logprobs,
        {
            "old_logprobs": old_logprobs,
            "ref_logprobs": ref_logprobs,
            "advantages": advantages,
            "loss_weights": loss_weights,
        },
    )
    settings = _Settings(1 - epsilon_low, 1 + epsilon_high, delta, beta, use_bias_correction_kl)
    forward = _triton_forward if _runs_by_triton(backend, logprobs) else _torch_forward
    inputs = (logprobs, old_logprobs, ref_logprobs, advantages, loss_weights, settings)
    if logprobs.requires_grad and torch.is_grad_enabled():
        loss, *stats = _PolicyLoss.apply(*inputs, forward)
        return loss, TokenStats(*stats)
    loss, _, stats = forward(*inputs, False)
    return loss, stats


def _triton_forward(
    logprobs: Tensor, old_logprobs: Tensor | None, ref_logprobs: Tensor | None, advantages: Tensor,
    loss_weights: Tensor, settings: _Settings, with_slope: bool,
) -> tuple[Tensor, Tensor | None, TokenStats]:  # fmt: skip
    """(loss (), d loss / d logp (N,) or None, TokenStats), by the kernel."""
    tokens, device = logprobs.shape[0], logprobs.device
    blocks = -(-tokens // BLOCK)
    partials, ratio = (torch.empty(n, dtype=torch.float32, device=device) for n in (blocks, tokens))
    slope = torch.empty_like(ratio) if with_slope else None
    kl = None if ref_logprobs is None else torch.empty_like(ratio)
    clipped_low, clipped_high = (torch.empty(tokens, dtype=torch.bool, device=device) for _ in range(2))
    if blocks:
        inputs = (logprobs, old_logprobs, ref_logprobs, advantages, loss_weights)
        strides = (0 if x is None else x.stride(0) for x in inputs)
        with torch.cuda.device_of(logprobs):
            _policy_loss_kernel[(blocks,)](
                *inputs, *strides, partials, slope, kl, ratio, clipped_low, clipped_high,
                settings.low, settings.high, settings.delta, settings.beta, tokens,
                BIAS_CORRECTION=settings.bias_correction, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    return partials.sum(), slope, TokenStats(kl, ratio, clipped_low, clipped_high)


def _torch_forward(
    logprobs: Tensor, old_logprobs: Tensor | None, ref_logprobs: Tensor | None, advantages: Tensor,
    loss_weights: Tensor, settings: _Settings, with_slope: bool,
) -> tuple[Tensor, Tensor | None, TokenStats]:  # fmt: skip
    """(loss (), d loss / d logp (N,) or None, TokenStats), in plain PyTorch, in the dtype of logprobs."""
    live = loss_weights != 0

    def read(values: Tensor) -> Tensor:
        return torch.where(live, values.detach(), 0).to(logprobs.dtype)

    logprob, advantage, weight = read(logprobs), read(advantages), loss_weights.to(logprobs.dtype)
    ratio = torch.ones_like(logprob) if old_logprobs is None else logprob.sub(read(old_logprobs)).exp_()
    loss, slope = _torch_clipped(ratio, advantage, settings)
    kl = None
    if ref_logprobs is not None:
        kl, kl_slope = _torch_kl(read(ref_logprobs).sub_(logprob), ratio, settings.bias_correction)
        loss.add_(settings.beta * kl)
        slope.add_(kl_slope.mul_(settings.beta))
    stats = TokenStats(kl, ratio, (ratio < settings.low) & (advantage < 0), (ratio > settings.high) & (advantage > 0))
    return loss.mul_(weight).sum(), slope.mul_(weight) if with_slope else None, stats


def _torch_clipped(ratio: Tensor, advantage: Tensor, settings: _Settings) -> tuple[Tensor, Tensor]:
    """(-min(...), its derivative by logp), (N,) each."""
    clipped = ratio.clamp(settings.low, settings.high)
    bounded = ratio if settings.delta is None else ratio.clamp(max=settings.delta)
    use_clipped = ((advantage > 0) & (clipped < bounded)) | ((advantage < 0) & (clipped > bounded))
    chosen = torch.where(use_clipped, clipped, bounded)
    slope = torch.where((chosen < ratio) | (chosen > ratio), 0, -ratio * advantage)
    return chosen.neg_().mul_(advantage), slope


def _torch_kl(gap: Tensor, ratio: Tensor, bias_correction: bool) -> tuple[Tensor, Tensor]:
    """(kl, its derivative by logp), (N,) each."""
    growth = torch.expm1(gap)
    if bias_correction:
        return (growth - gap) * ratio, -gap * ratio
    return growth - gap, -growth


def _runs_by_triton(backend: str, logprobs: Tensor) -> bool:
    by_triton, in_fp32 = runs_by_triton(backend, logprobs.device.type), logprobs.dtype == torch.float32
    if backend == "triton" and not in_fp32:
        raise ValueError(f"backend='triton' computes in float32; {logprobs.dtype} is for backend='torch'")
    return by_triton and in_fp32


def _check(logprobs: Tensor, others: dict[str, Tensor | None]) -> None:
    if logprobs.dim() != 1 or logprobs.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logprobs must be (N,) float32, not {tuple(logprobs.shape)} {logprobs.dtype}")
    for name, values in others.items():
        if values is None:
            continue
        if values.shape != logprobs.shape or values.device != logprobs.device:
            raise ValueError(
                f"{name} {tuple(values.shape)} on {values.device} must be as logprobs is, {tuple(logprobs.shape)} on "
                f"{logprobs.device}"
            )
        if values.requires_grad:
            raise ValueError(f"{name} asks for a gradient, and only logprobs gets one; detach it")

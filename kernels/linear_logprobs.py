"""Log-probabilities of labels under a frozen linear head, in tiles: no (tokens, vocabulary) tensor exists.

    s_v = softcap(logit_scale (h . W_v + b_v)) / temperature        softcap(x) = c tanh(x / c), or x
    logp = s_y - log sum_v exp(s_v)                                  entropy = -sum_v p_v log p_v

    hidden_states (N, D), weight (V, D), bias (V,), labels (N,) int64  ->  logp (N,) fp32, entropy (N,) fp32

A head that is frozen needs no gradient of its own, and d logp / dh does not depend on the loss. So the forward that
will be differentiated stores it, (N, D) in the dtype of hidden_states, and the backward only scales its rows.

The sum leaves the label out. With m a reference (the label's own score s_y, unless another score exceeds it by far)

    rest = sum_{v != y} exp(s_v - m)      A = sum_{v != y} exp(s_v - m) j_v W_v      j = d softcap / dx
    logp = -log1p(rest exp(m - s_y))      d logp / dh = (rest j_y W_y - A) logit_scale / (temperature l)
    l = rest + exp(s_y - m)

in which 1 - p_y = rest / l keeps its relative precision however close p_y is to 1. The usual form W_y - sum_v p_v W_v
cancels there: in bf16 it is off by 72 % where p_y is 0.99 to 0.999, where most tokens of a trained policy are.
"""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

# A score this far above the reference moves it, so that exp() stays far from fp32's overflow at 88.
RESCALE_ABOVE = 40.0
# Tokens and vocabulary entries in a tile, by device type: 16 MiB of fp32 scores on a CPU, 32 MiB on a GPU.
CHUNKS = {"cpu": (1024, 4096), "cuda": (2048, 4096)}


@overload
def linear_logprobs(*args, return_entropy: Literal[True], **kwargs) -> tuple[Tensor, Tensor]: ...
@overload
def linear_logprobs(*args, **kwargs) -> Tensor: ...
def linear_logprobs(
    hidden_states: Tensor,  # (N, D), the only input that gets a gradient
    weight: Tensor,  # (V, D), frozen
    labels: Tensor,  # (N,) int64 in [0, V)
    *,
    bias: Tensor | None = None,  # (V,), frozen
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    chunks: tuple[int, int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each label, (N,) fp32; with return_entropy also each row's entropy, (N,) fp32, no gradient.

    Scratch, where chunks = (C, Vb): up to three (C, Vb), three (C, D) and one (Vb, D) fp32 tiles. A pass that will be
    differentiated keeps (N, D) in the dtype of hidden_states; its backward overwrites it, so a second backward through
    the same result raises. hidden_states has the dtype of weight, or fp32.

    Raises:
        ValueError: shapes or dtypes that do not belong together, or a head that asks for a gradient.
    """
    _check(hidden_states, weight, labels, bias, temperature)
    chunks = chunks or CHUNKS[hidden_states.device.type]
    settings = _Settings(temperature, logit_scale, softcap, chunks, return_entropy)
    if hidden_states.requires_grad and torch.is_grad_enabled():
        logprobs, entropy = _LinearLogprobs.apply(hidden_states, weight, labels, bias, settings)
    else:
        logprobs, entropy, _ = _torch_forward(hidden_states, weight, labels, bias, settings, False)
    return (logprobs, entropy) if return_entropy else logprobs


class _Settings(NamedTuple):
    temperature: float
    logit_scale: float
    softcap: float | None
    chunks: tuple[int, int]
    with_entropy: bool


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, labels, bias, settings):
        logprobs, entropy, jacobian = _torch_forward(hidden_states, weight, labels, bias, settings, True)
        ctx.save_for_backward(jacobian)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        (jacobian,) = ctx.saved_tensors
        return (
            jacobian.mul_(grad_logprobs[:, None]),
            None,
            None,
            None,
            None,
        )  # in place, which a second backward detects


def _torch_forward(
    hidden_states: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, settings: _Settings, with_jacobian: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The plain-PyTorch twin: (logp (N,), entropy (N,) if asked for, d logp / dh (N, D) or None)."""
    rows = hidden_states.shape[0]
    logprobs, entropy = (torch.empty(rows, dtype=torch.float32, device=hidden_states.device) for _ in range(2))
    jacobian = torch.empty_like(hidden_states, memory_format=torch.contiguous_format) if with_jacobian else None
    with torch.autocast(hidden_states.device.type, enabled=False):
        for start in range(0, rows, settings.chunks[0]):
            here = slice(start, start + settings.chunks[0])
            logprobs[here], entropy[here], slope = _torch_rows(
                hidden_states[here], weight, labels[here], bias, settings, with_jacobian
            )
            if jacobian is not None:
                jacobian[here] = slope
    return logprobs, entropy, jacobian


def _torch_rows(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, settings: _Settings, with_jacobian: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One chunk of rows against the whole head, vocabulary chunk by vocabulary chunk."""
    temperature, logit_scale, softcap, (_, vocabulary_chunk), with_entropy = settings
    label_rows = weight[labels]  # (C, D)
    label_raw = (hidden.float() * label_rows.float()).sum(-1)
    if bias is not None:
        label_raw += bias[labels].float()
    label_score, label_slope = _score(label_raw, temperature, logit_scale, softcap)  # (C,) each

    reference = label_score.clone()
    rest = torch.zeros_like(reference)  # sum of exp(s - m)
    moment = torch.zeros_like(reference)  # sum of exp(s - m) (s - m)
    pull = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if with_jacobian else None
    wide = None if _multiplies_into_fp32(hidden, weight) else hidden.float()
    for start in range(0, weight.shape[0], vocabulary_chunk):
        head = weight[start : start + vocabulary_chunk]
        head = head if wide is None else head.float()
        scores = _mm_fp32(hidden if wide is None else wide, head.t())  # (C, Vb)
        if bias is not None:
            scores += bias[start : start + vocabulary_chunk].float()
        scores, slope = _score(scores, temperature, logit_scale, softcap)
        inside = (labels >= start) & (labels < start + head.shape[0])
        column = (labels - start).clamp(0, head.shape[0] - 1)[:, None]
        scores.scatter_(1, column, torch.where(inside[:, None], -torch.inf, scores.gather(1, column)))

        peak = scores.amax(-1)
        raised = torch.where(peak > reference + RESCALE_ABOVE, peak, reference)
        shrink = torch.exp(reference - raised)
        moment = shrink * (moment + rest * (reference - raised))
        rest = shrink * rest
        reference = raised

        scores -= reference[:, None]
        weights = scores.exp()  # the label's is exp(-inf) = 0
        rest += weights.sum(-1)
        if with_entropy:  # 0 * -1e30 = 0, where 0 * -inf would be NaN
            moment += torch.einsum("cv,cv->c", weights, scores.clamp_(min=-1e30))
        if pull is not None:
            weights = weights if slope is None else weights.mul_(slope)
            pull.mul_(shrink[:, None])
            pull += _mm_fp32(weights.to(head.dtype), head)

    label_share = torch.exp(label_score - reference)
    total = label_share + rest
    logprobs = -torch.log1p(rest * torch.exp(reference - label_score))
    # Past fp32's range exp() is infinite; the logarithm of the sum is then that of its rest.
    logprobs = torch.where(torch.isfinite(logprobs), logprobs, label_score - reference - rest.log())
    entropy = total.log() - (moment + label_share * (label_score - reference)) / total
    if pull is None:
        return logprobs, entropy, None
    label_weight = rest if label_slope is None else rest * label_slope
    pull = torch.addcmul(pull.neg_(), label_weight[:, None], label_rows.float())
    return logprobs, entropy, pull.mul_((logit_scale / (temperature * total))[:, None])


def _score(raw: Tensor, temperature: float, logit_scale: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Raw products h . W_v + b_v -> (scores s, slope j or None). Overwrites raw."""
    raw *= logit_scale
    if softcap is None:
        return raw.div_(temperature), None
    bent = raw.div_(softcap).tanh_()
    return bent * (softcap / temperature), bent.square_().neg_().add_(1.0)


def _multiplies_into_fp32(a: Tensor, b: Tensor) -> bool:
    """bf16 x bf16 -> fp32 in one GEMM; elsewhere the operands are widened (fp16's range is too small for exp(40))."""
    return a.is_cuda and a.dtype == b.dtype == torch.bfloat16


def _mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=torch.float32) if _multiplies_into_fp32(a, b) else torch.mm(a, b)


def _check(hidden_states, weight, labels, bias, temperature) -> None:
    if hidden_states.dim() != 2 or weight.dim() != 2 or hidden_states.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden_states {tuple(hidden_states.shape)} and weight {tuple(weight.shape)} must be (N, D) and (V, D)"
        )
    if labels.shape != hidden_states.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be ({hidden_states.shape[0]},) int64, not {tuple(labels.shape)} {labels.dtype}")
    if hidden_states.dtype not in (weight.dtype, torch.float32):
        raise ValueError(f"hidden_states must be {weight.dtype} as weight is, or float32, not {hidden_states.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), not {tuple(bias.shape)}")
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError(
            "the head asks for a gradient, which is never computed here; freeze it with requires_grad_(False)"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")

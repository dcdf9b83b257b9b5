"""What stands between the products of a decoding step's layer: one kernel each for start, heads, residual and gated.

    y = round(round(sum_i parts_i + bias) + round(sum_i low_i) B)        round: to the compute dtype

    start      stream = embedding[token] scale, h = norm(stream)
    heads      y's heads: norm of queries and keys, rotation; keys and values into their page  ->  query (S, H, D)
    residual   stream += share norm(y), h = norm(stream)
    gated      act(y_gate) y_up

A product leaves fp32 parts (splits, S, N) and, of its adapter, low (splits, S, n R), as nf4_product.product makes
them; each of these kernels begins by finishing them. low has R columns for each of n linears that stand side by side
in N, or R for all of them; b (R, N) is the adapter's other factor with its scale in it, R a multiple of 16.
Rounding is where a training forward rounds: after a product and its bias, after what the adapter adds, in the norm,
after the share, after the sum of the stream.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

# An RMS norm x / sqrt(mean x^2 + eps) gain: the gain (N,) fp32, eps, and whether x / sqrt(...) is rounded before the
# gain (Llama) or only after (Gemma).
Norm = tuple[Tensor, float, bool]
Backend = Literal["auto", "triton", "torch"]


@torch.no_grad()
def start(
    token_ids: Tensor,  # (S,) int64
    embedding: Tensor,  # (V, N)
    *,
    scale: float,
    before: Norm | None,
    dtype: torch.dtype,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The residual stream (S, N) of tokens in `dtype`, and its norm; without one the stream itself."""
    stream = (embedding[token_ids].to(dtype).float() * scale).to(dtype)
    return stream, _after_norm(stream, before)


@torch.no_grad()
def heads(
    parts: Tensor,  # (splits, S, (H + 2 H_kv) D) fp32: queries, keys, values
    low: Tensor | None,  # (splits, S, 3 R) fp32, or (splits, S, R) of one adapter for all three
    b: Tensor | None,  # (R, (H + 2 H_kv) D)
    bias: Tensor | None,  # ((H + 2 H_kv) D,)
    *,
    own: Tensor,  # (L, 2, pages, H_kv, page_tokens, D), last stride 1: keys and values, written to
    scales: Tensor | None,  # (L, 2, pages, H_kv, page_tokens) fp16, of int8 keys and values
    layer: int,
    table: Tensor,  # (S, max_pages) int64
    positions: Tensor,  # (S,) int64: where the token stands in its text
    prefilled: Tensor | None,  # (S,) int64: tokens of the text that stand elsewhere, before own's first
    query_norm: Norm | None,  # gain (D,), or (H D,) over all heads
    key_norm: Norm | None,  # gain (D,), or (H_kv D,)
    cos: Tensor | None,  # (T, rotary <= D), contiguous; None: nothing is rotated
    sin: Tensor | None,
    paired: bool,  # columns 2 i and 2 i + 1 are rotated together, else i and i + rotary / 2
    dtype: torch.dtype,
    addresses: Tensor | None = None,  # (5,) int64: own's and scales' address to use in place of their own, as [0], [1]
    backend: Backend = "auto",
) -> Tensor:
    """Queries (S, H, D) in `dtype`, normed and rotated; keys and values go into own.

    The column is positions - prefilled, of page table[row, column // page_tokens]. Rotation rounds its two products
    to the dtype of cos. int8 numbers have the scale max |x| / 127 of their token and head.
    """
    kv_heads, page_tokens, D = own.shape[3:]
    N = parts.shape[2]
    sizes = [N - 2 * kv_heads * D, kv_heads * D, kv_heads * D]
    query, key, value = _finished(parts, low, b, bias, sizes, dtype).split(sizes, 1)
    turned = []
    for x, norm in ((query, query_norm), (key, key_norm)):
        if norm is not None:
            x = _rms(x.unflatten(1, (-1, len(norm[0]))), norm).flatten(1)
        x = x.unflatten(1, (-1, D))
        if cos is not None and sin is not None:
            x = _rotated(x, cos[positions][:, None], sin[positions][:, None], paired)
        turned.append(x)
    columns = positions if prefilled is None else positions - prefilled
    page = table.gather(1, (columns // page_tokens)[:, None])[:, 0]
    for kind, x in enumerate((turned[1], value.unflatten(1, (-1, D)))):
        at = (layer, kind, page, slice(None), columns % page_tokens)
        if scales is None:
            own[at] = x
        else:
            own[at], scales[at] = _in_int8(x)
    return turned[0]


@torch.no_grad()
def residual(
    stream: Tensor,  # (S, N), contiguous, overwritten
    parts: Tensor,  # (splits, S, N) fp32
    low: Tensor | None,  # (splits, S, R) fp32
    b: Tensor | None,  # (R, N)
    bias: Tensor | None,  # (N,)
    *,
    after: Norm | None = None,
    share: float = 1.0,
    before: Norm | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Add share norm(y) to the stream, in place; returns the norm `before` of it, or without one the stream itself."""
    y = _after_norm(_finished(parts, low, b, bias, [parts.shape[2]], stream.dtype), after)
    stream += y if share == 1 else y * share
    return _after_norm(stream, before)


@torch.no_grad()
def gated(
    parts: Tensor,  # (splits, S, 2 I) fp32: gate, up
    low: Tensor | None,  # (splits, S, 2 R) fp32, or (splits, S, R) of one adapter for both
    b: Tensor | None,  # (R, 2 I)
    bias: Tensor | None,  # (2 I,)
    *,
    activation: Literal["silu", "gelu", "gelu_tanh"],
    dtype: torch.dtype,
    backend: Backend = "auto",
) -> Tensor:
    """Activation of gate, times up: (S, I) in `dtype`."""
    gate, up = _finished(parts, low, b, bias, [parts.shape[2] // 2] * 2, dtype).chunk(2, 1)
    return ACTIVATIONS[activation](gate) * up


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def _finished(
    parts: Tensor, low: Tensor | None, b: Tensor | None, bias: Tensor | None, sizes: list[int], dtype: torch.dtype
) -> Tensor:
    """y (S, N) in `dtype` of parts, bias and adapter."""
    y = parts.sum(0)
    y = (y if bias is None else y + bias.float()).to(dtype)
    if low is None or b is None:
        return y
    lows = low.sum(0).to(dtype).float().split(len(b), 1)
    lows = lows if len(lows) > 1 else lows * len(sizes)
    high = torch.cat([x @ y.float() for x, y in zip(lows, b.split(sizes, 1), strict=True)], 1)
    return (y.float() + high).to(dtype)


def _rms(x: Tensor, norm: Norm) -> Tensor:
    gain, eps, early = norm
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return ((wide.to(x.dtype).float() if early else wide) * gain.float()).to(x.dtype)


def _after_norm(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else _rms(x, norm)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, paired: bool) -> Tensor:
    """x (S, H, D) with its first columns rotated, by cos and sin (S, 1, rotary)."""
    front, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if paired:
        other = torch.stack([-front[..., 1::2], front[..., ::2]], -1).flatten(-2)
    else:
        first, second = front.chunk(2, -1)
        other = torch.cat([-second, first], -1)
    return torch.cat([(front * cos + other * sin).to(x.dtype), rest], -1)


def _in_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 numbers (S, H, D) and fp16 scales (S, H) of x."""
    scales = (x.float().abs().amax(-1) / 127).half().clamp(min=2**-24)  # fp16's least, where all is 0
    return (x / scales[..., None].float()).round().clamp(-127, 127).to(torch.int8), scales

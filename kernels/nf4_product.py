"""Products of few rows with 4-bit weights as bitsandbytes stores them, NF4 in blocks of 64, left in parts.

    parts_i = x_i [W_0; W_1; ...]_i^T        low_i = x_i A_i^T        y = sum_i parts_i, i over splits of K

    x (S, K), W_j (N_j, K) of 4 bits, A (R, K)  ->  parts (splits, S, N) fp32, low (splits, S, R) fp32, N = sum N_j

Nothing is finished here: the sum, a bias, what the adapter adds and all rounding are the first lines of the kernel
that reads the parts (decode_layer.py). So the rows of A are more rows of the weight, in one launch.

A weight is its code, rounded to x's dtype, times the absmax of its block of 64; the absmax multiplies a block's sum.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

BLOCK_K = 64  # numbers of one absmax
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Weight(NamedTuple):
    """A 4-bit matrix (N, K), K a multiple of 64: the tensors of bitsandbytes' QuantState."""

    packed: Tensor  # N K / 2 uint8 of any shape, the high four bits first
    absmax: Tensor  # (N K / 64,) fp32, or uint8 where it is quantized itself ("nested")
    outer: Tensor | None = None  # (ceil(N K / 64 / 256),) fp32, nested: state2.absmax
    offset: Tensor | None = None  # () fp32, nested
    code: Tensor | None = None  # (256,) fp32, nested: state2.code


@torch.no_grad()
def product(
    x: Tensor,  # (S, K), contiguous
    weights: Sequence[Weight],  # 1 to 3, whose rows stand one after another in N; all nested or none
    a: Tensor | None = None,  # (R, K) in x's dtype, R a multiple of 16
    *,
    splits: int = 1,  # of K
    backend: Literal["auto", "triton", "torch"] = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Parts (splits, S, N) and low (splits, S, R), both fp32, of x with weights and with A. No gradient.

    A row's result depends neither on S nor on the other rows.
    """
    dense = torch.cat([dequantized(weight, x.shape[1], x.dtype) for weight in weights])
    step = -(-x.shape[1] // BLOCK_K // splits) * BLOCK_K
    pieces = [slice(i * step, (i + 1) * step) for i in range(splits)]
    parts = torch.stack([x[:, piece].float() @ dense[:, piece].T for piece in pieces])
    if a is None:
        return parts, None
    return parts, torch.stack([x[:, piece].float() @ a[:, piece].float().T for piece in pieces])


def dequantized(weight: Weight, K: int, dtype: torch.dtype) -> Tensor:
    """The matrix (N, K) in fp32: codes rounded to `dtype`, times their absmax."""
    packed = weight.packed.flatten().to(torch.int32)
    codes = torch.stack([packed >> 4, packed & 15], 1).view(-1, BLOCK_K)
    absmax = weight.absmax.float()
    if weight.code is not None and weight.outer is not None and weight.offset is not None:
        block = torch.arange(len(absmax), device=absmax.device) // 256
        absmax = weight.code[weight.absmax.long()] * weight.outer[block] + weight.offset
    table = torch.tensor(NF4, dtype=dtype, device=packed.device).float()
    return (table[codes] * absmax[:, None]).view(-1, K)

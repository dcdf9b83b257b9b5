"""bitsandbytes' 4-bit product, called past Linear4bit and matmul_4bit: their numbers for 38 us less of the host."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor

_gemm = torch.ops.bitsandbytes.gemm_4bit.default
_dequantize = torch.ops.bitsandbytes.dequantize_4bit.default
_dequantize_scales = torch.ops.bitsandbytes.dequantize_blockwise.default


def product_4bit(layer: Linear4bit) -> Callable[[Tensor], Tensor]:
    """A layer's product with its bias as a function: x (..., in) -> (..., out) in x's dtype, without a gradient.

    It computes in x's dtype, and reads the codes where they lay when it was made: a layer whose weight is moved or
    merged needs a new one.
    """
    codes, (shape, scales, blocksize, kind), double = _unpacked(layer)

    def product(x: Tensor) -> Tensor:
        bias = layer.bias if layer.bias is None else layer.bias.to(x.dtype)
        return _gemm(x, codes, shape, scales, blocksize, kind, bias, *double)

    return product


def product_of(layer: Any) -> Callable[[Tensor], Tensor]:
    """The product of a layer: product_4bit, or the layer itself where it is no Linear4bit or has a hooked forward."""
    return product_4bit(layer) if type(layer) is Linear4bit and "forward" not in vars(layer) else layer


def dequantized(layer: Linear4bit, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) of a layer, rounded once to dtype, whatever it was quantized from."""
    return weight_4bit(layer)(dtype)


def weight_4bit(layer: Linear4bit) -> Callable[[torch.dtype], Tensor]:
    """dequantized() of a layer as a function of the dtype.

    It reads the codes where they lay when it was made.
    """
    codes, (shape, scales, blocksize, kind), double = _unpacked(layer)

    def weight(dtype: torch.dtype) -> Tensor:
        return _dequantize(codes, _scales(scales, *double) if double else scales, blocksize, kind, shape, dtype)

    return weight


def dequantize_nf4(
    codes: Tensor, scales_of_scales: Tensor, double: tuple[Tensor, Tensor, Tensor], shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """A weight of a shape from NF4 codes (bytes, 1) with double quantization, rounded once to dtype.

    double has the scales' codes, what those mean, and the offset.
    """
    return from_nf4(codes, _scales(scales_of_scales, *double), shape, dtype)


def from_nf4(codes: Tensor, scales: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A weight of a shape from NF4 codes (bytes, 1), of which each 64 have a scale in fp32, rounded once to dtype."""
    return _dequantize(codes, scales, 64, "nf4", shape, dtype)


def _scales(scales_of_scales: Tensor, codes: Tensor, table: Tensor, offset: Tensor) -> Tensor:
    return _dequantize_scales(codes, scales_of_scales, table, 256, torch.float32).add_(offset)


def _unpacked(layer: Linear4bit) -> tuple[Tensor, tuple, tuple]:
    """Codes, then (shape, scales, blocksize, kind), and of double quantization (codes of scales, table, offset)."""
    weight: Any = layer.weight
    state = weight.quant_state
    codes = weight.data.view(-1, 1)
    if not state.nested:
        return codes, (state.shape, state.absmax, state.blocksize, state.quant_type), ()
    if state.state2.blocksize != 256:  # the product has it built in
        raise NotImplementedError(f"double quantization in blocks of {state.state2.blocksize} in place of 256")
    own = (state.shape, state.state2.absmax, state.blocksize, state.quant_type)
    return codes, own, (state.absmax, state.state2.code, state.offset)

"""Keys and values of the tokens in flight, and the attention that reads them.

    own (L, 2, S, H_kv, T, D)        each slot's tokens, or pages of them in place of slots
    prefix (L, 2, P, H_kv, T_p, D)   prompts, once for their whole group, where the shape shares them

Both are of the compute dtype, or int8 with an fp16 scale for every token and head, its largest magnitude over 127.

Each layer's attention stores the new keys and values and attends over [prefix ; own]. The cache classes of transformers
are never touched, and keys are never repeated for grouped queries.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem_grpo.generate.shape import KVShape, StoreShape


class Rows(NamedTuple):
    """Keys and values of some rows of tokens."""

    numbers: Tensor  # (L, 2, rows, H_kv, T, D)
    scales: Tensor | None  # (L, 2, rows, H_kv, T) fp16, of int8 numbers

    def write(self, layer: int, at: tuple, key: Tensor, value: Tensor, sources: Any = ...) -> list[Tensor]:
        """Store key[sources] and value[sources] at the index `at` of (rows, H_kv, T); returns what attention reads.

        A prompt's own tokens see the rounded values that later tokens see, so that a token may be prefilled or decoded.
        """
        read = []
        for place, given in enumerate((key, value)):
            if self.scales is None:
                self.numbers[layer, place][at] = given[sources]
            else:
                numbers, scales = quantized(given)
                self.numbers[layer, place][at] = numbers[sources]
                self.scales[layer, place][at] = scales[sources]
                given = dequantized(numbers, scales, given.dtype)
            read.append(given)
        return read

    def read(self, layer: int, num_rows: int, num_tokens: int, dtype: torch.dtype) -> Tensor:
        """Keys and values of the first rows and tokens, (2, num_rows, H_kv, num_tokens, D). Of int8 a copy."""
        numbers = self.numbers[layer, :, :num_rows, :, :num_tokens]
        return (
            numbers
            if self.scales is None
            else dequantized(numbers, self.scales[layer, :, :num_rows, :, :num_tokens], dtype)
        )

    def clear(self, rows: Tensor) -> None:
        """Zero these rows: masked attention multiplies old values by 0, which leaves a NaN a NaN."""
        for tensor in self._tensors():
            tensor[:, :, rows] = 0

    def copied_out(self, rows: Tensor) -> list[list[Tensor]]:
        """A copy of these rows in CPU memory, made a layer at a time since GPU memory is short."""
        return [[layer[:, rows].cpu() for layer in tensor] for tensor in self._tensors()]

    def copy_in(self, rows: Tensor, saved: list[list[Tensor]]) -> None:
        for tensor, layers in zip(self._tensors(), saved, strict=True):
            for layer, held in zip(tensor, layers, strict=True):
                layer[:, rows] = held.to(layer.device)

    def _tensors(self) -> list[Tensor]:
        return [self.numbers] if self.scales is None else [self.numbers, self.scales]

    def move(self, sources: Tensor, targets: Tensor) -> None:
        for tensor in self._tensors():
            for layer in tensor:
                layer[:, targets] = layer[:, sources]


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 numbers (..., D) and fp16 scales (...,) of x (..., D), half a scale off at most."""
    scales = (x.float().abs().amax(-1) / 127).half().clamp(min=2**-24)  # fp16's least, where all is 0
    return (x / scales[..., None].float()).round().clamp(-127, 127).to(torch.int8), scales


def dequantized(numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return (numbers * scales[..., None].float()).to(dtype)


class Store:
    """The keys and values of a rollout, zeroed: masked values must still be finite."""

    def __init__(self, kv: KVShape, shape: StoreShape, dtype: torch.dtype, device: torch.device):
        def rows(num_rows: int, num_tokens: int) -> Rows:
            size = (kv.layers, 2, num_rows, kv.kv_heads, num_tokens)
            numbers = torch.zeros(*size, kv.head_dim, dtype=dtype, device=device)
            return Rows(numbers, torch.zeros(size, dtype=torch.float16, device=device) if dtype == torch.int8 else None)

        self.own = rows(shape.pages, shape.page_tokens) if shape.paged else rows(shape.slots, shape.slot_tokens)
        self.prefix = rows(shape.prefixes, shape.prefix_tokens)

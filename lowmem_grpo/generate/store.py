"""Keys and values of the tokens in flight, and the attention that reads them.

    own (L, 2, S, H_kv, T, D)        each slot's tokens, or pages of them in place of slots
    prefix (L, 2, P, H_kv, T_p, D)   prompts, once for their whole group, where the shape shares them

Both are of the compute dtype, or int8 with an fp16 scale for every token and head, its largest magnitude over 127.
Where a decoding step goes by a table of pages, as on a GPU, a page or slot is the outermost in memory, and the step
finds the store by its addresses, in a tensor that may outlive the store.

Each layer's attention stores the new keys and values and attends over [prefix ; own]. The cache classes of transformers
are never touched, and keys are never repeated for grouped queries.
"""

from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lowmem_grpo.generate.shape import KVShape, StoreShape
from lowmem_grpo.kernels.decode_attention import (
    addressed,
    decode_attention,
    goes_by_addresses,
    quantized,
    write_token,
)
from lowmem_grpo.kernels.decode_layer import NO_NORM, Norm, heads


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

    def copied_out(self, rows: list[int]) -> list[list[Tensor]]:
        """A copy of these rows in CPU memory, made a row at a time since GPU memory is short."""
        return [[tensor[:, :, row].to("cpu", copy=True) for row in rows] for tensor in self._tensors()]

    def copy_in(self, rows: list[int], saved: list[list[Tensor]]) -> None:
        for tensor, held in zip(self._tensors(), saved, strict=True):
            for row, values in zip(rows, held, strict=True):
                tensor[:, :, row] = values.to(tensor.device)

    def _tensors(self) -> list[Tensor]:
        return [self.numbers] if self.scales is None else [self.numbers, self.scales]

    def move(self, sources: Tensor, targets: Tensor) -> None:
        for tensor in self._tensors():
            for layer in tensor:
                layer[:, targets] = layer[:, sources]


def dequantized(numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return (numbers * scales[..., None].float()).to(dtype)


def goes_by_table(shape: StoreShape, device: torch.device) -> bool:
    """Whether steps of decoding find keys and values by a table of pages, or of one row a slot."""
    return shape.paged or device.type == "cuda"


def can_outlive(device: torch.device) -> bool:
    """Whether a step that was captured with one store serves a later one: by addresses alone it finds that.

    Without Triton's kernels a step on a GPU holds the store's own tensors.
    """
    return device.type == "cpu" or goes_by_addresses(device)


class Store:
    """The keys and values of a rollout, zeroed: masked values must still be finite."""

    def __init__(
        self, kv: KVShape, shape: StoreShape, dtype: torch.dtype, device: torch.device, addresses: Tensor | None = None
    ):
        """Allocate a store. Where steps go by a table, its addresses are written to `addresses`, or to a new tensor."""
        by_table = goes_by_table(shape, device)

        def zeros(num_rows: int, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            outer = (kv.layers, 2)
            if by_table:
                return torch.zeros(num_rows, *outer, *sizes, dtype=dtype, device=device).movedim(0, 2)
            return torch.zeros(*outer, num_rows, *sizes, dtype=dtype, device=device)

        def rows(num_rows: int, num_tokens: int) -> Rows:
            size = (kv.kv_heads, num_tokens)
            scales = zeros(num_rows, size, torch.float16) if dtype == torch.int8 else None
            return Rows(zeros(num_rows, (*size, kv.head_dim), dtype), scales)

        self.own = rows(shape.pages, shape.page_tokens) if shape.paged else rows(shape.slots, shape.slot_tokens)
        self.prefix = rows(shape.prefixes, shape.prefix_tokens)
        if by_table:
            prefix = self.prefix if shape.shared else (None, None)
            self.keys_values = addressed(*self.own, *prefix, addresses)
            _LIVE[self.own.numbers.data_ptr()] = self

    def write_token(self, key: Tensor, value: Tensor, **where: Any) -> None:
        """Store each row's newest key and value, (S, H_kv, D); `where` is as kernels/decode_attention.py has it."""
        if key.device.type == "cpu":
            _write_token(key, value, self.keys_values.addresses, **where)
        else:
            write_token(key, value, self.keys_values, **where)

    def heads(
        self, parts: Tensor, low: Tensor | None, b: Tensor | None, bias: Tensor | None, *,
        query_norm: Norm | None, key_norm: Norm | None, **where: Any,
    ) -> Tensor:  # fmt: skip
        """Queries (S, H, D) of each row's newest token, keys and values stored, as kernels/decode_layer.py has it."""
        store = self.keys_values
        if parts.device.type == "cpu":
            norms = [x for norm in (query_norm, key_norm) for x in norm or NO_NORM]
            return _heads(parts, low, b, bias, store.addresses, *norms, **where)
        return heads(
            parts, low, b, bias, own=store.own, scales=store.own_scales, addresses=store.addresses,
            query_norm=query_norm, key_norm=key_norm, **where,
        )  # fmt: skip

    def attend(self, query: Tensor, **where: Any) -> Tensor:
        """Attention of each row's newest token, (S, H, D); `where` is as kernels/decode_attention.py has it."""
        if query.device.type == "cpu":
            return _attend(query, self.keys_values.addresses, **where)
        return decode_attention(query, self.keys_values, **where)


# A CPU, where tests alone go by a table, looks for the store that lies at an address. Each is one call, so that what a
# test records in place of a CUDA graph knows as little of the store as the graph does.
_LIVE: WeakValueDictionary[int, Store] = WeakValueDictionary()


def _at(addresses: Tensor) -> Any:
    store = _LIVE.get(int(addresses[0]))
    if store is None:
        raise RuntimeError("a step goes to a store that was given back")
    return store.keys_values


@torch.library.custom_op("lowmem_grpo::write_token", mutates_args=())
def _write_token(
    key: Tensor, value: Tensor, addresses: Tensor, layer: int, table: Tensor, positions: Tensor,
    prefilled: Tensor | None,
) -> None:  # fmt: skip
    write_token(key, value, _at(addresses), layer=layer, table=table, positions=positions, prefilled=prefilled)


@torch.library.custom_op("lowmem_grpo::heads", mutates_args=())
def _heads(
    parts: Tensor, low: Tensor | None, b: Tensor | None, bias: Tensor | None, addresses: Tensor,
    query_gain: Tensor | None, query_eps: float, query_early: bool,
    key_gain: Tensor | None, key_eps: float, key_early: bool,
    layer: int, table: Tensor, positions: Tensor, prefilled: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    paired: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    store = _at(addresses)
    return heads(
        parts, low, b, bias, own=store.own, scales=store.own_scales, layer=layer, table=table, positions=positions,
        prefilled=prefilled, query_norm=None if query_gain is None else (query_gain, query_eps, query_early),
        key_norm=None if key_gain is None else (key_gain, key_eps, key_early), cos=cos, sin=sin, paired=paired,
        dtype=dtype,
    )  # fmt: skip


@torch.library.custom_op("lowmem_grpo::decode_attention", mutates_args=())
def _attend(
    query: Tensor, addresses: Tensor, layer: int, table: Tensor, positions: Tensor, prefilled: Tensor | None,
    prefix_rows: Tensor | None, scaling: float, softcap: float | None, window: int | None,
) -> Tensor:  # fmt: skip
    return decode_attention(
        query, _at(addresses), layer=layer, table=table, positions=positions, prefilled=prefilled,
        prefix_rows=prefix_rows, scaling=scaling, softcap=softcap, window=window,
    )  # fmt: skip

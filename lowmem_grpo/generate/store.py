"""Keys and values of the tokens in flight, and the attention that reads them.

    own (L, 2, S, H_kv, T, D)        each slot's tokens, or pages of them in place of slots
    prefix (L, 2, P, H_kv, T_p, D)   prompts, once for their whole group, where the shape shares them

There is one of each for every (H_kv, D) that a model's layers have. A layer that shares an earlier one's keys and
values reads those, and stores none.

Both are of the compute dtype, or int8 with an fp16 scale for every token and head, its largest magnitude over 127.
Where a decoding step goes by a table of pages, as on a GPU, a page or slot is the outermost in memory, and the step
finds the store by its addresses, in a tensor that may outlive the store.

Each layer's attention stores the new keys and values and attends over [prefix ; own]. The cache classes of transformers
are never touched, and keys are never repeated for grouped queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lowmem_grpo.generate.shape import StoreShape, stored
from lowmem_grpo.kernels.decode_attention import (
    addressed,
    decode_attention,
    goes_by_addresses,
    quantized,
    write_token,
)
from lowmem_grpo.kernels.decode_layer import NO_NORM, Norm, heads
from lowmem_grpo.model.layer_shapes import LayerShape


class Place(NamedTuple):
    """The place of a layer's keys and values in a store."""

    group: int
    index: int  # among the group's layers
    writes: bool  # or another layer does, with which this one shares them


class Group(NamedTuple):
    """Keys and values of some rows of tokens, of L layers with as many heads of one size."""

    numbers: Tensor  # (L, 2, rows, H_kv, T, D)
    scales: Tensor | None  # (L, 2, rows, H_kv, T) fp16, of int8 numbers

    def tensors(self) -> list[Tensor]:
        return [self.numbers] if self.scales is None else [self.numbers, self.scales]


@dataclass(frozen=True)
class Rows:
    """Keys and values of some rows of tokens, of all layers that attend."""

    groups: list[Group]
    places: dict[int, Place]  # by layer
    num_tokens: int  # that a row has room for

    def write(self, layer: int, at: tuple, key: Tensor, value: Tensor, sources: Any = ...) -> list[Tensor]:
        """Store key[sources] and value[sources] at the index `at` of (rows, H_kv, T); returns what attention reads.

        A prompt's own tokens see the rounded values that later tokens see, so that a token may be prefilled or decoded.
        Of a layer that shares another's nothing is stored.
        """
        place = self.places[layer]
        stored, stored_scales = self.groups[place.group]
        read = []
        for kind, given in enumerate((key, value)):
            if stored_scales is None:
                if place.writes:
                    stored[place.index, kind][at] = given[sources]
            else:
                numbers, scales = quantized(given)
                if place.writes:
                    stored[place.index, kind][at] = numbers[sources]
                    stored_scales[place.index, kind][at] = scales[sources]
                given = dequantized(numbers, scales, given.dtype)
            read.append(given)
        return read

    def read(self, layer: int, num_rows: int, num_tokens: int, dtype: torch.dtype) -> Tensor:
        """Keys and values of the first rows and tokens, (2, num_rows, H_kv, num_tokens, D). Of int8 a copy."""
        place = self.places[layer]
        stored, scales = self.groups[place.group]
        numbers = stored[place.index, :, :num_rows, :, :num_tokens]
        if scales is None:
            return numbers
        return dequantized(numbers, scales[place.index, :, :num_rows, :, :num_tokens], dtype)

    def clear(self, rows: Tensor) -> None:
        """Zero these rows: masked attention multiplies old values by 0, which leaves a NaN a NaN."""
        for tensor in self._tensors():
            tensor[:, :, rows] = 0

    def copied_out(self, rows: list[int], num_tokens: int) -> list[list[Tensor]]:
        """A copy of these rows' first num_tokens tokens in CPU memory, made a row at a time."""
        return [[_copied_out(tensor[:, :, row, :, :num_tokens]) for row in rows] for tensor in self._tensors()]

    def copy_in(self, rows: list[int], saved: list[list[Tensor]]) -> None:
        for tensor, held in zip(self._tensors(), saved, strict=True):
            for row, values in zip(rows, held, strict=True):
                _copy_in(tensor[:, :, row, :, : values.shape[3]], values)

    def move(self, sources: Tensor, targets: Tensor) -> None:
        for tensor in self._tensors():
            for layer in tensor:
                layer[:, targets] = layer[:, sources]

    def _tensors(self) -> list[Tensor]:
        return [tensor for group in self.groups for tensor in group.tensors()]


# GPU memory is short, and what does not lie in one piece is copied there first: a layer at a time, which is little.
def _copied_out(values: Tensor) -> Tensor:
    if values.is_contiguous():
        return values.to("cpu", copy=True)
    return torch.stack([layer.cpu() for layer in values])


def _copy_in(place: Tensor, values: Tensor) -> None:
    if place.is_contiguous():
        place.copy_(values)
    else:
        for layer, own in zip(place, values, strict=True):
            layer.copy_(own)


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
        self, layers: dict[int, LayerShape], shape: StoreShape, dtype: torch.dtype, device: torch.device,
        addresses: Sequence[Tensor] | None = None,
    ):  # fmt: skip
        """Allocate a store of these layers' keys and values.

        Where steps go by a table, the addresses of each group are written to one of `addresses`, or to a new tensor.
        """
        by_table, sizes = goes_by_table(shape, device), stored(layers)

        def zeros(outer: tuple[int, ...], num_rows: int, inner: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            if by_table:
                return torch.zeros(num_rows, *outer, *inner, dtype=dtype, device=device).movedim(0, 2)
            return torch.zeros(*outer, num_rows, *inner, dtype=dtype, device=device)

        def rows(num_rows: int, num_tokens: int) -> Rows:
            groups = []
            for (kv_heads, head_dim), numbers in sizes.items():
                outer, inner = (len(numbers), 2), (kv_heads, num_tokens)
                scales = zeros(outer, num_rows, inner, torch.float16) if dtype == torch.int8 else None
                groups.append(Group(zeros(outer, num_rows, (*inner, head_dim), dtype), scales))
            return Rows(groups, places, num_tokens)

        own = {n: Place(g, i, True) for g, numbers in enumerate(sizes.values()) for i, n in enumerate(numbers)}
        places = {n: own[layer.source]._replace(writes=layer.source == n) for n, layer in layers.items()}
        self.own = rows(shape.pages, shape.page_tokens) if shape.paged else rows(shape.slots, shape.slot_tokens)
        self.prefix = rows(shape.prefixes, shape.prefix_tokens)
        self.places, self.keys_values = places, []
        if by_table:
            for index, group in enumerate(self.own.groups):
                prefix = self.prefix.groups[index] if shape.shared else (None, None)
                self.keys_values.append(addressed(*group, *prefix, None if addresses is None else addresses[index]))
                _LIVE[group.numbers.data_ptr()] = self

    def write_token(self, key: Tensor, value: Tensor, *, layer: int, **where: Any) -> None:
        """Store each row's newest key and value, (S, H_kv, D); `where` is as kernels/decode_attention.py has it.

        Of a layer that shares another's nothing is stored.
        """
        group, index, writes = self.places[layer]
        if not writes:
            return
        if key.device.type == "cpu":
            _write_token(key, value, self.keys_values[group].addresses, layer=index, **where)
        else:
            write_token(key, value, self.keys_values[group], layer=index, **where)

    def heads(
        self, parts: Tensor, low: Tensor | None, b: Tensor | None, bias: Tensor | None, *,
        query_norm: Norm | None, key_norm: Norm | None, layer: int, **where: Any,
    ) -> Tensor:  # fmt: skip
        """Queries (S, H, D) of each row's newest token, keys and values stored, as kernels/decode_layer.py has it."""
        group, index, writes = self.places[layer]
        assert writes, "an outline's layers have keys and values of their own"
        store = self.keys_values[group]
        if parts.device.type == "cpu":
            norms = [x for norm in (query_norm, key_norm) for x in norm or NO_NORM]
            return _heads(parts, low, b, bias, store.addresses, *norms, layer=index, **where)
        return heads(
            parts, low, b, bias, own=store.own, scales=store.own_scales, addresses=store.addresses,
            query_norm=query_norm, key_norm=key_norm, layer=index, **where,
        )  # fmt: skip

    def attend(self, query: Tensor, *, layer: int, **where: Any) -> Tensor:
        """Attention of each row's newest token, (S, H, D); `where` is as kernels/decode_attention.py has it."""
        group, index, _ = self.places[layer]
        if query.device.type == "cpu":
            return _attend(query, self.keys_values[group].addresses, layer=index, **where)
        return decode_attention(query, self.keys_values[group], layer=index, **where)


# A CPU, where tests alone go by a table, looks for the store that lies at an address. Each is one call, so that what a
# test records in place of a CUDA graph knows as little of the store as the graph does.
_LIVE: WeakValueDictionary[int, Store] = WeakValueDictionary()


def _at(addresses: Tensor) -> Any:
    store = _LIVE.get(int(addresses[0]))
    if store is None:
        raise RuntimeError("a step goes to a store that was given back")
    return next(x for x in store.keys_values if x.own.data_ptr() == int(addresses[0]))


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
        prefilled=prefilled, query_norm=None if query_gain is None else Norm(query_gain, query_eps, query_early),
        key_norm=None if key_gain is None else Norm(key_gain, key_eps, key_early), cos=cos, sin=sin, paired=paired,
        dtype=dtype,
    )  # fmt: skip


@torch.library.custom_op("lowmem_grpo::decode_attention", mutates_args=())
def _attend(
    query: Tensor, addresses: Tensor, layer: int, table: Tensor, positions: Tensor, prefilled: Tensor | None,
    prefix_rows: Tensor | None, scaling: float, softcap: float | None, window: int | None, sink: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return decode_attention(
        query, _at(addresses), layer=layer, table=table, positions=positions, prefilled=prefilled,
        prefix_rows=prefix_rows, scaling=scaling, softcap=softcap, window=window, sink=sink,
    )  # fmt: skip

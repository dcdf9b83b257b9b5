"""Keys and values of the tokens in flight, and the attention that reads them.

    own (L, 2, S, H_kv, T, D)        each slot's tokens, or pages of them in place of slots
    prefix (L, 2, P, H_kv, T_p, D)   prompts, once for their whole group, where the plan shares them

Both are of the compute dtype, or int8 with an fp16 scale for every token and head, its largest magnitude over 127.

Each layer's attention stores the new keys and values and attends over [prefix ; own]. The cache classes of transformers
are never touched, and keys are never repeated for grouped queries.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lowmem_grpo.attention import soften, softmax_attention
from lowmem_grpo.generate.plan import KVShape, RolloutPlan
from lowmem_grpo.kernels.decode_attention import decode_attention

SPAN = 32  # own columns are read in multiples of this, so that shapes change rarely


class Rows(NamedTuple):
    """Keys and values of some tokens each."""

    numbers: Tensor  # (L, 2, rows, H_kv, T, D)
    scales: Tensor | None  # (L, 2, rows, H_kv, T) fp16, of int8 numbers

    def write(self, layer: int, at: tuple, key: Tensor, value: Tensor, sources: Any = ...) -> list[Tensor]:
        """Put key[sources] and value[sources] where `at` indexes (rows, H_kv, T); key and value as they will be read.

        What a prompt's own tokens see is rounded like what later ones see, so that it does not matter which tokens are
        prefilled and which decoded.
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

    def read(self, layer: int, rows: int, tokens: int, dtype: torch.dtype) -> Tensor:
        """(2, rows, H_kv, tokens, D) of the first rows and tokens: a view, or of int8 a copy of this layer's."""
        numbers = self.numbers[layer, :, :rows, :, :tokens]
        return numbers if self.scales is None else dequantized(numbers, self.scales[layer, :, :rows, :, :tokens], dtype)

    def clear(self, rows: Tensor) -> None:
        """So that a NaN of who had them before does not spread: 0 times it, where it is not attended to, is NaN."""
        for tensor in self._tensors():
            tensor[:, :, rows] = 0

    def copied_out(self, rows: Tensor) -> list[list[Tensor]]:
        """What these rows hold, in CPU memory; a layer at a time, since it is done where memory is short."""
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
    """The memory of a rollout, zeroed: what is never attended to must still be finite."""

    def __init__(self, shape: KVShape, plan: RolloutPlan, dtype: torch.dtype, device: torch.device):
        def rows(count: int, tokens: int) -> Rows:
            size = (shape.layers, 2, count, shape.kv_heads, tokens)
            numbers = torch.zeros(*size, shape.head_dim, dtype=dtype, device=device)
            return Rows(numbers, torch.zeros(size, dtype=torch.float16, device=device) if dtype == torch.int8 else None)

        self.own = rows(plan.pages, plan.page_tokens) if plan.paged else rows(plan.slots, plan.slot_tokens)
        self.prefix = rows(plan.prefixes, plan.prefix_tokens)


@dataclass(frozen=True)
class Prefill:
    """A batch of prompts, padded on the right; token t of row r goes to column t of every row in targets[r]."""

    store: Rows  # the store's own or its prefix
    sources: Tensor  # (R',) int64: a row of the batch
    targets: Tensor  # (R',) int64: the row of the store that gets it

    def attend(self, layer, query, key, value, scaling, window, softcap) -> Tensor:
        return _prefill(self, layer, query, key, value, scaling, window, softcap)


@dataclass(frozen=True)
class Decode:
    """One token of each of the first S slots."""

    store: Store
    columns: Tensor  # (S,) int64: where the token goes in its slot
    positions: Tensor  # (S,) int64: where it stands in its text
    span: int  # columns of own that are read
    prefix_lengths: Tensor | None  # (S,) int64, where prompts are shared
    members: Tensor | None  # (P, m) int64: the slots of each prefix row, filled up with 0
    places: Tensor | None  # (S,) int64: where a slot stands in members, flattened
    prefix_rows: Tensor | None  # (S,) int64: the prefix row of each slot
    table: Tensor | None  # (S, most pages) int64: the pages of each slot; None for the dense attention of a CPU
    masks: dict  # by window: made by the first layer that asks

    def attend(self, layer, query, key, value, scaling, window, softcap) -> Tensor:
        return _decode(self, layer, query, key, value, scaling, window, softcap)

    def mask(self, window: int | None) -> Tensor:
        """(S, 1, 1, prefix tokens + span) bool: what a token sees."""
        if window not in self.masks:
            column = torch.arange(self.span, device=self.columns.device)
            back = self.columns[:, None] - column  # how far before the token
            seen = [(back >= 0) & (back < (window or self.span + 1))]
            if self.prefix_lengths is not None:
                place = torch.arange(self.store.prefix.numbers.shape[4], device=self.columns.device)
                near = self.positions[:, None] - place < (window or 2**62)
                seen.insert(0, (place < self.prefix_lengths[:, None]) & near)
            self.masks[window] = torch.cat(seen, -1)[:, None, None]
        return self.masks[window]


def _prefill(now: Prefill, layer, query, key, value, scaling, window, softcap) -> Tensor:
    tokens = key.shape[2]
    at = (now.targets, slice(None), slice(tokens))
    key, value = now.store.write(layer, at, key, value, now.sources)
    if softcap is None and (window is None or window >= tokens):
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2)
    place = torch.arange(tokens, device=query.device)
    back = place[:, None] - place
    mask = (back >= 0) & (back < (window or tokens + 1))
    batch, heads, _, size = query.shape
    grouped = query.view(batch, key.shape[1], -1, tokens, size)
    out = softmax_attention(grouped, key[:, :, None], value[:, :, None], mask, scaling, softcap)
    return out.view(batch, heads, tokens, size).transpose(1, 2)


def _decode(now: Decode, layer, query, key, value, scaling, window, softcap) -> Tensor:
    if now.table is not None:
        return _paged_attention(now, layer, query, key, value, scaling, window, softcap)
    slots, heads, _, size = query.shape
    kv_heads = key.shape[1]
    at = (torch.arange(slots, device=query.device), slice(None), now.columns)
    now.store.own.write(layer, at, key[:, :, 0], value[:, :, 0])
    keys, values = now.store.own.read(layer, slots, now.span, query.dtype)
    query = query.view(slots, kv_heads, heads // kv_heads, size)
    mask = now.mask(window)
    if now.members is not None:
        store = now.store.prefix
        prefix = store.read(layer, len(now.members), store.numbers.shape[4], query.dtype)
        out = _shared_attention(query, keys, values, prefix, now.members, now.places, mask, scaling, softcap)
    elif softcap is None:
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)
    else:
        out = softmax_attention(query, keys, values, mask, scaling, softcap)
    return out.view(slots, 1, heads, size)


def _paged_attention(now: Decode, layer, query, key, value, scaling, window, softcap) -> Tensor:
    assert now.table is not None
    own, shared = now.store.own, now.store.prefix
    page_tokens = own.numbers.shape[4]
    page = now.table.gather(1, (now.columns // page_tokens)[:, None])[:, 0]
    own.write(layer, (page, slice(None), now.columns % page_tokens), key[:, :, 0], value[:, :, 0])
    keys, values = own.numbers[layer]  # (pages, H_kv, page tokens, D)
    prefix: dict[str, Any] = {}
    if now.prefix_lengths is not None:
        prefix_keys, prefix_values = shared.numbers[layer]
        prefix = dict(
            prefix_keys=prefix_keys, prefix_values=prefix_values, prefix_rows=now.prefix_rows,
            prefix_lengths=now.prefix_lengths, prefix_scales=None if shared.scales is None else shared.scales[layer],
        )  # fmt: skip
    out = decode_attention(
        query[:, :, 0], keys, values, now.table, now.columns + 1, scaling=scaling, softcap=softcap, window=window,
        own_scales=None if own.scales is None else own.scales[layer], **prefix,
    )  # fmt: skip
    return out[:, None]


def _shared_attention(query, keys, values, prefix, members, places, mask, scaling, softcap) -> Tensor:
    """One softmax over [prefix ; own], each prefix read once for all of its slots. query (S, H_kv, Q, D)."""
    _, kv_heads, queries, size = query.shape
    groups, most = members.shape
    width = prefix.shape[3]
    together = query[members].transpose(1, 2).reshape(groups, kv_heads, most * queries, size)
    of_prefix = (together @ prefix[0].transpose(-1, -2)).view(groups, kv_heads, most, queries, width)
    of_prefix = of_prefix.transpose(1, 2).flatten(0, 1)[places]  # (S, H_kv, Q, P)
    scores = torch.cat([of_prefix, query @ keys.transpose(-1, -2)], -1).float() * scaling
    share = soften(scores, softcap).masked_fill_(~mask, -torch.inf).softmax(-1).to(values.dtype)
    together = share[..., :width][members].transpose(1, 2).reshape(groups, kv_heads, most * queries, width)
    from_prefix = (together @ prefix[1]).view(groups, kv_heads, most, queries, size)
    return from_prefix.transpose(1, 2).flatten(0, 1)[places] + share[..., width:] @ values

"""The layouts of a rollout's attention: prompts that are prefilled, and one decoded token of each slot."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lowmem_grpo.generate.states import States, Tables
from lowmem_grpo.generate.store import Rows, Store
from lowmem_grpo.model.attention import Scoring, shares_of, sink_column, soften, softmax_attention
from lowmem_grpo.model.mixing import Call
from lowmem_grpo.model.packed_attention import causal_attention, takes_groups

SPAN = 32  # own columns are read in multiples of this, so that shapes change rarely


class Shifts(NamedTuple):
    """Padding on the right moved to the left, and back."""

    to_left: Tensor  # (R, T) int64: which token of a row stands here then
    mask: Tensor  # (R, T) bool: whether that is one of its own
    to_right: Tensor  # (R, T) int64: the way back

    @classmethod
    def of(cls, lengths: Tensor, width: int) -> "Shifts":
        """The shifts of rows with (R,) tokens of their own, padded to a width."""
        place = torch.arange(width, device=lengths.device)
        padding = width - lengths[:, None]
        return cls((place - padding).clamp(min=0), place >= padding, (place + padding).clamp(max=width - 1))


@dataclass(frozen=True)
class Prefill:
    """A batch of prompts, padded on the right, and the rows that get their keys, values and states.

    Token t of row r goes to column t of each of its targets.
    """

    store: Rows  # the store's own or its prefix
    sources: Tensor  # (R',) int64: a row of the batch
    targets: Tensor  # (R',) int64: the row of the store that gets it
    states: Tables | None = None  # the states' own or their prefix; None where no layer keeps one
    shifts: Shifts | None = None  # None where no layer keeps a state, or no row has padding
    masks: dict = field(default_factory=dict)  # of causal_attention, made by the first layer that asks

    def attend(self, query: Tensor, key: Tensor, value: Tensor, asked: Scoring) -> Tensor:
        layer, scaling, window, softcap, sink = asked
        tokens = key.shape[2]
        at = (self.targets, slice(None), slice(tokens))
        key, value = self.store.write(layer, at, key, value, self.sources)
        plain = softcap is None and sink is None and (window is None or window >= tokens)
        if plain and takes_groups(query, key):
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
            return out.transpose(1, 2)
        return causal_attention((query, key, value), self.masks, asked)

    def mix(self, mixer: Any, forward: Any, hidden: Tensor) -> Tensor:
        """The output of a layer with a state for prompts (R, T, D), which it is handed padded on the left.

        On the right the states would go on through the padding; on the left a layer that is given a mask passes it by.
        """
        assert self.states is not None
        call = Call()
        if self.shifts is None:
            out = forward(hidden, call)
        else:
            to_left, mask, to_right = self.shifts
            out = _along(forward(_along(hidden, to_left), call, mask), to_right)
        for name, table in self.states[mixer.layer_idx].items():
            table[self.targets] = call.after[name][self.sources].to(table.dtype)
        return out


@dataclass(frozen=True)
class Decode:
    """One new token of each of the first S slots."""

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
    states: States | None = None  # where layers keep one

    def attend(self, query: Tensor, key: Tensor, value: Tensor, asked: Scoring) -> Tensor:
        if self.table is not None:
            return _paged_attention(self, query, key, value, asked)
        slots, heads, _, size = query.shape
        kv_heads = key.shape[1]
        at = (torch.arange(slots, device=query.device), slice(None), self.columns)
        self.store.own.write(asked.layer, at, key[:, :, 0], value[:, :, 0])
        keys, values = self.store.own.read(asked.layer, slots, self.span, query.dtype)
        query = query.view(slots, kv_heads, heads // kv_heads, size)
        mask = self.mask(asked.window)
        if self.members is not None:
            store = self.store.prefix
            prefix = store.read(asked.layer, len(self.members), store.num_tokens, query.dtype)
            out = _shared_attention(query, keys, values, prefix, self.members, self.places, mask, asked)
        elif asked.softcap is None and asked.sink is None:
            out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=asked.scaling)
        else:
            out = softmax_attention(query, keys, values, mask, asked)
        return out.view(slots, 1, heads, size)

    def mix(self, mixer: Any, forward: Any, hidden: Tensor) -> Tensor:
        """The output of a layer with a state for one token of each slot, (S, 1, D)."""
        assert self.states is not None
        return self.states.advance(mixer, forward, hidden)

    def mask(self, window: int | None) -> Tensor:
        """(S, 1, 1, prefix tokens + span) bool, True where a token attends."""
        if window not in self.masks:
            column = torch.arange(self.span, device=self.columns.device)
            back = self.columns[:, None] - column  # how far before the token
            seen = [(back >= 0) & (back < (window or self.span + 1))]
            if self.prefix_lengths is not None:
                place = torch.arange(self.store.prefix.num_tokens, device=self.columns.device)
                near = self.positions[:, None] - place < (window or 2**62)
                seen.insert(0, (place < self.prefix_lengths[:, None]) & near)
            self.masks[window] = torch.cat(seen, -1)[:, None, None]
        return self.masks[window]


def _along(values: Tensor, places: Tensor) -> Tensor:
    """Tokens (R, T, D) of each row, in the order of places (R, T)."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))


def _paged_attention(now: Decode, query: Tensor, key: Tensor, value: Tensor, asked: Scoring) -> Tensor:
    layer, scaling, window, softcap, sink = asked
    where: dict[str, Any] = dict(layer=layer, table=now.table, positions=now.positions, prefilled=now.prefix_lengths)
    now.store.write_token(key[:, :, 0], value[:, :, 0], **where)
    scores = dict(scaling=scaling, softcap=softcap, window=window, sink=sink)
    out = now.store.attend(query[:, :, 0], prefix_rows=now.prefix_rows, **scores, **where)
    return out[:, None]


def _shared_attention(query, keys, values, prefix, members, places, mask, asked: Scoring) -> Tensor:
    """One softmax over [prefix ; own], each prefix read once for all of its slots."""
    _, kv_heads, queries, size = query.shape
    groups, most = members.shape
    width = prefix.shape[3]
    together = query[members].transpose(1, 2).reshape(groups, kv_heads, most * queries, size)
    of_prefix = (together @ prefix[0].transpose(-1, -2)).view(groups, kv_heads, most, queries, width)
    of_prefix = of_prefix.transpose(1, 2).flatten(0, 1)[places]  # (S, H_kv, Q, P)
    scores = torch.cat([of_prefix, query @ keys.transpose(-1, -2)], -1).float() * asked.scaling
    scores = soften(scores, asked.softcap).masked_fill_(~mask, -torch.inf)
    share = shares_of(scores, sink_column(asked, kv_heads)).to(values.dtype)
    together = share[..., :width][members].transpose(1, 2).reshape(groups, kv_heads, most * queries, width)
    from_prefix = (together @ prefix[1]).view(groups, kv_heads, most, queries, size)
    return from_prefix.transpose(1, 2).flatten(0, 1)[places] + share[..., width:] @ values

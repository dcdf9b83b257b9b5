"""Attention over a packed row: each tail sees its prompt, which stands there once, and itself.

The gradient of a shared prompt's keys and values is the sum of what its copies would get
(https://arxiv.org/abs/2506.05433). Nothing here is of the size (tokens, tokens) of the whole row; with a softcap, the
scores of a prompt and of its tails are in memory, unless flash-attn is installed, which knows one.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowmem_grpo.model.attention import Scoring, scores_of
from lowmem_grpo.model.packing import Block, Packing

TILE = 4096  # queries at a time, times the heads of a kv head: no mask is of the size (tokens, tokens) of a long tail

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None
try:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]: the extra [flash]
except ImportError:
    flash_attn_varlen_func = None
_ASKS_FOR_GQA = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters


@dataclass(frozen=True)
class Packed:
    """The layout of one micro-batch, as attention.py asks for it."""

    packing: Packing
    varlen: bool  # by flash attention over segments, else by blocks

    def attend(self, query: Tensor, key: Tensor, value: Tensor, asked: Scoring) -> Tensor:
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H or H_kv, D)
        attention = varlen_attention(asked.softcap) if self.varlen else None
        if attention is not None:
            return by_segments(query, key, value, self.packing, asked, attention)[None]
        return by_blocks(query, key, value, self.packing, asked)[None]


def by_blocks(
    query: Tensor,  # (T, H, D)
    key: Tensor,  # (T, H_kv, D)
    value: Tensor,
    packing: Packing,
    asked: Scoring,
) -> Tensor:
    """Attention (T, H, D), by one scaled_dot_product_attention a block, or plain products with a softcap.

    Takes the memory of a copy of each prompt's keys and values per tail, which packing.py bounds.
    """
    results = []
    for block in packing.blocks:
        found = _attend(_inputs(block, query, key, value), packing, asked)  # (G n, C, H, D)
        results.append(found.flatten(0, 1))
    return torch.cat(results).index_select(0, packing.outputs)


Inputs = tuple[Tensor, Tensor, Tensor]  # queries (B, H, Q, D), keys and values (B, H_kv, K, D)


def _inputs(block: Block, query: Tensor, key: Tensor, value: Tensor) -> Inputs:
    """Queries, keys and values of a block: B is G n, Q is C, K is P + C."""
    groups, members, tail = block.tails.shape

    def own(x: Tensor) -> Tensor:  # (G n, C, H or H_kv, D)
        return x.index_select(0, block.tails.flatten()).unflatten(0, (groups * members, tail))

    def whole(x: Tensor) -> Tensor:
        if not block.prompts.numel():
            return own(x).transpose(1, 2)
        shared = x.index_select(0, block.prompts.flatten()).unflatten(0, (groups, 1, -1))
        return torch.cat([shared.expand(-1, members, -1, -1, -1).flatten(0, 1), own(x)], 1).transpose(1, 2)

    return own(query).transpose(1, 2), whole(key), whole(value)


def _attend(inputs: Inputs, packing: Packing, asked: Scoring) -> Tensor:
    """Attention (B, Q, H, D), where the last Q keys are the queries' own."""
    query, key, value = inputs
    window = asked.window
    batch, heads, queries, size = query.shape
    # In 16 bits a CPU's flash attention takes 1.2 to 6 times as long as plain products, forward and backward, while
    # there are few keys: 6 at 33 of them, 1.2 at 256; beyond, it wins.
    few = query.device.type == "cpu" and query.element_size() == 2 and key.shape[2] <= 256
    plain = asked.softcap is not None or few
    # A GPU's other kernels than flash know no grouped queries: all scores would be in memory at once.
    grouped_is_known = query.device.type == "cpu" or heads == key.shape[1] or flash_serves(query.device, query.dtype)
    if not plain and grouped_is_known and queries == key.shape[2] and (window is None or window >= queries):
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=asked.scaling, enable_gqa=True)
        return out.transpose(1, 2)
    most = max(8, TILE * key.shape[1] // heads // 8 * 8)
    if queries > most:
        before = key.shape[2] - queries
        tiles = []
        for stop in range(queries, 0, -most):  # from the last, which sees the most keys, and whose mask serves all
            start = max(0, stop - most)
            first = 0 if window is None else max(0, before + start + 1 - window)
            seen = slice(first, before + stop)
            tile = query[:, :, start:stop], key[:, :, seen], value[:, :, seen]
            tiles.append(_attend(tile, packing, asked))
        return torch.cat(tiles[::-1], 1)
    # The queries of one kv head in one: no copy of keys for each, and half of enable_gqa's time in a CPU's backward.
    grouped = query.unflatten(1, (key.shape[1], -1)).transpose(2, 3)  # (B, H_kv, Q, H / H_kv, D)
    folded = grouped.flatten(2, 3)
    mask = _mask(packing, grouped, key.shape[2], window)
    if not plain:
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=asked.scaling)
    else:
        out = (scores_of(folded, key, asked) + mask).softmax(-1).to(value.dtype) @ value
    return out.view(grouped.shape).transpose(1, 2).reshape(batch, queries, heads, size)


def _mask(packing: Packing, grouped: Tensor, keys: int, window: int | None) -> Tensor:
    """An additive mask (Q copies, K): 0 where a token is seen, else -inf. The last Q of K tokens are the queries.

    It is a view of the lower right corner of the largest that was asked for. A mask of bools would be turned into
    numbers, and saved, in every layer. grouped is (B, H_kv, Q, copies, D).
    """
    queries, copies = grouped.shape[2:4]
    kind = (copies, window, grouped.dtype)
    rows, widest = packing.masks[kind].shape if kind in packing.masks else (0, 0)
    if queries * copies > rows or keys > widest:
        tallest, widest = max(queries, rows // copies), -(-max(keys, widest) // 8) * 8  # aligned, as a GPU wants it
        place = torch.arange(widest, device=grouped.device)
        back = place[widest - tallest :, None] - place
        unseen = ((back < 0) | (back >= (window or widest))).repeat_interleave(copies, 0)
        packing.masks[kind] = grouped.new_zeros(unseen.shape).masked_fill_(unseen, -torch.inf)
    mask = packing.masks[kind][-queries * copies :, -keys:]
    return mask if mask.device.type == "cpu" or mask.data_ptr() % 16 == 0 else mask.contiguous()


def by_segments(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, asked: Scoring, attention: Callable
) -> Tensor:
    """Attention (T, H, D), by a varlen attention whose causality ends at each segment's last key."""
    return attention(
        query, key.index_select(0, packing.keys), value.index_select(0, packing.keys), packing.query_starts,
        packing.key_starts, packing.longest_query, packing.longest_key, asked.scaling, asked.window,
    )  # fmt: skip


def varlen_attention(softcap: float | None) -> Callable | None:
    """A varlen attention that knows a softcap: torch's own, else flash-attn's where it is installed, or None."""
    if softcap is None and varlen_attn is not None:
        return flash
    return None if flash_attn_varlen_func is None else partial(flash_with_softcap, softcap=softcap)


def flash(query, key, value, query_starts, key_starts, longest_query, longest_key, scaling, window) -> Tensor:
    """torch's varlen_attn; CUDA from sm_80 on, bf16 or fp16."""
    assert varlen_attn is not None
    # Some releases take grouped queries as they come.
    grouped: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if _ASKS_FOR_GQA else {}
    out: Any = varlen_attn(  # a tensor, where nothing else is asked for
        query, key, value, query_starts, key_starts, longest_query, longest_key, scale=scaling,
        window_size=(-1 if window is None else window - 1, 0), **grouped,
    )  # fmt: skip
    return out


def flash_with_softcap(
    query, key, value, query_starts, key_starts, longest_query, longest_key, scaling, window, softcap: float | None
) -> Tensor:
    """flash-attn's flash_attn_varlen_func; CUDA from sm_80 on, bf16 or fp16. Grouped queries are as they come."""
    assert flash_attn_varlen_func is not None
    return flash_attn_varlen_func(
        query, key, value, query_starts, key_starts, longest_query, longest_key, softmax_scale=scaling, causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0), softcap=softcap or 0.0,
    )  # fmt: skip


def flash_serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether a varlen attention may run on a device; it raises for head sizes that it does not know."""
    half = dtype in (torch.bfloat16, torch.float16)
    return (
        (varlen_attn is not None or flash_attn_varlen_func is not None)
        and half
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )

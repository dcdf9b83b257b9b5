"""A packed row's attention and states: each tail goes on from its prompt, which stands there once, and sees itself.

The gradient of a shared prompt's keys and values is the sum of what its copies would get
(https://arxiv.org/abs/2506.05433). Nothing here is of the size (tokens, tokens) of the whole row; with a softcap, the
scores of a prompt and of its tails are in memory, unless flash-attn is installed, which knows one. A sink is one more
key to an attention that knows none.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from lowmem_grpo.model.attention import Scoring, scores_of, shares_of, sink_column
from lowmem_grpo.model.mixing import Call, Forward, States
from lowmem_grpo.model.packing import Block, Packing, Run, Runs

ROOM = 8  # a sink's columns and keys beside those of the model, so that all sizes stay multiples of 8
TILE = 4096  # queries at a time, times the heads of a kv head: no mask is of the size (tokens, tokens) of a long tail

try:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]: the extra [flash]
except ImportError:
    flash_attn_varlen_func = None
_ASKS_FOR_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


@dataclass(frozen=True)
class Packed:
    """The layout of one micro-batch, as attention.py asks for it."""

    packing: Packing
    varlen: bool  # by flash attention over segments, else by blocks

    def attend(self, query: Tensor, key: Tensor, value: Tensor, asked: Scoring) -> Tensor:
        # (T, H or H_kv, D). A squeeze is one in the backward, too, where an index is zeros and a copy into them.
        query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        attention = varlen_attention(asked) if self.varlen else None
        if attention is not None:
            return by_segments(query, key, value, self.packing, asked, attention)[None]
        return by_blocks(query, key, value, self.packing, asked)[None]

    def mix(self, mixer: Any, forward: Forward, hidden: Tensor) -> Tensor:
        return by_runs(forward, hidden.squeeze(0), self.packing.runs)[None]


def by_runs(forward: Forward, hidden: Tensor, runs: Runs) -> Tensor:
    """Output of a layer with a state for a packed row: hidden (T, D) -> (T, D).

    A prompt's tails begin with copies of its states, whose gradient is so the sum of theirs.
    """
    results = []

    def call(run: Run, before: States) -> States:
        cache = Call(before)
        rows = hidden.index_select(0, run.places.flatten()).unflatten(0, run.places.shape)  # (B, T, D)
        results.append(forward(rows, cache, run.mask).flatten(0, 1))
        return cache.after

    ends = [call(run, {}) for run in runs.prompts]
    after = {name: torch.cat([end[name] for end in ends]) for name in ends[0]} if ends else {}
    for run in runs.others:
        prompts = run.prompts
        call(run, {} if prompts is None else {name: state.index_select(0, prompts) for name, state in after.items()})
    return torch.cat(results).index_select(0, runs.outputs)


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
        found = causal_attention(_inputs(block, query, key, value), packing.masks, asked)  # (G n, C, H, D)
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


def causal_attention(inputs: Inputs, masks: dict, asked: Scoring) -> Tensor:
    """Attention (B, Q, H, D), where the last Q keys are the queries' own. Masks are kept for the next layer."""
    query, key, value = inputs
    window = asked.window
    batch, heads, queries, size = query.shape
    # In 16 bits a CPU's flash attention takes 1.2 to 6 times as long as plain products, forward and backward, while
    # there are few keys: 6 at 33 of them, 1.2 at 256; beyond, it wins.
    few = query.device.type == "cpu" and query.element_size() == 2 and key.shape[2] <= 256
    plain = asked.softcap is not None or few
    whole = queries == key.shape[2] and (window is None or window >= queries) and asked.sink is None
    if not plain and whole and takes_groups(query, key):
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
            tiles.append(causal_attention(tile, masks, asked))
        return torch.cat(tiles[::-1], 1)
    # The queries of one kv head in one: no copy of keys for each, and half of enable_gqa's time in a CPU's backward.
    grouped = query.unflatten(1, (key.shape[1], -1)).transpose(2, 3)  # (B, H_kv, Q, H / H_kv, D)
    folded = grouped.flatten(2, 3)
    sink = sink_column(asked, key.shape[1], queries)
    if plain:
        scores = scores_of(folded, key, asked) + _mask(masks, grouped, key.shape[2], window)
        out = shares_of(scores, sink).to(value.dtype) @ value
    elif sink is None:
        mask = _mask(masks, grouped, key.shape[2], window)
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=asked.scaling)
    else:
        folded, key, value = _with_sink(folded, key, value, sink / asked.scaling)
        mask = _mask(masks, grouped, key.shape[2], window, room=ROOM)
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=asked.scaling)[..., :size]
    return out.view(grouped.shape).transpose(1, 2).reshape(batch, queries, heads, size)


def takes_groups(query: Tensor, key: Tensor) -> bool:
    """Whether scaled_dot_product_attention takes grouped queries without all scores in memory at once.

    On a GPU flash alone does, for heads of up to 256 numbers.
    """
    if query.device.type == "cpu" or query.shape[1] == key.shape[1]:
        return True
    return flash_serves(query.device, query.dtype) and query.shape[3] <= 256


def _with_sink(query: Tensor, key: Tensor, value: Tensor, product: Tensor) -> Inputs:
    """Queries (B, H_kv, Q, D), keys and values (B, H_kv, K, D) with ROOM more columns, and ROOM more keys.

    The first of these keys is the sink, whose products with the queries are given: (H_kv, Q, 1) fp32. A query has its
    product in two of its new columns, rounded and the rest of it, and the sink's key adds them up. All else is 0.
    """
    rounded = product.to(query.dtype)
    columns = torch.cat([rounded, (product - rounded.to(product.dtype)).to(query.dtype)], -1)
    columns = F.pad(columns, (0, ROOM - 2)).expand(len(query), -1, -1, -1)
    adds_up = key.new_zeros(key.shape[2] + ROOM, ROOM)
    adds_up[key.shape[2], :2] = 1
    keys = torch.cat([F.pad(key, (0, 0, 0, ROOM)), adds_up.expand(*key.shape[:2], -1, -1)], -1)
    return torch.cat([query, columns], -1), keys, F.pad(value, (0, ROOM, 0, ROOM))


def _mask(masks: dict, grouped: Tensor, keys: int, window: int | None, room: int = 0) -> Tensor:
    """An additive mask (Q copies, K): 0 where a token is seen, else -inf. The last Q of K tokens are the queries.

    With room the last keys are none of the tokens': the first of them is seen, the others are not.

    It is a view of the lower right corner of the largest that was asked for. A mask of bools would be turned into
    numbers, and saved, in every layer. grouped is (B, H_kv, Q, copies, D).
    """
    queries, copies = grouped.shape[2:4]
    kind = (copies, window, grouped.dtype, room)
    rows, widest = masks[kind].shape if kind in masks else (0, 0)
    if queries * copies > rows or keys > widest:
        tallest, widest = max(queries, rows // copies), -(-max(keys, widest) // 8) * 8  # aligned, as a GPU wants it
        place = torch.arange(widest - room, device=grouped.device)
        back = place[widest - room - tallest :, None] - place
        unseen = ((back < 0) | (back >= (window or widest))).repeat_interleave(copies, 0)
        if room:
            unseen = F.pad(F.pad(unseen, (0, 1)), (0, room - 1), value=True)
        masks[kind] = grouped.new_zeros(unseen.shape).masked_fill_(unseen, -torch.inf)
    mask = masks[kind][-queries * copies :, -keys:]
    return mask if mask.device.type == "cpu" or mask.data_ptr() % 16 == 0 else mask.contiguous()


def by_segments(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, asked: Scoring, attention: Callable
) -> Tensor:
    """Attention (T, H, D), by a varlen attention whose causality ends at each segment's last key."""
    return attention(
        query, key.index_select(0, packing.keys), value.index_select(0, packing.keys), packing.query_starts,
        packing.key_starts, packing.longest_query, packing.longest_key, asked.scaling, asked.window,
    )  # fmt: skip


def varlen_attention(asked: Scoring) -> Callable | None:
    """A varlen attention that knows a layer's softcap and sink, or None: torch's own, or an installed flash-attn's."""
    if asked.softcap is None:
        return flash if asked.sink is None else partial(flash_with_sink, sink=asked.sink)
    if flash_attn_varlen_func is None or asked.sink is not None:  # flash-attn's backward is not called with an lse
        return None
    return partial(flash_with_softcap, softcap=asked.softcap)


def flash(query, key, value, query_starts, key_starts, longest_query, longest_key, scaling, window) -> Tensor:
    """torch's varlen_attn; CUDA from sm_80 on, bf16 or fp16."""
    # Some releases take grouped queries as they come.
    grouped: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if _ASKS_FOR_GQA else {}
    out: Any = varlen_attn(  # a tensor, where nothing else is asked for
        query, key, value, query_starts, key_starts, longest_query, longest_key, scale=scaling,
        window_size=(-1 if window is None else window - 1, 0), **grouped,
    )  # fmt: skip
    return out


def flash_with_sink(
    query, key, value, query_starts, key_starts, longest_query, longest_key, scaling, window, sink: Tensor
) -> Tensor:
    """torch's flash attention over segments with a sink in every softmax; CUDA from sm_80 on, bf16 or fp16."""
    segments = (query_starts, key_starts, longest_query, longest_key)
    return _FlashWithSink.apply(query, key, value, sink, segments, scaling, window)


class _FlashWithSink(torch.autograd.Function):
    """flash() with a sink (H,).

    With exp(lse) the sum of a softmax, its sum with the sink is exp(lse') = exp(lse) + exp(sink), and each share is
    exp(lse - lse') times what it was. A backward kernel makes shares anew from scores and the lse that it is given:
    given lse' and the smaller result, its gradients are those of attention with the sink.
    """

    @staticmethod
    def forward(ctx, query, key, value, sink, segments, scaling, window):
        out, lse = _flash_forward(query, key, value, segments, scaling, window)  # (T, H, D), (H, T) fp32
        whole = torch.logaddexp(lse, sink.float()[:, None])
        out.mul_((lse - whole).exp().t()[..., None])
        ctx.save_for_backward(query, key, value, sink, out, whole, *segments[:2])
        ctx.settings = (segments[2:], scaling, window)
        return out

    @staticmethod
    def backward(ctx, *gradients):
        query, key, value, sink, out, whole, *starts = ctx.saved_tensors
        longest, scaling, window = ctx.settings
        (gradient,) = gradients
        found = _flash_backward(gradient, query, key, value, out, whole, (*starts, *longest), scaling, window)
        of_sink = None
        if ctx.needs_input_grad[3]:  # as one more key: it takes its share from all others
            lost = (gradient * out).sum(-1, dtype=torch.float32).t() * (sink.float()[:, None] - whole).exp()
            of_sink = -lost.sum(1).to(sink.dtype)
        return *found, of_sink, None, None, None


def _flash_forward(query, key, value, segments, scaling, window) -> tuple[Tensor, Tensor]:
    """Attention (T, H, D) and the log-sum-exp of its scores (H, T) fp32, by the kernel that varlen_attn calls."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, *segments, 0.0, window is None, False, scale=scaling,
        window_size_left=-1 if window is None else window - 1, window_size_right=0,
    )  # fmt: skip
    return out, lse


def _flash_backward(gradient, query, key, value, out, lse, segments, scaling, window) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, by the kernel that varlen_attn's backward calls."""
    no_dropout = query.new_zeros(2, dtype=torch.uint64), query.new_empty(0)
    return torch.ops.aten._flash_attention_backward(
        gradient.contiguous(), query, key, value, out, lse, *segments, 0.0, window is None, *no_dropout, scale=scaling,
        window_size_left=-1 if window is None else window - 1, window_size_right=0,
    )  # fmt: skip


def flash_with_softcap(
    query, key, value, query_starts, key_starts, longest_query, longest_key, scaling, window, softcap: float
) -> Tensor:
    """flash-attn's flash_attn_varlen_func; CUDA from sm_80 on, bf16 or fp16. Grouped queries are as they come."""
    assert flash_attn_varlen_func is not None
    return flash_attn_varlen_func(
        query, key, value, query_starts, key_starts, longest_query, longest_key, softmax_scale=scaling, causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0), softcap=softcap,
        deterministic=torch.are_deterministic_algorithms_enabled(),  # which a package of its own does not ask
    )  # fmt: skip


def flash_serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether a varlen attention may run on a device; it raises for head sizes that it does not know."""
    half = dtype in (torch.bfloat16, torch.float16)
    return half and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)

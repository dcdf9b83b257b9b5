"""Attention of one new token per sequence over [shared prefix ; own tokens], keys and values read where they are.

    u_t = scaling q . k_t      s_t = softcap tanh(u_t / softcap), or u_t      out = sum_t exp(s_t) v_t / sum_t exp(s_t)

    query (S, H, D), own_keys and own_values (pages, H_kv, page_tokens, D), table (S, max_pages), lengths (S,),
    prefix_keys and prefix_values (P, H_kv, T_p, D), prefix_rows (S,), prefix_lengths (S,)  ->  out (S, H, D)

Keys and values may be int8, with scales (2, pages or P, H_kv, page_tokens or T_p), of keys and then of values: k_t and
v_t are the int8 numbers times their token's scale.

Flash-decoding (https://pytorch.org/blog/flash-decoding): one program per sequence, kv head and SPLIT tokens writes its
peak and sums in fp32, and a second kernel merges them. One fp32 multiplication per query of a kv head and element: with
at most 8 of them the keys' and values' way from memory takes longer, and sm_75 has no tensor cores in Triton. Scratch:
about S H splits (D + 2) fp32 numbers, splits = ceil(T_p / SPLIT) + ceil(max_pages page_tokens / SPLIT); a table no
wider than the longest sequence keeps it small. A prefix comes from memory once and then, for the rest of its
sequences, mostly from the L2 cache.

A row's result depends neither on S nor on the other rows nor, by the kernel, on how much wider the table is than the
row: the splits are the same tokens, merged in the same order. What a row does not attend to never reaches it, NaN or
not. Lengths, pages and prefix rows are read on the device alone: CUDA graphs can capture the call.
"""

import os
from typing import Any, Literal

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS
    triton: Any = None

# Tokens of one program: the sums it leaves are 5 % of the bytes it reads, at 7 queries per kv head and bf16.
SPLIT = 256
STEP = 2  # tokens that a thread has in hand at a time; 4 spill
STEP_INT8 = 1  # with 2, a thread would have 16 columns of a token in place of 8, and spill
HEADS = 8  # queries of one kv head that a program handles at most; more are shared out among programs
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = 16  # splits that the second kernel merges at a time

if triton is not None:
    LOWEST = tl.constexpr(-3.4028234663852886e38)  # a peak of nothing; not -inf: -inf - -inf is NaN

    @triton.jit
    def _softcap(score, softcap):
        """softcap tanh(score / softcap), near 0 by its series, where 1 - exp(-2 x) would lose digits."""
        x = score / softcap
        e = tl.exp(-2.0 * tl.abs(x))
        far = tl.where(x < 0, e - 1.0, 1.0 - e) / (1.0 + e)
        y = x * x
        near = x * (1.0 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
        return softcap * tl.where(y < 0.0625, near, far)

    @triton.jit
    def _attend(
        query,  # (1, 1, HEADS, BLOCK_D) fp32, times scaling
        key_ptr,  # of the kv head
        key_page_stride,
        key_token_stride,
        value_ptr,
        value_page_stride,
        value_token_stride,
        key_scale_ptr,  # of the kv head, or None
        value_scale_ptr,
        scale_page_stride,
        table_ptr,  # of the sequence
        first,  # tokens first ... stop - 1 are attended to
        stop,
        sums_ptr,  # (HEADS, D) fp32, written
        state_ptr,  # (HEADS, 2) fp32, written: peak and total
        sums_stride,
        state_stride,
        known,  # (HEADS,) bool
        softcap,
        D: tl.constexpr,
        PAGE: tl.constexpr,  # tokens of a page; None where the table has one page per sequence
        HEADS: tl.constexpr,
        BLOCK_D: tl.constexpr,
        ROWS: tl.constexpr,
        STEP: tl.constexpr,
    ):
        """Peak, total and sums of one split. ROWS softmaxes run beside each other, each over every ROWS-th token.

        A thread holds the same columns of STEP tokens, so that only sums over columns cross threads until the end.
        """
        heads = tl.arange(0, HEADS)
        if first < stop:
            # (STEP, ROWS, HEADS, BLOCK_D) throughout: a reshape would send keys and values through shared memory.
            column = tl.arange(0, BLOCK_D)[None, None, None, :]
            token = tl.arange(0, STEP)[:, None, None, None] * ROWS + tl.arange(0, ROWS)[None, :, None, None]
            beside = tl.arange(0, STEP)[:, None, None] * ROWS + tl.arange(0, ROWS)[None, :, None]  # token, of scores
            peak = tl.full((ROWS, HEADS), LOWEST, tl.float32)
            total = tl.zeros((ROWS, HEADS), tl.float32)
            sums = tl.zeros((ROWS, HEADS, BLOCK_D), tl.float32)
            if PAGE is None:
                page = tl.load(table_ptr).to(tl.int64)
            for start in range(first, stop, STEP * ROWS):
                at = start + token
                seen = at < stop
                if PAGE is None:
                    inside = at.to(tl.int64)
                else:
                    page = tl.load(table_ptr + at // PAGE, mask=seen, other=0).to(tl.int64)
                    inside = (at % PAGE).to(tl.int64)
                read = seen & (column < D)
                key_at = key_ptr + page * key_page_stride + inside * key_token_stride + column
                value_at = value_ptr + page * value_page_stride + inside * value_token_stride + column
                key = tl.load(key_at, mask=read, other=0).to(tl.float32)
                value = tl.load(value_at, mask=read, other=0).to(tl.float32)
                if key_scale_ptr is not None:
                    scale_at = page * scale_page_stride + inside
                    key *= tl.load(key_scale_ptr + scale_at, mask=seen, other=0.0).to(tl.float32)
                    value *= tl.load(value_scale_ptr + scale_at, mask=seen, other=0.0).to(tl.float32)
                score = tl.sum(query * key, 3)  # (STEP, ROWS, HEADS)
                if softcap is not None:
                    score = _softcap(score, softcap)
                score = tl.where(start + beside < stop, score, float("-inf"))
                higher = tl.maximum(peak, tl.max(score, 0))
                share = tl.exp(score - higher[None])
                fade = tl.exp(peak - higher)
                total = total * fade + tl.sum(share, 0)
                sums = sums * fade[:, :, None] + tl.sum(share[:, :, :, None] * value, 0)
                peak = higher
            highest = tl.max(peak, 0)
            fade = tl.exp(peak - highest[None])
            total_of_split = tl.sum(total * fade, 0)
            sums_of_split = tl.sum(sums * fade[:, :, None], 0)
            tl.store(state_ptr + heads * state_stride, highest, mask=known)
            tl.store(state_ptr + heads * state_stride + 1, total_of_split, mask=known)
            d = tl.arange(0, BLOCK_D)[None, :]
            tl.store(sums_ptr + heads[:, None] * sums_stride + d, sums_of_split, mask=known[:, None] & (d < D))
        else:
            tl.store(state_ptr + heads * state_stride, LOWEST, mask=known)
            tl.store(state_ptr + heads * state_stride + 1, 0.0, mask=known)

    @triton.jit(
        do_not_specialize=[
            "table_stride",
            "own_scale_kind_stride",
            "prefix_scale_kind_stride",
            "prefix_tokens",
            "own_tokens",
            "window",
            "splits",
        ]
    )
    def _split_kernel(
        query_ptr,  # (S, H, D)
        own_key_ptr,  # (pages, H_kv, page_tokens, D)
        own_value_ptr,
        prefix_key_ptr,  # (P, H_kv, T_p, D), or None
        prefix_value_ptr,
        own_scale_ptr,  # (2, pages, H_kv, page_tokens), or None
        prefix_scale_ptr,  # (2, P, H_kv, T_p), or None
        table_ptr,  # (S, max_pages)
        lengths_ptr,  # (S,) int64
        prefix_rows_ptr,  # (S,) int64, or None
        prefix_lengths_ptr,  # (S,) int64, or None
        sums_ptr,  # (S, H, splits, D) fp32, written
        state_ptr,  # (S, H, splits, 2) fp32, written
        query_row_stride,
        query_head_stride,
        own_key_page_stride,
        own_key_head_stride,
        own_key_token_stride,
        own_value_page_stride,
        own_value_head_stride,
        own_value_token_stride,
        prefix_key_page_stride,
        prefix_key_head_stride,
        prefix_key_token_stride,
        prefix_value_page_stride,
        prefix_value_head_stride,
        prefix_value_token_stride,
        own_scale_kind_stride,  # from keys to values
        own_scale_page_stride,
        own_scale_head_stride,
        prefix_scale_kind_stride,
        prefix_scale_page_stride,
        prefix_scale_head_stride,
        table_stride,
        splits,
        prefix_tokens,  # T_p, or 0
        own_tokens,  # max_pages page_tokens
        window,  # or None
        scaling,
        softcap,  # or None
        D: tl.constexpr,
        H: tl.constexpr,
        GROUP: tl.constexpr,  # H / H_kv
        PAGE: tl.constexpr,
        SPLIT: tl.constexpr,
        HEADS: tl.constexpr,
        BLOCK_D: tl.constexpr,
        ROWS: tl.constexpr,
        STEP: tl.constexpr,
    ):
        """One program per sequence, up to HEADS queries of a kv head, and split: the prefix's splits, then its own."""
        row = tl.program_id(0).to(tl.int64)
        parts: tl.constexpr = (GROUP + HEADS - 1) // HEADS
        kv_head = (tl.program_id(1) // parts).to(tl.int64)
        part = tl.program_id(1) % parts
        split = tl.program_id(2)
        head = kv_head * GROUP + part * HEADS
        left = GROUP - part * HEADS

        heads = tl.arange(0, HEADS)[None, None, :, None]
        column = tl.arange(0, BLOCK_D)[None, None, None, :]
        query_ptr += row * query_row_stride + head * query_head_stride
        query = tl.load(query_ptr + heads * query_head_stride + column, mask=(heads < left) & (column < D), other=0.0)
        query = query.to(tl.float32) * scaling
        known = tl.arange(0, HEADS) < left
        sums_stride, state_stride = splits * D, splits * 2  # from head to head; by products, whose D shows
        sums_ptr += (row * H + head) * sums_stride + split * D
        state_ptr += (row * H + head) * state_stride + split * 2

        length = tl.load(lengths_ptr + row).to(tl.int32)
        own_value_scale_ptr, prefix_value_scale_ptr = own_scale_ptr, prefix_scale_ptr
        if own_scale_ptr is not None:
            own_scale_ptr += kv_head * own_scale_head_stride
            own_value_scale_ptr = own_scale_ptr + own_scale_kind_stride
        if prefix_scale_ptr is not None:
            prefix_scale_ptr += kv_head * prefix_scale_head_stride
            prefix_value_scale_ptr = prefix_scale_ptr + prefix_scale_kind_stride
        own_split = split
        if prefix_key_ptr is not None:
            own_split -= tl.cdiv(prefix_tokens, SPLIT)
            if own_split < 0:
                prefix_length = tl.load(prefix_lengths_ptr + row).to(tl.int32)
                first = split * SPLIT
                stop = tl.minimum(tl.minimum(first + SPLIT, prefix_length), prefix_tokens)
                if window is not None:
                    first = tl.maximum(first, prefix_length + length - window)
                _attend(
                    query,
                    prefix_key_ptr + kv_head * prefix_key_head_stride, prefix_key_page_stride, prefix_key_token_stride,
                    prefix_value_ptr + kv_head * prefix_value_head_stride, prefix_value_page_stride,
                    prefix_value_token_stride, prefix_scale_ptr, prefix_value_scale_ptr, prefix_scale_page_stride,
                    prefix_rows_ptr + row, first, stop, sums_ptr, state_ptr, sums_stride, state_stride, known, softcap,
                    D, None, HEADS, BLOCK_D, ROWS, STEP,
                )  # fmt: skip
        if own_split >= 0:
            first = own_split * SPLIT
            stop = tl.minimum(tl.minimum(first + SPLIT, length), own_tokens)
            if window is not None:
                first = tl.maximum(first, length - window)
            _attend(
                query, own_key_ptr + kv_head * own_key_head_stride, own_key_page_stride, own_key_token_stride,
                own_value_ptr + kv_head * own_value_head_stride, own_value_page_stride, own_value_token_stride,
                own_scale_ptr, own_value_scale_ptr, own_scale_page_stride, table_ptr + row * table_stride, first, stop,
                sums_ptr, state_ptr, sums_stride, state_stride, known, softcap, D, PAGE, HEADS, BLOCK_D, ROWS, STEP,
            )  # fmt: skip

    @triton.jit(do_not_specialize=["splits"])
    def _merge_kernel(
        sums_ptr,  # (S, H, splits, D) fp32
        state_ptr,  # (S, H, splits, 2) fp32: peak and total
        out_ptr,  # (S, H, D), written
        splits,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        TILE: tl.constexpr,
    ):
        """One program per sequence and head. The sums of an empty split were not written, and are not read."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK_D)
        peak = tl.full((1,), LOWEST, tl.float32)
        total = tl.zeros((1,), tl.float32)
        sums = tl.zeros((BLOCK_D,), tl.float32)
        for start in range(0, splits, TILE):
            split = start + tl.arange(0, TILE)[:, None]
            # One number for all columns: with one for each, the sums' mask would let them be read one at a time alone.
            state_at = state_ptr + (row * splits + split) * 2
            peaks = tl.load(state_at, mask=split < splits, other=LOWEST)
            totals = tl.load(state_at + 1, mask=split < splits, other=0.0)
            read = (totals != 0) & (column < D)[None, :]
            part = tl.load(sums_ptr + (row * splits + split) * D + column[None, :], mask=read, other=0.0)
            higher = tl.maximum(peak, tl.max(peaks, 0))
            weight = tl.exp(peaks - higher[None, :])
            fade = tl.exp(peak - higher)
            total = total * fade + tl.sum(totals * weight, 0)
            sums = sums * fade + tl.sum(part * weight, 0)
            peak = higher
        tl.store(out_ptr + row * D + column, (sums / total).to(out_ptr.dtype.element_ty), mask=column < D)


@torch.no_grad()
def decode_attention(
    query: Tensor,  # (S, H, D)
    own_keys: Tensor,  # (pages, H_kv, page_tokens, D), any strides but the last, which is 1
    own_values: Tensor,  # like own_keys
    table: Tensor,  # (S, max_pages) int32 or int64: each sequence's pages in order; what is past its length is not read
    lengths: Tensor,  # (S,) int64 >= 1: own tokens to attend to, the newest included
    *,
    scaling: float,
    prefix_keys: Tensor | None = None,  # (P, H_kv, T_p, D), strides likewise
    prefix_values: Tensor | None = None,  # like prefix_keys
    prefix_rows: Tensor | None = None,  # (S,) int64: the prefix row of each sequence
    prefix_lengths: Tensor | None = None,  # (S,) int64 in 0 ... T_p: how many tokens of it are real
    own_scales: Tensor | None = None,  # (2, pages, H_kv, page_tokens) fp16, last stride 1, of int8 keys and values
    prefix_scales: Tensor | None = None,  # (2, P, H_kv, T_p), likewise
    softcap: float | None = None,
    window: int | None = None,  # only the last that many tokens of [prefix ; own] are seen
    backend: Literal["auto", "triton", "torch"] = "auto",
) -> Tensor:
    """Attention of each sequence's newest token, (S, H, D) in query's dtype; scores and sums are fp32. No gradient.

    Memory that is one page per sequence is the case page_tokens = all of it, table = arange(S)[:, None]. A row that
    attends to nothing is NaN. Tokens past the end of table and prefix are left out, whatever the lengths say.

    Raises:
        ValueError: shapes, dtypes or settings that do not belong together.
        RuntimeError: backend="triton" where it cannot run.
    """
    prefix = _all_or_none(prefix_keys, prefix_values, prefix_rows, prefix_lengths)
    scales = (own_scales, prefix_scales)
    _check(query, own_keys, own_values, table, lengths, prefix, scales, softcap, window)
    if _runs_by_triton(backend, query.device.type):
        return _launch(query, own_keys, own_values, table, lengths, prefix, scales, scaling, softcap, window)
    keys, values, seen, back = _gathered(own_keys, own_values, own_scales, table, lengths, lengths)
    if prefix is not None:
        prefix_keys, prefix_values, prefix_rows, prefix_lengths = prefix
        text = prefix_lengths + lengths
        before = _gathered(prefix_keys, prefix_values, prefix_scales, prefix_rows[:, None], prefix_lengths, text)
        keys, values = torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)
        seen, back = torch.cat([before[2], seen], 1), torch.cat([before[3], back], 1)
    if window is not None:
        seen = seen & (back <= window)
    seen = seen[:, None, :, None]  # (S, 1, N, 1)
    grouped = query.float().unflatten(1, (keys.shape[1], -1))  # (S, H_kv, H / H_kv, D)
    score = grouped @ keys.mT * scaling
    if softcap is not None:
        score = score.div_(softcap).tanh_().mul_(softcap)
    share = score.masked_fill_(~seen.mT, -torch.inf).softmax(-1)
    return (share @ values.masked_fill_(~seen, 0.0)).flatten(1, 2).to(query.dtype)


def _gathered(
    keys: Tensor, values: Tensor, scales: Tensor | None, table: Tensor, lengths: Tensor, text: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values (S, H_kv, N, D) fp32 of each row's pages, which are real, and how far before its text."""
    page_tokens = keys.shape[2]
    place = torch.arange(table.shape[1] * page_tokens, device=table.device)
    used = place[::page_tokens] < lengths[:, None]
    pages = table.long().masked_fill(~used, 0)
    keys, values = (x[pages].float() for x in (keys, values))  # (S, max_pages, H_kv, page_tokens, D)
    if scales is not None:
        keys, values = (x * scale[pages][..., None] for x, scale in zip((keys, values), scales, strict=True))
    keys, values = (x.transpose(1, 2).flatten(2, 3) for x in (keys, values))
    return keys, values, place < lengths[:, None], text[:, None] - place


def _launch(query, own_keys, own_values, table, lengths, prefix, scales, scaling, softcap, window) -> Tensor:
    S, H, D = query.shape
    kv_heads, page_tokens = own_keys.shape[1:3]
    prefix_keys, prefix_values, prefix_rows, prefix_lengths = prefix or (None,) * 4
    prefix_tokens = 0 if prefix_keys is None else prefix_keys.shape[2]
    own_tokens = table.shape[1] * page_tokens
    splits = triton.cdiv(prefix_tokens, SPLIT) + triton.cdiv(own_tokens, SPLIT)  # by capacity: lengths stay unread
    heads = min(HEADS, triton.next_power_of_2(H // kv_heads))
    step = STEP_INT8 if own_keys.dtype == torch.int8 else STEP
    block_d = max(16, triton.next_power_of_2(D))
    rows = 1024 // block_d  # 8 elements of a token to each thread of 4 warps
    out = torch.empty(S, H, D, dtype=query.dtype, device=query.device)
    sums = torch.empty(S, H, splits, D, dtype=torch.float32, device=query.device)
    state = torch.empty(S, H, splits, 2, dtype=torch.float32, device=query.device)
    query = query if query.stride(2) == 1 else query.contiguous()
    table = table if table.stride(1) == 1 else table.contiguous()
    lengths, prefix_rows, prefix_lengths = (
        x if x is None else x.contiguous() for x in (lengths, prefix_rows, prefix_lengths)
    )
    if S:
        with torch.cuda.device_of(query):
            _split_kernel[(S, kv_heads * triton.cdiv(H // kv_heads, heads), splits)](
                query, own_keys, own_values, prefix_keys, prefix_values, *scales, table, lengths, prefix_rows,
                prefix_lengths, sums, state, *query.stride()[:2], *own_keys.stride()[:3], *own_values.stride()[:3],
                *(stride for x in (prefix_keys, prefix_values, *scales)
                  for stride in ((0, 0, 0) if x is None else x.stride()[:3])),
                table.stride(0), splits, prefix_tokens, own_tokens,
                window if window is None else min(window, 2**30), scaling, softcap,
                D=D, H=H, GROUP=H // kv_heads, PAGE=page_tokens if table.shape[1] > 1 else None, SPLIT=SPLIT,
                HEADS=heads, BLOCK_D=block_d, ROWS=rows, STEP=step, num_warps=4,
            )  # fmt: skip
            _merge_kernel[(S * H,)](sums, state, out, splits, D=D, BLOCK_D=block_d, TILE=TILE, num_warps=4)
    return out


def _all_or_none(*given: Tensor | None) -> tuple[Tensor, ...] | None:
    there = tuple(x for x in given if x is not None)
    if there and len(there) < len(given):
        raise ValueError("prefix_keys, prefix_values, prefix_rows and prefix_lengths go together: pass all or none")
    return there or None


def _check(query, own_keys, own_values, table, lengths, prefix, scales, softcap, window) -> None:
    if query.dim() != 3 or query.dtype not in DTYPES or not 1 <= query.shape[2] <= 256:
        raise ValueError(f"query must be (S, H, D <= 256) fp32, bf16 or fp16, not {tuple(query.shape)} {query.dtype}")
    S, H, D = query.shape
    _check_store("own", own_keys, own_values, scales[0], own_keys, H, D)
    if table.dim() != 2 or len(table) != S or table.shape[1] == 0 or table.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"table must be ({S}, max_pages) int32 or int64, not {tuple(table.shape)} {table.dtype}")
    _check_rows("lengths", lengths, S)
    given = (query, own_keys, own_values, table, lengths, *(prefix or ()), *scales)
    devices = {x.device for x in given if x is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, not on {sorted(map(str, devices))}")
    if prefix is None and scales[1] is not None:
        raise ValueError("prefix_scales go with prefix_keys and the rest of a prefix")
    if prefix is not None:
        _check_store("prefix", prefix[0], prefix[1], scales[1], own_keys, H, D)
        if prefix[0].shape[1] != own_keys.shape[1]:
            raise ValueError(f"prefix_keys must have own_keys' {own_keys.shape[1]} heads, not {prefix[0].shape[1]}")
        _check_rows("prefix_rows", prefix[2], S)
        _check_rows("prefix_lengths", prefix[3], S)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, not {softcap}; None leaves scores as they are")
    if window is not None and not window > 0:
        raise ValueError(f"window must be positive, not {window}; None shows every token")


def _check_store(
    name: str, keys: Tensor, values: Tensor, scales: Tensor | None, own_keys: Tensor, H: int, D: int
) -> None:
    dtypes = (*DTYPES, torch.int8)
    if keys.dim() != 4 or keys.shape[3] != D or 0 in keys.shape or H % keys.shape[1] or keys.dtype not in dtypes:
        raise ValueError(
            f"{name}_keys must be (pages, kv heads that divide {H}, tokens, {D}) fp32, bf16, fp16 or int8, and not "
            f"empty, not {tuple(keys.shape)} {keys.dtype}"
        )
    if (scales is not None) != (keys.dtype == torch.int8):
        raise ValueError(f"{name}_scales go with int8 keys and values, and with no others")
    if scales is not None and (
        scales.shape != (2, *keys.shape[:3]) or scales.dtype != torch.float16 or scales.stride(3) != 1
    ):
        raise ValueError(
            f"{name}_scales must be {(2, *keys.shape[:3])} torch.float16 with a last stride of 1, not "
            f"{tuple(scales.shape)} {scales.dtype}"
        )
    if values.shape != keys.shape or not values.dtype == keys.dtype == own_keys.dtype:
        raise ValueError(f"{name}_values must have {name}_keys' shape, and all keys and values one dtype")
    if keys.stride(3) != 1 or values.stride(3) != 1:
        raise ValueError(f"{name}_keys and {name}_values must have a last stride of 1: store head_dim last")


def _check_rows(name: str, given: Tensor, S: int) -> None:
    if given.shape != (S,) or given.dtype != torch.int64:
        raise ValueError(f"{name} must be ({S},) torch.int64, not {tuple(given.shape)} {given.dtype}")


def _runs_by_triton(backend: str, device_type: str) -> bool:
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend must be 'auto', 'triton' or 'torch', not {backend!r}")
    if backend == "triton" and triton is None:
        raise RuntimeError("backend='triton' needs Triton installed; backend='torch' does without")
    if backend == "triton" and device_type != "cuda" and not triton.knobs.runtime.interpret:
        raise RuntimeError(
            f"backend='triton' on {device_type} runs only in Triton's interpreter: set TRITON_INTERPRET=1 before it is "
            "imported, or use backend='torch'"
        )
    wanted = os.environ.get("LOWMEM_GRPO_TRITON") != "0"  # the way out, where a card or a driver does not suit it
    return backend == "triton" or (backend == "auto" and device_type == "cuda" and triton is not None and wanted)

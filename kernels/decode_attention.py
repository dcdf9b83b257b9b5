"""Attention of one new token per sequence over [shared prefix ; own tokens], keys and values read where they are.

    u_t = scaling q . k_t      s_t = softcap tanh(u_t / softcap), or u_t      out = sum_t exp(s_t) v_t / sum_t exp(s_t)

With a sink (H,), exp(sink) is in the last sum, too: of a key that has no value.

    query (S, H, D), own (L, 2, pages, H_kv, T, D), prefix (L, 2, P, H_kv, T_p, D), table (S, max_pages),
    positions, prefilled, prefix_rows (S,)  ->  out (S, H, D)

Of L layers, keys are 0 and values 1. In memory a page comes first, (pages, L, 2, H_kv, T, D), so that all strides but a
prefix row's are the model's. Keys and values may be int8, with fp16 scales (L, 2, pages or P, H_kv, T or T_p): k_t and
v_t are the int8 numbers times their token's scale.

The kernels take the store's addresses and T_p from device memory. A CUDA graph that was captured with one store is
right with a later one, wherever that lies and however many pages and prefix rows it has.

Flash-decoding (https://pytorch.org/blog/flash-decoding): one program per sequence, kv head and SPLIT tokens writes its
peak and sums in fp32, and a second kernel merges them. Tensor cores multiply 16-bit queries with keys and values of 16
or 8 bits, from sm_80 on; elsewhere it is one fp32 multiplication per query of a kv head and element. Scratch: S H
splits (D + 2) fp32 numbers, splits = prefix_splits(T_p) + ceil(max_pages T / SPLIT); a table no wider than the longest
sequence keeps it small. A prefix comes from memory once and then, for the rest of its sequences, mostly from the L2
cache.

A row's result depends neither on S nor on the other rows nor, by the kernel, on how much wider the table is than the
row, or T_p than its prefix: the splits are the same tokens, merged in the same order. What a row does not attend to
never reaches it, NaN or not. Positions, pages and prefix rows are read on the device alone: CUDA graphs can capture the
calls.
"""

from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem_grpo.kernels.backend import Backend, runs_by_triton
from lowmem_grpo.kernels.overlap import launched

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS
    triton: Any = None

# Tokens of one program: the sums it leaves are 6 % of the bytes it reads, at 7 queries per kv head and bf16.
SPLIT = 128
STEP = 1  # tokens that a thread has in hand at a time; with 2 an H200 takes 1.5 to 1.6 times as long, 4 spill
TILE_NUMBERS = 8192  # keys of a tile for tensor cores, and as many values: 32 KiB in 16 bits, taken over by the next
STAGES = 2  # with 3 a tile has memory of its own: twice as much for a split that is 8 % shorter, as estimated for sm_90
HEADS = 8  # queries of one kv head that a program handles at most; more are shared out among programs
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_SCALE = 2.0**-24  # fp16's least, of int8 numbers that are all 0
TILE = 4  # splits that the second kernel merges at a time

if triton is not None:
    from lowmem_grpo.kernels.overlap import launch_next, wait_for_last

    IN_TRITON = {
        torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int8: tl.int8,
    }  # fmt: skip
    LEAST = tl.constexpr(LEAST_SCALE)
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
    def _pointer(address_ptr, DTYPE: tl.constexpr):
        """The pointer that lies in memory. Without the hint, every access by it would be of one number."""
        return tl.multiple_of(tl.load(address_ptr).to(tl.pointer_type(DTYPE)), 16)  # type: ignore[arg-type]

    @triton.jit
    def _place(
        start,  # the first token of a tile
        token,  # of each of a tile's tokens, how far behind that it stands
        seen,  # of each: whether it is attended to
        where,
        tokens,  # of a page, T or T_p
        PAGE_ROWS: tl.constexpr,  # L 2 H_kv
        T: tl.constexpr,
        HALVES: tl.constexpr,
    ):
        """Rows of D numbers before a tile's keys: one number for all tokens, and one for each to add.

        `where` is what a split has for it: rows before its token 0 if all tokens were in the page of its first half,
        rows by that of its second half, which begins at `middle`, its table, whether it is a prefix's, and its key_row.
        """
        first_row, second_row, middle, table_ptr, in_prefix, key_row = where
        if HALVES:
            return tl.where(start < middle, first_row, second_row) + start, token
        else:
            at = start + token
            index = tl.where(in_prefix, 0, at // T)
            page = tl.load(table_ptr + index, mask=seen, other=0)
            return key_row * tokens, page * PAGE_ROWS * tokens - index * T + at

    @triton.jit
    def _attend(
        query,  # (1, 1, HEADS, BLOCK_D) fp32, times scaling
        base_ptr,  # (pages, L, 2, H_kv, T, D)
        scale_base_ptr,  # (pages, L, 2, H_kv, T), or None
        first,  # tokens first ... stop - 1 are attended to, those before first_seen excepted
        first_seen,  # or None
        stop,
        sums_ptr,  # (HEADS, D) fp32, written
        state_ptr,  # (HEADS, 2) fp32, written: peak and total
        sums_stride,
        state_stride,
        known,  # (HEADS,) bool
        softcap,
        where,  # as in _place
        tokens,  # of a page, T or T_p
        LAYERS: tl.constexpr,
        KV_HEADS: tl.constexpr,
        T: tl.constexpr,
        HALVES: tl.constexpr,
        D: tl.constexpr,
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
            for start in range(first, stop, STEP * ROWS):
                seen = token < stop - start
                counts = beside < stop - start
                if first_seen is not None:
                    seen &= token >= first_seen - start
                    counts &= beside >= first_seen - start
                read = seen & (column < D)
                row, rest = _place(start, token, seen, where, tokens, LAYERS * 2 * KV_HEADS, T, HALVES)
                # A value is H_kv rows of T tokens behind its key.
                key_at = base_ptr + row * D + (rest * D + column)
                key = tl.load(key_at, mask=read, other=0).to(tl.float32)
                value = tl.load(key_at + KV_HEADS * tokens * D, mask=read, other=0).to(tl.float32)
                if scale_base_ptr is not None:
                    scale_at = scale_base_ptr + row + rest
                    key *= tl.load(scale_at, mask=seen, other=0.0).to(tl.float32)
                    value *= tl.load(scale_at + KV_HEADS * tokens, mask=seen, other=0.0).to(tl.float32)
                score = tl.sum(query * key, 3)  # (STEP, ROWS, HEADS)
                if softcap is not None:
                    score = _softcap(score, softcap)
                score = tl.where(counts, score, float("-inf"))
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

    @triton.jit
    def _attend_by_tiles(
        query,  # (HEADS, BLOCK_D), as given
        base_ptr,  # (pages, L, 2, H_kv, T, D)
        scale_base_ptr,  # (pages, L, 2, H_kv, T), or None
        first,  # tokens first ... stop - 1 are attended to, those before first_seen excepted
        first_seen,  # or None
        stop,
        sums_ptr,  # (HEADS, D) fp32, written
        state_ptr,  # (HEADS, 2) fp32, written: peak and total
        sums_stride,
        state_stride,
        known,  # (HEADS,) bool
        scaling,
        softcap,
        where,  # as in _place
        tokens,  # of a page, T or T_p
        LAYERS: tl.constexpr,
        KV_HEADS: tl.constexpr,
        T: tl.constexpr,
        HALVES: tl.constexpr,
        D: tl.constexpr,
        HEADS: tl.constexpr,
        BLOCK_D: tl.constexpr,
        TOKENS: tl.constexpr,
        FACTOR: tl.constexpr,  # dtype of a product's factors
    ):
        """Peak, total and sums of one split, TOKENS at a time, on tensor cores.

        Keys, values and queries have 16 bits, or 8, so that their products are exact in fp32. A token's share is the
        sum of two numbers of 16 bits, which leaves it 16 bits or more.
        """
        heads = tl.arange(0, HEADS)
        d = tl.arange(0, BLOCK_D)[None, :]
        token = tl.arange(0, TOKENS)
        peak = tl.full((HEADS,), LOWEST, tl.float32)
        total = tl.zeros((HEADS, TOKENS), tl.float32)  # of every TOKENS-th token
        sums = tl.zeros((HEADS, BLOCK_D), tl.float32)
        for start in range(first, stop, TOKENS):
            seen = token < stop - start
            if first_seen is not None:
                seen &= token >= first_seen - start
            read = seen[:, None] & (d < D)
            row, rest = _place(start, token, seen, where, tokens, LAYERS * 2 * KV_HEADS, T, HALVES)
            # A value is H_kv rows of T tokens behind its key.
            key_at = base_ptr + row * D + (rest[:, None] * D + d)
            key = tl.load(key_at, mask=read, other=0)
            value = tl.load(key_at + KV_HEADS * tokens * D, mask=read, other=0)
            if scale_base_ptr is not None:
                scale_at = scale_base_ptr + row + rest
                key_scale = tl.load(scale_at, mask=seen, other=0.0)
                value_scale = tl.load(scale_at + KV_HEADS * tokens, mask=seen, other=0.0)
            score = tl.dot(query.to(FACTOR), tl.trans(key.to(FACTOR)), input_precision="ieee") * scaling
            if scale_base_ptr is not None:
                score *= key_scale.to(tl.float32)[None, :]  # (HEADS, TOKENS)
            if softcap is not None:
                score = _softcap(score, softcap)
            score = tl.where(seen[None, :], score, float("-inf"))
            higher = tl.maximum(peak, tl.max(score, 1))
            share = tl.exp(score - higher[:, None])
            fade = tl.exp(peak - higher)
            total = total * fade[:, None] + share
            if scale_base_ptr is not None:
                share *= value_scale.to(tl.float32)[None, :]
            most = share.to(FACTOR)
            rest_of_share = (share - most.to(tl.float32)).to(FACTOR)
            value = value.to(FACTOR)
            sums = tl.dot(rest_of_share, value, sums * fade[:, None], input_precision="ieee")
            sums = tl.dot(most, value, sums, input_precision="ieee")
            peak = higher
        tl.store(state_ptr + heads * state_stride, peak, mask=known)
        tl.store(state_ptr + heads * state_stride + 1, tl.sum(total, 1), mask=known)
        if first < stop:
            tl.store(sums_ptr + heads[:, None] * sums_stride + d, sums, mask=known[:, None] & (d < D))

    @triton.jit(
        do_not_specialize=["layer", "table_stride", "splits", "prefix_splits", "own_tokens", "window"],
    )
    def _split_kernel(
        query_ptr,  # (S, H, D)
        addresses_ptr,  # (5,) int64
        table_ptr,  # (S, max_pages)
        positions_ptr,  # (S,) int64
        prefilled_ptr,  # (S,) int64, or None
        prefix_rows_ptr,  # (S,) int64, or None
        sums_ptr,  # (S, H, splits, D) fp32, written
        state_ptr,  # (S, H, splits, 2) fp32, written
        query_row_stride,
        query_head_stride,
        table_stride,
        layer,
        splits,
        prefix_splits,  # the first of them
        own_tokens,  # max_pages T
        window,  # or None
        scaling,
        softcap,  # or None
        NUMBERS: tl.constexpr,  # dtype of keys and values
        LAYERS: tl.constexpr,
        H: tl.constexpr,
        GROUP: tl.constexpr,  # H / H_kv
        T: tl.constexpr,  # tokens of a page
        D: tl.constexpr,
        HALVES: tl.constexpr,  # whether a split's first half lies in one page, and its second
        SPLIT: tl.constexpr,
        HEADS: tl.constexpr,
        BLOCK_D: tl.constexpr,
        ROWS: tl.constexpr,
        STEP: tl.constexpr,
        TOKENS: tl.constexpr,  # of a tile for tensor cores, or None
        FACTOR: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        """One program per sequence, up to HEADS queries of a kv head, and split: the prefix's splits, then its own."""
        if OVERLAP:
            launch_next()
            wait_for_last()
        row = tl.program_id(0).to(tl.int64)
        parts: tl.constexpr = (GROUP + HEADS - 1) // HEADS
        KV_HEADS: tl.constexpr = H // GROUP
        kv_head = (tl.program_id(1) // parts).to(tl.int64)
        part = tl.program_id(1) % parts
        split = tl.program_id(2)
        head = kv_head * GROUP + part * HEADS
        left = GROUP - part * HEADS

        # All that can be is loaded before anything is computed of it, so that keys are one wait for memory away.
        in_prefix = split < prefix_splits
        begin = (split - tl.where(in_prefix, 0, prefix_splits)) * SPLIT
        middle = begin + SPLIT // 2
        table_ptr += row * table_stride
        length = tl.load(positions_ptr + row)
        if prefilled_ptr is not None:
            prefilled = tl.load(prefilled_ptr + row)
            prefix_tokens = tl.load(addresses_ptr + 4)
            table_ptr = tl.where(in_prefix, prefix_rows_ptr + row, table_ptr)
        address_ptr = addresses_ptr + tl.where(in_prefix, 2, 0)
        base_ptr = _pointer(address_ptr, NUMBERS)
        scale_base_ptr = None if tl.int8 != NUMBERS else _pointer(address_ptr + 1, tl.float16)
        if HALVES:
            first_index = tl.where(in_prefix, 0, begin // T)
            second_index = tl.where(in_prefix | (middle >= own_tokens), 0, middle // T)
            first_page, second_page = tl.load(table_ptr + first_index), tl.load(table_ptr + second_index)
        query_ptr += row * query_row_stride + head * query_head_stride
        if TOKENS is None:
            heads = tl.arange(0, HEADS)[None, None, :, None]
            column = tl.arange(0, BLOCK_D)[None, None, None, :]
        else:
            heads = tl.arange(0, HEADS)[:, None]
            column = tl.arange(0, BLOCK_D)[None, :]
        there = (heads < left) & (column < D)
        query = tl.load(query_ptr + heads * query_head_stride + column, mask=there, other=0.0)

        known = tl.arange(0, HEADS) < left
        sums_stride, state_stride = splits * D, splits * 2  # from head to head; by products, whose D shows
        sums_ptr += (row * H + head) * sums_stride + split * D
        state_ptr += (row * H + head) * state_stride + split * 2
        key_row = layer.to(tl.int64) * (2 * KV_HEADS) + kv_head
        length = length.to(tl.int32) + 1
        capacity = own_tokens
        tokens = T
        first_seen = None if window is None else length - window
        if prefilled_ptr is not None:
            prefilled = prefilled.to(tl.int32)
            length = tl.where(in_prefix, prefilled, length - prefilled)
            capacity = tl.where(in_prefix, prefix_tokens.to(tl.int32), own_tokens)
            tokens = tl.where(in_prefix, prefix_tokens, T)
            if window is not None:
                first_seen -= tl.where(in_prefix, 0, prefilled)
        stop = tl.minimum(tl.minimum(begin + SPLIT, length), capacity)
        if window is not None:
            TILE: tl.constexpr = STEP * ROWS if TOKENS is None else TOKENS
            begin += tl.maximum(first_seen - begin, 0) // TILE * TILE  # by whole tiles, which do not straddle pages
        PAGE_ROWS: tl.constexpr = LAYERS * 2 * KV_HEADS
        first_row, second_row = key_row, key_row
        if HALVES:
            first_row = (first_page * PAGE_ROWS + key_row) * tokens - first_index * T
            second_row = (second_page * PAGE_ROWS + key_row) * tokens - second_index * T
        where = (first_row, second_row, middle, table_ptr, in_prefix, key_row)
        if TOKENS is None:
            _attend(
                query.to(tl.float32) * scaling, base_ptr, scale_base_ptr, begin, first_seen, stop, sums_ptr, state_ptr,
                sums_stride, state_stride, known, softcap, where, tokens, LAYERS, KV_HEADS, T, HALVES, D, HEADS,
                BLOCK_D, ROWS, STEP,
            )  # fmt: skip
        else:
            _attend_by_tiles(
                query, base_ptr, scale_base_ptr, begin, first_seen, stop, sums_ptr, state_ptr, sums_stride,
                state_stride, known, scaling, softcap, where, tokens, LAYERS, KV_HEADS, T, HALVES, D, HEADS,
                BLOCK_D, TOKENS, FACTOR,
            )  # fmt: skip

    @triton.jit(do_not_specialize=["splits"])
    def _merge_kernel(
        sums_ptr,  # (S, H, splits, D) fp32
        state_ptr,  # (S, H, splits, 2) fp32: peak and total
        sink_ptr,  # (H,), or None
        out_ptr,  # (S, H, D), written
        splits,
        H: tl.constexpr,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        TILE: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        """One program per sequence and head, and BLOCK_D columns. Whatever is in an empty split's sums is left out.

        Splits are merged one after another, so that empty ones change nothing, wherever they are; TILE are loaded at a
        time.
        """
        if OVERLAP:
            launch_next()
            wait_for_last()
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        if sink_ptr is None:
            peak, total = tl.full((), LOWEST, tl.float32), tl.full((), 0.0, tl.float32)
        else:
            peak, total = tl.load(sink_ptr + row % H).to(tl.float32), tl.full((), 1.0, tl.float32)
        sums = tl.zeros((BLOCK_D,), tl.float32)
        for start in range(0, splits, TILE):
            loaded = ()  # before the first is looked at, so that all are on their way at once
            for split in tl.static_range(TILE):
                at = row * splits + start + split
                there = True & (start + split < splits)  # True &: as in nf4_product
                its_peak = tl.load(state_ptr + at * 2, mask=there, other=LOWEST)
                its_total = tl.load(state_ptr + at * 2 + 1, mask=there, other=0.0)
                part = tl.load(sums_ptr + at * D + column, mask=(column < D) & there, other=0.0)
                loaded += ((its_peak, its_total, part),)
            for split in tl.static_range(TILE):
                its_peak, its_total, part = loaded[split]
                higher = tl.maximum(peak, its_peak)
                fade, weight = tl.exp(peak - higher), tl.exp(its_peak - higher)
                total = total * fade + its_total * weight
                sums = sums * fade + tl.where(its_total != 0, part, 0.0) * weight
                peak = higher
        tl.store(out_ptr + row * D + column, (sums / total).to(out_ptr.dtype.element_ty), mask=column < D)

    @triton.jit(do_not_specialize=["layer", "table_stride"])
    def _write_kernel(
        key_ptr,  # (S, H_kv, D)
        value_ptr,  # (S, H_kv, D)
        addresses_ptr,  # (5,) int64
        table_ptr,  # (S, max_pages)
        positions_ptr,  # (S,) int64
        prefilled_ptr,  # (S,) int64, or None
        key_row_stride,
        key_head_stride,
        value_row_stride,
        value_head_stride,
        table_stride,
        layer,
        NUMBERS: tl.constexpr,
        LAYERS: tl.constexpr,
        KV_HEADS: tl.constexpr,
        T: tl.constexpr,
        D: tl.constexpr,
        BLOCK_HEADS: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        """One program per sequence, keys and values."""
        row, kind = tl.program_id(0).to(tl.int64), tl.program_id(1)
        column = tl.load(positions_ptr + row)
        if prefilled_ptr is not None:
            column -= tl.load(prefilled_ptr + row)
        page = tl.load(table_ptr + row * table_stride + column // T).to(tl.int64)
        head, d = tl.arange(0, BLOCK_HEADS)[:, None], tl.arange(0, BLOCK_D)[None, :]
        there = (head < KV_HEADS) & (d < D)
        if kind == 0:
            x = tl.load(key_ptr + row * key_row_stride + head * key_head_stride + d, mask=there, other=0.0)
        else:
            x = tl.load(value_ptr + row * value_row_stride + head * value_head_stride + d, mask=there, other=0.0)
        base_ptr = _pointer(addresses_ptr, NUMBERS)
        scale_base_ptr = None if tl.int8 != NUMBERS else _pointer(addresses_ptr + 1, tl.float16)
        token_at = (((page * LAYERS + layer) * 2 + kind) * KV_HEADS + head) * T + column % T  # (BLOCK_HEADS, 1)
        if scale_base_ptr is not None:
            x = x.to(tl.float32)
            # Nothing is added but where x has an infinity or a NaN, which the maximum alone would pass over.
            peak = tl.max(tl.abs(x), 1, keep_dims=True) + tl.sum(x * 0.0, 1, keep_dims=True)
            scale = tl.div_rn(peak, 127.0).to(tl.float16)
            scale = tl.where(scale < LEAST, LEAST, scale.to(tl.float32))
            x = tl.div_rn(x, scale)
            x = (x + 12582912.0) - 12582912.0  # 1.5 x 2**23: to the next whole number, to the even one of two
            x = tl.minimum(tl.maximum(x, -127.0), 127.0)
            tl.store(scale_base_ptr + token_at, scale.to(tl.float16), mask=head < KV_HEADS)
        tl.store(base_ptr + token_at * D + d, x.to(NUMBERS), mask=there)


class KeysValues(NamedTuple):
    """A store of keys (0) and values (1), and its addresses, which are all that the kernels know of where it lies."""

    own: Tensor  # (L, 2, pages, H_kv, T, D)
    own_scales: Tensor | None  # (L, 2, pages, H_kv, T) fp16, of int8 numbers
    prefix: Tensor | None  # (L, 2, P, H_kv, T_p, D)
    prefix_scales: Tensor | None  # (L, 2, P, H_kv, T_p) fp16
    addresses: Tensor  # (5,) int64: of own, its scales or 0, prefix or 0, its scales or 0; and T_p


def addressed(
    own: Tensor,
    own_scales: Tensor | None = None,
    prefix: Tensor | None = None,
    prefix_scales: Tensor | None = None,
    addresses: Tensor | None = None,
) -> KeysValues:
    """A store's KeysValues; its addresses are written over what is in `addresses`, or to a tensor of their own.

    Raises:
        ValueError: shapes, dtypes, devices or an order in memory that do not belong together.
    """
    _check_store("own", own, own_scales, own)
    if prefix is None and prefix_scales is not None:
        raise ValueError("prefix_scales go with a prefix")
    if prefix is not None:
        _check_store("prefix", prefix, prefix_scales, own)
    addresses = torch.zeros(5, dtype=torch.int64, device=own.device) if addresses is None else addresses
    if addresses.shape != (5,) or addresses.dtype != torch.int64:
        raise ValueError(f"addresses must be (5,) torch.int64, not {tuple(addresses.shape)} {addresses.dtype}")
    _check_devices(own, own_scales, prefix, prefix_scales, addresses)
    found = [0 if x is None else x.data_ptr() for x in (own, own_scales, prefix, prefix_scales)]
    addresses.copy_(torch.tensor([*found, 0 if prefix is None else prefix.shape[4]]))
    return KeysValues(own, own_scales, prefix, prefix_scales, addresses)


def goes_by_addresses(device: torch.device) -> bool:
    """Whether calls with tensors on a device take a store's addresses for it, as the kernels do, or its tensors."""
    return runs_by_triton("auto", device.type)


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 numbers (..., D) and fp16 scales (...,) of x (..., D), half a scale off at most."""
    scales = (x.float().abs().amax(-1) / 127).half().clamp(min=LEAST_SCALE)
    return (x / scales[..., None].float()).round().clamp(-127, 127).to(torch.int8), scales


@torch.no_grad()
def write_token(
    key: Tensor,  # (S, H_kv, D)
    value: Tensor,  # (S, H_kv, D)
    store: KeysValues,
    *,
    layer: int,
    table: Tensor,  # (S, max_pages) int64: each sequence's pages in order
    positions: Tensor,  # (S,) int64: where the token stands in its text
    prefilled: Tensor | None = None,  # (S,) int64: how many tokens of the text stand in its prefix, before own's first
    backend: Backend = "auto",
) -> None:
    """Store each sequence's newest key and value in column positions - prefilled of its pages; int8 ones rounded.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
        RuntimeError: backend="triton" where it cannot run.
    """
    own, scales = store.own, store.own_scales
    expected = (len(positions), own.shape[3], own.shape[5])
    for name, x in (("key", key), ("value", value)):
        if x.shape != expected or x.dtype not in DTYPES:
            raise ValueError(f"{name} must be {expected} fp32, bf16 or fp16, not {tuple(x.shape)} {x.dtype}")
    _check_sequences(len(positions), table, positions, prefilled, layer, own)
    if runs_by_triton(backend, key.device.type):
        return _launch_write(key, value, store, layer, table, positions, prefilled)
    tokens = own.shape[4]
    columns = positions if prefilled is None else positions - prefilled
    at = (table.gather(1, (columns // tokens)[:, None])[:, 0], slice(None), columns % tokens)
    for kind, x in enumerate((key, value)):
        if scales is None:
            own[layer, kind][at] = x.to(own.dtype)
        else:
            own[layer, kind][at], scales[layer, kind][at] = quantized(x)


@torch.no_grad()
def decode_attention(
    query: Tensor,  # (S, H, D)
    store: KeysValues,
    *,
    layer: int,
    table: Tensor,  # (S, max_pages) int64: each sequence's pages in order; what is past its length is not read
    positions: Tensor,  # (S,) int64: where the newest token stands in its text
    prefilled: Tensor | None = None,  # (S,) int64 in 0 ... T_p: how many tokens of the text stand in its prefix row
    prefix_rows: Tensor | None = None,  # (S,) int64: the prefix row of each sequence
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,  # only the last that many tokens of [prefix ; own] are seen
    sink: Tensor | None = None,  # (H,) fp32, bf16 or fp16: the score of one more key, without a value
    backend: Backend = "auto",
) -> Tensor:
    """Attention of each sequence's newest token, (S, H, D) in query's dtype; scores and sums are fp32. No gradient.

    A sequence has positions - prefilled + 1 tokens of its own. Memory that is one page per sequence is the case T = all
    of it, table = arange(S)[:, None]. A row that attends to nothing is NaN, with a sink 0. Tokens past the end of table
    and prefix are left out, whatever the positions say.

    Raises:
        ValueError: shapes, dtypes or settings that do not belong together.
        RuntimeError: backend="triton" where it cannot run.
    """
    _check(query, store, layer, table, positions, prefilled, prefix_rows, softcap, window, sink)
    if runs_by_triton(backend, query.device.type):
        return _launch(query, store, layer, table, positions, prefilled, prefix_rows, scaling, softcap, window, sink)
    lengths = positions + 1 if prefilled is None else positions + 1 - prefilled
    keys, values, seen, back = _gathered(store.own[layer], store.own_scales, layer, table, lengths, lengths)
    if prefilled is not None:
        assert store.prefix is not None and prefix_rows is not None
        before = _gathered(
            store.prefix[layer], store.prefix_scales, layer, prefix_rows[:, None], prefilled, positions + 1
        )
        keys, values = torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)
        seen, back = torch.cat([before[2], seen], 1), torch.cat([before[3], back], 1)
    if window is not None:
        seen = seen & (back <= window)
    seen = seen[:, None, :, None]  # (S, 1, N, 1)
    grouped = query.float().unflatten(1, (keys.shape[1], -1))  # (S, H_kv, H / H_kv, D)
    score = grouped @ keys.mT * scaling
    if softcap is not None:
        score = score.div_(softcap).tanh_().mul_(softcap)
    score = score.masked_fill_(~seen.mT, -torch.inf)
    if sink is not None:
        score = torch.cat([score, sink.float().view(*grouped.shape[1:3], 1).expand(*score.shape[:3], 1)], 3)
    share = score.softmax(-1)[..., : seen.shape[2]]
    return (share @ values.masked_fill_(~seen, 0.0)).flatten(1, 2).to(query.dtype)


def _gathered(
    numbers: Tensor, scales: Tensor | None, layer: int, table: Tensor, lengths: Tensor, text: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values (S, H_kv, N, D) fp32 of each row's pages, which are real, and how far before its text."""
    tokens = numbers.shape[3]
    place = torch.arange(table.shape[1] * tokens, device=table.device)
    used = place[::tokens] < lengths[:, None]
    pages = table.masked_fill(~used, 0)
    keys, values = (x[pages].float() for x in numbers)  # (S, max_pages, H_kv, T, D)
    if scales is not None:
        keys, values = (x * scale[pages][..., None] for x, scale in zip((keys, values), scales[layer], strict=True))
    keys, values = (x.transpose(1, 2).flatten(2, 3) for x in (keys, values))
    return keys, values, place < lengths[:, None], text[:, None] - place


def prefix_splits(prefix_tokens: int) -> int:
    """Number of splits of a prefix row of so many tokens, by twos: a captured step is of one number."""
    return 2 * ceil(prefix_tokens / (2 * SPLIT))


def scratch_bytes(prefix_tokens: int, own_tokens: int, heads: int, head_dim: int) -> int:
    """Bytes of the fp32 sums, peaks and totals of a row's splits; prefix_tokens are T_p, own_tokens max_pages T."""
    return 4 * (prefix_splits(prefix_tokens) + ceil(own_tokens / SPLIT)) * heads * (head_dim + 2)


def has_tiles(query: Tensor, numbers: torch.dtype) -> bool:
    """Whether tensor cores multiply a query with keys and values: both of 16 bits, or those of 8, from sm_80 on."""
    if query.dtype == torch.float32 or numbers not in (query.dtype, torch.int8):
        return False
    return not query.is_cuda or torch.cuda.get_device_capability(query.device) >= (8, 0)


def _launch(query, store, layer, table, positions, prefilled, prefix_rows, scaling, softcap, window, sink) -> Tensor:
    S, H, D = query.shape
    layers, _, _, kv_heads, tokens, _ = store.own.shape
    own_tokens = table.shape[1] * tokens
    # By capacity: what the positions are stays on the device.
    before = 0 if prefilled is None else prefix_splits(store.prefix.shape[4])
    splits = before + triton.cdiv(own_tokens, SPLIT)
    tiles = has_tiles(query, store.own.dtype)
    heads = 16 if tiles else min(HEADS, triton.next_power_of_2(H // kv_heads))
    block_d = max(16, triton.next_power_of_2(D))
    rows = 1024 // block_d  # 8 elements of a token to each thread of 4 warps
    tile = max(16, min(64, TILE_NUMBERS // block_d)) if tiles else STEP * rows
    halves = table.shape[1] == 1 or (SPLIT % (2 * tile) == 0 and tokens % (SPLIT // 2) == 0)
    out = torch.empty(S, H, D, dtype=query.dtype, device=query.device)
    sums = torch.empty(S, H, splits, D, dtype=torch.float32, device=query.device)
    state = torch.empty(S, H, splits, 2, dtype=torch.float32, device=query.device)
    query = query if query.stride(2) == 1 else query.contiguous()
    if S:
        with torch.cuda.device_of(query):
            _split_kernel[(S, kv_heads * triton.cdiv(H // kv_heads, heads), splits)](
                query, store.addresses, table, positions, prefilled, prefix_rows, sums, state, *query.stride()[:2],
                table.stride(0), layer, splits, before, own_tokens,
                window if window is None else min(window, 2**30), scaling, softcap,
                NUMBERS=IN_TRITON[store.own.dtype], LAYERS=layers, H=H, GROUP=H // kv_heads, T=tokens, D=D,
                HALVES=halves, SPLIT=SPLIT, HEADS=heads, BLOCK_D=block_d, ROWS=rows, STEP=STEP,
                TOKENS=tile if tiles else None,
                FACTOR=tl.float32 if triton.knobs.runtime.interpret else IN_TRITON[query.dtype],
                num_warps=4, num_stages=STAGES if tiles else 3, **launched(),
            )  # fmt: skip
            columns = min(128, block_d)  # 16 bytes of sums to each thread of a warp
            _merge_kernel[(S * H, triton.cdiv(D, columns))](
                sums, state, sink, out, splits, H=H, D=D, BLOCK_D=columns, TILE=TILE, num_warps=1, **launched()
            )
    return out


def _launch_write(key, value, store, layer, table, positions, prefilled) -> None:
    S, kv_heads, D = key.shape
    layers, _, _, _, tokens, _ = store.own.shape
    key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (key, value))
    if S:
        with torch.cuda.device_of(key):
            _write_kernel[(S, 2)](
                key, value, store.addresses, table, positions, prefilled, *key.stride()[:2], *value.stride()[:2],
                table.stride(0), layer, NUMBERS=IN_TRITON[store.own.dtype], LAYERS=layers, KV_HEADS=kv_heads, T=tokens,
                D=D, BLOCK_HEADS=triton.next_power_of_2(kv_heads), BLOCK_D=max(16, triton.next_power_of_2(D)),
                num_warps=1,
            )  # fmt: skip


def _check(query, store, layer, table, positions, prefilled, prefix_rows, softcap, window, sink) -> None:
    if query.dim() != 3 or query.dtype not in DTYPES or query.shape[2] != store.own.shape[5]:
        raise ValueError(
            f"query must be (S, H, {store.own.shape[5]}) fp32, bf16 or fp16, not {tuple(query.shape)} {query.dtype}"
        )
    S, H, _ = query.shape
    if H % store.own.shape[3]:
        raise ValueError(f"query's {H} heads must be a multiple of the store's {store.own.shape[3]}")
    _check_sequences(S, table, positions, prefilled, layer, store.own)
    if (prefilled is None) != (prefix_rows is None):
        raise ValueError("prefilled and prefix_rows go together: pass both or neither")
    if prefilled is not None and store.prefix is None:
        raise ValueError("prefilled and prefix_rows go with a store that has a prefix")
    if prefix_rows is not None:
        _check_rows("prefix_rows", prefix_rows, S)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, not {softcap}; None leaves scores as they are")
    if window is not None and not window > 0:
        raise ValueError(f"window must be positive, not {window}; None shows every token")
    if sink is not None:
        if sink.shape != (H,) or sink.dtype not in DTYPES or not sink.is_contiguous():
            raise ValueError(
                f"sink must be ({H},) fp32, bf16 or fp16, contiguous, not {tuple(sink.shape)} {sink.dtype}"
            )
        _check_devices(query, sink)


def _check_store(name: str, numbers: Tensor, scales: Tensor | None, own: Tensor) -> None:
    dtypes = (*DTYPES, torch.int8)
    if numbers.dim() != 6 or numbers.shape[1] != 2 or 0 in numbers.shape or numbers.dtype not in dtypes:
        raise ValueError(
            f"{name} must be (layers, 2, pages, kv heads, tokens, head_dim) fp32, bf16, fp16 or int8, and not empty, "
            f"not {tuple(numbers.shape)} {numbers.dtype}"
        )
    layers, _, _, heads, _, size = numbers.shape
    if (layers, heads, size) != (own.shape[0], own.shape[3], own.shape[5]) or numbers.dtype != own.dtype or size > 512:
        raise ValueError(f"{name} must have own's layers, kv heads, head_dim of at most 512, and dtype")
    if (scales is not None) != (numbers.dtype == torch.int8):
        raise ValueError(f"{name}_scales go with int8 keys and values, and with no others")
    if scales is not None and (scales.shape != numbers.shape[:5] or scales.dtype != torch.float16):
        raise ValueError(
            f"{name}_scales must be {tuple(numbers.shape[:5])} torch.float16, not {tuple(scales.shape)} {scales.dtype}"
        )
    if not all(x is None or x.movedim(2, 0).is_contiguous() for x in (numbers, scales)):
        raise ValueError(f"{name} must lie in memory as (pages, layers, 2, kv heads, tokens, head_dim)")


def _check_sequences(
    S: int, table: Tensor, positions: Tensor, prefilled: Tensor | None, layer: int, own: Tensor
) -> None:
    if table.dim() != 2 or len(table) != S or not table.shape[1] or table.dtype != torch.int64 or table.stride(1) != 1:
        raise ValueError(
            f"table must be ({S}, max_pages) torch.int64, its last stride 1, not {tuple(table.shape)} {table.dtype}"
        )
    _check_rows("positions", positions, S)
    if prefilled is not None:
        _check_rows("prefilled", prefilled, S)
    if not 0 <= layer < len(own):
        raise ValueError(f"layer must be one of {len(own)}, not {layer}")
    _check_devices(own, table, positions, prefilled)


def _check_devices(*given: Tensor | None) -> None:
    devices = {x.device for x in given if x is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, not on {sorted(map(str, devices))}")


def _check_rows(name: str, given: Tensor, S: int) -> None:
    if given.shape != (S,) or given.dtype != torch.int64 or not given.is_contiguous():
        raise ValueError(f"{name} must be ({S},) torch.int64, contiguous, not {tuple(given.shape)} {given.dtype}")

"""Kernels between the products of a decoding step's layer: start, heads, residual and gated.

    y = round(round(sum_i parts_i + bias) + round(sum_i low_i) B)        round: to the compute dtype

    start      stream = embedding[token] scale, h = norm(stream)
    heads      y's heads: norm of queries and keys, rotation; keys and values into their page  ->  query (S, H, D)
    residual   stream += share norm(y), h = norm(stream)
    gated      act(y_gate) y_up

A product leaves fp32 parts (splits, S, N) and, of its adapter, low (splits, S, n R), as nf4_product.product makes
them; each of these kernels begins by finishing them. low has R columns for each of n linears that stand side by side
in N, or R for all of them; b (R, N) is the adapter's other factor with its scale in it, R a multiple of 16.
Rounding is where a training forward rounds: after a product and its bias, after what the adapter adds, in the norm,
after the share, after the sum of the stream.
"""

import os
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lowmem_grpo.kernels.overlap import launched

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS
    triton: Any = None

# An RMS norm, x / sqrt(mean x^2 + eps) times gain: the gain, eps, and whether x / sqrt(...) is rounded before the gain
# (Llama) or only after it (Gemma).
Norm = tuple[Tensor, float, bool]
Backend = Literal["auto", "triton", "torch"]
NO_NORM = (None, 0.0, False)
RANK = 16  # an adapter's rank is a multiple of it, by zeros
STEP = 16  # of its columns that are in hand at a time
# Ranks up to this are taken without a loop. More would take a minute to compile, and of gated, which loops over rows,
# all of b into registers.
UNROLLED, UNROLLED_BY_ROWS = 64, 16
COLUMNS = 512  # of gated in a program: 8 to each thread of 2 warps, 16 bytes of b
ROWS = 8  # of gated in a program at most: as many as b has times 16 columns, since each program reads b from L2

if triton is not None:
    from lowmem_grpo.kernels.overlap import launch_next, prefetch, wait_for_last

    @triton.jit
    def _rounded(x, dtype: tl.constexpr):
        return x.to(dtype).to(tl.float32)

    @triton.jit
    def _raised(
        low_ptr, b_ptr, row, M, n, n_in, low_column, first, N: tl.constexpr, LOW: tl.constexpr, STEP: tl.constexpr,
        SPLITS: tl.constexpr, dtype: tl.constexpr,
    ):  # fmt: skip
        """The share of STEP columns of an adapter in a row at columns n: rounded sums of low times b."""
        PARTS: tl.constexpr = triton.next_power_of_2(SPLITS)
        part, r = tl.arange(0, PARTS)[:, None], tl.arange(0, STEP)
        at = low_ptr + (part * M + row) * LOW + low_column + first + r[None, :]
        low = _rounded(tl.sum(tl.load(at, mask=part < SPLITS, other=0.0), 0), dtype)  # (STEP,), by one load
        high = tl.zeros(n.shape, tl.float32)
        for column in tl.static_range(STEP):  # pyright: ignore[reportGeneralTypeIssues]: Triton unrolls it
            b = tl.load(b_ptr + (first + column) * N + n, mask=n_in, other=0.0).to(tl.float32)
            high += tl.sum(tl.where(r == column, low, 0.0), 0) * b
        return high

    @triton.jit
    def _finished(
        parts_ptr,  # (SPLITS, M, N) fp32
        low_ptr,  # (SPLITS, M, LOW) fp32, or None
        b_ptr,  # (R, N), where low is not None
        bias_ptr,  # (N,), or None
        row,
        M,
        n,  # (...) int32 columns of N
        n_in,  # (...) bool
        low_column,  # the first of this linear's R columns of LOW
        N: tl.constexpr,
        LOW: tl.constexpr,
        R: tl.constexpr,
        STEP: tl.constexpr,
        UNROLLED: tl.constexpr,
        SPLITS: tl.constexpr,
        dtype: tl.constexpr,
    ):
        """y of a row at columns n, fp32 numbers that are rounded to dtype. Columns of b are read wide, along n."""
        y = tl.zeros(n.shape, tl.float32)
        for split in tl.static_range(SPLITS):  # pyright: ignore[reportGeneralTypeIssues]: Triton unrolls it
            y += tl.load(parts_ptr + (split * M + row) * N + n, mask=n_in, other=0.0)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + n, mask=n_in, other=0.0).to(tl.float32)
        y = _rounded(y, dtype)
        if low_ptr is not None:
            high = tl.zeros(n.shape, tl.float32)
            if R <= UNROLLED:  # in a loop the addresses of b take so many registers that they spill
                for first in tl.static_range(0, R, STEP):  # pyright: ignore[reportGeneralTypeIssues]: likewise
                    high += _raised(low_ptr, b_ptr, row, M, n, n_in, low_column, first, N, LOW, STEP, SPLITS, dtype)
            else:
                for first in range(0, R, STEP):
                    high += _raised(low_ptr, b_ptr, row, M, n, n_in, low_column, first, N, LOW, STEP, SPLITS, dtype)
            y = _rounded(y + high, dtype)
        return y

    @triton.jit
    def _prefetch_finish(b_ptr, bias_ptr, N: tl.constexpr, R: tl.constexpr, part, PARTS: tl.constexpr):
        """Ask for the part of what _finished reads that is no activation."""
        if b_ptr is not None:
            prefetch(b_ptr, R * N, part, PARTS)
        if bias_ptr is not None:
            prefetch(bias_ptr, N, part, PARTS)

    @triton.jit
    def _normed(x, square_sum, gain_ptr, n, n_in, eps, count, EARLY: tl.constexpr, dtype: tl.constexpr):
        """The RMS norm of x, whose squares sum to square_sum over count columns; its gain is read at n."""
        y = x * tl.rsqrt(square_sum / count + eps)
        if EARLY:
            y = _rounded(y, dtype)
        return _rounded(y * tl.load(gain_ptr + n, mask=n_in, other=0.0).to(tl.float32), dtype)

    @triton.jit
    def _start_kernel(
        token_ids_ptr,  # (M,) int64
        embedding_ptr,  # (V, N)
        stream_ptr,  # (M, N), written
        gain_ptr,  # (N,), or None
        out_ptr,  # (M, N), written where gain is not None
        scale,
        eps,
        N: tl.constexpr,
        EARLY: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program a row."""
        dtype: tl.constexpr = stream_ptr.dtype.element_ty
        row = tl.program_id(0)
        n = tl.arange(0, BLOCK)
        n_in = n < N
        token = tl.load(token_ids_ptr + row).to(tl.int64)
        x = tl.load(embedding_ptr + token * N + n, mask=n_in, other=0.0).to(dtype).to(tl.float32)
        x = _rounded(x * scale, dtype)
        tl.store(stream_ptr + row * N + n, x.to(dtype), mask=n_in)
        if gain_ptr is not None:
            y = _normed(x, tl.sum(x * x, 0), gain_ptr, n, n_in, eps, N, EARLY, dtype)
            tl.store(out_ptr + row * N + n, y.to(dtype), mask=n_in)

    @triton.jit(do_not_specialize=["M"])
    def _residual_kernel(
        stream_ptr,  # (M, N), overwritten
        parts_ptr,  # (SPLITS, M, N) fp32
        low_ptr,  # (SPLITS, M, R) fp32, or None
        b_ptr,  # (R, N), or None
        bias_ptr,  # (N,), or None
        after_ptr,  # (N,) gain of the norm of what is added, or None
        before_ptr,  # (N,) gain of the norm of the stream, or None
        out_ptr,  # (M, N), written where before is not None
        M,
        share,  # or None
        after_eps,
        before_eps,
        N: tl.constexpr,
        R: tl.constexpr,
        STEP: tl.constexpr,
        UNROLLED: tl.constexpr,
        SPLITS: tl.constexpr,
        AFTER_EARLY: tl.constexpr,
        BEFORE_EARLY: tl.constexpr,
        BLOCK: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        """One program a row."""
        dtype: tl.constexpr = stream_ptr.dtype.element_ty
        row = tl.program_id(0)
        if OVERLAP:
            launch_next()
            _prefetch_finish(b_ptr, bias_ptr, N, R, row, 1)
            if after_ptr is not None:
                prefetch(after_ptr, N, row, 1)
            if before_ptr is not None:
                prefetch(before_ptr, N, row, 1)
            wait_for_last()
        n = tl.arange(0, BLOCK)
        n_in = n < N
        y = _finished(parts_ptr, low_ptr, b_ptr, bias_ptr, row, M, n, n_in, 0, N, R, R, STEP, UNROLLED, SPLITS, dtype)
        if after_ptr is not None:
            y = _normed(y, tl.sum(y * y, 0), after_ptr, n, n_in, after_eps, N, AFTER_EARLY, dtype)
        if share is not None:
            y = _rounded(y * share, dtype)
        at = stream_ptr + row * N + n
        y = _rounded(y + tl.load(at, mask=n_in, other=0.0).to(tl.float32), dtype)
        tl.store(at, y.to(dtype), mask=n_in)
        if before_ptr is not None:
            y = _normed(y, tl.sum(y * y, 0), before_ptr, n, n_in, before_eps, N, BEFORE_EARLY, dtype)
            tl.store(out_ptr + row * N + n, y.to(dtype), mask=n_in)

    @triton.jit(do_not_specialize=["M", "table_stride", "page_tokens"])
    def _heads_kernel(
        parts_ptr,  # (SPLITS, M, (H + 2 H_KV) D) fp32
        low_ptr,  # (SPLITS, M, LOW) fp32, LOW 3 R or, of one adapter for all three, R; or None
        b_ptr,  # (R, (H + 2 H_KV) D), or None
        bias_ptr,  # ((H + 2 H_KV) D,), or None
        query_gain_ptr,  # (D,), or (H D,) where WHOLE, or None
        key_gain_ptr,  # (D,), or (H_KV D,) where WHOLE, or None
        cos_ptr,  # (T, ROTARY), or None
        sin_ptr,
        positions_ptr,  # (M,) int64
        prefilled_ptr,  # (M,) int64, or None
        table_ptr,  # (M, max_pages) int64
        query_ptr,  # (M, H, D), written
        own_ptr,  # keys and values of a layer; where addresses are given, only its dtype counts
        scales_ptr,  # of int8 keys and values, or None
        addresses_ptr,  # (5,) int64: where own and scales begin, or None
        M,
        query_eps,
        key_eps,
        table_stride,
        page_tokens,
        own_layer,  # number of elements from own's beginning to the layer's
        own_kind_stride,
        own_page_stride,
        own_head_stride,
        scales_layer,
        scales_kind_stride,
        scales_page_stride,
        scales_head_stride,
        D: tl.constexpr,
        H: tl.constexpr,
        H_KV: tl.constexpr,
        ROTARY: tl.constexpr,
        PAIRED: tl.constexpr,
        LOW: tl.constexpr,
        R: tl.constexpr,
        STEP: tl.constexpr,
        UNROLLED: tl.constexpr,
        SPLITS: tl.constexpr,
        EARLY: tl.constexpr,
        WHOLE: tl.constexpr,
        HEADS: tl.constexpr,
        BLOCK_D: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        """One program per row and head: of queries, then keys, then values. WHOLE: per row and one of those three."""
        dtype: tl.constexpr = query_ptr.dtype.element_ty
        N: tl.constexpr = (H + 2 * H_KV) * D
        row, block = tl.program_id(0), tl.program_id(1)
        if OVERLAP:
            launch_next()
            BLOCKS: tl.constexpr = 3 if WHOLE else H + 2 * H_KV  # pyright: ignore[reportAssignmentType]
            _prefetch_finish(b_ptr, bias_ptr, N, R, row * BLOCKS + block, BLOCKS)
            if query_gain_ptr is not None:
                prefetch(query_gain_ptr, H * D if WHOLE else D, row * BLOCKS + block, BLOCKS)
                prefetch(key_gain_ptr, H_KV * D if WHOLE else D, row * BLOCKS + block, BLOCKS)
            wait_for_last()
        if WHOLE:
            kind, head = block, tl.arange(0, HEADS)[:, None]
        else:
            kind = tl.where(block < H, 0, tl.where(block < H + H_KV, 1, 2))
            head = tl.arange(0, 1)[:, None] + block - tl.where(kind == 0, 0, tl.where(kind == 1, H, H + H_KV))
        begin = tl.where(kind == 0, 0, tl.where(kind == 1, H, H + H_KV)) * D
        d = tl.arange(0, BLOCK_D)[None, :]
        inside = (d < D) & (head < tl.where(kind == 0, H, H_KV))
        y = _finished(
            parts_ptr, low_ptr, b_ptr, bias_ptr, row, M, begin + head * D + d, inside, kind * ((LOW - R) // 2), N, LOW,
            R, STEP, UNROLLED, SPLITS, dtype,
        )  # fmt: skip
        position = tl.load(positions_ptr + row)
        if kind < 2:
            if query_gain_ptr is not None:
                gain_ptr = tl.where(kind == 0, query_gain_ptr, key_gain_ptr)
                eps = tl.where(kind == 0, query_eps, key_eps)
                square_sum = tl.sum(y * y, 1)[:, None]
                if WHOLE:
                    square_sum = tl.sum(square_sum, 0)[None, :]
                    count = tl.where(kind == 0, H * D, H_KV * D)
                    y = _normed(y, square_sum, gain_ptr, head * D + d, inside, eps, count, EARLY, dtype)
                else:
                    y = _normed(y, square_sum, gain_ptr, d, inside, eps, D, EARLY, dtype)
            if cos_ptr is not None:
                turns = d < ROTARY
                if PAIRED:
                    second, partner = d % 2 == 1, d ^ 1
                else:
                    second, partner = d >= ROTARY // 2, tl.where(d < ROTARY // 2, d + ROTARY // 2, d - ROTARY // 2)
                partner = tl.broadcast_to(tl.where(turns, partner, d), (HEADS, BLOCK_D))
                other = tl.gather(y, partner, 1)
                other = tl.where(second, other, -other)
                cos = tl.load(cos_ptr + position * ROTARY + d, mask=turns, other=1.0).to(tl.float32)
                sin = tl.load(sin_ptr + position * ROTARY + d, mask=turns, other=0.0).to(tl.float32)
                angles: tl.constexpr = cos_ptr.dtype.element_ty
                y = _rounded(_rounded(y * cos, angles) + _rounded(other * sin, angles), dtype)
        if kind == 0:
            tl.store(query_ptr + (row * H + head) * D + d, y.to(dtype), mask=inside)
        else:
            column = position.to(tl.int32)
            if prefilled_ptr is not None:
                column -= tl.load(prefilled_ptr + row).to(tl.int32)
            page = tl.load(table_ptr + row * table_stride + column // page_tokens).to(tl.int64)
            column %= page_tokens
            numbers_ptr = own_ptr
            if addresses_ptr is not None:
                numbers_ptr = tl.load(addresses_ptr).to(tl.pointer_type(own_ptr.dtype.element_ty))
                numbers_ptr = tl.multiple_of(numbers_ptr, 16)  # else one number at a time is stored
            numbers_ptr += own_layer + (kind - 1) * own_kind_stride + page * own_page_stride + column * D
            at = numbers_ptr + head * own_head_stride + d
            if scales_ptr is None:
                tl.store(at, y.to(own_ptr.dtype.element_ty), mask=inside)
            else:
                first_ptr = scales_ptr
                if addresses_ptr is not None:
                    first_ptr = tl.load(addresses_ptr + 1).to(tl.pointer_type(tl.float16))
                first_ptr += scales_layer + (kind - 1) * scales_kind_stride + page * scales_page_stride + column
                # The largest magnitude; what is added is nothing, or a NaN, which a maximum would pass over.
                peak = tl.max(tl.abs(y), 1)[:, None] + tl.sum(y * 0.0, 1)[:, None]
                scale = tl.div_rn(peak, 127.0).to(tl.float16).to(tl.float32)
                scale = tl.where(scale < 5.960464477539063e-08, 5.960464477539063e-08, scale)  # fp16's least, of zeros
                # Half to even, as torch rounds: above 2**23 an fp32 number is a whole one.
                number = tl.div_rn(y, tl.broadcast_to(scale, y.shape)) + 12582912.0 - 12582912.0
                number = tl.minimum(tl.maximum(number, -127.0), 127.0)
                tl.store(at, number.to(tl.int8), mask=inside)
                known = head < H_KV
                tl.store(first_ptr + head * scales_head_stride, scale.to(tl.float16), mask=known)

    @triton.jit(do_not_specialize=["M"])
    def _gated_kernel(
        parts_ptr,  # (SPLITS, M, 2 WIDTH) fp32
        low_ptr,  # (SPLITS, M, LOW) fp32, LOW 2 R or, of one adapter for both, R; or None
        b_ptr,  # (R, 2 WIDTH), or None
        bias_ptr,  # (2 WIDTH,), or None
        out_ptr,  # (M, WIDTH), written
        M,
        WIDTH: tl.constexpr,
        LOW: tl.constexpr,
        R: tl.constexpr,
        STEP: tl.constexpr,
        UNROLLED: tl.constexpr,
        SPLITS: tl.constexpr,
        ACTIVATION: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        """One program per ROWS rows and BLOCK columns."""
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        if OVERLAP:
            launch_next()
            BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
            _prefetch_finish(b_ptr, bias_ptr, 2 * WIDTH, R, tl.program_id(0) * BLOCKS + tl.program_id(1), BLOCKS)
            wait_for_last()
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        n_in = n < WIDTH
        for i in range(ROWS):
            row = tl.program_id(0) * ROWS + i
            if row < M:
                gate = _finished(
                    parts_ptr, low_ptr, b_ptr, bias_ptr, row, M, n, n_in, 0, 2 * WIDTH, LOW, R, STEP, UNROLLED, SPLITS,
                    dtype,
                )  # fmt: skip
                up = _finished(
                    parts_ptr, low_ptr, b_ptr, bias_ptr, row, M, n + WIDTH, n_in, LOW - R, 2 * WIDTH, LOW, R, STEP,
                    UNROLLED, SPLITS, dtype,
                )  # fmt: skip
                if ACTIVATION == "silu":
                    y = gate / (1.0 + tl.exp(-gate))
                elif ACTIVATION == "gelu":
                    y = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
                else:  # z / (1 + exp(-2 t)) is z / 2 (1 + tanh t)
                    t = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
                    y = gate / (1.0 + tl.exp(-2.0 * t))
                tl.store(out_ptr + row * WIDTH + n, (_rounded(y, dtype) * up).to(dtype), mask=n_in)


@torch.no_grad()
def start(
    token_ids: Tensor,  # (S,) int64
    embedding: Tensor,  # (V, N)
    *,
    scale: float,
    before: Norm | None,
    dtype: torch.dtype,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The residual stream (S, N) of tokens in `dtype`, and its norm; without one the stream itself."""
    S, N = len(token_ids), embedding.shape[1]
    if _runs_by_triton(backend, embedding.device.type):
        stream = torch.empty(S, N, dtype=dtype, device=embedding.device)
        out = stream if before is None else torch.empty_like(stream)
        if S:
            with torch.cuda.device_of(embedding):
                gain, eps, early = before or NO_NORM
                block = triton.next_power_of_2(N)
                _start_kernel[(S,)](
                    token_ids, embedding, stream, gain, out, scale, eps, N=N, EARLY=early, BLOCK=block,
                    num_warps=_num_warps(block),
                )  # fmt: skip
        return stream, out
    stream = (embedding[token_ids].to(dtype).float() * scale).to(dtype)
    return stream, _after_norm(stream, before)


@torch.no_grad()
def heads(
    parts: Tensor,  # (splits, S, (H + 2 H_kv) D) fp32: queries, keys, values
    low: Tensor | None,  # (splits, S, 3 R) fp32, or (splits, S, R) of one adapter for all three
    b: Tensor | None,  # (R, (H + 2 H_kv) D)
    bias: Tensor | None,  # ((H + 2 H_kv) D,)
    *,
    own: Tensor,  # (L, 2, pages, H_kv, page_tokens, D), last stride 1: keys and values, written to
    scales: Tensor | None,  # (L, 2, pages, H_kv, page_tokens) fp16, of int8 keys and values
    layer: int,
    table: Tensor,  # (S, max_pages) int64
    positions: Tensor,  # (S,) int64: where the token stands in its text
    prefilled: Tensor | None,  # (S,) int64: tokens of the text that stand elsewhere, before own's first
    query_norm: Norm | None,  # gain (D,), or (H D,) over all heads
    key_norm: Norm | None,  # gain (D,), or (H_kv D,)
    cos: Tensor | None,  # (T, rotary <= D), contiguous; None: nothing is rotated
    sin: Tensor | None,
    paired: bool,  # columns 2 i and 2 i + 1 are rotated together, else i and i + rotary / 2
    dtype: torch.dtype,
    addresses: Tensor | None = None,  # (5,) int64: own's and scales' address to use in place of their own, as [0], [1]
    backend: Backend = "auto",
) -> Tensor:
    """Queries (S, H, D) in `dtype`, normed and rotated; keys and values go into own.

    The column is positions - prefilled, of page table[row, column // page_tokens]. Rotation rounds its two products
    to the dtype of cos. int8 numbers have the scale max |x| / 127 of their token and head.
    """
    kv_heads, page_tokens, D = own.shape[3:]
    N = parts.shape[2]
    _check(parts, low, b, bias, 3)
    if N % D or own.stride()[4:] != (D, 1):
        raise ValueError(f"own must be (L, 2, pages, H_kv, page_tokens, D), a token's D side by side, not {own.shape}")
    if (own.dtype == torch.int8) != (scales is not None):
        raise ValueError("scales go with int8 keys and values, and with no others")
    if _runs_by_triton(backend, parts.device.type):
        return _launch_heads(
            parts, low, b, bias, own, scales, layer, table, positions, prefilled, query_norm, key_norm, cos, sin,
            paired, dtype, addresses,
        )  # fmt: skip
    sizes = [N - 2 * kv_heads * D, kv_heads * D, kv_heads * D]
    query, key, value = _summed(parts, low, b, bias, sizes, dtype).split(sizes, 1)
    turned = []
    for x, norm in ((query, query_norm), (key, key_norm)):
        if norm is not None:
            x = rms(x.unflatten(1, (-1, len(norm[0]))), norm).flatten(1)
        x = x.unflatten(1, (-1, D))
        if cos is not None and sin is not None:
            x = rotated(x, cos[positions][:, None], sin[positions][:, None], paired)
        turned.append(x)
    columns = positions if prefilled is None else positions - prefilled
    page = table.gather(1, (columns // page_tokens)[:, None])[:, 0]
    for kind, x in enumerate((turned[1], value.unflatten(1, (-1, D)))):
        at = (layer, kind, page, slice(None), columns % page_tokens)
        if scales is None:
            own[at] = x
        else:
            own[at], scales[at] = _in_int8(x)
    return turned[0]


@torch.no_grad()
def residual(
    stream: Tensor,  # (S, N), contiguous, overwritten
    parts: Tensor,  # (splits, S, N) fp32
    low: Tensor | None,  # (splits, S, R) fp32
    b: Tensor | None,  # (R, N)
    bias: Tensor | None,  # (N,)
    *,
    after: Norm | None = None,
    share: float = 1.0,
    before: Norm | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Add share norm(y) to the stream, in place; returns the norm `before` of it, or without one the stream itself."""
    _check(parts, low, b, bias, 1)
    splits, S, N = parts.shape
    if stream.shape != (S, N) or not stream.is_contiguous():
        raise ValueError(f"stream must be contiguous {(S, N)}, not {tuple(stream.shape)}")
    if _runs_by_triton(backend, stream.device.type):
        out = stream if before is None else torch.empty_like(stream)
        if S:
            with torch.cuda.device_of(stream):
                after_gain, after_eps, after_early = after or NO_NORM
                before_gain, before_eps, before_early = before or NO_NORM
                block, rank = triton.next_power_of_2(N), 0 if b is None else len(b)
                _residual_kernel[(S,)](
                    stream, parts, low, b, bias, after_gain, before_gain, out, S, None if share == 1 else share,
                    after_eps, before_eps, N=N, R=rank, STEP=STEP, UNROLLED=UNROLLED, SPLITS=splits,
                    AFTER_EARLY=after_early, BEFORE_EARLY=before_early, BLOCK=block,
                    num_warps=_num_warps(block, 8 if rank <= 32 else 16), **launched(),
                )  # fmt: skip
        return out
    y = _after_norm(_summed(parts, low, b, bias, [N], stream.dtype), after)
    stream += y if share == 1 else y * share
    return _after_norm(stream, before)


@torch.no_grad()
def gated(
    parts: Tensor,  # (splits, S, 2 I) fp32: gate, up
    low: Tensor | None,  # (splits, S, 2 R) fp32, or (splits, S, R) of one adapter for both
    b: Tensor | None,  # (R, 2 I)
    bias: Tensor | None,  # (2 I,)
    *,
    activation: Literal["silu", "gelu", "gelu_tanh"],
    dtype: torch.dtype,
    backend: Backend = "auto",
) -> Tensor:
    """Activation of gate, times up: (S, I) in `dtype`."""
    _check(parts, low, b, bias, 2)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    if _runs_by_triton(backend, parts.device.type):
        splits, S, N = parts.shape
        out = torch.empty(S, N // 2, dtype=dtype, device=parts.device)
        if S:
            with torch.cuda.device_of(parts):
                rows = 1 if b is None else min(ROWS, len(b) // RANK)
                _gated_kernel[(triton.cdiv(S, rows), triton.cdiv(N // 2, COLUMNS))](
                    parts, low, b, bias, out, S, WIDTH=N // 2, LOW=0 if low is None else low.shape[2],
                    R=0 if b is None else len(b), STEP=STEP, UNROLLED=UNROLLED_BY_ROWS, SPLITS=splits,
                    ACTIVATION=activation, ROWS=rows, BLOCK=COLUMNS, num_warps=2, **launched(),
                )  # fmt: skip
        return out
    gate, up = _summed(parts, low, b, bias, [parts.shape[2] // 2] * 2, dtype).chunk(2, 1)
    return ACTIVATIONS[activation](gate) * up


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def _launch_heads(
    parts, low, b, bias, own, scales, layer, table, positions, prefilled, query_norm, key_norm, cos, sin, paired, dtype,
    addresses,
) -> Tensor:  # fmt: skip
    splits, S, N = parts.shape
    kv_heads, page_tokens, D = own.shape[3:]
    H = N // D - 2 * kv_heads
    query_gain, query_eps, early = query_norm or NO_NORM
    key_gain, key_eps, key_early = key_norm or NO_NORM
    if (query_norm is None) != (key_norm is None) or early != key_early:
        raise ValueError("queries and keys both have a norm that rounds at one place, or neither has one")
    whole = query_gain is not None and len(query_gain) != D
    query = torch.empty(S, H, D, dtype=dtype, device=parts.device)
    table = table if table.stride(1) == 1 else table.contiguous()
    if S:
        with torch.cuda.device_of(parts):
            _heads_kernel[(S, 3 if whole else H + 2 * kv_heads)](
                parts, low, b, bias, query_gain, key_gain, cos, sin, positions, prefilled, table, query, own, scales,
                addresses, S, query_eps, key_eps, table.stride(0), page_tokens,
                layer * own.stride(0), *own.stride()[1:4],
                *((0, 0, 0, 0) if scales is None else (layer * scales.stride(0), *scales.stride()[1:4])),
                D=D, H=H, H_KV=kv_heads, ROTARY=0 if cos is None else cos.shape[1], PAIRED=paired,
                LOW=0 if low is None else low.shape[2], R=0 if b is None else len(b), STEP=STEP, UNROLLED=UNROLLED,
                SPLITS=splits, EARLY=early, WHOLE=whole, HEADS=triton.next_power_of_2(H) if whole else 1,
                BLOCK_D=triton.next_power_of_2(D), num_warps=8 if whole else 1,
                enable_fp_fusion=False,  # a product in 16 bits and a sum would become one, rounded once
                **launched(),
            )  # fmt: skip
    return query


def _num_warps(block: int, columns: int = 16) -> int:
    """Warps for a row of `block` columns: so many columns to each thread, where that is possible."""
    return min(16, max(1, block // (32 * columns)))


def _summed(
    parts: Tensor, low: Tensor | None, b: Tensor | None, bias: Tensor | None, sizes: list[int], dtype: torch.dtype
) -> Tensor:
    """y (S, N) in `dtype` of parts, bias and adapter."""
    y = parts.sum(0)
    y = (y if bias is None else y + bias.float()).to(dtype)
    if low is None or b is None:
        return y
    lows = low.sum(0).to(dtype).float().split(len(b), 1)
    lows = lows if len(lows) > 1 else lows * len(sizes)
    high = torch.cat([x @ y.float() for x, y in zip(lows, b.split(sizes, 1), strict=True)], 1)
    return (y.float() + high).to(dtype)


def rms(x: Tensor, norm: Norm) -> Tensor:
    gain, eps, early = norm
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return ((wide.to(x.dtype).float() if early else wide) * gain.float()).to(x.dtype)


def _after_norm(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else rms(x, norm)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, paired: bool) -> Tensor:
    """x (S, H, D) with its first columns rotated, by cos and sin (S, 1, rotary)."""
    front, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if paired:
        other = torch.stack([-front[..., 1::2], front[..., ::2]], -1).flatten(-2)
    else:
        first, second = front.chunk(2, -1)
        other = torch.cat([-second, first], -1)
    return torch.cat([(front * cos + other * sin).to(x.dtype), rest], -1)


def _in_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 numbers (S, H, D) and fp16 scales (S, H) of x."""
    scales = (x.float().abs().amax(-1) / 127).half().clamp(min=2**-24)  # fp16's least, where all is 0
    return (x / scales[..., None].float()).round().clamp(-127, 127).to(torch.int8), scales


def _check(parts: Tensor, low: Tensor | None, b: Tensor | None, bias: Tensor | None, linears: int) -> None:
    if parts.dim() != 3 or parts.dtype != torch.float32 or not parts.is_contiguous():
        raise ValueError(f"parts must be contiguous (splits, S, N) fp32, not {tuple(parts.shape)} {parts.dtype}")
    splits, S, N = parts.shape
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias must be ({N},), not {tuple(bias.shape)}")
    if (low is None) != (b is None):
        raise ValueError("low and b go together: pass both or none")
    if low is None or b is None:
        return
    R = len(b)
    if b.shape != (R, N) or R % RANK or not R or not b.is_contiguous():
        raise ValueError(f"b must be contiguous (R, {N}), R a multiple of {RANK}, not {tuple(b.shape)}")
    if low.shape not in ((splits, S, R), (splits, S, linears * R)) or low.dtype != torch.float32:
        raise ValueError(f"low must be ({splits}, {S}, {R} or {linears * R}) fp32, not {tuple(low.shape)} {low.dtype}")
    if not low.is_contiguous():
        raise ValueError("low must be contiguous")


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

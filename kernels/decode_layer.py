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

What a kernel takes is the time until its numbers come from memory, over and over: so each asks for all that fits into
its registers before it waits for the first.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lowmem_grpo.kernels.backend import Backend, runs_by_triton
from lowmem_grpo.kernels.decode_attention import quantized
from lowmem_grpo.kernels.overlap import launched

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS
    triton: Any = None

Activation = Literal["silu", "gelu", "gelu_tanh"]
NO_NORM = (None, 0.0, False)
RANK = 16  # an adapter's rank is a multiple of it, by zeros
COLUMNS = 8  # of a row side by side in a thread: 16 bytes of b
# Of gated; a program has 8 numbers of gate and of up in a thread. 16 rows are the fewest that tensor cores multiply.
BLOCK_M, BLOCK_N, NUM_WARPS = 16, 64, 4

if triton is not None:
    from lowmem_grpo.kernels.overlap import launch_next, prefetch, wait_for_last

    @triton.jit
    def _rounded(x, dtype: tl.constexpr):
        return x.to(dtype).to(tl.float32)

    @triton.jit
    def _asked(ptr, at, stride, inside, first, end, COUNT: tl.constexpr):
        """COUNT tensors, `stride` apart, from `first` on, and zeros from `end` on.

        In a tuple all are on their way at once: added up one by one, each is waited for before the next is asked for.
        """
        numbers = ()
        for i in tl.static_range(COUNT):  # pyright: ignore[reportGeneralTypeIssues]: Triton unrolls it
            number = tl.load(ptr + (first + i) * stride + at, mask=inside & (first + i < end), other=0.0)
            numbers = numbers + (number,)  # noqa: RUF005, Triton unpacks no tuple
        return numbers

    @triton.jit
    def _finished(
        parts_ptr,  # (SPLITS, M, N) fp32
        low_ptr,  # (SPLITS, M, LOW) fp32, or None
        b_ptr,  # (R, N), where low is not None
        bias_ptr,  # (N,), or None
        row,
        M,
        n,  # (B,) int32 columns of N
        n_in,  # (B,) bool
        low_column,  # the first of this linear's R columns of LOW
        N: tl.constexpr,
        LOW: tl.constexpr,
        R: tl.constexpr,
        SPLITS: tl.constexpr,
        HAND: tl.constexpr,
        STEP: tl.constexpr,
        dtype: tl.constexpr,
    ):
        """y (B,) of a row at columns n, fp32 numbers that are rounded to dtype.

        A round asks for HAND splits and STEP rows of b at once, before it waits for any of them.
        """
        ROUNDS: tl.constexpr = max((SPLITS + HAND - 1) // HAND, R // STEP)
        PARTS: tl.constexpr = triton.next_power_of_2(SPLITS)
        y, high = tl.zeros(n.shape, tl.float32), tl.zeros(n.shape, tl.float32)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + n, mask=n_in, other=0.0)
        for i in range(ROUNDS):
            if low_ptr is not None:
                part, r = tl.arange(0, PARTS)[:, None], i * STEP + tl.arange(0, STEP)
                known = i * STEP < R
                at = low_ptr + (part * M + row) * LOW + low_column + r[None, :]
                low = tl.load(at, mask=(part < SPLITS) & known, other=0.0)
                b = tl.load(b_ptr + r[:, None] * N + n[None, :], mask=n_in[None, :] & known, other=0.0)
            parts = _asked(parts_ptr, row * N + n, M * N, n_in, i * HAND, SPLITS, HAND)
            if low_ptr is not None:
                low = _rounded(tl.sum(low, 0), dtype)
                high += tl.sum(low[:, None] * b.to(tl.float32), 0)
            for j in tl.static_range(HAND):  # pyright: ignore[reportGeneralTypeIssues]: likewise
                y += parts[j]
        if bias_ptr is not None:
            y += bias.to(tl.float32)
        y = _rounded(y, dtype)
        if low_ptr is not None:
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
    def _normed(x, square_sum, gain, eps, count, EARLY: tl.constexpr, dtype: tl.constexpr):
        """The RMS norm of x, whose squares sum to square_sum over count columns."""
        y = x * tl.rsqrt(square_sum / count + eps)
        if EARLY:
            y = _rounded(y, dtype)
        return _rounded(y * gain.to(tl.float32), dtype)

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
        if gain_ptr is not None:
            gain = tl.load(gain_ptr + n, mask=n_in, other=0.0)
        x = tl.load(embedding_ptr + token * N + n, mask=n_in, other=0.0).to(dtype).to(tl.float32)
        x = _rounded(x * scale, dtype)
        tl.store(stream_ptr + row * N + n, x.to(dtype), mask=n_in)
        if gain_ptr is not None:
            y = _normed(x, tl.sum(x * x, 0), gain, eps, N, EARLY, dtype)
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
        SPLITS: tl.constexpr,
        HAND: tl.constexpr,
        STEP: tl.constexpr,
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
        at = stream_ptr + row * N + n
        stream = tl.load(at, mask=n_in, other=0.0)
        y = _finished(parts_ptr, low_ptr, b_ptr, bias_ptr, row, M, n, n_in, 0, N, R, R, SPLITS, HAND, STEP, dtype)
        if before_ptr is not None:
            before = tl.load(before_ptr + n, mask=n_in, other=0.0)
        if after_ptr is not None:
            after = tl.load(after_ptr + n, mask=n_in, other=0.0)
            y = _normed(y, tl.sum(y * y, 0), after, after_eps, N, AFTER_EARLY, dtype)
        if share is not None:
            y = _rounded(y * share, dtype)
        y = _rounded(y + stream.to(tl.float32), dtype)
        tl.store(at, y.to(dtype), mask=n_in)
        if before_ptr is not None:
            y = _normed(y, tl.sum(y * y, 0), before, before_eps, N, BEFORE_EARLY, dtype)
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
        SPLITS: tl.constexpr,
        HAND: tl.constexpr,
        STEP: tl.constexpr,
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
        position = tl.load(positions_ptr + row)
        column = position.to(tl.int32)
        if prefilled_ptr is not None:
            column -= tl.load(prefilled_ptr + row).to(tl.int32)
        numbers_ptr, first_ptr = own_ptr, scales_ptr
        if addresses_ptr is not None:
            numbers_ptr = tl.load(addresses_ptr).to(tl.pointer_type(own_ptr.dtype.element_ty))
            numbers_ptr = tl.multiple_of(numbers_ptr, 16)  # else one number at a time is stored
            if scales_ptr is not None:
                first_ptr = tl.load(addresses_ptr + 1).to(tl.pointer_type(tl.float16))
        kind = block if WHOLE else tl.where(block < H, 0, tl.where(block < H + H_KV, 1, 2))
        begin = tl.where(kind == 0, 0, tl.where(kind == 1, H, H + H_KV))  # the first head of the kind
        first = 0 if WHOLE else block - begin
        query_or_key = True & (kind < 2)  # True &: as in nf4_product
        head, d = first + tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK_D)[None, :]
        inside = (d < D) & (head < tl.where(kind == 0, H, H_KV))
        if query_gain_ptr is not None:
            gain_ptr = tl.where(kind == 0, query_gain_ptr, key_gain_ptr) + (head * D + d if WHOLE else d)
            gain = tl.load(gain_ptr, mask=inside & query_or_key, other=0.0)
        if cos_ptr is not None:
            turns = (d < ROTARY) & query_or_key
            cos = tl.load(cos_ptr + position * ROTARY + d, mask=turns, other=1.0).to(tl.float32)
            sin = tl.load(sin_ptr + position * ROTARY + d, mask=turns, other=0.0).to(tl.float32)
        page = tl.load(table_ptr + row * table_stride + column // page_tokens).to(tl.int64)
        column %= page_tokens
        i = tl.arange(0, HEADS * BLOCK_D)
        n = (begin + first + i // BLOCK_D) * D + i % BLOCK_D
        n_in = (i % BLOCK_D < D) & (first + i // BLOCK_D < tl.where(kind == 0, H, H_KV))
        low_column = kind * ((LOW - R) // 2)
        y = _finished(
            parts_ptr, low_ptr, b_ptr, bias_ptr, row, M, n, n_in, low_column, N, LOW, R, SPLITS, HAND, STEP, dtype
        )
        y = tl.reshape(y, (HEADS, BLOCK_D))
        if kind < 2:
            if query_gain_ptr is not None:
                eps = tl.where(kind == 0, query_eps, key_eps)
                square_sum = tl.sum(y * y, 1)[:, None]
                count = D
                if WHOLE:
                    square_sum = tl.sum(square_sum, 0)[None, :]
                    count = tl.where(kind == 0, H * D, H_KV * D)
                y = _normed(y, square_sum, gain, eps, count, EARLY, dtype)
            if cos_ptr is not None:
                if PAIRED:
                    second, partner = d % 2 == 1, d ^ 1
                else:
                    second, partner = d >= ROTARY // 2, tl.where(d < ROTARY // 2, d + ROTARY // 2, d - ROTARY // 2)
                partner = tl.broadcast_to(tl.where(turns, partner, d), (HEADS, BLOCK_D))
                other = tl.gather(y, partner, 1)
                other = tl.where(second, other, -other)
                angles: tl.constexpr = cos_ptr.dtype.element_ty
                y = _rounded(_rounded(y * cos, angles) + _rounded(other * sin, angles), dtype)
        if kind == 0:
            tl.store(query_ptr + (row * H + head) * D + d, y.to(dtype), mask=inside)
        else:
            numbers_ptr += own_layer + (kind - 1) * own_kind_stride + page * own_page_stride + column * D
            at = numbers_ptr + head * own_head_stride + d
            if scales_ptr is None:
                tl.store(at, y.to(own_ptr.dtype.element_ty), mask=inside)
            else:
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
        SPLITS: tl.constexpr,
        HAND: tl.constexpr,
        STEP: tl.constexpr,
        ACTIVATION: tl.constexpr,
        INTERPRETED: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        """One program per BLOCK_M rows and BLOCK_N columns of WIDTH."""
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        # Interpreted, there are no dots of bf16.
        factor: tl.constexpr = tl.float32 if INTERPRETED else dtype  # pyright: ignore[reportAssignmentType]
        N: tl.constexpr = 2 * WIDTH
        if OVERLAP:
            launch_next()
            BLOCKS: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
            _prefetch_finish(b_ptr, bias_ptr, N, R, tl.program_id(0) * BLOCKS + tl.program_id(1), BLOCKS)
            wait_for_last()
        ROUNDS: tl.constexpr = max((SPLITS + HAND - 1) // HAND, R // STEP)
        PARTS: tl.constexpr = triton.next_power_of_2(SPLITS)
        # What is finished is a vector, in which a thread's numbers lie side by side; factors of dots are matrices.
        i = tl.arange(0, BLOCK_M * BLOCK_N)
        m, n = tl.program_id(0) * BLOCK_M + i // BLOCK_N, tl.program_id(1) * BLOCK_N + i % BLOCK_N
        inside = (m < M) & (n < WIDTH)
        gate, up = tl.zeros(i.shape, tl.float32), tl.zeros(i.shape, tl.float32)
        if bias_ptr is not None:
            gate_bias = tl.load(bias_ptr + n, mask=inside, other=0.0)
            up_bias = tl.load(bias_ptr + WIDTH + n, mask=inside, other=0.0)
        if low_ptr is not None:
            high_gate, high_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            part = tl.arange(0, PARTS)[None, None, :]
            rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None, None]
            columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        for j in range(ROUNDS):
            if low_ptr is not None:
                r = j * STEP + tl.arange(0, STEP)
                low_at = low_ptr + (part * M + rows) * LOW + r[None, :, None]
                low_in = (part < SPLITS) & (rows < M) & (j * STEP < R)
                low_gate = tl.load(low_at, mask=low_in, other=0.0)
                low_up = tl.load(low_at + (LOW - R), mask=low_in, other=0.0)
            gates = _asked(parts_ptr, m * N + n, M * N, inside, j * HAND, SPLITS, HAND)
            ups = _asked(parts_ptr + WIDTH, m * N + n, M * N, inside, j * HAND, SPLITS, HAND)
            tl.debug_barrier()  # else the compiler moves loads behind the first wait, which saves registers
            if low_ptr is not None:
                b_at, b_in = b_ptr + r[:, None] * N + columns, (columns < WIDTH) & (j * STEP < R)
                b_gate = tl.load(b_at, mask=b_in, other=0.0).to(factor)
                b_up = tl.load(b_at + WIDTH, mask=b_in, other=0.0).to(factor)
                low_gate = tl.sum(low_gate, 2).to(dtype).to(factor)
                low_up = tl.sum(low_up, 2).to(dtype).to(factor)
                high_gate = tl.dot(low_gate, b_gate, high_gate, input_precision="ieee")
                high_up = tl.dot(low_up, b_up, high_up, input_precision="ieee")
            for part_of in tl.static_range(HAND):  # pyright: ignore[reportGeneralTypeIssues]: Triton unrolls it
                gate += gates[part_of]
                up += ups[part_of]
        if bias_ptr is not None:
            gate += gate_bias.to(tl.float32)
            up += up_bias.to(tl.float32)
        gate, up = _rounded(gate, dtype), _rounded(up, dtype)
        if low_ptr is not None:
            gate = _rounded(gate + tl.reshape(high_gate, i.shape), dtype)
            up = _rounded(up + tl.reshape(high_up, i.shape), dtype)
        if ACTIVATION == "silu":
            y = gate / (1.0 + tl.exp(-gate))
        elif ACTIVATION == "gelu":
            y = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
        else:  # z / (1 + exp(-2 t)) is z / 2 (1 + tanh t)
            t = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
            y = gate / (1.0 + tl.exp(-2.0 * t))
        tl.store(out_ptr + m * WIDTH + n, (_rounded(y, dtype) * up).to(dtype), mask=inside)


class Norm(NamedTuple):
    """An RMS norm x / sqrt(mean x^2 + eps) gain."""

    gain: Tensor  # (N,)
    eps: float
    early: bool  # x / sqrt(...) is rounded to 16 bits before the gain (Llama), or only the result is (Gemma)


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
    if runs_by_triton(backend, embedding.device.type):
        stream = torch.empty(S, N, dtype=dtype, device=embedding.device)
        out = stream if before is None else torch.empty_like(stream)
        if S:
            with torch.cuda.device_of(embedding):
                gain, eps, early = before or NO_NORM
                block = triton.next_power_of_2(N)
                _start_kernel[(S,)](
                    token_ids, embedding, stream, gain, out, scale, eps, N=N, EARLY=early, BLOCK=block,
                    num_warps=row_warps(N),
                )  # fmt: skip
        return stream, out
    stream = (embedding[token_ids].to(dtype).float() * scale).to(dtype)
    return stream, normed(stream, before)


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
    if runs_by_triton(backend, parts.device.type):
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
            own[at], scales[at] = quantized(x)
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
    if runs_by_triton(backend, stream.device.type):
        out = stream if before is None else torch.empty_like(stream)
        if S:
            with torch.cuda.device_of(stream):
                after_gain, after_eps, after_early = after or NO_NORM
                before_gain, before_eps, before_early = before or NO_NORM
                block, rank = triton.next_power_of_2(N), 0 if b is None else len(b)
                num_warps = row_warps(N)
                hand, step = row_hand(splits, rank, N, num_warps, stream.element_size())
                _residual_kernel[(S,)](
                    stream, parts, low, b, bias, after_gain, before_gain, out, S, None if share == 1 else share,
                    after_eps, before_eps, N=N, R=rank, SPLITS=splits, HAND=hand, STEP=step,
                    AFTER_EARLY=after_early, BEFORE_EARLY=before_early, BLOCK=block, num_warps=num_warps, **launched(),
                )  # fmt: skip
        return out
    y = normed(_summed(parts, low, b, bias, [N], stream.dtype), after)
    stream += y if share == 1 else y * share
    return normed(stream, before)


@torch.no_grad()
def gated(
    parts: Tensor,  # (splits, S, 2 I) fp32: gate, up
    low: Tensor | None,  # (splits, S, 2 R) fp32, or (splits, S, R) of one adapter for both
    b: Tensor | None,  # (R, 2 I)
    bias: Tensor | None,  # (2 I,)
    *,
    activation: Activation,
    dtype: torch.dtype,
    backend: Backend = "auto",
) -> Tensor:
    """Activation of gate, times up: (S, I) in `dtype`."""
    _check(parts, low, b, bias, 2)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    if runs_by_triton(backend, parts.device.type):
        splits, S, N = parts.shape
        out = torch.empty(S, N // 2, dtype=dtype, device=parts.device)
        if S:
            with torch.cuda.device_of(parts):
                rank = 0 if b is None else len(b)
                tensor_cores = not parts.is_cuda or torch.cuda.get_device_capability(parts.device) >= (8, 0)
                hand, step = tile_hand(splits, rank, dtype.itemsize, tensor_cores)
                _gated_kernel[(triton.cdiv(S, BLOCK_M), triton.cdiv(N // 2, BLOCK_N))](
                    parts, low, b, bias, out, S, WIDTH=N // 2, LOW=0 if low is None else low.shape[2], R=rank,
                    SPLITS=splits, HAND=hand, STEP=step, ACTIVATION=activation,
                    INTERPRETED=triton.knobs.runtime.interpret, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=NUM_WARPS,
                    **launched(),
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
    heads_at_once, block = triton.next_power_of_2(H) if whole else 1, triton.next_power_of_2(D)
    rank = 0 if b is None else len(b)
    num_warps = 8 if whole else 1
    hand, step = row_hand(splits, rank, heads_at_once * block, num_warps, dtype.itemsize)
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
                LOW=0 if low is None else low.shape[2], R=rank, SPLITS=splits, HAND=hand, STEP=step, EARLY=early,
                WHOLE=whole, HEADS=heads_at_once, BLOCK_D=block, num_warps=num_warps,
                enable_fp_fusion=False,  # a product in 16 bits and a sum would become one, rounded once
                **launched(),
            )  # fmt: skip
    return query


def row_warps(columns: int) -> int:
    """Warps of a program for a row: COLUMNS to each thread, more where 8 warps have not enough."""
    return min(8, max(1, triton.next_power_of_2(columns) // (32 * COLUMNS)))


def row_hand(splits: int, rank: int, columns: int, num_warps: int, width: int) -> tuple[int, int]:
    """HAND and STEP of a program that finishes a row's columns; a number of b has `width` bytes."""
    threads = 32 * num_warps
    whole = triton.cdiv(columns, threads * COLUMNS) * COLUMNS
    of_a_thread = max(1, min(triton.next_power_of_2(columns) // threads, whole))
    others = 24 + 3.5 * of_a_thread  # registers: more than they were in machine code for seven cards
    return _in_hand(splits, rank, of_a_thread, of_a_thread * width / 4, 1 / threads, 4, 255 - others)


def tile_hand(splits: int, rank: int, width: int, tensor_cores: bool) -> tuple[int, int]:
    """HAND and STEP of a program of gated; a number of b has `width` bytes."""
    columns, threads = 2 * BLOCK_N, 32 * NUM_WARPS
    factors = columns * width / 4 / threads if tensor_cores and width == 2 else 4  # FMA has factors in registers
    return _in_hand(splits, rank, BLOCK_M * columns / threads, factors, 2 * BLOCK_M / threads, 16, 112)


def _in_hand(
    splits: int, rank: int, part: float, factors: float, low: float, least: int, registers: float
) -> tuple[int, int]:
    """Splits, and rows of b, at least `least`, that fit at once into a thread's registers, in the fewest rounds.

    A split takes `part` registers, a row of b `factors`, and a number of low `low`.
    """
    rounds = 1
    while True:
        hand, step = -(-splits // rounds), max(least, triton.next_power_of_2(-(-rank // rounds)))
        taken = part * hand + (step * (factors + low * triton.next_power_of_2(splits)) if rank else 0)
        if (taken <= registers and rank % step == 0) or rounds >= max(splits, rank):
            return hand, step
        rounds *= 2


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
    """The norm of x (..., N), in x's dtype."""
    gain, eps, early = norm
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return ((wide.to(x.dtype).float() if early else wide) * gain.float()).to(x.dtype)


def normed(x: Tensor, norm: Norm | None) -> Tensor:
    """The norm of x (..., N), or x where there is none."""
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

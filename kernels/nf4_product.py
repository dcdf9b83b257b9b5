"""Products of few rows with 4-bit weights as bitsandbytes stores them, NF4 in blocks of 64, left in parts.

    parts_i = x_i [W_0; W_1; ...]_i^T        low_i = x_i A_i^T        y = sum_i parts_i, i over splits of K

    x (S, K), W_j (N_j, K) of 4 bits, A (R, K)  ->  parts (splits, S, N) fp32, low (splits, S, R) fp32, N = sum N_j

Nothing is finished here: the sum, a bias, what the adapter adds and all rounding are the first lines of the kernel
that reads the parts (decode_layer.py). So the rows of A are more rows of the weight, in one launch.

A weight is its code, rounded to x's dtype, times the absmax of its block of 64; the absmax multiplies a block's sum.
A row's result depends neither on S nor on the other rows: the splits are chosen by shape and card alone.
"""

import json
import os
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
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

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
CODES = torch.tensor(NF4)
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MXFP4_CODES = torch.tensor([*MAGNITUDES, *(-x for x in MAGNITUDES)])  # of 4 bits, the first of which is the sign
BLOCK_N, NUM_WARPS, STAGES = 64, 4, 3  # rows of a weight in a program; more warps would leave a warp under 16 of them
# Programs to each processor. At 64 rows 3584 x 18944 takes an H200 57 us in 8 splits, 53 in 16; more are more parts.
PROGRAMS, MOST_SPLITS = 4, 16
OLDEST = 80  # compute capability: below it Triton multiplies without tensor cores, and spills
RANK = 16  # rows of A in a program, which take as many bytes as 64 rows of a weight


def unpacking(dtype: torch.dtype, codes: Tensor = CODES, low_first: bool = False) -> str:
    """PTX that turns a word of 4 packed bytes, $8, into its 8 codes of 16 bits, $0 to $7, in the order of columns.

    `prmt` takes 4 selectors of 4 bits as they lie in two bytes: their low 3 bits choose among 8 bytes of a table, once
    in its lower and once in its upper half, and their fourth bit, spread over a byte, chooses between both; so for the
    codes' low bytes and for their high bytes. Two more put low and high bytes together. Each table's first 4 bytes are
    operands, $9 to $12 (first_words).
    """
    _, low, _, high = ([f"{word & 0xFFFFFFFF:#x}" for word in words] for words in _tables(dtype, codes))
    pairs = ("0x5140", "0x7362") if low_first else ("0x4051", "0x6273")

    def two_bytes(selectors: str, signs: str, first: int) -> str:
        joined = "".join(
            f"prmt.b32 b, a, c, {pair}; mov.b32 {{${first + 2 * byte}, ${first + 2 * byte + 1}}}, b;"
            for byte, pair in enumerate(pairs)
        )
        return f"""
        prmt.b32 m, $8, u, {signs};
        prmt.b32 a, $9, {low[0]}, {selectors}; prmt.b32 b, $10, {low[1]}, {selectors}; lop3.b32 a, m, b, a, 0xCA;
        prmt.b32 c, $11, {high[0]}, {selectors}; prmt.b32 d, $12, {high[1]}, {selectors}; lop3.b32 c, m, d, c, 0xCA;
        {joined}"""

    # A selector's fourth bit spreads the sign of a byte: of the word's bytes for high four bits, of u's for low ones.
    # What is written has 16 bits, what is read 32, so that no register is both.
    begin = "{ .reg .b32 s, t, u, m, a, b, c, d; and.b32 s, $8, 0x77777777; shl.b32 u, $8, 4; shr.u32 t, s, 16;"
    return begin + two_bytes("s", "0x9d8c", 0) + two_bytes("t", "0xbfae", 4) + " }"


def first_words(dtype: torch.dtype, codes: Tensor = CODES) -> list[int]:
    """The first 4 bytes of each table of unpacking: low bytes of codes 0 to 3 and 8 to 11, and their high bytes."""
    low, _, high, _ = _tables(dtype, codes)
    return [*low, *high]


def _tables(dtype: torch.dtype, codes: Tensor) -> list[list[int]]:
    """Words of the codes' low bytes, codes 0 to 3 and 8 to 11, then 4 to 7 and 12 to 15, and so of their high bytes."""
    both = codes.to(dtype).view(torch.uint8).view(-1, 2)
    words = [both[:, byte].contiguous().view(torch.int32).tolist() for byte in (0, 1)]
    return [of_byte[half::2] for of_byte in words for half in (0, 1)]


if triton is not None:
    from lowmem_grpo.kernels.overlap import launch_next, prefetch, wait_for_last

    _UNPACK_BF16: Any = tl.constexpr(unpacking(torch.bfloat16))
    _UNPACK_FP16: Any = tl.constexpr(unpacking(torch.float16))
    _UNPACK_MXFP4_BF16: Any = tl.constexpr(unpacking(torch.bfloat16, MXFP4_CODES, low_first=True))
    _UNPACK_MXFP4_FP16: Any = tl.constexpr(unpacking(torch.float16, MXFP4_CODES, low_first=True))
    _WORDS_BF16: Any = tl.constexpr(first_words(torch.bfloat16))
    _WORDS_FP16: Any = tl.constexpr(first_words(torch.float16))
    _WORDS_MXFP4_BF16: Any = tl.constexpr(first_words(torch.bfloat16, MXFP4_CODES))
    _WORDS_MXFP4_FP16: Any = tl.constexpr(first_words(torch.float16, MXFP4_CODES))
    _BF16: Any = tl.constexpr((tl.bfloat16,) * 8)
    _FP16: Any = tl.constexpr((tl.float16,) * 8)
    _REGISTERS: Any = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r")
    # Bit 31 of the lanes below a thread's, which no lane is below: nothing that ptxas could know.
    _ZERO: Any = tl.constexpr("{ .reg .b32 t; mov.u32 t, %lanemask_lt; shr.u32 $0, t, 31; }")

    @triton.jit
    def _unpacked(words, codes_ptr, dtype: tl.constexpr, MXFP4: tl.constexpr):
        """Codes (N, W, 2, 2, 2) of words (N, W) of 4 bytes in the order of columns, in dtype; interpreted in fp32."""
        if codes_ptr is not None:
            column = tl.arange(0, 8)
            shift = column // 2 * 8 + (column + 1 - MXFP4) % 2 * 4
            codes = tl.load(codes_ptr + (words[:, :, None] >> shift[None, None, :] & 15)).to(tl.float32)
            return tl.reshape(codes, (words.shape[0], words.shape[1], 2, 2, 2))
        # A number that ptxas knows it moves from a uniform register at every use, 32 times in a step of 200 others.
        zero = tl.inline_asm_elementwise(_ZERO, "=r", [], tl.int32, is_pure=True, pack=1)
        if dtype == tl.bfloat16:
            WORDS: tl.constexpr = _WORDS_MXFP4_BF16 if MXFP4 else _WORDS_BF16
            c0, c1, c2, c3, c4, c5, c6, c7 = tl.inline_asm_elementwise(
                _UNPACK_MXFP4_BF16 if MXFP4 else _UNPACK_BF16, _REGISTERS,
                [words, zero ^ WORDS[0], zero ^ WORDS[1], zero ^ WORDS[2], zero ^ WORDS[3]], _BF16,
                is_pure=True, pack=1,
            )  # fmt: skip
        else:
            WORDS: tl.constexpr = _WORDS_MXFP4_FP16 if MXFP4 else _WORDS_FP16
            c0, c1, c2, c3, c4, c5, c6, c7 = tl.inline_asm_elementwise(
                _UNPACK_MXFP4_FP16 if MXFP4 else _UNPACK_FP16, _REGISTERS,
                [words, zero ^ WORDS[0], zero ^ WORDS[1], zero ^ WORDS[2], zero ^ WORDS[3]], _FP16,
                is_pure=True, pack=1,
            )  # fmt: skip
        even = tl.join(tl.join(c0, c4), tl.join(c2, c6))
        return tl.join(even, tl.join(tl.join(c1, c5), tl.join(c3, c7)))

    @triton.jit
    def _rows(BLOCK_N: tl.constexpr, WARPS: tl.constexpr):
        """The row that stands at each place of a tile of words, for _part."""
        place = tl.arange(0, BLOCK_N)
        return place // 8 % WARPS * (BLOCK_N // WARPS) + place // (8 * WARPS) * 8 + place % 8

    @triton.jit
    def _part(words, x, codes_ptr, MXFP4: tl.constexpr, WARPS: tl.constexpr, WGMMA: tl.constexpr):
        """Product (N, M), fp32, of codes in words (N, W), whose rows are in the order of _rows, with x (M, 8 W).

        A tensor core wants of each 16 columns four from a thread, two and two. They may be any columns, if of x they
        are the same: so a thread unpacks what it loaded, W / 4 words side by side, and no layout is changed on the way.
        wgmma has two and two next to each other in its order, and for mma Triton has them in fours. mma of a batch, a
        part of the rows to each warp, since otherwise two warps would unpack the same rows for half of x each.
        """
        N: tl.constexpr = words.shape[0]
        W: tl.constexpr = words.shape[1]
        M: tl.constexpr = x.shape[0]
        w = _unpacked(words, codes_ptr, x.dtype, MXFP4)
        w = tl.reshape(w, (N // 8 // WARPS, WARPS, 8, 4, W // 4, 2, 2, 2))
        x = tl.reshape(x.to(w.dtype), (M, 4, W // 4, 2, 2, 2))
        if WGMMA:
            w = tl.reshape(tl.permute(w, (1, 0, 2, 4, 5, 6, 3, 7)), (N, 8 * W))
            part = tl.dot(w, tl.trans(tl.reshape(tl.permute(x, (0, 2, 3, 4, 1, 5)), (M, 8 * W))))
        else:
            w = tl.reshape(tl.permute(w, (1, 0, 2, 4, 6, 3, 5, 7)), (WARPS, N // WARPS, 8 * W))
            x = tl.reshape(tl.permute(x, (0, 2, 4, 1, 3, 5)), (M, 8 * W))[None, :, :]
            part = tl.reshape(tl.dot(w, tl.permute(tl.broadcast_to(x, (WARPS, M, 8 * W)), (0, 2, 1))), (N, M))
        return part

    @triton.jit
    def _prefetch_weight(
        w_ptr, absmax_ptr, outer_ptr, offset_ptr, BLOCKS: tl.constexpr, NESTED: tl.constexpr, part, PARTS: tl.constexpr
    ):
        prefetch(w_ptr, BLOCKS * 32, part, PARTS)
        prefetch(absmax_ptr, BLOCKS, part, PARTS)
        if NESTED:
            prefetch(outer_ptr, (BLOCKS + 255) // 256, part, PARTS)
            prefetch(offset_ptr, 1, part, PARTS)

    @triton.jit(do_not_specialize=["M"])  # one row, and 16, would be kernels of their own
    def _product_kernel(
        x_ptr,  # (M, K) 16 bits
        w0_ptr,  # (N0, K / 2) uint8: an even column in the high four bits, the odd one that follows in the low ones
        w1_ptr,  # (N1, K / 2), or None where N1 is 0
        w2_ptr,
        absmax0_ptr,  # (N0 K / 64,) uint8 where NESTED, else fp32
        absmax1_ptr,
        absmax2_ptr,
        outer0_ptr,  # (N0 K / 64 / 256,) fp32, where NESTED
        outer1_ptr,
        outer2_ptr,
        offset0_ptr,  # () fp32, where NESTED
        offset1_ptr,
        offset2_ptr,
        code_ptr,  # (256,) fp32, where NESTED
        codes_ptr,  # (16,) NF4 in x's dtype where interpreted, for want of inline assembly and dots of bf16; else None
        a_ptr,  # (R, K) 16 bits, where R > 0
        parts_ptr,  # (SPLITS, M, N0 + N1 + N2) fp32, written
        low_ptr,  # (SPLITS, M, R) fp32, written where R > 0
        M,
        K: tl.constexpr,
        N0: tl.constexpr,
        N1: tl.constexpr,
        N2: tl.constexpr,
        R: tl.constexpr,
        SPLITS: tl.constexpr,
        NESTED: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        RANK: tl.constexpr,
        WARPS: tl.constexpr,
        STAGES: tl.constexpr,  # of the loop over A
        WGMMA: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        """One program per BLOCK_N rows of a weight or RANK of A, split of K, and BLOCK_M rows of x.

        Rows of a weight are the product's first side, so that each warp unpacks its own.
        """
        N: tl.constexpr = N0 + N1 + N2
        BLOCKS: tl.constexpr = K // 64
        STEPS: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
        B0: tl.constexpr = (N0 + BLOCK_N - 1) // BLOCK_N
        B1: tl.constexpr = (N1 + BLOCK_N - 1) // BLOCK_N
        B2: tl.constexpr = (N2 + BLOCK_N - 1) // BLOCK_N
        if OVERLAP:
            launch_next()
            PROGRAMS: tl.constexpr = (B0 + B1 + B2 + R // RANK) * SPLITS
            program = tl.program_id(0) * SPLITS + tl.program_id(1) + tl.program_id(2) * PROGRAMS
            _prefetch_weight(w0_ptr, absmax0_ptr, outer0_ptr, offset0_ptr, N0 * BLOCKS, NESTED, program, PROGRAMS)
            if N1 > 0:
                _prefetch_weight(w1_ptr, absmax1_ptr, outer1_ptr, offset1_ptr, N1 * BLOCKS, NESTED, program, PROGRAMS)
            if N2 > 0:
                _prefetch_weight(w2_ptr, absmax2_ptr, outer2_ptr, offset2_ptr, N2 * BLOCKS, NESTED, program, PROGRAMS)
            if NESTED:
                prefetch(code_ptr, 256, program, PROGRAMS)
            if R > 0:
                prefetch(a_ptr, R * K, program, PROGRAMS)
            wait_for_last()
        block, split = tl.program_id(0), tl.program_id(1).to(tl.int64)
        m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
        m_in = m < M
        first = tl.program_id(1) * STEPS
        if block < B0 + B1 + B2:
            # A choice among pointers by a scalar: what is known of their alignment stays known.
            w_ptr, absmax_ptr, outer_ptr, offset_ptr = w0_ptr, absmax0_ptr, outer0_ptr, offset0_ptr
            begin, size, first_block = 0, N0, 0
            if N1 > 0:
                one = block >= B0
                w_ptr, absmax_ptr = tl.where(one, w1_ptr, w_ptr), tl.where(one, absmax1_ptr, absmax_ptr)
                begin, size, first_block = tl.where(one, N0, 0), tl.where(one, N1, N0), tl.where(one, B0, 0)
                if NESTED:
                    outer_ptr = tl.where(one, outer1_ptr, outer_ptr)
                    offset_ptr = tl.where(one, offset1_ptr, offset_ptr)
            if N2 > 0:
                two = block >= B0 + B1
                w_ptr, absmax_ptr = tl.where(two, w2_ptr, w_ptr), tl.where(two, absmax2_ptr, absmax_ptr)
                begin, size = tl.where(two, N0 + N1, begin), tl.where(two, N2, size)
                first_block = tl.where(two, B0 + B1, first_block)
                if NESTED:
                    outer_ptr = tl.where(two, outer2_ptr, outer_ptr)
                    offset_ptr = tl.where(two, offset2_ptr, offset_ptr)
            place = (block - first_block) * BLOCK_N
            n = place + tl.arange(0, BLOCK_N)
            n_in = n < size
            # Rows beyond the last one are the last one again, and are not stored.
            rows = tl.minimum(place + _rows(BLOCK_N, WARPS), size - 1)
            w_at = w_ptr.to(tl.pointer_type(tl.int32)) + rows[:, None] * (K // 8) + first * 8
            w_at = tl.multiple_of(w_at + tl.arange(0, 8)[None, :], [8, 8])  # bytes a thread, as in _part
            x_at = x_ptr + tl.minimum(m, M - 1)[:, None] * K + first * 64 + tl.arange(0, 64)[None, :]
            absmax_at = tl.minimum(n, size - 1) * BLOCKS + first
            # K may not be a whole number of splits.
            steps = tl.maximum(tl.minimum(STEPS, BLOCKS - first), 0) if BLOCKS % SPLITS else STEPS
            # A thread has weights of two steps ahead, of which it needs 4 registers, and x of the next one.
            # True & compiles to nothing: in Triton 3.9's interpreter scalars compared are int32, which is no mask.
            some, more = True & (steps > 0), True & (steps > 1)  # pyright: ignore[reportOperatorIssue]
            scale = tl.load(absmax_ptr + absmax_at, mask=some)
            words = tl.load(w_at, mask=some)
            x = tl.load(x_at, mask=some)
            next_absmax = tl.load(absmax_ptr + absmax_at + 1, mask=more)
            next_words = tl.load(w_at + 8, mask=more)
            if NESTED:
                offset = tl.load(offset_ptr)
                outer = tl.load(outer_ptr + absmax_at // 256, mask=some)
                scale = tl.load(code_ptr + scale.to(tl.int32), mask=some) * outer + offset
            sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for step in tl.range(0, steps, num_stages=1, loop_unroll_factor=2):
                next_in, after_in = True & (step + 1 < steps), True & (step + 2 < steps)
                next_scale = next_absmax
                if NESTED:
                    next_scale = tl.load(code_ptr + next_absmax.to(tl.int32), mask=next_in)
                    outer = tl.load(outer_ptr + (absmax_at + step + 1) // 256, mask=next_in)
                next_absmax = tl.load(absmax_ptr + absmax_at + step + 2, mask=after_in)
                w, x_now = words, x
                words = next_words
                next_words = tl.load(w_at + (step + 2) * 8, mask=after_in)
                x = tl.load(x_at + (step + 1) * 64, mask=next_in)
                sums += _part(w, x_now, codes_ptr, False, WARPS, WGMMA) * scale[:, None]
                scale = next_scale
                if NESTED:
                    scale = next_scale * outer + offset
            parts_at = parts_ptr + split * M * N + m[None, :] * N + (begin + n)[:, None]
            tl.store(parts_at, sums, mask=m_in[None, :] & n_in[:, None])
        elif R > 0:
            r = (block - B0 - B1 - B2) * RANK + tl.arange(0, RANK)
            column = tl.arange(0, 64)
            low = tl.zeros((RANK, BLOCK_M), tl.float32)
            for step in tl.range(0, STEPS, num_stages=STAGES):
                at = (first + step) * 64 + column[None, :]
                inside = True & (first + step < BLOCKS)
                a = tl.load(a_ptr + r[:, None] * K + at, mask=(r < R)[:, None] & inside, other=0.0)
                x = tl.load(x_ptr + m[:, None] * K + at, mask=m_in[:, None] & inside, other=0.0)
                if codes_ptr is not None:
                    a, x = a.to(tl.float32), x.to(tl.float32)
                low = tl.dot(a, tl.trans(x), low)
            low_at = low_ptr + split * M * R + m[None, :] * R + r[:, None]
            tl.store(low_at, low, mask=m_in[None, :] & (r < R)[:, None])


class Weight(NamedTuple):
    """A 4-bit matrix (N, K), K a multiple of 64: the tensors of bitsandbytes' QuantState."""

    packed: Tensor  # N K / 2 uint8 of any shape, the even columns in the high four bits
    absmax: Tensor  # (N K / 64,) fp32, or uint8 where it is quantized itself ("nested")
    outer: Tensor | None = None  # (ceil(N K / 64 / 256),) fp32, nested: state2.absmax
    offset: Tensor | None = None  # () fp32, nested
    code: Tensor | None = None  # (256,) fp32, nested: state2.code, one for all weights of a product


@torch.no_grad()
def product(
    x: Tensor,  # (S, K), contiguous
    weights: Sequence[Weight],  # 1 to 3, whose rows stand one after another in N; all nested or none
    a: Tensor | None = None,  # (R, K) in x's dtype, contiguous, R a multiple of 16
    *,
    splits: int | None = None,  # of K; None: those of splits_of, or 1
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Parts (splits, S, N) and low (splits, S, R), both fp32, of x with weights and with A. No gradient.

    The kernel takes bf16 and fp16.

    Raises:
        ValueError: shapes or dtypes that do not belong together, or packed in a place that the kernel cannot read.
        RuntimeError: backend="triton" where it cannot run.
    """
    _check(x, weights, a, splits)
    if splits is None:
        sizes = tuple(2 * weight.packed.numel() // x.shape[1] for weight in weights)
        splits = splits_of(sizes, x.shape[1], x.device) or 1
    if _runs_by_triton(backend, x):
        return _launch(x, weights, a, splits)
    dense = torch.cat([dequantized(weight, x.shape[1], x.dtype) for weight in weights])
    step = -(-x.shape[1] // 64 // splits) * 64
    pieces = [slice(i * step, (i + 1) * step) for i in range(splits)]
    parts = torch.stack([x[:, piece].float() @ dense[:, piece].T for piece in pieces])
    if a is None:
        return parts, None
    return parts, torch.stack([x[:, piece].float() @ a[:, piece].float().T for piece in pieces])


@cache
def splits_of(
    sizes: tuple[int, ...],  # N_j
    K: int,
    device: torch.device,
) -> int | None:
    """Number of splits of K that a product takes on a device, or None where bitsandbytes' product serves instead.

    A process asks once: what bench_gemm_4bit keeps later is for the next one. Never by rows, or a completion's
    rounding would depend on how many run beside it.
    """
    if device.type != "cuda":
        return 1
    card = torch.cuda.get_device_properties(device)
    return splits_on(card.name, 10 * card.major + card.minor, card.multi_processor_count, sizes, K)


def splits_on(card: str, capability: int, processors: int, sizes: Sequence[int], K: int) -> int | None:
    """Splits of K, or None for bitsandbytes' product, on a card of such a name, compute capability and processors.

    What bench_gemm_4bit measured and kept at table_path() decides. For a shape or card that was not measured:
    bitsandbytes' product below sm_80, else default_splits.
    """
    measured = measured_splits(card)
    if (key := shape_key(sizes, K)) in measured:
        return measured[key]
    return default_splits(sizes, K, processors) if capability >= OLDEST else None


def has_wgmma(capability: int) -> bool:
    """Whether Triton multiplies by wgmma on a card of such a compute capability: on Hopper alone."""
    return capability // 10 == 9


@cache
def capability_of(device: torch.device) -> int:
    """A device's compute capability, 90 for 9.0, and 0 for a CPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def default_splits(sizes: Sequence[int], K: int, processors: int) -> int:
    """Splits of K by arithmetic: programs enough for all processors, three blocks of K or more to each."""
    blocks = sum(-(-size // BLOCK_N) for size in sizes)
    return max(1, min(MOST_SPLITS, K // 64 // 3, round(PROGRAMS * processors / blocks)))


def measured_splits(card: str) -> dict[str, int | None]:
    """Splits by shape_key that were measured on a card, None where bitsandbytes' product was faster."""
    path = table_path()
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get(card, {}) if path.exists() else {}
        if not all(splits is None or (type(splits) is int and 0 < splits <= MOST_SPLITS) for splits in found.values()):
            raise ValueError(f"splits are numbers from 1 to {MOST_SPLITS}, or null")
    except (OSError, ValueError, AttributeError) as error:
        warnings.warn(f"{path} is not read, and the splits of 4-bit products are reckoned: {error}", stacklevel=2)
        return {}
    return found


def shape_key(sizes: Sequence[int], K: int) -> str:
    return f"{'+'.join(map(str, sizes))}x{K}"


def table_path() -> Path:
    """The file of measured splits, JSON by card and shape_key."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowmem_grpo" / "nf4_product.json"


def dequantized(weight: Weight, K: int, dtype: torch.dtype) -> Tensor:
    """The matrix (N, K) in fp32: codes rounded to `dtype`, times their absmax."""
    packed = weight.packed.flatten().to(torch.int32)
    codes = torch.stack([packed >> 4, packed & 15], 1).view(-1, 64)
    absmax = weight.absmax.float()
    if weight.code is not None and weight.outer is not None and weight.offset is not None:
        block = torch.arange(len(absmax), device=absmax.device) // 256
        absmax = weight.code[weight.absmax.long()] * weight.outer[block] + weight.offset
    table = CODES.to(packed.device, dtype).float()
    return (table[codes] * absmax[:, None]).view(-1, K)


def _launch(x: Tensor, weights: Sequence[Weight], a: Tensor | None, splits: int) -> tuple[Tensor, Tensor | None]:
    if any(weight.packed.data_ptr() % 8 for weight in weights):
        raise ValueError("packed must begin at a multiple of 8 bytes, of which the kernel makes one load")
    M, K = x.shape
    R = 0 if a is None else len(a)
    absent = 3 - len(weights)
    sizes = [weight.packed.numel() * 2 // K for weight in weights] + [0] * absent
    packed, absmax, outer, offset, _ = zip(*weights, *[(None,) * 5] * absent, strict=True)
    parts = torch.empty(splits, M, sum(sizes), dtype=torch.float32, device=x.device)
    low = None if a is None else torch.empty(splits, M, R, dtype=torch.float32, device=x.device)
    codes = CODES.to(x.dtype) if triton.knobs.runtime.interpret else None
    block_m = 16 if M <= 16 else 32 if M <= 32 else 64
    if M:
        blocks = sum(triton.cdiv(size, BLOCK_N) for size in sizes) + R // RANK
        with torch.cuda.device_of(x):
            _product_kernel[(blocks, splits, triton.cdiv(M, block_m))](
                x, *packed, *absmax, *outer, *offset, weights[0].code, codes, a, parts, low, M,
                K=K, N0=sizes[0], N1=sizes[1], N2=sizes[2], R=R, SPLITS=splits, NESTED=weights[0].code is not None,
                BLOCK_M=block_m, BLOCK_N=BLOCK_N, RANK=RANK, WARPS=NUM_WARPS, STAGES=STAGES,
                WGMMA=has_wgmma(capability_of(x.device)), num_warps=NUM_WARPS, **launched(),
            )  # fmt: skip
    return parts, low


def _check(x: Tensor, weights: Sequence[Weight], a: Tensor | None, splits: int | None) -> None:
    if x.dim() != 2 or not x.is_floating_point() or not x.is_contiguous() or x.shape[1] % 64 or not x.shape[1]:
        raise ValueError(f"x must be contiguous (S, K), K a multiple of 64, not {tuple(x.shape)} {x.dtype}")
    K = x.shape[1]
    if not 1 <= len(weights) <= 3 or len({weight.code is None for weight in weights}) > 1:
        raise ValueError(f"weights must be 1 to 3, all nested or none, not {len(weights)}")
    for weight in weights:
        if weight.packed.dtype != torch.uint8 or weight.packed.numel() % (K // 2):
            raise ValueError(f"packed must be uint8 of whole rows of {K // 2}, not {tuple(weight.packed.shape)}")
        if weight.absmax.numel() * 32 != weight.packed.numel():
            raise ValueError(f"absmax must be one of 64 numbers, not {tuple(weight.absmax.shape)}")
        nested = weight.absmax.dtype == torch.uint8
        if any((x is not None) != nested for x in (weight.outer, weight.offset, weight.code)):
            raise ValueError("outer, offset and code go with an absmax of uint8, and with no other")
    packed = [weight.packed.numel() for weight in weights]
    if max(*packed, len(x) * max(K, 2 * sum(packed) // K)) >= 2**31:
        raise ValueError(
            "a weight of 2 GiB, or 2**31 numbers of x or of a part, are beyond the kernel's 32-bit offsets"
        )
    if a is not None and (a.shape[1:] != (K,) or len(a) % RANK or a.dtype != x.dtype or not a.is_contiguous()):
        raise ValueError(f"a must be contiguous (R, {K}) {x.dtype}, R a multiple of {RANK}, not {tuple(a.shape)}")
    if splits is not None and splits < 1:
        raise ValueError(f"splits must be at least 1, not {splits}")


def _runs_by_triton(backend: str, x: Tensor) -> bool:
    by_triton, narrow = runs_by_triton(backend, x.device.type), x.dtype in (torch.bfloat16, torch.float16)
    if backend == "triton" and not narrow:
        raise ValueError(f"backend='triton' multiplies bf16 or fp16, not {x.dtype}")
    return by_triton and narrow

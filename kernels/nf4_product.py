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
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

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


def unpacking(dtype: torch.dtype, codes: Tensor = CODES) -> str:
    """PTX that turns 4 packed bytes, $4, into their 16-bit codes: of the high four bits in $0 and $1, else in $2, $3.

    `prmt` takes 4 selectors of 4 bits as they lie in two bytes: their low 3 bits choose among 8 bytes of a table, once
    in its lower and once in its upper half, and their fourth bit chooses between both; so for the codes' low bytes and
    for their high bytes. Two more put low and high bytes together.
    """
    both = codes.to(dtype).view(torch.uint8).view(-1, 2)
    low, high = (both[:, byte].contiguous().view(torch.int32).tolist() for byte in (0, 1))
    low, high = ([f"{word & 0xFFFFFFFF:#x}" for word in words] for words in (low, high))

    def two_bytes(source: str, of_high: str, of_low: str) -> str:
        return f"""
        and.b32 s, {source}, 0x7777; shr.u32 t, {source}, 3; and.b32 t, t, 0x1111; prmt.b32 m, 0x0000ff00, 0, t;
        prmt.b32 a, {low[0]}, {low[1]}, s; prmt.b32 b, {low[2]}, {low[3]}, s; lop3.b32 a, m, b, a, 0xCA;
        prmt.b32 c, {high[0]}, {high[1]}, s; prmt.b32 d, {high[2]}, {high[3]}, s; lop3.b32 c, m, d, c, 0xCA;
        prmt.b32 {of_high}, a, c, 0x7351; prmt.b32 {of_low}, a, c, 0x6240;"""

    # $4 is read for the last time before $0 is written: both may be one register.
    upper = "{ .reg .b32 s, t, m, a, b, c, d, w; shr.u32 w, $4, 16;"
    return upper + two_bytes("$4", "$0", "$2") + two_bytes("w", "$1", "$3") + " }"


if triton is not None:
    from lowmem_grpo.kernels.overlap import launch_next, prefetch, wait_for_last

    _UNPACK_BF16: Any = tl.constexpr(unpacking(torch.bfloat16))
    _UNPACK_FP16: Any = tl.constexpr(unpacking(torch.float16))
    _UNPACK_MXFP4_BF16: Any = tl.constexpr(unpacking(torch.bfloat16, MXFP4_CODES))
    _UNPACK_MXFP4_FP16: Any = tl.constexpr(unpacking(torch.float16, MXFP4_CODES))
    _REGISTERS: Any = tl.constexpr("=r,=r,=r,=r,r")

    @triton.jit
    def _unpacked(q, codes_ptr, dtype: tl.constexpr, MXFP4: tl.constexpr):
        """Codes of the high and of the low four bits of bytes, in dtype; interpreted in fp32."""
        if codes_ptr is not None:
            q = q.to(tl.int32)
            return tl.load(codes_ptr + (q >> 4)).to(tl.float32), tl.load(codes_ptr + (q & 15)).to(tl.float32)
        elif dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                _UNPACK_MXFP4_BF16 if MXFP4 else _UNPACK_BF16, _REGISTERS, [q], (tl.bfloat16, tl.bfloat16),
                is_pure=True, pack=4,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                _UNPACK_MXFP4_FP16 if MXFP4 else _UNPACK_FP16, _REGISTERS, [q], (tl.float16, tl.float16),
                is_pure=True, pack=4,
            )  # fmt: skip

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
        STAGES: tl.constexpr,
        OVERLAP: tl.constexpr,
    ):
        """One program per BLOCK_N rows of a weight or RANK of A, split of K, and BLOCK_M rows of x.

        Rows of a weight are the product's first side, so that each warp unpacks its own. Even and odd columns come from
        one byte, and lie side by side in a thread before they are joined. With x split into even and odd columns in
        their place, its way to the tensor cores led through registers, and an H200 took 1.5 to 1.8 times as long.
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
            n = (block - first_block) * BLOCK_N + tl.arange(0, BLOCK_N)
            n_in = n < size
            pair = tl.arange(0, 32)
            w_at = w_ptr + n[:, None] * (K // 2) + pair[None, :]
            x_at = x_ptr + m[:, None] * K + tl.arange(0, 64)[None, :]
            absmax_at = n * BLOCKS
            if NESTED:
                offset = tl.load(offset_ptr)
            sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for step in tl.range(0, STEPS, num_stages=STAGES):
                k = first + step
                inside = k < BLOCKS  # K may not be a whole number of splits
                q = tl.load(w_at + k * 32, mask=n_in[:, None] & inside, other=0)
                x = tl.load(x_at + k * 64, mask=m_in[:, None] & inside, other=0.0)
                absmax = tl.load(absmax_ptr + absmax_at + k, mask=n_in & inside, other=0)
                if NESTED:
                    outer = tl.load(outer_ptr + (absmax_at + k) // 256, mask=n_in & inside, other=0.0)
                    absmax = tl.load(code_ptr + absmax.to(tl.int32)) * outer + offset
                w_even, w_odd = _unpacked(q, codes_ptr, x_ptr.dtype.element_ty, False)
                w = tl.reshape(tl.join(w_even, w_odd), (BLOCK_N, 64))
                part = tl.dot(w, tl.trans(x.to(w.dtype)))
                sums += part * absmax[:, None]
            parts_at = parts_ptr + split * M * N + m[None, :] * N + (begin + n)[:, None]
            tl.store(parts_at, sums, mask=m_in[None, :] & n_in[:, None])
        elif R > 0:
            r = (block - B0 - B1 - B2) * RANK + tl.arange(0, RANK)
            column = tl.arange(0, 64)
            low = tl.zeros((RANK, BLOCK_M), tl.float32)
            for step in tl.range(0, STEPS, num_stages=STAGES):
                at = (first + step) * 64 + column[None, :]
                inside = first + step < BLOCKS
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
    backend: Literal["auto", "triton", "torch"] = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Parts (splits, S, N) and low (splits, S, R), both fp32, of x with weights and with A. No gradient.

    The kernel takes bf16 and fp16.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
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
                BLOCK_M=block_m, BLOCK_N=BLOCK_N, RANK=RANK, STAGES=STAGES, num_warps=NUM_WARPS,
                **launched(),
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
        if 2 * weight.packed.numel() // K * max(len(x), K // 2) >= 2**31:
            raise ValueError("a weight of 2 GiB, or its product, is beyond the kernel's 32-bit offsets")
        nested = weight.absmax.dtype == torch.uint8
        if any((x is not None) != nested for x in (weight.outer, weight.offset, weight.code)):
            raise ValueError("outer, offset and code go with an absmax of uint8, and with no other")
    if a is not None and (a.shape[1:] != (K,) or len(a) % RANK or a.dtype != x.dtype or not a.is_contiguous()):
        raise ValueError(f"a must be contiguous (R, {K}) {x.dtype}, R a multiple of {RANK}, not {tuple(a.shape)}")
    if splits is not None and splits < 1:
        raise ValueError(f"splits must be at least 1, not {splits}")


def _runs_by_triton(backend: str, x: Tensor) -> bool:
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend must be 'auto', 'triton' or 'torch', not {backend!r}")
    if backend == "triton" and triton is None:
        raise RuntimeError("backend='triton' needs Triton installed; backend='torch' does without")
    if backend == "triton" and not x.is_cuda and not triton.knobs.runtime.interpret:
        raise RuntimeError(
            f"backend='triton' on {x.device.type} runs only in Triton's interpreter: set TRITON_INTERPRET=1 before it "
            "is imported, or use backend='torch'"
        )
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    if backend == "triton" and not narrow:
        raise ValueError(f"backend='triton' multiplies bf16 or fp16, not {x.dtype}")
    wanted = os.environ.get("LOWMEM_GRPO_TRITON") != "0"  # the way out, where a card or a driver does not suit it
    return backend == "triton" or (backend == "auto" and x.is_cuda and narrow and triton is not None and wanted)

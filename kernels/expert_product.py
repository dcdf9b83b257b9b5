"""Products of each row with the experts that it chose, whose 4-bit weights are read where they lie.

    y_c = W_e(c) x_(c // k)^T, for the C = S k choices c of S rows, of k experts each

    x (S, K) or one row for each choice (C, K), W (E, N, K) of 4 bits, chosen (C,)  ->  y (C, N) in x's dtype

Choices are grouped by expert: a weight is read once for up to 32 of an expert's choices, and not at all if it has none.
The number of launches and all shapes depend on C and E alone, and the host reads no choice: steps can be captured.
A choice of E or more is of no expert; its y is not written.

NF4 as bitsandbytes has it with double quantization, in blocks of 64 along K; or MXFP4, in blocks of 32. A weight is its
code, which 16 bits hold, times its block's scale, which multiplies the block's sum in fp32. A choice's result depends
on no other choice. Grouping tokens by expert: MegaBlocks (https://arxiv.org/abs/2211.15841).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem_grpo.kernels.backend import Backend, runs_by_triton
from lowmem_grpo.kernels.nf4_product import CODES, MXFP4_CODES, OLDEST, Weight, capability_of, dequantized, has_wgmma

try:
    import triton
    import triton.language as tl

    from lowmem_grpo.kernels.nf4_product import _part, _rows
except ImportError:  # Windows, macOS
    triton: Any = None

MOST = 4096  # choices of a call: each program of the grouping reads them all
NUM_WARPS, BLOCK_N = 4, 64
TAKEN = (torch.bfloat16, torch.float16, torch.int64)  # by the kernels: rows, and choices

if triton is not None:

    @triton.jit(do_not_specialize=["C"])  # every number of rows would be a kernel of its own
    def _group_kernel(
        chosen_ptr,  # (C,) int64
        order_ptr,  # (C,) int32, written: choices in the order of their experts
        begins_ptr,  # (E + 1,) int32, written: where each expert's begin there, and those of none
        C,
        E,
        BLOCK: tl.constexpr,
    ):
        """One program per expert, and one for choices of none."""
        expert = tl.program_id(0)
        choice = tl.arange(0, BLOCK)
        chosen = tl.load(chosen_ptr + choice, mask=choice < C, other=-1)
        chosen = tl.minimum(chosen, E).to(tl.int32)
        own = chosen == expert
        begin = tl.sum(((chosen < expert) & (choice < C)).to(tl.int32), 0)
        tl.store(begins_ptr + expert, begin)
        tl.store(order_ptr + begin + tl.cumsum(own.to(tl.int32), 0) - 1, choice, mask=own)

    @triton.jit
    def _product_kernel(
        x_ptr,  # (C / SHARED, K) 16 bits
        chosen_ptr,  # (C,) int64
        order_ptr,  # (C,) int32
        begins_ptr,  # (E + 1,) int32
        codes_ptr,  # (E, N, K / 2) uint8
        scales_ptr,  # (E, N, K / BLOCK) uint8
        outer_ptr,  # (E, ceil(N K / BLOCK / 256)) fp32 in NF4, else None
        offsets_ptr,  # (E,) fp32 in NF4
        table_ptr,  # (256,) fp32 in NF4
        values_ptr,  # (16,) what codes mean, in x's dtype, where interpreted; else None
        out_ptr,  # (C, N) 16 bits, written
        E,
        K: tl.constexpr,
        N: tl.constexpr,
        SHARED: tl.constexpr,  # choices of one row of x
        BY_PLACE: tl.constexpr,
        BLOCK: tl.constexpr,  # numbers with one scale
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        WARPS: tl.constexpr,
        WGMMA: tl.constexpr,
    ):
        """One program per expert, or BY_PLACE in `order` where that is less, and BLOCK_N rows of its weight."""
        BLOCKS: tl.constexpr = K // BLOCK
        OUTER: tl.constexpr = (N * BLOCKS + 255) // 256
        expert = tl.program_id(0)
        if BY_PLACE:  # the first of each expert's works for all of them
            place = expert
            expert = tl.minimum(tl.load(chosen_ptr + tl.load(order_ptr + place)), E).to(tl.int32)
            begin = tl.load(begins_ptr + expert)
            there = (place == begin) & (expert < E)
            end = tl.where(there, tl.load(begins_ptr + expert + 1, mask=there, other=0), begin)
        else:
            begin = tl.load(begins_ptr + expert)
            end = tl.load(begins_ptr + expert + 1)
        at = tl.minimum(expert, E - 1).to(tl.int64)  # of no expert nothing is multiplied; what is loaded must exist
        WORDS: tl.constexpr = BLOCK // 8  # of 4 bytes
        place = tl.program_id(1) * BLOCK_N
        n = place + tl.arange(0, BLOCK_N)
        n_in = n < N
        # Rows beyond the last one are the last one again, and are not stored; so are choices beyond an expert's.
        rows = tl.minimum(place + _rows(BLOCK_N, WARPS), N - 1)
        w_at = (codes_ptr + at * (N * K // 2)).to(tl.pointer_type(tl.int32)) + rows[:, None] * (K // 8)
        w_at = tl.multiple_of(w_at + tl.arange(0, WORDS)[None, :], [WORDS, WORDS])  # bytes a thread, as in _part
        scale_at = tl.minimum(n, N - 1) * BLOCKS
        scales_ptr += at * (N * BLOCKS)
        if outer_ptr is not None:
            outer_ptr += at * OUTER
            offset = tl.load(offsets_ptr + at)
        for first in range(begin, end, BLOCK_M):
            m = first + tl.arange(0, BLOCK_M)
            m_in = m < end
            choice = tl.load(order_ptr + m, mask=m_in, other=0)
            x_at = x_ptr + (choice // SHARED)[:, None] * K + tl.arange(0, BLOCK)[None, :]
            words, x, scale = tl.load(w_at), tl.load(x_at), tl.load(scales_ptr + scale_at)
            next_words = tl.load(w_at + WORDS, mask=BLOCKS > 1)
            sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for step in tl.range(0, BLOCKS, num_stages=1, loop_unroll_factor=2):
                next_in = step + 1 < BLOCKS
                if outer_ptr is None:  # the exponent's bits, but for 2^-127, which has none
                    bits = scale.to(tl.int32)
                    factor = tl.where(bits > 0, bits << 23, 1 << 22).to(tl.float32, bitcast=True)
                else:
                    outer = tl.load(outer_ptr + (scale_at + step) // 256)
                    factor = tl.load(table_ptr + scale.to(tl.int32)) * outer + offset
                scale = tl.load(scales_ptr + scale_at + step + 1, mask=next_in)
                w, x_now = words, x
                words = next_words
                next_words = tl.load(w_at + (step + 2) * WORDS, mask=step + 2 < BLOCKS)
                x = tl.load(x_at + (step + 1) * BLOCK, mask=next_in)
                sums += _part(w, x_now, values_ptr, outer_ptr is None, WARPS, WGMMA) * factor[:, None]
            out_at = out_ptr + choice[:, None] * N + n[None, :]
            tl.store(out_at, tl.trans(sums).to(out_ptr.dtype.element_ty), mask=m_in[:, None] & n_in[None, :])


class Stack(NamedTuple):
    """Matrices (N, K) of E experts in 4 bits: NF4 with double quantization, or MXFP4, which has no last three."""

    codes: Tensor  # E N K / 2 uint8 of any shape; NF4 has an even column in the high four bits, MXFP4 in the low ones
    scales: Tensor  # (E, N K / 64) uint8, codes of table; in MXFP4 (E, N, K / 32) exponents, each 127 higher
    outer: Tensor | None = None  # (E, ceil(N K / 64 / 256)) fp32: what 256 scales are multiplied by
    offsets: Tensor | None = None  # (E,) fp32, added to scales
    table: Tensor | None = None  # (256,) fp32


class Groups(NamedTuple):
    """Choices grouped by expert."""

    chosen: Tensor  # (C,) int64
    order: Tensor  # (C,) int32, choices in the order of their experts, those of no expert last
    begins: Tensor  # (E + 1,) int32, where each expert's begin in `order`, and last where those of no expert do


def serves(K: int, stack: Stack, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel multiplies rows of K numbers, for up to MOST choices, on a device.

    On "meta" as on this machine's GPU, or as on a card of today where it has none.
    """
    if K % block_of(stack) or not _suits(dtype, device):
        return False
    card = device if device.type == "cuda" else None
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(card) >= divmod(OLDEST, 10)


def block_of(stack: Stack) -> int:
    """Numbers with one scale: 64 in NF4, 32 in MXFP4."""
    return 32 if stack.table is None else 64


@torch.no_grad()
def grouped(chosen: Tensor, num_experts: int, *, backend: Backend = "auto") -> Groups:
    """Group choices (C,) int64 of num_experts experts; the host reads none of them.

    Raises:
        ValueError: choices that are not (C,) int64, or more than MOST.
        RuntimeError: backend="triton" where it cannot run.
    """
    if chosen.dim() != 1 or chosen.dtype != torch.int64 or not chosen.is_contiguous() or len(chosen) > MOST:
        raise ValueError(f"chosen must be contiguous (C,) int64, C at most {MOST}, not {tuple(chosen.shape)}")
    if not _runs_by_triton(backend, chosen):
        experts, order = chosen.sort(stable=True)
        begins = torch.searchsorted(experts, torch.arange(num_experts + 1, device=chosen.device))
        return Groups(chosen, order.int(), begins.int())
    order = torch.empty_like(chosen, dtype=torch.int32)
    begins = torch.empty(num_experts + 1, dtype=torch.int32, device=chosen.device)
    if not chosen.is_meta:
        block = triton.next_power_of_2(max(1, len(chosen)))
        with torch.cuda.device_of(chosen):
            _group_kernel[(num_experts + 1,)](chosen, order, begins, len(chosen), num_experts, BLOCK=block, num_warps=4)
    return Groups(chosen, order, begins)


@torch.no_grad()
def expert_product(
    x: Tensor,  # (S, K) or (C, K), contiguous: C / S choices in a row have one row of x
    stack: Stack,
    groups: Groups,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Multiply rows by the experts they chose: (C, N) in x's dtype. No gradient.

    Rows of choices of no expert hold anything. The kernel takes bf16 and fp16. On a tensor without memory it allocates
    what it would on a GPU.

    Raises:
        ValueError: shapes or dtypes that do not belong together, or codes in a place that the kernel cannot read.
        RuntimeError: backend="triton" where it cannot run.
    """
    _check(x, stack, groups)
    C, E, K, block = len(groups.chosen), len(groups.begins) - 1, x.shape[1], block_of(stack)
    N = 2 * stack.codes.numel() // (E * K)
    out = torch.empty(C, N, dtype=x.dtype, device=x.device)
    if not C or (x.is_meta and backend != "torch"):
        return out
    share = C // len(x)
    if not _runs_by_triton(backend, x):
        for choice, expert in enumerate(groups.chosen.tolist()):
            if expert < E:
                out[choice] = dense(stack, expert, K, x.dtype) @ x[choice // share].float()
        return out
    if stack.codes.data_ptr() % (block // 8):
        raise ValueError(f"codes must begin at a multiple of {block // 8} bytes, of which the kernel makes one load")
    values = (MXFP4_CODES if stack.table is None else CODES).to(x.dtype) if triton.knobs.runtime.interpret else None
    block_m = 16 if C <= 8 * E else 32  # few experts have more than twice the mean; 64 rows would spill
    by_place = C < E
    with torch.cuda.device_of(x):
        _product_kernel[(C if by_place else E, triton.cdiv(N, BLOCK_N))](
            x, groups.chosen, groups.order, groups.begins, *stack, values, out, E, K=K, N=N, SHARED=share,
            BY_PLACE=by_place, BLOCK=block, BLOCK_M=block_m, BLOCK_N=BLOCK_N, WARPS=NUM_WARPS,
            WGMMA=has_wgmma(capability_of(x.device)), num_warps=NUM_WARPS,
        )  # fmt: skip
    return out


def dense(stack: Stack, expert: int, K: int, dtype: torch.dtype) -> Tensor:
    """The matrix (N, K) of one expert in fp32: codes rounded to `dtype`, times their scale."""
    codes, scales = stack.codes.view(len(stack.scales), -1)[expert], stack.scales[expert].flatten()
    if stack.outer is not None and stack.offsets is not None:
        return dequantized(Weight(codes, scales, stack.outer[expert], stack.offsets[expert], stack.table), K, dtype)
    pairs = torch.stack([codes & 15, codes >> 4], 1).view(-1, 32).int()
    return torch.ldexp(MXFP4_CODES.to(codes.device)[pairs], scales[:, None].int() - 127).view(-1, K)


def _check(x: Tensor, stack: Stack, groups: Groups) -> None:
    C, E, block = len(groups.chosen), len(groups.begins) - 1, block_of(stack)
    if x.dim() != 2 or not x.is_floating_point() or not x.is_contiguous() or x.shape[1] % block or not x.shape[1]:
        raise ValueError(f"x must be contiguous (S, K), K a multiple of {block}, not {tuple(x.shape)} {x.dtype}")
    if len({x is None for x in stack[2:]}) > 1:
        raise ValueError("outer, offsets and table go together")
    if C and (not len(x) or C % len(x)):
        raise ValueError(f"{C} choices are no multiple of {len(x)} rows")
    numbers = 2 * stack.codes.numel()
    if len(stack.scales) != E or numbers % (E * x.shape[1]) or stack.scales.numel() * block != numbers:
        raise ValueError(f"codes and scales must be of {E} experts of whole rows of {x.shape[1]} numbers")
    if numbers // E * 4 >= 2**31 or C * (numbers // E // x.shape[1]) >= 2**31:
        raise ValueError("an expert of 256 MiB, or a product of 2**31 numbers, is beyond the kernel's 32-bit offsets")


def _runs_by_triton(backend: str, x: Tensor) -> bool:
    if backend == "auto":
        return _suits(x.dtype, x.device)
    by_triton = runs_by_triton(backend, x.device.type)
    if by_triton and x.dtype not in TAKEN:
        raise ValueError(f"backend='triton' multiplies bf16 or fp16, not {x.dtype}")
    return by_triton


def _suits(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether the kernels are for tensors of a dtype on a device."""
    return dtype in TAKEN and device.type in ("cuda", "meta") and runs_by_triton("auto", "cuda")

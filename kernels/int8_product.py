"""Products of few rows with a head in int8 (see quantize_head), each of whose weights is read once. No gradient.

    y = x W^T        W = round(weight * scale[:, None]) to x's dtype

    x (S, K), weight (N, K) int8, scale (N,) fp32  ->  y (S, N) fp32

W is to the last bit the head that linear_logprobs trains with, and exists in tiles alone. Sums are fp32.
"""

from typing import Any

import torch
from torch import Tensor

from lowmem_grpo.kernels.backend import Backend, runs_by_triton
from lowmem_grpo.kernels.nf4_product import OLDEST, capability_of, has_wgmma

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS
    triton: Any = None

ROWS = 2048  # of the weight in the twin's hands: in fp32 and 16 bits 42 MiB of scratch at K = 3584
# Rows of the weight in a program, its warps, and stages of the loop over K, in two of which weights are on the way. Of
# 16 rows of x a program has 45 KiB of shared memory or less: two fit a processor of 100 KiB, with 64 KiB on the way.
BLOCK_N, NUM_WARPS, STAGES = 128, 4, 3

# PTX that turns a word of 4 int8, $4, into 4 fp32, $0 to $3. With its sign flipped a byte is the last one of its value
# + 2**23 + 128, from which 2**23 + 128 is taken, as in
# https://github.com/NVIDIA/FasterTransformer/blob/main/src/fastertransformer/cutlass_extensions/include/cutlass_extensions/interleaved_numeric_conversion.h
# All in all 5 instructions a weight of up to 16 rows (compile_kernels). Estimates by arithmetic, of weights to a clock
# and processor: 25 are widened, an H200 reads 21, a card of 20 processors and 200 GB/s reads 7. Cards that convert
# integers at 16 a clock would be bound by that.
WIDEN = "{ .reg .b32 u; xor.b32 u, $4, 0x80808080; " + " ".join(
    f"prmt.b32 ${byte}, u, 0x4B000000, 0x744{byte}; add.f32 ${byte}, ${byte}, 0fCB000080;" for byte in range(4)
) + " }"  # fmt: skip

if triton is not None:
    _WIDEN: Any = tl.constexpr(WIDEN)

    @triton.jit(do_not_specialize=["M"])  # one row, and 16, would be kernels of their own
    def _product_kernel(
        x_ptr,  # (M, K) 16 bits; where PERMUTED, of the columns that permuted() makes
        weight_ptr,  # (N, K) int8
        scale_ptr,  # (N,) fp32
        out_ptr,  # (M, N) fp32, written
        M,
        K: tl.constexpr,
        N: tl.constexpr,
        PERMUTED: tl.constexpr,
        INTERPRETED: tl.constexpr,  # for want of inline assembly and dots of bf16
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        STAGES: tl.constexpr,
    ):
        """One program per BLOCK_M rows of x and BLOCK_N of the weight, which are the product's first side.

        So each warp widens weights of its own, of up to 32 rows of x and by wgmma; two warps the same ones of 64 by
        mma. Programs of the same weights are launched one after another, and find them in the L2 cache.
        """
        m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        m_in = (m < M)[:, None]
        rows = tl.minimum(n, N - 1)  # beyond the last one the last one again, which is not stored
        x_at = x_ptr + m[:, None].to(tl.int64) * K + k[None, :]
        weight_at = weight_ptr + rows[:, None].to(tl.int64) * K + k[None, :]
        scale = tl.load(scale_ptr + rows)[:, None]
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            if K % BLOCK_K == 0:
                x = tl.load(x_at + start, mask=m_in, other=0.0)
                w = tl.load(weight_at + start)
            else:
                k_in = (start + k < K)[None, :]
                x = tl.load(x_at + start, mask=m_in & k_in, other=0.0)
                w = tl.load(weight_at + start, mask=k_in, other=0)
            if INTERPRETED:
                w = (w.to(tl.float32) * scale).to(x.dtype).to(tl.float32)
                x = x.to(tl.float32)
            else:
                w = tl.inline_asm_elementwise(_WIDEN, "=r,=r,=r,=r,r", [w], tl.float32, is_pure=True, pack=4)
                w = (w * scale).to(x.dtype)
            if PERMUTED:
                w = tl.reshape(w, (BLOCK_N, BLOCK_K // 64, 4, 4, 2, 2))
                w = tl.reshape(tl.permute(w, (0, 1, 3, 4, 2, 5)), (BLOCK_N, BLOCK_K))
            sums = tl.dot(w, tl.trans(x), sums)
        out_at = out_ptr + m[None, :].to(tl.int64) * N + n[:, None]
        tl.store(out_at, sums, mask=(m < M)[None, :] & (n < N)[:, None])


@torch.no_grad()
def product_int8(
    x: Tensor,  # (S, K) bf16, fp16 or fp32
    weight: Tensor,  # (N, K) int8, contiguous
    scale: Tensor,  # (N,) fp32
    *,
    backend: Backend = "auto",
) -> Tensor:  # (S, N) fp32
    """Product of x with the head `weight * scale[:, None]`, rounded to x's dtype, summed in fp32. No gradient.

    The kernel takes bf16 and fp16, and any K: one that is no multiple of 16 in narrow accesses. The twin has fp32
    everywhere, and the others on a CPU, where they are widened, and on cards older than sm_80. Both can be captured in
    a CUDA graph.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together.
        RuntimeError: backend="triton" where it cannot run.
    """
    _check(x, weight, scale)
    out = torch.empty(len(x), len(weight), dtype=torch.float32, device=x.device)
    if _runs_by_triton(backend, x):
        _launch(x, weight, scale, out)
        return out
    # A GPU multiplies 16 bits into fp32. Elsewhere they are widened, or the product is as narrow as they are.
    widens = x.is_cuda and x.dtype != torch.float32
    rows, into = (x, {"out_dtype": torch.float32}) if widens else (x.float(), {})
    # Tiles share their scratch: with one for each, one thread of a CPU took 1.7 to 9 times as long (49152 x 576).
    wide, narrow = (x.new_empty(min(ROWS, len(weight)), x.shape[1], dtype=dtype) for dtype in (torch.float32, x.dtype))
    for first in range(0, len(weight), ROWS):
        tile = slice(first, min(first + ROWS, len(weight)))
        head = wide[: tile.stop - first].copy_(weight[tile]).mul_(scale[tile, None])
        if x.dtype != torch.float32:
            rounded = narrow[: len(head)].copy_(head)
            head = rounded if widens else head.copy_(rounded)
        torch.mm(rows, head.T, out=out[:, tile], **into)
    return out


def permuted(x: Tensor) -> Tensor:
    """x (S, K), K a multiple of 64, with its columns in the order in which a thread hands weights to wgmma.

    Of each 16 columns wgmma takes from the four threads of a row two, and two again. A thread loads 16 weights side by
    side, of 64: its columns 16 t + 4 j + 2 h + p, t the thread, are the j-th 16's at place 8 h + 2 t + p.
    """
    return x.view(len(x), -1, 4, 4, 2, 2).permute(0, 1, 3, 4, 2, 5).reshape(x.shape)


def _launch(x: Tensor, weight: Tensor, scale: Tensor, out: Tensor) -> None:
    M, N = out.shape
    K = x.shape[1]
    x = x.contiguous()
    by_wgmma = has_wgmma(capability_of(x.device)) and K % 64 == 0
    block_m = 16 if M <= 16 else 32 if M <= 32 else 64
    if out.numel():
        with torch.cuda.device_of(x):
            _product_kernel[(triton.cdiv(M, block_m), triton.cdiv(N, BLOCK_N))](
                permuted(x) if by_wgmma else x, weight, scale, out, M, K=K, N=N, PERMUTED=by_wgmma,
                INTERPRETED=triton.knobs.runtime.interpret, BLOCK_M=block_m, BLOCK_N=BLOCK_N,
                BLOCK_K=block_k(block_m), STAGES=STAGES, num_warps=NUM_WARPS,
            )  # fmt: skip


def block_k(block_m: int) -> int:
    """Columns of a step: 128 bytes of a row of the weight, or 64 where x's rows take the registers."""
    return 128 if block_m < 64 else 64


def _check(x: Tensor, weight: Tensor, scale: Tensor) -> None:
    if x.dim() != 2 or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x must be (S, K) bf16, fp16 or fp32, not {tuple(x.shape)} {x.dtype}")
    if weight.shape[1:] != x.shape[1:] or weight.dtype != torch.int8 or not weight.is_contiguous():
        raise ValueError(
            f"weight must be contiguous (N, {x.shape[1]}) torch.int8, not {tuple(weight.shape)} {weight.dtype}"
        )
    if scale.shape != weight.shape[:1] or scale.dtype != torch.float32 or not scale.is_contiguous():
        raise ValueError(
            f"scale must be contiguous ({len(weight)},) torch.float32, not {tuple(scale.shape)} {scale.dtype}"
        )
    if not x.device == weight.device == scale.device:
        raise ValueError(f"x, weight and scale must be on one device, not {x.device}, {weight.device}, {scale.device}")


def _runs_by_triton(backend: str, x: Tensor) -> bool:
    by_triton, narrow = runs_by_triton(backend, x.device.type), x.dtype != torch.float32
    if backend == "triton" and not narrow:
        raise ValueError(f"backend='triton' multiplies bf16 or fp16, not {x.dtype}")
    return backend == "triton" or (by_triton and narrow and capability_of(x.device) >= OLDEST)

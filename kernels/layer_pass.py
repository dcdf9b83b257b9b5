"""Norms, sums, rotation and gate of a decoder layer in a training pass, and their gradients: all but its products.

A row of x is a token's. Norms and rotations are of fixed numbers, so that a gradient is that of x alone:

    norm      n = x / sqrt(mean x^2 + eps), y = gain n         dx = (gain dy - n mean(n gain dy)) / sqrt(mean x^2 + eps)
    added     x + share norm(result), and a norm of that sum
    heads     the norm of each head, or of all, rotated        d(norm) = rotated back dy
    gated     y = f(gate) up                                   d gate = dy up f'(gate), d up = dy f(gate)

Each is one launch: a program has a row, several heads, or BLOCK columns of a gate. Sums and functions are in fp32. A
forward rounds to x's dtype where transformers' layers round, a backward rounds once, at its end.
"""

from typing import Any

import torch
from torch import Tensor

from lowmem_grpo.kernels.backend import Backend, runs_by_triton
from lowmem_grpo.kernels.decode_layer import ACTIVATIONS, NO_NORM, Activation, Norm, rms, rotated, row_warps

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS
    triton: Any = None

BLOCK, NUM_WARPS = 1024, 4  # of gated: 8 columns a thread, 16 bytes in 16 bits
HEAD_COLUMNS = 2048  # of heads, without a norm over all of them: 8 a thread of each half that is rotated with the other

if triton is not None:
    from lowmem_grpo.kernels.decode_layer import _normed, _rounded

    @triton.jit
    def _normed_kernel(
        x_ptr,  # (T, N)
        gain_ptr,  # (N,)
        out_ptr,  # (T, N), contiguous, written
        x_stride,
        eps,
        N: tl.constexpr,
        EARLY: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program a row."""
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        row, n = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        n_in = n < N
        x = tl.load(x_ptr + row * x_stride + n, mask=n_in, other=0.0)
        gain = tl.load(gain_ptr + n, mask=n_in, other=0.0)
        x = x.to(tl.float32)
        y = _normed(x, tl.sum(x * x, 0), gain, eps, N, EARLY, dtype)
        tl.store(out_ptr + row * N + n, y.to(dtype), mask=n_in)

    @triton.jit
    def _added_kernel(
        x_ptr,  # (T, N)
        result_ptr,  # (T, N)
        after_ptr,  # (N,) gain of the norm of result, or None
        before_ptr,  # (N,) gain of the norm of the sum, or None
        sum_ptr,  # (T, N), contiguous, written
        out_ptr,  # (T, N), contiguous, written where before is not None
        x_stride,
        result_stride,
        share,  # or None
        after_eps,
        before_eps,
        N: tl.constexpr,
        AFTER_EARLY: tl.constexpr,
        BEFORE_EARLY: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program a row."""
        dtype: tl.constexpr = sum_ptr.dtype.element_ty
        row, n = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        n_in = n < N
        x = tl.load(x_ptr + row * x_stride + n, mask=n_in, other=0.0)
        y = tl.load(result_ptr + row * result_stride + n, mask=n_in, other=0.0)
        if after_ptr is not None:
            after = tl.load(after_ptr + n, mask=n_in, other=0.0)
        if before_ptr is not None:
            before = tl.load(before_ptr + n, mask=n_in, other=0.0)
        y = y.to(tl.float32)
        if after_ptr is not None:
            y = _normed(y, tl.sum(y * y, 0), after, after_eps, N, AFTER_EARLY, dtype)
        if share is not None:
            y = _rounded(y * share, dtype)
        y = _rounded(x.to(tl.float32) + y, dtype)
        tl.store(sum_ptr + row * N + n, y.to(dtype), mask=n_in)
        if before_ptr is not None:
            y = _normed(y, tl.sum(y * y, 0), before, before_eps, N, BEFORE_EARLY, dtype)
            tl.store(out_ptr + row * N + n, y.to(dtype), mask=n_in)

    @triton.jit
    def _normed_backward_kernel(
        grad_ptr,  # (T, N)
        x_ptr,  # (T, N)
        gain_ptr,  # (N,)
        onto_ptr,  # (T, N), or None
        out_ptr,  # (T, N), contiguous, written
        grad_stride,
        x_stride,
        onto_stride,
        eps,
        N: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program a row."""
        row, n = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        n_in = n < N
        grad = tl.load(grad_ptr + row * grad_stride + n, mask=n_in, other=0.0)
        x = tl.load(x_ptr + row * x_stride + n, mask=n_in, other=0.0)
        gain = tl.load(gain_ptr + n, mask=n_in, other=0.0)
        if onto_ptr is not None:
            onto = tl.load(onto_ptr + row * onto_stride + n, mask=n_in, other=0.0)
        x = x.to(tl.float32)
        grad = grad.to(tl.float32) * gain.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, 0) / N + eps)
        pull = tl.sum(x * grad, 0) / N * inverse * inverse
        y = (grad - x * pull) * inverse
        if onto_ptr is not None:
            y += onto.to(tl.float32)
        tl.store(out_ptr + row * N + n, y.to(out_ptr.dtype.element_ty), mask=n_in)

    @triton.jit
    def _columns(ptr, at, known, D: tl.constexpr, ROTARY: tl.constexpr, PAIRED: tl.constexpr):
        """D columns of heads from `at` (HEADS, 1) on, fp32: those that are rotated with each other, then the rest."""
        columns = ()
        if ROTARY:
            HALF: tl.constexpr = triton.next_power_of_2(ROTARY // 2)
            if PAIRED:
                d = tl.arange(0, 2 * HALF)[None, :]
                x = tl.load(ptr + at + d, mask=known & (d < ROTARY), other=0.0)
                first, second = tl.split(tl.reshape(x, (at.shape[0], HALF, 2)))
            else:
                d = tl.arange(0, HALF)[None, :]
                inside = known & (d < ROTARY // 2)
                first = tl.load(ptr + at + d, mask=inside, other=0.0)
                second = tl.load(ptr + at + ROTARY // 2 + d, mask=inside, other=0.0)
            columns = columns + (first.to(tl.float32), second.to(tl.float32))  # noqa: RUF005, Triton unpacks no tuple
        if ROTARY < D:
            d = ROTARY + tl.arange(0, triton.next_power_of_2(D - ROTARY))[None, :]
            rest = tl.load(ptr + at + d, mask=known & (d < D), other=0.0)
            columns = columns + (rest.to(tl.float32),)  # noqa: RUF005
        return columns

    @triton.jit
    def _store_columns(ptr, at, known, columns, D: tl.constexpr, ROTARY: tl.constexpr, PAIRED: tl.constexpr):
        """Store what _columns loads."""
        dtype: tl.constexpr = ptr.dtype.element_ty
        if ROTARY:
            HALF: tl.constexpr = triton.next_power_of_2(ROTARY // 2)
            first, second = columns[0].to(dtype), columns[1].to(dtype)
            if PAIRED:
                d = tl.arange(0, 2 * HALF)[None, :]
                x = tl.reshape(tl.join(first, second), (at.shape[0], 2 * HALF))
                tl.store(ptr + at + d, x, mask=known & (d < ROTARY))
            else:
                d = tl.arange(0, HALF)[None, :]
                inside = known & (d < ROTARY // 2)
                tl.store(ptr + at + d, first, mask=inside)
                tl.store(ptr + at + ROTARY // 2 + d, second, mask=inside)
        if ROTARY < D:
            d = ROTARY + tl.arange(0, triton.next_power_of_2(D - ROTARY))[None, :]
            tl.store(ptr + at + d, columns[-1].to(dtype), mask=known & (d < D))

    @triton.jit
    def _mean(x, y, COUNT: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr):
        """Means of x y over a head's N columns, or over all heads', of COUNT parts."""
        total = tl.sum(x[0] * y[0], 1)
        for i in tl.static_range(1, COUNT):  # pyright: ignore[reportGeneralTypeIssues]: Triton unrolls it
            total += tl.sum(x[i] * y[i], 1)
        if WHOLE:
            total = tl.sum(total[None, :], 1)
        return total[:, None] / N

    @triton.jit
    def _normed_columns(x, mean, gain, eps, COUNT: tl.constexpr, EARLY: tl.constexpr, dtype: tl.constexpr):
        """The RMS norms of COUNT parts, whose squares have that mean."""
        y = ()
        for i in tl.static_range(COUNT):  # pyright: ignore[reportGeneralTypeIssues]: likewise
            y = y + (_normed(x[i], mean, gain[i], eps, 1, EARLY, dtype),)  # noqa: RUF005
        return y

    @triton.jit
    def _of_heads(heads, H: tl.constexpr, WHOLE: tl.constexpr, HEADS: tl.constexpr):
        """Row and place in it of a program's heads, (HEADS, 1) each, and which of them there are.

        Heads are counted over all rows, and a program has any HEADS of them; WHOLE: those of a row.
        """
        if WHOLE:
            head = tl.arange(0, HEADS)[:, None]
            known = head < H
            row = tl.program_id(0) + tl.zeros_like(head)
        else:
            head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)[:, None]
            known = head < heads
            row, head = head // H, head % H
        return row.to(tl.int64), head, known

    @triton.jit(do_not_specialize=["heads"])
    def _heads_kernel(
        x_ptr,  # (T, H D)
        gain_ptr,  # (D,), WHOLE: (H D,), or None
        cos_ptr,  # (T, ROTARY), contiguous, or None
        sin_ptr,
        out_ptr,  # (T, H, D), contiguous, written
        heads,  # T H
        x_stride,
        eps,
        D: tl.constexpr,
        H: tl.constexpr,
        ROTARY: tl.constexpr,
        PAIRED: tl.constexpr,
        EARLY: tl.constexpr,
        WHOLE: tl.constexpr,
        HEADS: tl.constexpr,
    ):
        """One program per HEADS heads, WHOLE: per row."""
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        PARTS: tl.constexpr = (2 if ROTARY else 0) + (ROTARY < D)  # pyright: ignore[reportAssignmentType]
        row, head, known = _of_heads(heads, H, WHOLE, HEADS)
        x = _columns(x_ptr, row * x_stride + head * D, known, D, ROTARY, PAIRED)
        if gain_ptr is not None:
            gain = _columns(gain_ptr, head * D if WHOLE else head * 0, known, D, ROTARY, PAIRED)
        if cos_ptr is not None:
            cos = _columns(cos_ptr, row * ROTARY, known, ROTARY, ROTARY, PAIRED)
            sin = _columns(sin_ptr, row * ROTARY, known, ROTARY, ROTARY, PAIRED)
        if gain_ptr is not None:
            mean = _mean(x, x, PARTS, H * D if WHOLE else D, WHOLE)
            x = _normed_columns(x, mean, gain, eps, PARTS, EARLY, dtype)
        if cos_ptr is not None:
            # As torch multiplies: in 16 bits where both have that type, else in fp32.
            same: tl.constexpr = cos_ptr.dtype.element_ty == dtype
            product: tl.constexpr = dtype if same else tl.float32  # pyright: ignore[reportAssignmentType]
            first = _rounded(x[0] * cos[0], product) + _rounded(-x[1] * sin[0], product)
            second = _rounded(x[1] * cos[1], product) + _rounded(x[0] * sin[1], product)
            x = (first, second, x[2]) if ROTARY < D else (first, second)
        _store_columns(out_ptr, (row * H + head) * D, known, x, D, ROTARY, PAIRED)

    @triton.jit(do_not_specialize=["heads"])
    def _heads_backward_kernel(
        grad_ptr,  # (T, H, D)
        x_ptr,  # (T, H D), or None
        gain_ptr,  # (D,), WHOLE: (H D,), or None as x
        cos_ptr,  # (T, ROTARY), contiguous, or None
        sin_ptr,
        out_ptr,  # (T, H D), contiguous, written
        heads,  # T H
        grad_row_stride,
        grad_head_stride,
        x_stride,
        eps,
        D: tl.constexpr,
        H: tl.constexpr,
        ROTARY: tl.constexpr,
        PAIRED: tl.constexpr,
        WHOLE: tl.constexpr,
        HEADS: tl.constexpr,
    ):
        """One program per HEADS heads, WHOLE: per row."""
        PARTS: tl.constexpr = (2 if ROTARY else 0) + (ROTARY < D)  # pyright: ignore[reportAssignmentType]
        row, head, known = _of_heads(heads, H, WHOLE, HEADS)
        grad_at = row * grad_row_stride + head.to(tl.int64) * grad_head_stride
        grad = _columns(grad_ptr, grad_at, known, D, ROTARY, PAIRED)
        if gain_ptr is not None:
            x = _columns(x_ptr, row * x_stride + head * D, known, D, ROTARY, PAIRED)
            gain = _columns(gain_ptr, head * D if WHOLE else head * 0, known, D, ROTARY, PAIRED)
        if cos_ptr is not None:
            cos = _columns(cos_ptr, row * ROTARY, known, ROTARY, ROTARY, PAIRED)
            sin = _columns(sin_ptr, row * ROTARY, known, ROTARY, ROTARY, PAIRED)
            first, second = grad[0] * cos[0] + grad[1] * sin[1], grad[1] * cos[1] - grad[0] * sin[0]
            grad = (first, second, grad[2]) if ROTARY < D else (first, second)
        if gain_ptr is not None:
            scaled = ()
            for i in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]: likewise
                scaled = scaled + (grad[i] * gain[i],)  # noqa: RUF005
            N: tl.constexpr = H * D if WHOLE else D  # pyright: ignore[reportAssignmentType]
            inverse = tl.rsqrt(_mean(x, x, PARTS, N, WHOLE) + eps)
            pull = _mean(x, scaled, PARTS, N, WHOLE) * inverse * inverse
            grad = ()
            for i in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]: likewise
                grad = grad + ((scaled[i] - x[i] * pull) * inverse,)  # noqa: RUF005
        _store_columns(out_ptr, (row * H + head) * D, known, grad, D, ROTARY, PAIRED)

    @triton.jit
    def _of_gate(WIDTH: tl.constexpr, BLOCK: tl.constexpr):
        """A program's row, its BLOCK columns, and which of them there are."""
        BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
        row, n = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        return row.to(tl.int64), n, n < WIDTH

    @triton.jit
    def _share_of_gate(x, ACTIVATION: tl.constexpr):
        """f(x) / x, and f'(x), of an activation f."""
        if ACTIVATION == "silu":
            share = 1.0 / (1.0 + tl.exp(-x))
            slope = share + x * share * (1.0 - share)
        elif ACTIVATION == "gelu":
            share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
            slope = share + x * tl.exp(-0.5 * x * x) * 0.3989422804014327  # the density of a normal number
        else:  # 1 / (1 + exp(-2 t)) is (1 + tanh t) / 2
            share = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
            slope = share + x * share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return share, slope

    @triton.jit
    def _gated_kernel(
        gate_ptr,  # (T, WIDTH)
        up_ptr,  # (T, WIDTH)
        out_ptr,  # (T, WIDTH), contiguous, written
        gate_stride,
        up_stride,
        WIDTH: tl.constexpr,
        ACTIVATION: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program per BLOCK columns of a row."""
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        row, n, n_in = _of_gate(WIDTH, BLOCK)
        gate = tl.load(gate_ptr + row * gate_stride + n, mask=n_in, other=0.0)
        up = tl.load(up_ptr + row * up_stride + n, mask=n_in, other=0.0)
        gate = gate.to(tl.float32)
        share, _ = _share_of_gate(gate, ACTIVATION)
        y = _rounded(gate * share, dtype) * up.to(tl.float32)
        tl.store(out_ptr + row * WIDTH + n, y.to(dtype), mask=n_in)

    @triton.jit
    def _gated_backward_kernel(
        grad_ptr,  # (T, WIDTH)
        gate_ptr,  # (T, WIDTH), overwritten by its gradient
        up_ptr,  # (T, WIDTH), likewise
        grad_stride,
        gate_stride,
        up_stride,
        WIDTH: tl.constexpr,
        ACTIVATION: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program per BLOCK columns of a row."""
        dtype: tl.constexpr = gate_ptr.dtype.element_ty
        row, n, n_in = _of_gate(WIDTH, BLOCK)
        gate_at, up_at = gate_ptr + row * gate_stride + n, up_ptr + row * up_stride + n
        grad = tl.load(grad_ptr + row * grad_stride + n, mask=n_in, other=0.0)
        gate, up = tl.load(gate_at, mask=n_in, other=0.0), tl.load(up_at, mask=n_in, other=0.0)
        grad, gate = grad.to(tl.float32), gate.to(tl.float32)
        share, slope = _share_of_gate(gate, ACTIVATION)
        tl.store(gate_at, (grad * up.to(tl.float32) * slope).to(dtype), mask=n_in)
        tl.store(up_at, (grad * gate * share).to(dtype), mask=n_in)


def normed(x: Tensor, norm: Norm, *, backend: Backend = "auto") -> Tensor:
    """The norm of rows x (T, N), as its dtype."""
    if not runs_by_triton(backend, x.device.type):
        return rms(x, norm)
    (T, N), (gain, eps, early) = x.shape, norm
    x, out = _rows(x), _made(x, T, N)
    if T:
        with torch.cuda.device_of(x):
            _normed_kernel[(T,)](
                x, gain, out, x.stride(0), eps, N=N, EARLY=early, BLOCK=triton.next_power_of_2(N),
                num_warps=row_warps(N),
            )  # fmt: skip
    return out


def added(
    x: Tensor,  # (T, N)
    result: Tensor,  # (T, N)
    after: Norm | None,
    share: float,
    before: Norm | None,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The sum x + share after(result), and the norm `before` of it, or without one the sum itself."""
    _check(x, result=result)
    if not runs_by_triton(backend, x.device.type):
        result = result if after is None else rms(result, after)
        total = x + (result if share == 1 else result * share)
        return total, total if before is None else rms(total, before)
    (T, N), (x, result) = x.shape, (_rows(x), _rows(result))
    total = _made(x, T, N)
    out = total if before is None else _made(x, T, N)
    if T:
        after_gain, after_eps, after_early = after or NO_NORM
        before_gain, before_eps, before_early = before or NO_NORM
        with torch.cuda.device_of(x):
            _added_kernel[(T,)](
                x, result, after_gain, before_gain, total, out, x.stride(0), result.stride(0),
                None if share == 1 else share, after_eps, before_eps, N=N, AFTER_EARLY=after_early,
                BEFORE_EARLY=before_early, BLOCK=triton.next_power_of_2(N), num_warps=row_warps(N),
                enable_fp_fusion=False,  # a product in 16 bits and a sum would become one, rounded once
            )  # fmt: skip
    return total, out


def normed_backward(
    grad: Tensor,  # (T, N) of the norm
    x: Tensor,  # (T, N)
    norm: Norm,
    onto: Tensor | None = None,  # (T, N), another gradient of x, which is added before the one rounding
    *,
    backend: Backend = "auto",
) -> Tensor:
    """The gradient of rows x (T, N) from that of their norm."""
    _check(x, grad=grad, onto=onto)
    if not runs_by_triton(backend, x.device.type):
        of_x = _back_through_norm(grad.float(), x, norm)
        return (of_x if onto is None else of_x.add_(onto)).to(x.dtype)
    (T, N), (gain, eps, _) = x.shape, norm
    grad, x, onto = _rows(grad), _rows(x), None if onto is None else _rows(onto)
    out = _made(x, T, N)
    if T:
        with torch.cuda.device_of(x):
            _normed_backward_kernel[(T,)](
                grad, x, gain, onto, out, grad.stride(0), x.stride(0), 0 if onto is None else onto.stride(0), eps, N=N,
                BLOCK=triton.next_power_of_2(N), num_warps=row_warps(N),
            )  # fmt: skip
    return out


def heads(
    x: Tensor,  # (T, H D), which may be columns of another
    norm: Norm | None,  # gain (D,), or (H D,) over all heads
    cos_sin: tuple[Tensor, Tensor] | None,  # (T, rotary <= D) each; None: nothing is rotated
    head_dim: int,
    paired: bool,  # columns 2 i and 2 i + 1 are rotated together, else i and i + rotary / 2
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Rows x as contiguous heads (T, H, D), with their norm, rotated.

    Rotation rounds its two products where cosines have x's dtype.
    """
    T, H, D = len(x), x.shape[1] // head_dim, head_dim
    if norm is None and cos_sin is None:
        return x.unflatten(1, (H, D)).contiguous()
    if not runs_by_triton(backend, x.device.type):
        y = x if norm is None else rms(_by_norm(x, norm), norm)
        y = y.reshape(T, H, D)
        return y if cos_sin is None else rotated(y, cos_sin[0][:, None], cos_sin[1][:, None], paired)
    gain, eps, early = norm or NO_NORM
    x, (cos, sin) = _rows(x), _angles(cos_sin)
    out = _made(x, T, H, D)
    if T:
        whole = gain is not None and len(gain) != D
        heads_at_once, num_warps = heads_tile(H, D, whole)
        with torch.cuda.device_of(x):
            _heads_kernel[(T if whole else triton.cdiv(T * H, heads_at_once),)](
                x, gain, cos, sin, out, T * H, x.stride(0), eps, D=D, H=H, ROTARY=0 if cos is None else cos.shape[1],
                PAIRED=paired, EARLY=early, WHOLE=whole, HEADS=heads_at_once, num_warps=num_warps,
                enable_fp_fusion=False,  # as in added
            )  # fmt: skip
    return out


def heads_backward(
    grad: Tensor,  # (T, H, D)
    x: Tensor | None,  # (T, H D), as heads() was given it; None without a norm
    norm: Norm | None,
    cos_sin: tuple[Tensor, Tensor] | None,
    paired: bool,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """The gradient of x (T, H D) from that of heads()."""
    T, H, D = grad.shape
    if (x is None) != (norm is None) or (x is not None and x.shape != (T, H * D)):
        given = None if x is None else tuple(x.shape)
        raise ValueError(f"with a norm, x must be {(T, H * D)} for a gradient {(T, H, D)}, and else None; not {given}")
    if norm is None and cos_sin is None:
        return grad.reshape(T, H * D)
    if not runs_by_triton(backend, grad.device.type):
        of_x = grad.float()
        if cos_sin is not None:
            of_x = _rotated_back(of_x, cos_sin[0][:, None], cos_sin[1][:, None], paired)
        if norm is not None and x is not None:
            by_norm = _by_norm(x, norm)
            of_x = _back_through_norm(of_x.reshape(by_norm.shape), by_norm, norm)
        return of_x.reshape(T, H * D).to(grad.dtype)
    gain, eps, _ = norm or NO_NORM
    grad, x, (cos, sin) = _rows(grad), None if x is None else _rows(x), _angles(cos_sin)
    out = _made(grad, T, H * D)
    if T:
        whole = gain is not None and len(gain) != D
        heads_at_once, num_warps = heads_tile(H, D, whole)
        with torch.cuda.device_of(grad):
            _heads_backward_kernel[(T if whole else triton.cdiv(T * H, heads_at_once),)](
                grad, x, gain, cos, sin, out, T * H, grad.stride(0), grad.stride(1), 0 if x is None else x.stride(0),
                eps, D=D, H=H, ROTARY=0 if cos is None else cos.shape[1], PAIRED=paired, WHOLE=whole,
                HEADS=heads_at_once, num_warps=num_warps,
            )  # fmt: skip
    return out


def gated(gate_up: list[Tensor], activation: Activation, *, backend: Backend = "auto") -> Tensor:
    """Activation of gate (T, I), times up (T, I), which are two tensors or the halves of one (T, 2 I); contiguous."""
    gate, up = _halves(gate_up)
    if not runs_by_triton(backend, gate.device.type):
        return ACTIVATIONS[activation](gate).mul_(up).contiguous()
    (T, width), (gate, up) = gate.shape, (_rows(gate), _rows(up))
    out = _made(gate, T, width)
    if T:
        with torch.cuda.device_of(gate):
            _gated_kernel[(T * triton.cdiv(width, BLOCK),)](
                gate, up, out, gate.stride(0), up.stride(0), WIDTH=width, ACTIVATION=activation, BLOCK=BLOCK,
                num_warps=NUM_WARPS,
            )  # fmt: skip
    return out


def gated_backward(
    grad: Tensor,  # (T, I) of gated(); overwritten
    gate_up: list[Tensor],  # as gated() was given them, of rows side by side
    activation: Activation,
    *,
    backend: Backend = "auto",
) -> list[Tensor]:
    """The gradients of gate_up, in their place: an MLP's widest tensors, of which there are no more at a time."""
    gate, up = _halves(gate_up)
    _check(gate, grad=grad)
    if gate.stride(1) != 1 or up.stride(1) != 1:
        raise ValueError("gate and up must have the numbers of a row side by side, since they are overwritten")
    if not runs_by_triton(backend, gate.device.type):
        of_up = ACTIVATIONS[activation](gate).mul_(grad)
        through = grad.mul_(up)
        up.copy_(of_up)
        if activation == "silu":
            torch.ops.aten.silu_backward.grad_input(through, gate, grad_input=gate)
        else:
            approximate = "tanh" if activation == "gelu_tanh" else "none"
            torch.ops.aten.gelu_backward.grad_input(through, gate, approximate=approximate, grad_input=gate)
        return gate_up
    (T, width), grad = gate.shape, _rows(grad)
    if T:
        with torch.cuda.device_of(gate):
            _gated_backward_kernel[(T * triton.cdiv(width, BLOCK),)](
                grad, gate, up, grad.stride(0), gate.stride(0), up.stride(0), WIDTH=width, ACTIVATION=activation,
                BLOCK=BLOCK, num_warps=NUM_WARPS,
            )  # fmt: skip
    return gate_up


def _halves(gate_up: list[Tensor]) -> tuple[Tensor, Tensor]:
    gate, up = gate_up if len(gate_up) == 2 else gate_up[0].chunk(2, 1)
    _check(gate, up=up)
    return gate, up


def heads_tile(H: int, D: int, whole: bool) -> tuple[int, int]:
    """Heads of a program of heads() and its backward, and its warps."""
    if whole:
        heads_at_once = triton.next_power_of_2(H)
        return heads_at_once, row_warps(heads_at_once * D)
    return max(1, HEAD_COLUMNS // triton.next_power_of_2(D)), NUM_WARPS


def _made(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _rows(x: Tensor) -> Tensor:
    """x with the numbers of a row side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _angles(cos_sin: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if cos_sin is None else (cos_sin[0].contiguous(), cos_sin[1].contiguous())


def _check(x: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and other.shape != x.shape:
            raise ValueError(f"{name} must be {tuple(x.shape)}, not {tuple(other.shape)}")


def _by_norm(x: Tensor, norm: Norm) -> Tensor:
    """Rows in the shape in which their norm takes them."""
    return x if len(norm[0]) == x.shape[1] else x.unflatten(1, (-1, len(norm[0])))


def _back_through_norm(grad: Tensor, x: Tensor, norm: Norm) -> Tensor:
    """The fp32 gradient of x from an fp32 one of its norm."""
    gain, eps, _ = norm
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    wide = wide * inverse
    grad = grad * gain
    return grad.sub_(wide.mul_((grad * wide).mean(-1, keepdim=True))).mul_(inverse)


def _rotated_back(grad: Tensor, cos: Tensor, sin: Tensor, paired: bool) -> Tensor:
    """The fp32 gradient of what rotated() was given, whose transpose this is."""
    front, rest = grad[..., : cos.shape[-1]], grad[..., cos.shape[-1] :]
    other = front * sin
    if paired:
        other = torch.stack([other[..., 1::2], -other[..., ::2]], -1).flatten(-2)
    else:
        first, second = other.chunk(2, -1)
        other = torch.cat([second, -first], -1)
    return torch.cat([(front * cos).add_(other), rest], -1)

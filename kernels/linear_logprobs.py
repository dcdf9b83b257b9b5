"""Log-probabilities of labels under a frozen linear head, in tiles: no (tokens, vocabulary) tensor exists.

    s_v = softcap(logit_scale (h . W_v + b_v)) / temperature        softcap(x) = c tanh(x / c), or x
    logp = s_y - log sum_v exp(s_v)                                  entropy = -sum_v p_v log p_v

    hidden_states (N, D), weight (V, D), bias (V,), labels (N,) int64  ->  logp (N,) fp32, entropy (N,) fp32

A head that is frozen needs no gradient of its own, and d logp / dh does not depend on the loss. So the forward that
will be differentiated stores it, (N, D) in the dtype of hidden_states, and the backward only scales its rows: two
matrix products for a training pass (scores, and their pull on h), one for a pass without gradient.

The sum leaves the label out. With m a reference (the label's own score s_y, unless another score exceeds it by far),
d_v = s_v - m, j = d softcap / dx, q = 1 - p_y, and over the v != y

    rest = sum exp(d_v)      moment = sum exp(d_v) d_v      pull = sum exp(d_v) j_v W_v
    x = rest exp(m - s_y)    logp = -log1p(x)               q = x / (1 + x)

    d logp / dh = q logit_scale / temperature * direction                     direction = j_y W_y - pull / rest

in which q keeps its relative precision however close p_y is to 1. The usual form W_y - sum_v p_v W_v cancels there:
with its sum in bf16 it is off by more than 10 % from p_y = 0.99 on, where most tokens of a trained policy are. What is
stored is the direction, which is as large as W for every p_y and so fits fp16 too; its factor q is kept apart, (N,)
fp32.

The gradient of the entropy takes a third product, spread = sum exp(d_v) d_v j_v W_v. With mean = moment / rest

    d entropy / dh = -q logit_scale / temperature * ((spread - mean pull) / rest + p_y (d_y - mean) direction)

Per tile of (C, Vb): the library multiplies into fp32 scores; one kernel folds them into the sums and writes
exp(d_v) j_v over them, in the dtype of the second product's operands; the library accumulates the pull in fp32. On a
Hopper, in bf16 and where nothing bends the scores, one kernel multiplies and folds (head_shares.py), and a pass without
gradient has the whole vocabulary in one tile. Each kernel has a plain-PyTorch twin at the end of the file, which is
what runs on a CPU and where Triton is not installed.
"""

import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from lowmem_grpo.kernels import head_shares
from lowmem_grpo.kernels.backend import Backend, runs_by_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS
    triton: Any = None

# (device type, least GPU memory in GiB, largest D) -> (C, Vb): tokens and vocabulary entries of a tile. First match.
# Scratch is 4 C (Vb + D) bytes on a GPU: 44 MiB at D = 1536 and 60 MiB at 3584 where (C, Vb) = (2048, 4096).
# A tile's launches cost the host 0.08 to 0.09 ms (an H200's machine, at 76 to 304 tiles a call), for which the GPU must
# be busy: few and large tiles where it is fast. On an H200 at commit 2e88e23 (N 8192, D 1536), whose fold kernel took
# twice today's time, a training pass and one without gradient were, in ms,
#   (1024, 4096) 25.1, 24.7    (2048, 4096) 19.5, 14.2    (2048, 8192) 18.4, 8.3    (4096, 8192) 17.8, 9.0
#   (1024, 8192) 19.8, 14.2    (4096, 4096) 18.5, 8.2     (8192, 4096) 17.6, 8.3    (8192, 8192) 18.5, 8.1
# and at D 3584 all from (1024, 8192) on were within 5 %. On slower cards a tile is to stay in the L2 cache: 32 MiB of
# scores in the 40 to 96 MiB of those from 20 GiB on, 16 MiB below. Not measured yet there.
CHUNKS = (
    ("cuda", 70, math.inf, (4096, 8192)),
    ("cuda", 20, 4096, (2048, 4096)),
    ("cuda", 0, math.inf, (1024, 4096)),
    ("cpu", 0, 1024, (1024, 4096)),  # there a widened (Vb, D) tile of the weight comes on top
    ("cpu", 0, math.inf, (1024, 2048)),
)


class Rule(NamedTuple):
    """When the reference m moves: to `below` nats under a score that exceeds it by `above`."""

    above: float
    below: float


# Start at the label's score; bf16 and fp32 hold exp(40), and the sums stay far from fp32's overflow at exp(88).
FROM_LABEL = Rule(above=40.0, below=0.0)
# Start below every score and follow the largest: for fp16, which ends at 65504 > exp(8) and rounds to 0 below 3e-8, and
# for the entropy, whose log(rest) - moment / rest loses digits where m is far from the scores that count.
FROM_LARGEST = Rule(above=8.0, below=3.0)
# Without slack for the entropy's gradient, whose 16-bit spread - mean pull loses more of them.
THE_LARGEST = Rule(above=0.0, below=0.0)
BELOW_EVERY_SCORE = -1e30  # not -inf, which would make 0 * (m - m') a NaN

# Tokens that the twin folds at a time. What it needs besides the tile itself is (ROWS, Vb) fp32, 2 MiB at Vb = 4096.
ROWS = 128

# A tile's rows have room up to a multiple of so many numbers; kernels read and write up to there, 16 bytes at a time.
WIDE = 16

# Rows of the state that a chunk of tokens carries from tile to tile, (5, C) fp32; with return_top (6, C).
LABEL_SCORE, LABEL_SLOPE, REFERENCE, REST, MOMENT, BEST = range(6)

if triton is not None:

    @triton.jit
    def _soften(bent_in, outer):
        """u -> (outer tanh(u), d tanh / du), by exp: libdevice's tanh is not in the interpreter."""
        e = tl.exp(-2.0 * tl.abs(bent_in))
        bent = (1.0 - e) / (1.0 + e)
        return tl.where(bent_in < 0, -bent, bent) * outer, 4.0 * e / ((1.0 + e) * (1.0 + e))

    @triton.jit(do_not_specialize=["state_stride"])
    def _start_kernel(
        hidden_ptr,  # (C, D)
        label_weight_ptr,  # (*, D)
        index_ptr,  # (C,) int64, each token's row of label_weight
        label_ptr,  # (C,) int64
        bias_ptr,  # (V,)
        state_ptr,  # (5 or 6, C) fp32, written
        hidden_row_stride,
        hidden_stride,
        weight_row_stride,
        weight_stride,
        state_stride,
        vocabulary,
        inner,
        outer,
        below_every_score,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BIAS: tl.constexpr,
        SOFTCAP: tl.constexpr,
        FROM_LABEL: tl.constexpr,
        TOP: tl.constexpr,
    ):
        """The label's own score, exactly, and the empty sums. One program per token."""
        row = tl.program_id(0).to(tl.int64)
        label = tl.load(label_ptr + row)
        # A label outside of the vocabulary reads nothing, and its row is NaN.
        known = (label >= 0) & (label < vocabulary)
        index = tl.where(known, tl.load(index_ptr + row), 0)
        products = tl.zeros((BLOCK_D,), tl.float32)
        for start in range(0, D, BLOCK_D):
            at = start + tl.arange(0, BLOCK_D).to(tl.int64)
            hidden = tl.load(hidden_ptr + row * hidden_row_stride + at * hidden_stride, mask=at < D, other=0.0)
            weight = tl.load(label_weight_ptr + index * weight_row_stride + at * weight_stride, mask=at < D, other=0.0)
            products += hidden.to(tl.float32) * weight.to(tl.float32)
        raw = tl.sum(products, 0)
        if BIAS:
            raw += tl.load(bias_ptr + label, mask=known, other=0.0).to(tl.float32)
        score = tl.where(known, raw, float("nan")) * inner
        if SOFTCAP:
            score, slope = _soften(score, outer)
            tl.store(state_ptr + state_stride + row, slope)
        tl.store(state_ptr + row, score)
        if FROM_LABEL:
            tl.store(state_ptr + 2 * state_stride + row, score)
        else:
            tl.store(state_ptr + 2 * state_stride + row, below_every_score)
        tl.store(state_ptr + 3 * state_stride + row, 0.0)
        tl.store(state_ptr + 4 * state_stride + row, 0.0)
        if TOP:
            tl.store(state_ptr + 5 * state_stride + row, float("-inf"))

    @triton.jit(do_not_specialize=["state_stride", "vocabulary_start", "width"])
    def _fold_kernel(
        score_ptr,  # (C, width) fp32, h . W_v; each row of it, of share_ptr and of drift_ptr has room up to WIDE
        share_ptr,  # (C, width) in the operands' dtype, written; may be score_ptr's own storage
        drift_ptr,  # (C, width) in the operands' dtype, written
        pull_ptr,  # (C, D) fp32, rescaled where the reference moves
        spread_ptr,  # (C, D) fp32, likewise
        bias_ptr,  # (width,) of the tile, and readable up to WIDE
        label_ptr,  # (C,) int64
        state_ptr,  # (5 or 6, C) fp32, updated
        score_stride,
        share_stride,
        drift_stride,
        pull_stride,
        state_stride,
        vocabulary_start,
        width,
        inner,
        outer,
        above,
        below,
        D: tl.constexpr,
        BLOCK_V: tl.constexpr,
        BLOCK_D: tl.constexpr,
        WIDE: tl.constexpr,
        WHOLE: tl.constexpr,
        BIAS: tl.constexpr,
        SOFTCAP: tl.constexpr,
        ENTROPY: tl.constexpr,
        GRADIENT: tl.constexpr,
        ENTROPY_GRADIENT: tl.constexpr,
        TOP: tl.constexpr,
    ):
        """A tile of raw products into rest and moment, and into the next products' operands. One program per token.

        WHOLE: width is BLOCK_V, as of all tiles but the last, and nothing has to be left out.
        """
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, BLOCK_V)
        # A mask that ends anywhere makes every access one number wide; what is past the width is read and left out.
        near = at < (BLOCK_V if WHOLE else tl.cdiv(width, WIDE) * WIDE)
        score = tl.load(score_ptr + row * score_stride + at, mask=near, other=0.0)
        if BIAS:
            score += tl.load(bias_ptr + at, mask=near, other=0.0).to(tl.float32)
        score = score * inner
        if SOFTCAP:
            score, slope = _soften(score, outer)
        if not WHOLE:
            score = tl.where(at < width, score, float("-inf"))
        label_at = tl.load(label_ptr + row) - vocabulary_start
        if (label_at >= 0) & (label_at < BLOCK_V):  # in one tile of many: the others compare no score with it
            score = tl.where(at == label_at.to(tl.int32), float("-inf"), score)

        reference = tl.load(state_ptr + 2 * state_stride + row)
        rest = tl.load(state_ptr + 3 * state_stride + row)
        moment = tl.load(state_ptr + 4 * state_stride + row)
        peak = tl.max(score, 0)
        if TOP:
            best_at = state_ptr + 5 * state_stride + row
            tl.store(best_at, tl.maximum(tl.load(best_at), peak))
        raised = tl.where(peak > reference + above, peak - below, reference)
        shrink = tl.exp(reference - raised)
        if GRADIENT:  # noqa: SIM102, the inner condition is not known when compiling
            if (raised > reference) & (rest > 0):  # rare: the first scores that count set the reference
                for start in range(0, D, BLOCK_D):
                    column = start + tl.arange(0, BLOCK_D)
                    pull_at = pull_ptr + row * pull_stride + column
                    pull = tl.load(pull_at, mask=column < D, other=0.0) * shrink
                    tl.store(pull_at, pull, mask=column < D)
                    if ENTROPY_GRADIENT:  # exp(d) d: d moves as well
                        spread_at = spread_ptr + row * pull_stride + column
                        spread = tl.load(spread_at, mask=column < D, other=0.0) * shrink
                        tl.store(spread_at, spread + (reference - raised) * pull, mask=column < D)
        if ENTROPY:
            moment = shrink * (moment + rest * (reference - raised))
        rest = shrink * rest

        drop = score - raised
        share = tl.exp(drop)
        rest += tl.sum(share, 0)
        if ENTROPY:
            drift = share * tl.where(share > 0, drop, 0.0)  # at the label it would be 0 * -inf
            moment += tl.sum(drift, 0)
            tl.store(state_ptr + 4 * state_stride + row, moment)
        tl.store(state_ptr + 2 * state_stride + row, raised)
        tl.store(state_ptr + 3 * state_stride + row, rest)
        if GRADIENT:
            if SOFTCAP:
                share = share * slope
            # Shares lie over the scores of the same row: every thread must have read before one writes.
            tl.debug_barrier()
            tl.store(share_ptr + row * share_stride + at, share.to(share_ptr.dtype.element_ty), mask=near)
            if ENTROPY_GRADIENT:
                if SOFTCAP:
                    drift = drift * slope
                tl.store(drift_ptr + row * drift_stride + at, drift.to(drift_ptr.dtype.element_ty), mask=near)

    @triton.jit(do_not_specialize=["state_stride"])
    def _finish_kernel(
        state_ptr,  # (5 or 6, C) fp32
        label_weight_ptr,  # (*, D)
        index_ptr,  # (C,) int64
        pull_ptr,  # (C, D) fp32
        spread_ptr,  # (C, D) fp32
        logprob_ptr,  # (C,) fp32, written
        entropy_ptr,  # (C,) fp32, written
        top_ptr,  # (C,) uint8, written
        factor_ptr,  # (C,) fp32, written
        direction_ptr,  # (C, D), written
        lean_ptr,  # (C, D), written
        state_stride,
        weight_row_stride,
        weight_stride,
        pull_stride,
        direction_stride,
        slope_scale,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        SOFTCAP: tl.constexpr,
        ENTROPY: tl.constexpr,
        GRADIENT: tl.constexpr,
        ENTROPY_GRADIENT: tl.constexpr,
        TOP: tl.constexpr,
    ):
        """The sums into log-probability, entropy, top and the stored gradient. One program per token."""
        row = tl.program_id(0).to(tl.int64)
        score = tl.load(state_ptr + row)
        reference = tl.load(state_ptr + 2 * state_stride + row)
        rest = tl.load(state_ptr + 3 * state_stride + row)
        if TOP:
            tl.store(top_ptr + row, (score >= tl.load(state_ptr + 5 * state_stride + row)).to(tl.uint8))
        gap = reference - score
        some = tl.where(rest == 0, 1.0, rest)
        # x beyond 1e6 is cut there, where log1p(x) is log(x) and q is 1: the exponential may be out of fp32's range.
        # By tl.where: tl.minimum would drop a NaN, which must show in the results.
        whole_x = rest * tl.exp(tl.where(gap > 40.0, 40.0, gap))
        x = tl.where(whole_x > 1e6, 1e6, whole_x)
        # log1p as log(1 + x) x / ((1 + x) - 1), which is exact where 1 + x rounds; Triton itself has none.
        one_more = 1.0 + x
        step = one_more - 1.0
        log1p = tl.where(step == 0.0, x, tl.log(one_more) * (x / tl.where(step == 0.0, 1.0, step)))
        logprob = tl.where(x >= 1e6, -gap - tl.log(some), -log1p)
        tl.store(logprob_ptr + row, logprob)
        q = x / (1.0 + x)
        p = tl.exp(logprob)
        mean = 0.0
        if ENTROPY:
            mean = tl.load(state_ptr + 4 * state_stride + row) / some
            # Two forms of log l - (moment + p~ d_y) / l. The second is exact for p_y near 1, the first for p_y near 0.
            below = tl.log(some + tl.exp(-tl.maximum(gap, 0.0))) - q * mean + p * gap
            # Where the label is the reference though others are far above it, mean is large, and q is to be exact.
            exact_q = tl.where(whole_x > 1e30, 1.0, whole_x / (1.0 + whole_x))
            entropy = tl.where(gap > 0, below, -logprob - exact_q * (mean + gap))
            tl.store(entropy_ptr + row, tl.where(rest == 0, 0.0, entropy))
        if GRADIENT:
            tl.store(factor_ptr + row, q * slope_scale)
            # A score that is NaN may be that of a label outside of the vocabulary.
            index = tl.where(score == score, tl.load(index_ptr + row), 0)
            lean_scale = tl.where(rest == 0, 0.0, p * (-gap - mean))
            for start in range(0, D, BLOCK_D):
                at = start + tl.arange(0, BLOCK_D).to(tl.int64)
                direction = tl.load(
                    label_weight_ptr + index * weight_row_stride + at * weight_stride, mask=at < D, other=0.0
                ).to(tl.float32)
                if SOFTCAP:
                    direction = direction * tl.load(state_ptr + state_stride + row)
                pull = tl.load(pull_ptr + row * pull_stride + at, mask=at < D, other=0.0) / some
                direction -= pull
                direction_at = direction_ptr + row * direction_stride + at
                tl.store(direction_at, direction.to(direction_ptr.dtype.element_ty), mask=at < D)
                if ENTROPY_GRADIENT:
                    spread = tl.load(spread_ptr + row * pull_stride + at, mask=at < D, other=0.0) / some
                    lean = spread - mean * pull + lean_scale * direction
                    lean_at = lean_ptr + row * direction_stride + at
                    tl.store(lean_at, lean.to(lean_ptr.dtype.element_ty), mask=at < D)

    @triton.jit
    def _scale_kernel(
        direction_ptr,  # (N, D), overwritten by the gradient
        lean_ptr,  # (N, D)
        factor_ptr,  # (N,) fp32
        lean_factor_ptr,  # (N,) fp32
        direction_stride,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        ENTROPY_GRADIENT: tl.constexpr,
    ):
        """direction <- factor direction + lean_factor lean, in place. One program per token."""
        row = tl.program_id(0).to(tl.int64)
        factor = tl.load(factor_ptr + row)
        if ENTROPY_GRADIENT:
            lean_factor = tl.load(lean_factor_ptr + row)
        for start in range(0, D, BLOCK_D):
            at = start + tl.arange(0, BLOCK_D)
            direction_at = direction_ptr + row * direction_stride + at
            gradient = factor * tl.load(direction_at, mask=at < D, other=0.0).to(tl.float32)
            if ENTROPY_GRADIENT:
                lean = tl.load(lean_ptr + row * direction_stride + at, mask=at < D, other=0.0).to(tl.float32)
                gradient += lean_factor * lean
            tl.store(direction_at, gradient.to(direction_ptr.dtype.element_ty), mask=at < D)


class _Settings(NamedTuple):
    temperature: float
    logit_scale: float
    softcap: float | None
    chunks: tuple[int, int]
    entropy: bool
    entropy_gradient: bool
    top: bool
    tile_dtype: torch.dtype
    by_triton: bool
    room: int  # numbers of a tile, also where there are fewer tokens than it could have

    @property
    def inner(self) -> float:
        """Raw products times this are scores, or with a softcap what tanh bends."""
        return self.logit_scale / (self.softcap or self.temperature)

    @property
    def outer(self) -> float:
        """tanh times this is the score."""
        return (self.softcap or 1.0) / self.temperature

    @property
    def suits_one_kernel(self) -> bool:
        """Whether head_shares.py has all that is asked for, and its reference may stay."""
        plain = self.softcap is None and not self.entropy_gradient
        return self.by_triton and plain and 0 < self.inner <= head_shares.MOST_INNER

    @property
    def slope_scale(self) -> float:
        return self.logit_scale / self.temperature


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, labels, bias, weight_scale, settings):
        logprobs, entropy, top, factor, direction, lean = _forward(
            hidden_states, weight, labels, bias, weight_scale, settings, True
        )
        ctx.save_for_backward(direction, factor, lean)
        ctx.by_triton = settings.by_triton
        ctx.mark_non_differentiable(
            *(() if settings.entropy_gradient else (entropy,)), *(() if top is None else (top,))
        )
        return logprobs, entropy, top

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy, _):
        if torch.is_grad_enabled():
            raise RuntimeError("linear_logprobs has no second derivative: differentiate without create_graph=True")
        direction, factor, lean = ctx.saved_tensors
        scale = _triton_scale if ctx.by_triton else _torch_scale
        lean_factor = None if lean is None else -grad_entropy * factor
        scale(direction, grad_logprobs * factor, lean, lean_factor)  # in place, which a second backward detects
        return direction, None, None, None, None, None


class _Chunk(NamedTuple):
    """The tensors of one chunk of C tokens."""

    hidden: Tensor  # (C, D) as given, or widened to the operands' dtype
    labels: Tensor  # (C,)
    label_weight: Tensor  # (*, D): the weight, or of an int8 head the labels' own rows, dequantized
    label_index: Tensor  # (C,) rows of label_weight
    state: Tensor  # (5, C) fp32; with settings.top (6, C)
    pull: Tensor | None  # (C, D) fp32
    spread: Tensor | None  # (C, D) fp32


def _forward(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    weight_scale: Tensor | None,
    settings: _Settings,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(logp, entropy, top, factor (N,), direction (N, D), lean (N, D)); the last three where a gradient is wanted."""
    device, (n, d), v = hidden_states.device, hidden_states.shape, weight.shape[0]
    c, vb = min(settings.chunks[0], n), min(settings.chunks[1], v)
    start, fold, finish = (
        (_triton_start, _triton_fold, _triton_finish)
        if settings.by_triton
        else (_torch_start, _torch_fold, _torch_finish)
    )

    def buffer(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=device)

    leans = gradient and settings.entropy_gradient
    logprobs, entropy = buffer(n), buffer(n)
    top = buffer(n, dtype=torch.bool) if settings.top else None
    factor = buffer(n) if gradient else None
    direction = buffer(n, d, dtype=hidden_states.dtype) if gradient else None
    lean = buffer(n, d, dtype=hidden_states.dtype) if leans else None
    if n == 0:
        return logprobs, entropy, top, factor, direction, lean

    one_dtype = weight.dtype in (hidden_states.dtype, torch.int8)
    # A GPU multiplies 16-bit operands into fp32. Elsewhere they are widened, or the product is as narrow as they are.
    narrow = device.type == "cuda" and one_dtype and hidden_states.dtype != torch.float32
    operand = hidden_states.dtype if narrow else settings.tile_dtype
    # The kernels write shares as narrow as the weight on a CPU too: there the interpreter checks them.
    share = hidden_states.dtype if settings.by_triton and one_dtype else operand
    rule = FROM_LARGEST if share == torch.float16 or settings.entropy else FROM_LABEL
    rule = THE_LARGEST if settings.entropy_gradient else rule

    # The scratch of the whole call: every chunk and tile reuses it.
    in_one = bias is None and settings.suits_one_kernel and head_shares.serves(hidden_states, weight)
    if in_one:
        rule, vb = FROM_LABEL, min(head_shares.slice_width(c, vb, settings.room), v) if gradient else v
    wide_vb = -(-vb // WIDE) * WIDE
    if in_one:
        scores, shares = None, buffer(c, wide_vb, dtype=share) if gradient else None
        parts = buffer(3 * head_shares.num_parts(vb) * c)
    else:
        scores, parts = buffer(c, wide_vb, dtype=settings.tile_dtype), None
        shares = scores.view(share)[:, :wide_vb] if gradient else None  # over the scores, whose row stride it keeps
    drifts = buffer(c, wide_vb, dtype=share) if leans else None
    if bias is not None and settings.by_triton:
        bias = F.pad(bias, (0, WIDE))
    tiles = () if settings.by_triton or scores is None else _torch_tiles(scores, shares, settings)
    head = buffer(vb, d, dtype=operand) if weight.dtype != operand else None
    wide = buffer(c, d, dtype=operand) if hidden_states.dtype != operand else None
    state = buffer(6 if settings.top else 5, c)
    pull = buffer(c, d) if gradient else None
    spread = buffer(c, d) if leans else None
    # A CPU multiplies 16-bit operands into 16 bits: (the product, its fp32 copy).
    rounds = gradient and not narrow and operand != torch.float32
    product = (buffer(c, d, dtype=operand), buffer(c, d)) if rounds else None

    with torch.no_grad(), torch.autocast(device.type, enabled=False), torch.cuda.device_of(hidden_states):
        heads = weight.split(vb)
        for row in range(0, n, c):
            here = slice(row, min(row + c, n))
            rows = here.stop - row
            hidden = hidden_states[here]
            label_weight, label_index = weight, labels[here]
            if weight_scale is not None:
                label_weight = _dequantize(weight[label_index], weight_scale[label_index], hidden_states.dtype)
                label_index = torch.arange(rows, device=device)
            chunk = _Chunk(
                hidden if wide is None else wide[:rows].copy_(hidden),
                labels[here],
                label_weight,
                label_index,
                state[:, :rows],
                None if pull is None else pull[:rows].zero_(),
                None if spread is None else spread[:rows].zero_(),
            )
            start(chunk._replace(hidden=hidden), bias, v, settings, rule)
            width, tile, tile_shares, tile_drifts = 0, scores, shares, drifts
            for first, tile_head in zip(range(0, v, vb), heads, strict=True):
                if len(tile_head) != width:  # of a chunk's first tile and of its last: each view costs the host
                    width = len(tile_head)
                    tile, tile_shares, tile_drifts = (
                        x if x is None else x[:rows, :width] for x in (scores, shares, drifts)
                    )
                if head is not None and weight_scale is not None:
                    scale = weight_scale[first : first + width]
                    tile_head = _dequantize(tile_head, scale, hidden_states.dtype, out=head[:width])
                elif head is not None:
                    tile_head = head[:width].copy_(tile_head)
                if in_one:
                    assert parts is not None
                    head_shares.fold(
                        chunk.hidden, tile_head, chunk.labels, chunk.state, parts, tile_shares, first, settings.inner,
                        settings.entropy, settings.top,
                    )  # fmt: skip
                else:
                    assert tile is not None
                    _multiply(chunk.hidden, tile_head.t(), tile)
                    fold(chunk, tile, tile_shares, tile_drifts, tiles, bias, first, settings, rule)
                for total, a in ((chunk.pull, tile_shares), (chunk.spread, tile_drifts)):
                    if total is not None and a is not None:
                        _accumulate(total, a, tile_head, product)
            if in_one:
                head_shares.rescue(chunk.hidden, weight, chunk.labels, chunk.state, chunk.pull, settings.inner)
            outputs = [x if x is None else x[here] for x in (logprobs, entropy, top, factor, direction, lean)]
            finish(chunk, *outputs, settings=settings)
    return logprobs, entropy, top, factor, direction, lean


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out <- a @ b, in fp32 where out is."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def _accumulate(total: Tensor, a: Tensor, b: Tensor, product: tuple[Tensor, Tensor] | None) -> None:
    """total <- total + a @ b with total in fp32: a bf16 accumulator biases training."""
    if product is not None:  # 16-bit products on a CPU round each tile's sum, then add in fp32
        rounded, wide = (x[: len(total)] for x in product)
        total += wide.copy_(torch.mm(a, b, out=rounded))
    elif b.dtype == torch.float32:
        total.addmm_(a.float(), b)  # a is narrower only under the interpreter
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def _dequantize(rows: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """int8 rows (*, D) times their scale (*,), rounded to dtype, which for every purpose is the head's."""
    if out is None:
        return (rows * scale[:, None]).to(dtype)
    torch.mul(rows, scale[:, None], out=out)
    return out if out.dtype == dtype else out.copy_(out.to(dtype))


def _blocks(d: int, num_warps: int = 4) -> dict:
    """D and how much of it a program has in hand: 16 bytes of fp32 a thread at least."""
    return dict(D=d, BLOCK_D=min(triton.next_power_of_2(d), max(1024, 128 * num_warps)))


def _triton_start(chunk: _Chunk, bias: Tensor | None, vocabulary: int, settings: _Settings, rule: Rule) -> None:
    hidden, weight = chunk.hidden, chunk.label_weight
    _start_kernel[(len(hidden),)](
        hidden, weight, chunk.label_index, chunk.labels, bias, chunk.state,
        *hidden.stride(), *weight.stride(), chunk.state.stride(0), vocabulary,
        settings.inner, settings.outer, BELOW_EVERY_SCORE,
        **_blocks(hidden.shape[1]), BIAS=bias is not None, SOFTCAP=settings.softcap is not None,
        FROM_LABEL=rule is FROM_LABEL, TOP=settings.top,
    )  # fmt: skip


def _triton_fold(chunk, scores, shares, drifts, _, bias, first: int, settings: _Settings, rule: Rule) -> None:
    gradient = shares is not None
    block = triton.next_power_of_2(settings.chunks[1])
    # 32 scores to a thread: 14 instructions a score and 160 KiB of scores in flight on an SM of 65,536 registers.
    num_warps = min(max(block // 1024, 4), 32)
    bias = None if bias is None else bias[first:]
    _fold_kernel[(len(scores),)](
        scores, shares, drifts, chunk.pull, chunk.spread, bias, chunk.labels, chunk.state,
        scores.stride(0), shares.stride(0) if gradient else 0, 0 if drifts is None else drifts.stride(0),
        chunk.pull.stride(0) if gradient else 0, chunk.state.stride(0), first, scores.shape[1],
        settings.inner, settings.outer, rule.above, rule.below,
        **_blocks(chunk.hidden.shape[1], num_warps), BLOCK_V=block, WIDE=WIDE, WHOLE=scores.shape[1] == block,
        BIAS=bias is not None, SOFTCAP=settings.softcap is not None, ENTROPY=settings.entropy,
        GRADIENT=gradient, ENTROPY_GRADIENT=drifts is not None, TOP=settings.top,
        num_warps=num_warps,
    )  # fmt: skip


def _triton_finish(chunk: _Chunk, logprobs, entropy, top, factor, direction, lean, settings: _Settings) -> None:
    gradient, weight = direction is not None, chunk.label_weight
    _finish_kernel[(len(logprobs),)](
        chunk.state, weight, chunk.label_index, chunk.pull, chunk.spread, logprobs, entropy,
        None if top is None else top.view(torch.uint8), factor, direction, lean,
        chunk.state.stride(0), *weight.stride(), 0 if chunk.pull is None else chunk.pull.stride(0),
        direction.stride(0) if gradient else 0, settings.slope_scale,
        **_blocks(weight.shape[1]), SOFTCAP=settings.softcap is not None, ENTROPY=settings.entropy,
        GRADIENT=gradient, ENTROPY_GRADIENT=lean is not None, TOP=settings.top,
    )  # fmt: skip


def _triton_scale(direction: Tensor, factor: Tensor, lean: Tensor | None, lean_factor: Tensor | None) -> None:
    if len(direction):
        _scale_kernel[(len(direction),)](
            direction, lean, factor, lean_factor, direction.stride(0),
            **_blocks(direction.shape[1]), ENTROPY_GRADIENT=lean is not None,
        )  # fmt: skip
    torch.autograd.graph.increment_version(direction)


@overload
def linear_logprobs(
    *args, return_entropy: Literal[True], return_top: Literal[True], **kwargs
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def linear_logprobs(*args, return_entropy: Literal[True], **kwargs) -> tuple[Tensor, Tensor]: ...
@overload
def linear_logprobs(*args, return_top: Literal[True], **kwargs) -> tuple[Tensor, Tensor]: ...
@overload
def linear_logprobs(*args, **kwargs) -> Tensor: ...
def linear_logprobs(
    hidden_states: Tensor,  # (N, D), the only input that gets a gradient
    weight: Tensor,  # (V, D), frozen; int8 with weight_scale
    labels: Tensor,  # (N,) int64 in [0, V)
    *,
    bias: Tensor | None = None,  # (V,), frozen
    weight_scale: Tensor | None = None,  # (V,) fp32: the head is weight * weight_scale[:, None]
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    entropy_grad: bool = False,
    return_top: bool = False,
    backend: Backend = "auto",
    chunks: tuple[int, int] | None = None,
    tile_dtype: torch.dtype = torch.float32,
) -> Tensor | tuple[Tensor, ...]:
    """Log-probability of each label, (N,) fp32; with return_entropy also each row's entropy, (N,) fp32.

    The entropy carries a gradient only with entropy_grad: one more matrix product, and (N, D) more kept. With
    return_top follows whether no score is above the label's, (N,) bool.
    hidden_states has the dtype of weight, or fp32. An int8 weight (see quantize_head) is dequantized tile by tile to
    the dtype of hidden_states.

    backend: "triton" runs the kernels: on a GPU, or on a CPU under TRITON_INTERPRET=1. "torch" runs their twin. "auto"
    is triton on a GPU where it is installed, else torch.
    chunks: (C, Vb), tokens and vocabulary entries of a tile; None takes them from the table CHUNKS.
    tile_dtype: torch.bfloat16 makes the twin on a CPU multiply in bf16 and round the scores so (1e-3 rms in logp), in
    less time. The label's own score stays exact.

    Scratch: scores 4 C Vb bytes and, for a gradient, the pull 4 C D bytes. On top, C D operands where hidden_states is
    widened, Vb D where weight is widened or dequantized, 4 C D and C Vb operands for entropy_grad, and in the twin one
    or two (ROWS, Vb) fp32 for 16-bit tiles, entropy or softcap. The twin and an int8 head also gather the labels' rows,
    for a moment one to three (C, D) fp32. Where one kernel multiplies and folds there are no scores: shares, 2 C Vb
    bytes, with fewer than C tokens as many numbers of more columns, and sums, C Vb / 21 bytes; without a gradient only
    sums, of all V columns. A pass that will be differentiated keeps (N, D) in the dtype of hidden_states; its backward
    overwrites it, so a second backward through the same result raises.

    Labels outside of [0, V) are refused on a CPU; on a GPU, where to look at them would wait for it, the kernels make
    their rows NaN.

    Raises:
        ValueError: shapes, devices or dtypes that do not belong together, numbers out of range, or a head that asks
            for a gradient.
        RuntimeError: backend="triton" where it cannot run.
    """
    _check(hidden_states, weight, labels, bias, weight_scale, temperature, softcap)
    if entropy_grad and not return_entropy:
        raise ValueError("entropy_grad=True is the gradient of the entropy: it needs return_entropy=True")
    by_triton = runs_by_triton(backend, hidden_states.device.type)
    if tile_dtype != torch.float32 and (tile_dtype != torch.bfloat16 or by_triton or hidden_states.is_cuda):
        raise ValueError("tile_dtype must be float32, or on a CPU with backend='torch' bfloat16")
    most = largest_chunks(hidden_states.device, hidden_states.shape[1]) if chunks is None else chunks
    if len(most) != 2 or min(most) < 1:
        raise ValueError(f"chunks must be (C, Vb), both at least 1, or None for the table's; not {chunks}")
    if chunks is None:  # on a GPU all chunks of tokens are alike
        chunks = even_chunks(len(hidden_states), most[0]) if hidden_states.is_cuda else most[0], most[1]
    settings = _Settings(
        temperature, logit_scale, softcap, chunks, return_entropy, entropy_grad, return_top, tile_dtype, by_triton,
        math.prod(most),
    )  # fmt: skip
    labels, bias = labels.contiguous(), None if bias is None else bias.contiguous()
    inputs = (hidden_states, weight, labels, bias, weight_scale, settings)
    if hidden_states.requires_grad and torch.is_grad_enabled():
        logprobs, entropy, top = _LinearLogprobs.apply(*inputs)
    else:
        logprobs, entropy, top, *_ = _forward(*inputs, False)
    asked = [logprobs] + [entropy] * return_entropy + [top] * return_top
    return tuple(asked) if len(asked) > 1 else logprobs


def quantize_head(weight: Tensor, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """(V, D) -> int8 (V, D) and scale (V,) fp32, the largest of each row at 127: half the memory of a 16-bit head.

    At a logit deviation of 2.5 this adds a noise of about 0.02 to each logit. Works through 4096 rows at a time, on the
    weight's device or another.
    """
    device = device or weight.device
    quantized = torch.empty(weight.shape, dtype=torch.int8, device=device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=device)
    for first in range(0, weight.shape[0], 4096):
        rows = weight[first : first + 4096].detach().to(device).float()
        scale[first : first + 4096] = row_scale = (rows.abs().amax(1) / 127).clamp_(min=1e-30)
        quantized[first : first + 4096] = (rows / row_scale[:, None]).round_().to(torch.int8)
    return quantized, scale


def largest_chunks(device: torch.device, d: int) -> tuple[int, int]:
    """The tile (C, Vb) for any number of tokens, from the table CHUNKS."""
    if device.type != "cuda":
        return default_chunks("cpu", 0, d)
    total = torch.cuda.get_device_properties(device).total_memory
    # A large card that is limited to a small one's memory counts as one.
    return default_chunks("cuda", total * torch.cuda.get_per_process_memory_fraction(device) / 2**30, d)


def even_chunks(n: int, most: int) -> int:
    """Tokens of a chunk where N are cut into as few as possible: 2,560 of 5,100 where a chunk has at most 4,096.

    A last chunk of 1,004 would have as many launches as a full one. A multiple of 128, the rows of a library's tile.
    """
    count = max(-(-n // most), 1)
    return min(most, -(-n // (128 * count)) * 128) or 1


def default_chunks(kind: str, gib: float, d: int) -> tuple[int, int]:
    """The tile (C, Vb) of a kind of device, "cuda" or "cpu", with so much memory, which need not be there."""
    return next(sizes for which, memory, most, sizes in CHUNKS if which == kind and gib >= memory and d <= most)


def _check(hidden_states, weight, labels, bias, weight_scale, temperature, softcap) -> None:
    if hidden_states.dim() != 2 or weight.dim() != 2 or hidden_states.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden_states {tuple(hidden_states.shape)} and weight {tuple(weight.shape)} must be (N, D) and (V, D)"
        )
    if labels.shape != hidden_states.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be ({hidden_states.shape[0]},) int64, not {tuple(labels.shape)} {labels.dtype}")
    if (weight.dtype == torch.int8) != (weight_scale is not None):
        raise ValueError("an int8 weight needs weight_scale, and only an int8 one: see quantize_head")
    if weight_scale is not None and (weight_scale.shape != weight.shape[:1] or weight_scale.dtype != torch.float32):
        raise ValueError(f"weight_scale must be ({weight.shape[0]},) float32")
    floats = (torch.float32, torch.bfloat16, torch.float16)
    if weight.dtype not in (*floats, torch.int8):
        raise ValueError(f"weight must be float32, bfloat16, float16, or int8 with its scale, not {weight.dtype}")
    if hidden_states.dtype not in (floats if weight_scale is not None else (weight.dtype, torch.float32)):
        raise ValueError(f"hidden_states must be {weight.dtype} as weight is, or float32, not {hidden_states.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), not {tuple(bias.shape)}")
    head = {"weight": weight, "labels": labels, "bias": bias, "weight_scale": weight_scale}
    for name, part in head.items():
        if part is not None and part.device != hidden_states.device:
            raise ValueError(
                f"{name} is on {part.device} and hidden_states on {hidden_states.device}; move one of them"
            )
    # Elsewhere to look at them would wait for the device.
    if labels.device.type == "cpu" and len(labels) and not 0 <= labels.min() <= labels.max() < len(weight):
        raise ValueError(
            f"labels must be in [0, {len(weight)}), not {labels.min()} to {labels.max()}; leave out rows that have none"
        )
    if any(part is not None and part.requires_grad for part in head.values()):
        raise ValueError(
            "the head asks for a gradient, which is never computed here; freeze it with requires_grad_(False)"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, or None for no softcap, not {softcap}")


def _torch_start(chunk: _Chunk, bias: Tensor | None, _: int, settings: _Settings, rule: Rule) -> None:
    """The twin of _start_kernel."""
    raw = chunk.label_weight[chunk.label_index].float().mul_(chunk.hidden).sum(-1)  # (C,)
    if bias is not None:
        raw += bias[chunk.labels].float()
    score = raw.mul_(settings.inner)
    if settings.softcap is not None:
        bent = score.tanh()
        chunk.state[LABEL_SLOPE] = 1 - bent.square()
        score = bent * settings.outer
    chunk.state[LABEL_SCORE] = score
    chunk.state[REFERENCE] = score if rule is FROM_LABEL else BELOW_EVERY_SCORE
    chunk.state[REST : MOMENT + 1] = 0.0
    if settings.top:
        chunk.state[BEST] = -torch.inf


def _torch_tiles(scores: Tensor, shares: Tensor | None, settings: _Settings) -> tuple:
    """Storage (fp32 scores, fp32 shares) of ROWS rows, for tiles whose own storage does not serve."""
    narrow = scores.dtype != torch.float32
    aliased = shares is not None and not narrow and shares.dtype != torch.float32
    second = settings.entropy or aliased or (shares is not None and settings.softcap is not None)
    rows = scores[:ROWS]
    return tuple(torch.empty_like(rows, dtype=torch.float32) if when else None for when in (narrow, second))


def _torch_fold(chunk, scores, shares, drifts, tiles, bias, first: int, settings: _Settings, rule: Rule) -> None:
    """The twin of _fold_kernel, ROWS tokens after the other. tiles: see _torch_tiles."""
    for row in range(0, len(scores), ROWS):
        here = slice(row, row + ROWS)
        labels, state = chunk.labels[here], chunk.state[:, here]
        pull, spread, tile, tile_shares, tile_drifts = (
            x if x is None else x[here] for x in (chunk.pull, chunk.spread, scores, shares, drifts)
        )
        some = chunk._replace(labels=labels, state=state, pull=pull, spread=spread)
        _torch_fold_rows(some, tile, tile_shares, tile_drifts, tiles, bias, first, settings, rule)


def _torch_fold_rows(chunk, scores, shares, drifts, tiles, bias, first: int, settings: _Settings, rule: Rule) -> None:
    rows, width = scores.shape
    wide, share = (x if x is None else x[:rows, :width] for x in tiles)
    score = scores if wide is None else wide.copy_(scores)
    if bias is not None:
        score += bias[first : first + width].float()
    if settings.inner != 1.0:
        score *= settings.inner
    if settings.softcap is not None:
        score.tanh_().mul_(settings.outer)
    inside = (chunk.labels >= first) & (chunk.labels < first + width)
    column = (chunk.labels - first).clamp_(0, width - 1)[:, None]
    score.scatter_(1, column, torch.where(inside[:, None], -torch.inf, score.gather(1, column)))

    _, _, reference, rest, moment, *best = chunk.state
    peak = score.amax(-1)
    if settings.top:
        torch.maximum(best[0], peak, out=best[0])
    raised = torch.where(peak > reference + rule.above, peak - rule.below, reference)
    shift = reference - raised
    if shift.any():
        shrink = shift.exp()
        moment.add_(rest * shift).mul_(shrink)
        rest.mul_(shrink)
        reference.copy_(raised)
        if chunk.spread is not None:
            chunk.spread.mul_(shrink[:, None])
            chunk.spread.addcmul_(chunk.pull, (shift * shrink)[:, None])
        if chunk.pull is not None:
            chunk.pull.mul_(shrink[:, None])

    drop = score.sub_(reference[:, None])
    share = torch.exp(drop, out=drop if share is None else share)
    rest += share.sum(-1)
    if share is not drop:
        drop.clamp_(min=-1e4)  # the label's: its share of 0 times -inf would be NaN
    if settings.entropy:
        moment += torch.einsum("cv,cv->c", share, drop)
    if shares is None:
        return
    drift = None if drifts is None else share * drop
    if settings.softcap is not None:
        bent = drop.add_(reference[:, None]).div_(settings.outer)
        slope = bent.square_().neg_().add_(1.0)
        share.mul_(slope)
        if drift is not None:
            drift.mul_(slope)
    if share is not scores:
        shares.copy_(share)
    if drifts is not None:
        drifts.copy_(drift)


def _torch_finish(chunk: _Chunk, logprobs, entropy, top, factor, direction, lean, settings: _Settings) -> None:
    """The twin of _finish_kernel."""
    score, slope, reference, rest, moment, *best = chunk.state
    if settings.top:
        torch.ge(score, best[0], out=top)
    gap = reference - score
    some = torch.where(rest == 0, 1.0, rest)
    x = (rest * gap.clamp(max=40.0).exp()).clamp(max=1e6)
    logprobs.copy_(torch.where(x >= 1e6, -gap - some.log(), -x.log1p()))
    q, p = x / (1 + x), logprobs.exp()
    mean = moment / some
    if settings.entropy:
        below = (some + (-gap.clamp(min=0.0)).exp()).log() - q * mean + p * gap
        exact = torch.where(gap > 0, below, -logprobs - q * (mean + gap))
        entropy.copy_(torch.where(rest == 0, 0.0, exact))
    if chunk.pull is None:
        return
    factor.copy_(q * settings.slope_scale)
    towards = chunk.label_weight[chunk.label_index].float()
    if settings.softcap is not None:
        towards.mul_(slope[:, None])
    pull = chunk.pull.div_(some[:, None])
    towards -= pull
    direction.copy_(towards)
    if chunk.spread is not None:
        lean_scale = torch.where(rest == 0, 0.0, p * (-gap - mean))
        spread = chunk.spread.div_(some[:, None])
        lean.copy_(spread.addcmul_(pull, -mean[:, None]).addcmul_(towards, lean_scale[:, None]))


def _torch_scale(direction: Tensor, factor: Tensor, lean: Tensor | None, lean_factor: Tensor | None) -> None:
    """The twin of _scale_kernel."""
    direction.mul_(factor[:, None])
    if lean is not None and lean_factor is not None:
        direction.addcmul_(lean, lean_factor[:, None].to(lean.dtype))

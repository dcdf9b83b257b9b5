"""The head's first product with what is made of its scores in one kernel: they never leave the registers.

For a chunk of C tokens and Vb entries of the vocabulary, with s_v = inner h . W_v, m the label's score s_y and over all
v but the label

    rest = sum exp(s_v - m)    moment = sum exp(s_v - m) (s_v - m)    best = max s_v
    shares (C, Vb) = exp(s_v - m), in bf16, where a second product follows

linear_logprobs.py multiplies into fp32 scores, 4 bytes each, which a second kernel reads: 1.3 times two bare products'
time on an H200 at D 1536. Here a tile of 128 x 256 scores is turned into shares where it was accumulated, and only
these are written. A tile's sums go to a place of their own and are added up in one order, so that two calls are equal
to the last bit.

m stays, since nobody knows the largest score before the last tile. bf16 and fp32 hold exp(88); a row whose rest
exceeds exp(60), as of a label that a model gives less than 1e-26, is computed anew by a program that follows the
largest score (_rescue_kernel). No token that was sampled is such a row.

A tensor core cuts off what fp32 would round, 16 products at a time: scores fall short, nearly in proportion to
themselves, while m is exact. Uncorrected, log-probabilities came out too large on an H200, in a prototype by at most
1.8e-5 at D 1536 and 4.3e-5 at 3584. So a trial of a few tiles measures the share that is lost, about 2e-6, and scores
are scaled up by it, at no cost. With a tensor core made up in Triton's interpreter that leaves less than a quarter of
the error (tests/test_linear_logprobs.py); not run on a GPU yet.

For Hopper, whose tensor cores read tiles that TMA brings, after that trial. Other cards compute as linear_logprobs.py
says.
"""

import functools
import math
import warnings
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Windows, macOS
    triton: Any = None
    TensorDescriptor: Any = None

BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 64  # a program's tile of scores, and how much of D it reads at a time
GROUP = 16  # tiles of rows side by side, which share entries of the head in the L2 cache
NUM_WARPS, NUM_STAGES = 8, 3
PARTS = 16  # of a row's sums that are added up at a time: 4,096 entries of the vocabulary
SUMMED = 32  # rows of a program that does so, one a thread
WIDEST = 32768  # entries of a slice of the vocabulary, whose shares a second product sums over
MOST_INNER = 2.0  # scores farther apart than a model's are, as at a temperature below a half, need another m
LIMIT = 1e26  # of rest, from which on a row is computed anew
WATCHED = 32  # rows that a program looks through for such, of which there is hardly ever one
# Rows of the state, as in linear_logprobs.py.
LABEL_SCORE, LABEL_SLOPE, REFERENCE, REST, MOMENT, BEST = range(6)

if triton is not None:
    _LOG2E, _LN2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))

    @triton.jit(do_not_specialize=["rows", "width", "label_start", "state_stride"])
    def _shares_kernel(
        hidden,  # (rows, D), described
        weight,  # (width, D), described
        shares,  # (rows, width), described, written; None without SHARES
        label_ptr,  # (rows,) int64
        state_ptr,  # (5 or 6, C) fp32
        parts_ptr,  # (3, column tiles, rows) fp32, written: rest, moment and best of each tile
        rows,
        width,
        label_start,  # the label of the first column
        state_stride,
        inner,
        D: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        GROUP: tl.constexpr,
        WHOLE: tl.constexpr,  # BLOCK_N divides width
        SHARES: tl.constexpr,
        ENTROPY: tl.constexpr,
        TOP: tl.constexpr,
    ):
        """Tiles of scores into shares and sums. One program per multiprocessor, which takes one tile after another."""
        row_tiles = tl.cdiv(rows, BLOCK_M)
        column_tiles = tl.cdiv(width, BLOCK_N)
        # In one loop with the product's, so that a tile's first loads are under way while the last one's sums are made.
        for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True):
            first = tile // (GROUP * column_tiles) * GROUP
            height = tl.minimum(row_tiles - first, GROUP)
            inside = tile % (GROUP * column_tiles)
            row_start = (first + inside % height) * BLOCK_M
            column_tile = inside // height
            column_start = column_tile * BLOCK_N
            product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k in range(0, D, BLOCK_K):
                x = hidden.load([row_start, k])
                w = weight.load([column_start, k])
                product = tl.dot(x, w.T, product)

            row = row_start + tl.arange(0, BLOCK_M)
            reference = tl.load(state_ptr + 2 * state_stride + row, mask=row < rows, other=0.0) * _LOG2E
            label = (tl.load(label_ptr + row, mask=row < rows, other=-1) - label_start).to(tl.int32)
            rest = tl.zeros((BLOCK_M,), tl.float32)
            moment = tl.zeros((BLOCK_M,), tl.float32)
            best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            # One half after the other: shares and scores of both would not fit into the registers.
            halves = tl.split(tl.permute(tl.reshape(product, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
            for half in tl.static_range(2):
                half_start = column_start + half * (BLOCK_N // 2)
                column = half_start + tl.arange(0, BLOCK_N // 2)
                others = column[None, :] != label[:, None]
                if not WHOLE:
                    others = others & (column < width)[None, :]
                score = halves[half]
                if TOP:
                    score = tl.where(others, score, -1e30)  # not -inf: the moment would have 0 times it
                    best = tl.maximum(best, tl.max(score, 1))
                # In powers of two: exp would be four instructions more, one factor and three for what is not normal.
                drop = score * (inner * _LOG2E) - reference[:, None]
                share = tl.exp2(drop)
                if not TOP:  # one selection is enough; after the power it needs the fewest instructions
                    share = tl.where(others, share, 0.0)
                if SHARES:
                    shares.store([row_start, half_start], share.to(shares.dtype))
                rest += tl.sum(share, 1)
                if ENTROPY:
                    moment += tl.sum(share * drop, 1)
            part_at = parts_ptr + column_tile.to(tl.int64) * rows + row
            tl.store(part_at, rest, mask=row < rows)
            if ENTROPY:
                tl.store(part_at + column_tiles.to(tl.int64) * rows, moment * _LN2, mask=row < rows)
            if TOP:
                tl.store(part_at + 2 * column_tiles.to(tl.int64) * rows, best * inner, mask=row < rows)

    @triton.jit(do_not_specialize=["rows", "count", "state_stride"])
    def _sum_kernel(
        parts_ptr,  # (3, count, rows) fp32
        state_ptr,  # (5 or 6, C) fp32, updated
        rows,
        count,
        state_stride,
        BLOCK: tl.constexpr,
        PARTS: tl.constexpr,
        ENTROPY: tl.constexpr,
        TOP: tl.constexpr,
    ):
        """Adds the sums of a slice's tiles to those of a row's slices before. One program per BLOCK rows.

        PARTS at a time, so that slices of PARTS tiles give the same bits as the whole vocabulary at once.
        """
        row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        own = row < rows
        rest_at = state_ptr + 3 * state_stride + row
        rest = tl.load(rest_at, mask=own, other=0.0)
        moment = tl.zeros((BLOCK,), tl.float32)
        best = tl.zeros((BLOCK,), tl.float32)
        if ENTROPY:
            moment = tl.load(rest_at + state_stride, mask=own, other=0.0)
        if TOP:
            best = tl.load(rest_at + 2 * state_stride, mask=own, other=0.0)
        step = rows.to(tl.int64)
        for start in tl.range(0, count, PARTS, loop_unroll_factor=2):  # whose loads are under way together
            more_rest = tl.zeros((BLOCK,), tl.float32)
            more_moment = tl.zeros((BLOCK,), tl.float32)
            for part in tl.static_range(PARTS):
                at = parts_ptr + (start + part) * step + row
                known = own & (start + part < count)
                more_rest += tl.load(at, mask=known, other=0.0)
                if ENTROPY:
                    more_moment += tl.load(at + count * step, mask=known, other=0.0)
                if TOP:
                    best = tl.maximum(best, tl.load(at + 2 * count * step, mask=known, other=float("-inf")))
            rest += more_rest
            if ENTROPY:
                moment += more_moment
        tl.store(rest_at, rest, mask=own)
        if ENTROPY:
            tl.store(rest_at + state_stride, moment, mask=own)
        if TOP:
            tl.store(rest_at + 2 * state_stride, best, mask=own)

    @triton.jit(do_not_specialize=["rows", "vocabulary", "state_stride"])
    def _rescue_kernel(
        hidden_ptr,  # (rows, D)
        weight_ptr,  # (V, D)
        label_ptr,  # (rows,) int64
        state_ptr,  # (5 or 6, C) fp32, updated
        pull_ptr,  # (rows, D) fp32, written
        hidden_stride,
        weight_stride,
        pull_stride,
        rows,
        vocabulary,
        state_stride,
        inner,
        limit,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_V: tl.constexpr,
        WATCHED: tl.constexpr,
        PULL: tl.constexpr,
    ):
        """Rows whose rest is beyond `limit`, anew, from their largest score; any other as it is.

        One program per WATCHED rows, as far apart as can be: those that are computed anew are often neighbours.
        """
        rest_ptr = state_ptr + 3 * state_stride
        first = tl.program_id(0).to(tl.int64)
        watched = first + tl.num_programs(0) * tl.arange(0, WATCHED)
        seen = tl.load(rest_ptr + watched, mask=watched < rows, other=0.0)
        if tl.max((seen > limit).to(tl.int32), 0) > 0:  # not where it is NaN
            for place in range(WATCHED):
                row = first + place * tl.num_programs(0)
                if tl.load(rest_ptr + row, mask=row < rows, other=0.0) > limit:
                    at = tl.arange(0, BLOCK_D)
                    hidden = tl.load(hidden_ptr + row * hidden_stride + at, mask=at < D, other=0.0).to(tl.float32)
                    label = tl.load(label_ptr + row)
                    reference = -1e30
                    rest = 0.0
                    moment = 0.0
                    pull = tl.zeros((BLOCK_D,), tl.float32)
                    for start in range(0, vocabulary, BLOCK_V):
                        column = start + tl.arange(0, BLOCK_V).to(tl.int64)
                        weight = tl.load(
                            weight_ptr + column[:, None] * weight_stride + at[None, :],
                            mask=(column < vocabulary)[:, None] & (at < D)[None, :], other=0.0,
                        ).to(tl.float32)  # fmt: skip
                        score = tl.sum(weight * hidden[None, :], 1) * inner
                        score = tl.where((column < vocabulary) & (column != label), score, float("-inf"))
                        raised = tl.maximum(reference, tl.max(score, 0))
                        shift = reference - raised
                        shrink = tl.exp(shift)
                        moment = shrink * (moment + rest * tl.where(rest > 0, shift, 0.0))
                        drop = score - raised
                        share = tl.exp(drop)
                        rest = shrink * rest + tl.sum(share, 0)
                        moment += tl.sum(share * tl.where(share > 0, drop, 0.0), 0)
                        pull = shrink * pull + tl.sum(share[:, None] * weight, 0)
                        reference = raised
                    tl.store(state_ptr + 2 * state_stride + row, reference)
                    tl.store(rest_ptr + row, rest)
                    tl.store(state_ptr + 4 * state_stride + row, moment)
                    if PULL:
                        tl.store(pull_ptr + row * pull_stride + at, pull, mask=at < D)


# By device and D, as far as tried: the share that scores are short of, or None where the kernels are not to be used.
_lost: dict[tuple[torch.device, int], float | None] = {}


def serves(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the kernels serve hidden states (N, D) and a head (V, D): bf16, on a Hopper where a trial went well."""
    if triton is None or not hidden.is_cuda or torch.version.hip or not hidden.dtype == weight.dtype == torch.bfloat16:
        return False
    if torch.cuda.get_device_capability(hidden.device) != (9, 0) or not all(map(can_be_described, (hidden, weight))):
        return False
    key = hidden.device, hidden.shape[1]
    if key not in _lost:
        with torch.cuda.device_of(hidden):  # on which a kernel is launched; it may not be the current one
            found = trial(hidden.device, hidden.shape[1], hidden.dtype)
        _lost[key] = None if isinstance(found, str) else found
        if isinstance(found, str):
            warnings.warn(f"the head is multiplied by a library, which is slower: {found}", stacklevel=2)
    return _lost[key] is not None


def trial(device: torch.device, d: int, dtype: torch.dtype) -> str | float:
    """The share that scores fall short by, or why not to use the kernels: a few tiles, compared with fp64."""
    rows, lost = BLOCK_M + 8, 0.0
    draw = torch.Generator(device).manual_seed(0)
    try:
        # With all that a pass with a gradient asks for and with nothing; all tiles by one program.
        for width, all_of_it in ((BLOCK_N + 40, True), (2 * BLOCK_N, False)):
            hidden, weight = (
                (torch.randn(size, d, generator=draw, device=device, dtype=torch.float32) / d**0.25).to(dtype)
                for size in (rows, width)
            )
            labels = torch.arange(rows, device=device)
            state = torch.zeros(6, rows, device=device, dtype=torch.float32)
            state[BEST] = -torch.inf
            parts = torch.empty(3 * num_parts(width) * rows, device=device, dtype=torch.float32)
            room = torch.empty(rows, width + -width % 16, device=device, dtype=dtype)
            shares = room[:, :width] if all_of_it else None
            fold(hidden, weight, labels, state, parts, shares, 0, 1.0, entropy=all_of_it, top=all_of_it, programs=1)
            scores = hidden.double() @ weight.double().t()
            scores[labels, labels] = -torch.inf
            expected = scores.exp()
            compared = [(state[REST], expected.sum(1), 1e-3)]
            if shares is not None:
                moment = (expected * scores.clamp(min=-1e3)).sum(1)
                compared += [(state[MOMENT], moment, 1e-3), (state[BEST], scores.amax(1), 1e-3)]
                compared += [(shares, expected, 1e-2)]  # rounded to 8 bits
                lost = 1 - (state[BEST] / scores.amax(1)).mean().item()
            for found, truth, bound in compared:
                if not (found - truth).norm() <= bound * truth.norm():  # nor where it is NaN
                    return "a trial of its kernel gave something else"
    except Exception as error:  # whatever a compiler or a driver has against it
        return f"a trial of its kernel failed ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    return lost


def can_be_described(rows: Tensor) -> bool:
    """Whether TMA reads a matrix (*, D): rows in one piece, apart, which begin at multiples of 16 bytes."""
    apart = rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1]  # not of one row that is expanded
    return apart and not (rows.data_ptr() % 16 or rows.stride(0) * rows.element_size() % 16)


def num_parts(width: int) -> int:
    """Number of sums that a row has for so many entries of the vocabulary."""
    return -(-width // BLOCK_N)


@functools.cache
def num_programs(device: torch.device) -> int:
    """One program for each multiprocessor, whose registers it fills."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def slice_width(tokens: int, width: int, room: int) -> int:
    """Entries of a slice for so few tokens that `room` numbers hold more than `width` of each.

    At 256 tokens a slice of 8,192 occupies a GPU for less time than its launches take the host. In steps that leave the
    sums' bits as they are, and not beyond WIDEST: the longer a product's sum, the more a tensor core cuts off.
    """
    step = PARTS * BLOCK_N
    return max(width, min(room // tokens, WIDEST) // step * step)


def fold(
    hidden: Tensor,  # (rows, D)
    weight: Tensor,  # (width, D), a slice of the head
    labels: Tensor,  # (rows,) int64
    state: Tensor,  # (5 or 6, rows) fp32, updated
    parts: Tensor,  # fp32, room for (3, num_parts(width), rows)
    shares: Tensor | None,  # (rows, width), written
    first: int,  # the label of the slice's first entry
    inner: float,
    entropy: bool,
    top: bool,
    programs: int | None = None,  # that share the tiles, one a multiprocessor; a trial has one
) -> None:
    """Add a slice's sums to the state, and write its shares."""
    rows, width = len(hidden), len(weight)
    inner *= 1 + (_lost.get((hidden.device, hidden.shape[1])) or 0.0)
    described = (
        TensorDescriptor.from_tensor(hidden, [BLOCK_M, BLOCK_K]),
        TensorDescriptor.from_tensor(weight, [BLOCK_N, BLOCK_K]),
        None if shares is None else TensorDescriptor.from_tensor(shares, [BLOCK_M, BLOCK_N // 2]),
    )
    tiles = -(-rows // BLOCK_M) * num_parts(width)
    _shares_kernel[(min(tiles, programs or num_programs(hidden.device)),)](
        *described, labels, state, parts, rows, width, first, state.stride(0), inner,
        D=hidden.shape[1], BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, GROUP=GROUP, WHOLE=width % BLOCK_N == 0,
        SHARES=shares is not None, ENTROPY=entropy, TOP=top, num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    _sum_kernel[(-(-rows // SUMMED),)](
        parts, state, rows, num_parts(width), state.stride(0), BLOCK=SUMMED, PARTS=PARTS, ENTROPY=entropy, TOP=top,
        num_warps=1,
    )  # fmt: skip


def rescue(hidden: Tensor, weight: Tensor, labels: Tensor, state: Tensor, pull: Tensor | None, inner: float) -> None:
    """Compute rows anew whose sums are beyond what fp32 adds up well, by the whole head (V, D)."""
    rows, (vocabulary, d) = len(hidden), weight.shape
    _rescue_kernel[(-(-rows // WATCHED),)](
        hidden, weight, labels, state, pull, hidden.stride(0), weight.stride(0),
        0 if pull is None else pull.stride(0), rows, vocabulary, state.stride(0), inner, LIMIT,
        **rescue_blocks(d), PULL=pull is not None,
    )  # fmt: skip


def rescue_blocks(d: int) -> dict[str, int]:
    """Sizes for a program that computes a row anew: the more of the head at a time, the fewer waits."""
    block = triton.next_power_of_2(d)
    return dict(D=d, BLOCK_D=block, BLOCK_V=max(1, 32768 // block), WATCHED=WATCHED, num_warps=16)

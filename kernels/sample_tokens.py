"""The next token of each sequence and its log-probability, from logits in memory: one launch, no more tensors.

    s_v = logit_v / temperature        logp_v = s_v - log sum_w exp(s_w)
    token = the first v whose exp(s_0) + ... + exp(s_v) exceeds uniform * sum_w exp(s_w)          (inverse CDF)

    logits (S, V), uniforms (S,) in [0, 1)  ->  tokens (S,) int64, logp (S,) fp32

A token depends on its own row and its own uniform number alone: the same for every S, order of rows and repeat of the
call. A logit of -inf is never drawn. PyTorch's own way (log_softmax, exp, cumsum, searchsorted, gather) keeps three
more (S, V) fp32 tensors, 117 MiB at 64 x 151,936, in seven launches.
"""

from typing import Any

import torch
from torch import Tensor

from lowmem_grpo.kernels.backend import Backend, runs_by_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS
    triton: Any = None

BLOCK = 4096  # logits of one pass through the loop: 16 to each thread of 8 warps
LOGITS = 2**21  # of the twin at a time, in whole rows: its scratch is three such fp32 tensors, 24 MiB

if triton is not None:

    @triton.jit
    def _choose_kernel(
        logits_ptr,  # (S, V)
        uniforms_ptr,  # (S,) fp32, or None: tokens are given
        tokens_ptr,  # (S,) int64, written where uniforms are given
        logprobs_ptr,  # (S,) fp32, written
        row_stride,
        inverse_temperature,
        V: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Draw a token of one row a program: sum exp(s - max s) by blocks, then find the block and place."""
        row = tl.program_id(0).to(tl.int64)
        logits_ptr += row * row_stride
        peak = tl.full((), -3.4028234663852886e38, tl.float32)  # the lowest, not -inf: -inf - -inf is NaN
        total = tl.zeros((), tl.float32)
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            logit = tl.load(logits_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(peak, tl.max(logit, 0))
            total *= tl.exp((peak - higher) * inverse_temperature)
            total += tl.sum(tl.exp((logit - higher) * inverse_temperature), 0)
            peak = higher
        if uniforms_ptr is None:
            token = tl.load(tokens_ptr + row)
        else:
            threshold = tl.load(uniforms_ptr + row) * total
            token = tl.full((), V, tl.int64)
            last = tl.zeros((), tl.int64)
            passed = tl.zeros((), tl.float32)
            for start in range(0, V, BLOCK):
                at = start + tl.arange(0, BLOCK)
                logit = tl.load(logits_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32)
                share = tl.exp((logit - peak) * inverse_temperature)
                reached = (passed + tl.cumsum(share, 0) > threshold) & (share > 0)
                token = tl.minimum(token, tl.min(tl.where(reached, at, V), 0).to(tl.int64))
                last = tl.maximum(last, tl.max(tl.where(share > 0, at, 0), 0).to(tl.int64))
                passed += tl.sum(share, 0)
            token = tl.where(token < V, token, last)  # a uniform within rounding of 1
            tl.store(tokens_ptr + row, token)
        # A given token outside of the vocabulary reads nothing: NaN.
        chosen = tl.load(logits_ptr + token, mask=(token >= 0) & (token < V), other=float("nan")).to(tl.float32)
        tl.store(logprobs_ptr + row, (chosen - peak) * inverse_temperature - tl.log(total))

    @triton.jit
    def _score(logit, scale, softcap):
        score = logit.to(tl.float32)
        if scale is not None:
            score *= scale
        if softcap is not None:
            e = tl.exp(-2.0 * tl.abs(score / softcap))
            score = softcap * tl.where(score < 0, e - 1.0, 1.0 - e) / (1.0 + e)
        return score

    @triton.jit
    def _sums_kernel(
        logits_ptr,  # (S, V)
        state_ptr,  # (S, chunks, 2) fp32, written: peak, and sum of exp((s - peak) / temperature)
        row_stride,
        scale,  # or None
        softcap,  # or None
        inverse_temperature,
        V: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program per row and BLOCK scores."""
        row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
        at = chunk * BLOCK + tl.arange(0, BLOCK)
        score = _score(tl.load(logits_ptr + row * row_stride + at, mask=at < V, other=0.0), scale, softcap)
        score = tl.where(at < V, score, float("-inf"))
        peak = tl.maximum(tl.max(score, 0), -3.4028234663852886e38)
        state_ptr += (row * tl.num_programs(1) + chunk) * 2
        tl.store(state_ptr, peak)
        tl.store(state_ptr + 1, tl.sum(tl.exp((score - peak) * inverse_temperature), 0))

    @triton.jit
    def _pick_kernel(
        logits_ptr,  # (S, V)
        state_ptr,  # (S, chunks, 2) fp32
        uniforms_ptr,  # (completions, tokens) fp32
        completions_ptr,  # (S,) int64
        token_ids_ptr,  # (S,) int64, written
        positions_ptr,  # (S,) int64, overwritten
        prefilled_ptr,  # (S,) int64
        out_ptr,  # (3, S) fp64, written
        row_stride,
        uniforms_stride,
        tokens,
        scale,
        softcap,
        inverse_temperature,
        V: tl.constexpr,
        BLOCK: tl.constexpr,
        CHUNKS: tl.constexpr,  # at least as many as there are, a power of two
    ):
        """One program a row: the chunk that its uniform falls in, and the token in it."""
        row = tl.program_id(0).to(tl.int64)
        chunks: tl.constexpr = (V + BLOCK - 1) // BLOCK
        chunk = tl.arange(0, CHUNKS)
        state_ptr += (row * chunks + chunk) * 2
        peaks = tl.load(state_ptr, mask=chunk < chunks, other=-3.4028234663852886e38)
        sums = tl.load(state_ptr + 1, mask=chunk < chunks, other=0.0)
        peak = tl.max(peaks, 0)
        sums *= tl.exp((peaks - peak) * inverse_temperature)
        total = tl.sum(sums, 0)
        position, prefilled = tl.load(positions_ptr + row), tl.load(prefilled_ptr + row)
        uniform_at = tl.load(completions_ptr + row) * uniforms_stride + position - prefilled
        threshold = tl.load(uniforms_ptr + uniform_at) * total
        reached = (tl.cumsum(sums, 0) > threshold) & (sums > 0)
        picked = tl.min(tl.where(reached, chunk, CHUNKS), 0)
        last = tl.max(tl.where(sums > 0, chunk, 0), 0)
        picked = tl.where(picked < CHUNKS, picked, last)  # a uniform within rounding of 1
        passed = tl.sum(tl.where(chunk < picked, sums, 0.0), 0)
        logits_ptr += row * row_stride
        at = picked * BLOCK + tl.arange(0, BLOCK)
        score = _score(tl.load(logits_ptr + at, mask=at < V, other=0.0), scale, softcap)
        share = tl.where(at < V, tl.exp((score - peak) * inverse_temperature), 0.0)
        reached = (passed + tl.cumsum(share, 0) > threshold) & (share > 0)
        token = tl.min(tl.where(reached, at, V), 0)
        last = tl.max(tl.where(share > 0, at, 0), 0)
        token = tl.where(token < V, token, last)
        chosen = _score(tl.load(logits_ptr + token), scale, softcap)
        logprob = ((chosen - peak) * inverse_temperature - tl.log(total)).to(tl.float64)
        tl.store(token_ids_ptr + row, token.to(tl.int64))
        tl.store(positions_ptr + row, tl.minimum(position + 1, prefilled + tokens - 1))
        rows = tl.num_programs(0)
        tl.store(out_ptr + row, token.to(tl.float64))
        tl.store(out_ptr + rows + row, logprob)
        tl.store(out_ptr + 2 * rows + row, logprob)


@torch.no_grad()
def sample_tokens(
    logits: Tensor,  # (S, V), not changed
    uniforms: Tensor,  # (S,) fp32 in [0, 1)
    *,
    temperature: float,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """(tokens (S,) int64 drawn by inverse CDF, their log-probabilities (S,) fp32). No gradient.

    A row without a single finite logit has no distribution: its token is in [0, V) and its log-probability NaN.

    Raises:
        ValueError: shapes or dtypes that do not belong together, or temperature not above 0.
        RuntimeError: backend="triton" where it cannot run.
    """
    _check(logits, uniforms, torch.float32, temperature, "uniforms")
    if runs_by_triton(backend, logits.device.type):
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        return tokens, _launch(logits, uniforms, tokens, temperature)
    tokens, logprobs = (
        logits.new_empty(len(logits), dtype=torch.int64),
        logits.new_empty(len(logits), dtype=torch.float),
    )
    for rows in _parts(logits):
        score = _scores(logits[rows], temperature)
        share = score.exp()
        reached = share.cumsum(-1)
        threshold = uniforms[rows, None] * reached[:, -1:]
        chosen = torch.searchsorted(reached, threshold, right=True)
        if chosen.is_cuda or (chosen == logits.shape[1]).any():  # a GPU would be waited for; the rest is rare
            chosen = torch.minimum(chosen, _last_positive(share))
        tokens[rows] = chosen[:, 0]
        # Not by logsumexp: more than one thread would add up a row that is alone in another order.
        logprobs[rows] = score.gather(1, tokens[rows, None])[:, 0] - reached[:, -1].log()
    return tokens, logprobs


@torch.no_grad()
def selective_logprobs(
    logits: Tensor,  # (S, V), not changed
    tokens: Tensor,  # (S,) int64 in [0, V)
    *,
    temperature: float,
    backend: Backend = "auto",
) -> Tensor:
    """Log-probability of one token of each row, (S,) fp32: log_softmax and gather without the log_softmax. No gradient.

    A token outside of [0, V) has NaN by the kernel; the twin raises, as gather does.

    Raises: as sample_tokens.
    """
    _check(logits, tokens, torch.int64, temperature, "tokens")
    if runs_by_triton(backend, logits.device.type):
        return _launch(logits, None, tokens.contiguous(), temperature)
    parts = [_logprobs(_scores(logits[rows], temperature), tokens[rows]) for rows in _parts(logits)]
    return torch.cat(parts) if parts else logits.new_empty(0, dtype=torch.float32)


@torch.no_grad()
def sample_next(
    logits: Tensor,  # (S, V), not changed
    uniforms: Tensor,  # (completions, tokens) fp32 in [0, 1)
    completions: Tensor,  # (S,) int64
    token_ids: Tensor,  # (S,) int64, overwritten by what is drawn
    positions: Tensor,  # (S,) int64, moved on by one
    prefilled: Tensor,  # (S,) int64
    *,
    temperature: float,
    scale: float = 1.0,
    softcap: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Draw each row's next token and move the row on: (3, S) fp64 of token, log-probability and once more that.

    Row i is drawn by uniforms[completions[i], positions[i] - prefilled[i]] from softcap tanh(scale logits / softcap).
    No position goes beyond the last of the uniforms: a row that has them all draws its last token again and again.
    Two launches, in which a row's logits are summed by S V / BLOCK programs, where sample_tokens has S.

    Raises:
        ValueError: shapes, dtypes or strides that do not belong together, or temperature not above 0.
        RuntimeError: backend="triton" where it cannot run.
    """
    _check_next(logits, uniforms, temperature, completions, token_ids, positions, prefilled)
    S, V = logits.shape
    if runs_by_triton(backend, logits.device.type):
        chunks = triton.cdiv(V, BLOCK)
        state = torch.empty(S, chunks, 2, dtype=torch.float32, device=logits.device)
        out = torch.empty(3, S, dtype=torch.float64, device=logits.device)
        if S:
            terms = (None if scale == 1 else scale, softcap, 1 / temperature)
            with torch.cuda.device_of(logits):
                _sums_kernel[(S, chunks)](logits, state, logits.stride(0), *terms, V=V, BLOCK=BLOCK, num_warps=8)
                _pick_kernel[(S,)](
                    logits, state, uniforms, completions, token_ids, positions, prefilled, out, logits.stride(0),
                    uniforms.stride(0), uniforms.shape[1], *terms, V=V, BLOCK=BLOCK,
                    CHUNKS=triton.next_power_of_2(chunks), num_warps=8,
                )  # fmt: skip
        return out
    now = positions - prefilled
    scores = logits if scale == 1 else logits.float() * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores.float() / softcap)
    tokens, logprobs = sample_tokens(scores, uniforms[completions, now], temperature=temperature, backend="torch")
    token_ids.copy_(tokens)
    torch.minimum(positions + 1, prefilled + uniforms.shape[1] - 1, out=positions)
    return torch.stack([tokens.double(), logprobs.double(), logprobs.double()])


def _launch(logits: Tensor, uniforms: Tensor | None, tokens: Tensor, temperature: float) -> Tensor:
    logprobs = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    if len(logits):
        with torch.cuda.device_of(logits):
            _choose_kernel[(len(logits),)](
                logits, None if uniforms is None else uniforms.contiguous(), tokens, logprobs, logits.stride(0),
                1 / temperature, V=logits.shape[1], BLOCK=min(BLOCK, triton.next_power_of_2(logits.shape[1])),
                num_warps=8,
            )  # fmt: skip
    return logprobs


def _parts(logits: Tensor) -> list[slice]:
    rows = max(1, LOGITS // logits.shape[1])
    return [slice(row, row + rows) for row in range(0, len(logits), rows)]


def _scores(logits: Tensor, temperature: float) -> Tensor:
    """fp32 logits less their row's largest, over temperature: at a low one the digits that count would be lost else."""
    wide = logits.float()
    return (wide - wide.amax(-1, keepdim=True)).div_(temperature)


def _logprobs(score: Tensor, tokens: Tensor) -> Tensor:
    """(R, V) fp32 scores -> (R,) log-probability of each row's token."""
    return score.gather(1, tokens[:, None])[:, 0] - score.logsumexp(-1)


def _last_positive(share: Tensor) -> Tensor:
    """(R, 1) the last place of each row with a share, for a uniform within rounding of 1."""
    return share.shape[1] - 1 - (share.flip(-1) > 0).int().argmax(-1, keepdim=True)


def _check(logits: Tensor, others: Tensor, dtype: torch.dtype, temperature: float, name: str) -> None:
    if logits.dim() != 2 or not logits.is_floating_point() or logits.shape[1] == 0:
        raise ValueError(f"logits must be (S, V) floating-point numbers, not {tuple(logits.shape)} {logits.dtype}")
    if others.shape != logits.shape[:1] or others.dtype != dtype:
        raise ValueError(f"{name} must be ({len(logits)},) {dtype}, not {tuple(others.shape)} {others.dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}; the greedy token is logits.argmax(-1)")


def _check_next(logits: Tensor, uniforms: Tensor, temperature: float, *rows: Tensor) -> None:
    if logits.dim() != 2 or not logits.is_floating_point() or logits.shape[1] == 0 or logits.stride(1) != 1:
        raise ValueError(f"logits must be (S, V) floating-point numbers with a last stride of 1, not {logits.shape}")
    if uniforms.dim() != 2 or uniforms.dtype != torch.float32 or uniforms.stride(1) != 1:
        raise ValueError(f"uniforms must be (completions, tokens) fp32, not {tuple(uniforms.shape)} {uniforms.dtype}")
    for name, given in zip(("completions", "token_ids", "positions", "prefilled"), rows, strict=True):
        if given.shape != logits.shape[:1] or given.dtype != torch.int64 or not given.is_contiguous():
            raise ValueError(f"{name} must be contiguous ({len(logits)},) torch.int64, not {tuple(given.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}; the greedy token is logits.argmax(-1)")

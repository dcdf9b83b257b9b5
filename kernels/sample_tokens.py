"""The next token of each sequence and its log-probability, from logits in memory: one launch, no more tensors.

    s_v = logit_v / temperature        logp_v = s_v - log sum_w exp(s_w)
    token = the first v whose exp(s_0) + ... + exp(s_v) exceeds uniform * sum_w exp(s_w)          (inverse CDF)

    logits (S, V), uniforms (S,) in [0, 1)  ->  tokens (S,) int64, logp (S,) fp32

A token depends on its own row and its own uniform number alone: the same for every S, order of rows and repeat of the
call. A logit of -inf is never drawn. PyTorch's own way (log_softmax, exp, cumsum, searchsorted, gather) keeps three
more (S, V) fp32 tensors, 117 MiB at 64 x 151,936, in seven launches.
"""

import os
from typing import Any, Literal

import torch
from torch import Tensor

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


@torch.no_grad()
def sample_tokens(
    logits: Tensor,  # (S, V), not changed
    uniforms: Tensor,  # (S,) fp32 in [0, 1)
    *,
    temperature: float,
    backend: Literal["auto", "triton", "torch"] = "auto",
) -> tuple[Tensor, Tensor]:
    """(tokens (S,) int64 drawn by inverse CDF, their log-probabilities (S,) fp32). No gradient.

    A row without a single finite logit has no distribution: its token is in [0, V) and its log-probability NaN.

    Raises:
        ValueError: shapes or dtypes that do not belong together, or temperature not above 0.
        RuntimeError: backend="triton" where it cannot run.
    """
    _check(logits, uniforms, torch.float32, temperature, "uniforms")
    if _runs_by_triton(backend, logits.device.type):
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
    backend: Literal["auto", "triton", "torch"] = "auto",
) -> Tensor:
    """Log-probability of one token of each row, (S,) fp32: log_softmax and gather without the log_softmax. No gradient.

    A token outside of [0, V) has NaN by the kernel; the twin raises, as gather does.

    Raises: as sample_tokens.
    """
    _check(logits, tokens, torch.int64, temperature, "tokens")
    if _runs_by_triton(backend, logits.device.type):
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
    backend: Literal["auto", "triton", "torch"] = "auto",
) -> Tensor:
    """Draw each row's next token and move the row on: (3, S) fp64 of token, log-probability and once more that.

    Row i is drawn by uniforms[completions[i], positions[i] - prefilled[i]] from softcap tanh(scale logits / softcap).
    No position goes beyond the last of the uniforms: a row that has them all draws its last token again and again.
    """
    now = positions - prefilled
    scores = logits if scale == 1 else logits * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
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

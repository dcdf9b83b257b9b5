"""The choice of the next token: penalty, temperature, truncation, and a draw."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lowmem_grpo.kernels.sample_tokens import sample_tokens, selective_logprobs

NOT_FINITE = (
    "the model cannot be sampled from, since its logits are not finite: a weight is not, or activations overflow the "
    "compute dtype (float16 ends at 65,504, bfloat16 where float32 does)"
)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    max_completion_length: int
    temperature: float  # 0 is greedy
    top_p: float = 1.0  # 1 is off
    top_k: int = 0  # 0 is off
    min_p: float | None = None
    repetition_penalty: float = 1.0  # 1 is off
    stop_strings: tuple[str, ...] = ()  # a completion ends with the token that completes one, and keeps it

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def truncates(self) -> bool:
        return self.top_p < 1 or self.top_k > 0 or bool(self.min_p)


class Choice(NamedTuple):
    """One token of each row, (S,) each."""

    token_ids: Tensor  # int64
    logprobs: Tensor  # fp32, under temperature alone, as a training forward computes it
    proposal_logprobs: Tensor  # fp32, as Completion has them; of a greedy token the same as logprobs


def choose(
    logits: Tensor,  # (S, V), not changed
    uniforms: Tensor,  # (S,) fp32 in [0, 1)
    seen: Tensor | None,  # (S, V) bool, tokens of the text so far; needed for a repetition penalty
    params: SamplingParams,
) -> Choice:
    """Draw a token of each row, after penalty, temperature, top-k, top-p and min-p in transformers' order."""
    penalized = logits if seen is None else penalize(logits, seen, params.repetition_penalty)
    if params.greedy:
        token_ids = penalized.argmax(-1)
        logprobs = selective_logprobs(logits, token_ids, temperature=1.0)
        return Choice(token_ids, logprobs, logprobs)
    if penalized is logits and not params.truncates:
        token_ids, logprobs = sample_tokens(logits, uniforms, temperature=params.temperature)
        return Choice(token_ids, logprobs, logprobs)
    left = truncate(penalized, params)
    token_ids, drawn = sample_tokens(left, uniforms, temperature=1.0)
    logprobs = selective_logprobs(logits, token_ids, temperature=params.temperature)
    if penalized is logits:  # drawn is logprobs over what is left: the share cancels
        return Choice(token_ids, logprobs, logprobs)
    if not params.truncates:
        return Choice(token_ids, logprobs, drawn)
    return Choice(token_ids, logprobs, drawn + log_share(logits.float() / params.temperature, left))


def log_share(
    scores: Tensor,  # (S, V)
    left: Tensor,  # (S, V), -inf where a token is ruled out
) -> Tensor:
    """Log of the probability, in softmax(scores), of the tokens that are left, (S,)."""
    return scores.masked_fill(left.isneginf(), -torch.inf).logsumexp(-1) - scores.logsumexp(-1)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits of tokens that were seen: divided by the penalty if positive, else times it (arXiv:1909.05858)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def truncate(logits: Tensor, params: SamplingParams) -> Tensor:
    """(S, V) fp32 scores under temperature, with -inf where a token is ruled out."""
    scores = logits.float() / params.temperature
    nothing: Any = None  # the text so far, which these three do not look at
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(nothing, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(nothing, scores)
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(nothing, scores)
    return scores

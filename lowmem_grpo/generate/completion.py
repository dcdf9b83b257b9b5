"""A completion: token ids, and the sampler's log-probabilities of each."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Conversation:
    """The turns of a completion in which tools answer, and the results between them."""

    messages: list[dict[str, Any]]  # of the assistant and of tools, as chats have them
    sampled: Tensor  # (T,) bool on the CPU: the tokens that the policy drew; the others are results, and a turn's frame
    num_calls: int  # of tools, that were answered
    num_failures: int  # calls of tools that raised, took too long or are not there


@dataclass(frozen=True)
class Completion:
    ids: list[int]  # the end-of-sequence token included, where one was sampled
    # (T,) fp32 on the CPU each, or None where the sampler does not say. Of each token: its log-probability under
    # temperature alone, which training computes too; and in the distribution that it was drawn from, after penalty and
    # truncation, plus the log of the share, under temperature alone, of the tokens that truncation left. An importance
    # weight divides by the latter, so that its mean is 1 whatever was truncated.
    logprobs: Tensor | None
    proposal_logprobs: Tensor | None
    finish: str  # "eos", "stop" (a stop string) or "length" (cut off)
    conversation: Conversation | None = None  # None where a run has no tools

    @property
    def sampled_ids(self) -> list[int]:
        """The tokens that the policy drew."""
        if self.conversation is None:
            return self.ids
        return [one for one, drawn in zip(self.ids, self.conversation.sampled.tolist(), strict=True) if drawn]

    @property
    def num_sampled(self) -> int:
        """Number of tokens that the policy drew."""
        return len(self.ids) if self.conversation is None else int(self.conversation.sampled.sum())

    @property
    def is_finite(self) -> bool:
        """True unless the sampler found a log-probability that is not finite."""
        return self.logprobs is None or bool(self.logprobs.isfinite().all())

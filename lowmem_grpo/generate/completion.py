"""A completion: token ids, and the sampler's log-probabilities of each."""

from dataclasses import dataclass

from torch import Tensor


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

    @property
    def is_finite(self) -> bool:
        """True unless the sampler found a log-probability that is not finite."""
        return self.logprobs is None or bool(self.logprobs.isfinite().all())

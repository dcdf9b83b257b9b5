"""The data that sampling hands to the update: prompts, completions, and all that a step knows of them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.generate.completion import Completion


@dataclass(frozen=True)
class Rollout:
    """B = prompts x num_generations completions, group after group, and M tokens, completion after completion.

    Tensors over tokens are flat, (M,): token t of completion b stands at offsets[b] + t. So a micro-batch in any layout
    reads and writes them by index.
    """

    prompts: list[Prompt]  # B / num_generations
    completions: list[Completion]  # B
    offsets: Tensor  # (B + 1,) int64
    sampling_logprobs: Tensor | None  # (M,) fp32, by the sampler, under temperature alone; None if it does not say
    proposal_logprobs: Tensor | None  # (M,) fp32, what an importance weight divides by; None where that is None
    rewards: Tensor  # (B, R) fp32, NaN where a reward does not apply
    advantages: Tensor  # (B,) fp32
    completion_mask: Tensor  # (B,) bool: whether the completion's tokens count
    metrics: dict[str, float]  # lengths, rewards, and what the reward functions logged
    # For people to read, a row a completion: prompt, completion, rewards, advantage, logged columns.
    table: dict[str, list]
    old_logprobs: Tensor | None = None  # (M,) of the policy before the update; None: those of its first forward
    ref_logprobs: Tensor | None = None  # (M,) of the reference, where there is a KL
    learn_mask: Tensor | None = None  # (M,) bool, the tokens that top_entropy_quantile leaves; None: all
    token_advantages: Tensor | None = None  # (M,) fp32, in place of advantages where each token has its own
    values: Tensor | None = None  # (M,) fp32, the critic's before the update, where there is one
    returns: Tensor | None = None  # (M,) fp32, what the critic learns to expect
    sampled: Tensor | None = None  # (M,) bool, the tokens that the policy drew, without tools' results; None: all
    num_replayed_tokens: int = 0  # the last ones of the whole rollout, which the policy of an earlier step sampled
    first_token_index: int = 0  # where these tokens stand in the rollout that this one is a part of

    @property
    def num_generations(self) -> int:
        return len(self.completions) // len(self.prompts)

    @property
    def num_tokens(self) -> int:
        """M, the tokens of all completions."""
        return int(self.offsets[-1])

    @property
    def num_sampled(self) -> Tensor:
        """(B,) int64 on the CPU: the number of tokens that the policy drew in each completion."""
        return self.offsets.diff() if self.sampled is None else self.by_completion(self.sampled.long())

    @property
    def num_counted_tokens(self) -> int:
        """The number of sampled tokens in completions that count."""
        return int((self.num_sampled * self.completion_mask).sum())

    @property
    def counted(self) -> Tensor:
        """(M,) bool on the CPU: the sampled tokens of completions that count."""
        counted = self.by_token(self.completion_mask)
        return counted if self.sampled is None else counted & self.sampled.cpu()

    @property
    def num_learning_tokens(self) -> int:
        """The number of tokens that count, or of those that top_entropy_quantile leaves."""
        return self.num_counted_tokens if self.learn_mask is None else int(self.learn_mask.sum())

    @property
    def has_advantage(self) -> Tensor:
        """(B,) bool: whether the completion's advantage, or that of one of its tokens, is not 0."""
        if self.token_advantages is None:
            return self.advantages != 0
        return self.by_completion((self.token_advantages != 0).long()) > 0

    @property
    def own_logprobs(self) -> Tensor:
        """The policy's (M,) before the update: as training computes them where a pass did, else the sampler's."""
        known = self.sampling_logprobs if self.old_logprobs is None else self.old_logprobs
        assert known is not None  # needs_old_pass() sees to it
        return known

    @property
    def lengths(self) -> list[int]:
        """Tokens of every completion with its prompt, B of them."""
        return [len(self.prompt_of(b).ids) + len(c.ids) for b, c in enumerate(self.completions)]

    @property
    def counted_lengths(self) -> list[int]:
        """Tokens of each completion that counts, with its prompt."""
        return self.lengths_of(self.completion_mask.tolist())

    @classmethod
    def bare(cls, prompts: list[list[int]], completions: list[list[int]], advantages: Tensor) -> "Rollout":
        """A rollout of ids alone, without rewards, metrics or text, to try or to measure an update."""
        lengths = torch.tensor([0, *map(len, completions)])
        return cls(
            prompts=[Prompt("", ids, {}) for ids in prompts],
            completions=[Completion(ids, None, None, "eos") for ids in completions],
            offsets=lengths.cumsum(0),
            sampling_logprobs=None,
            proposal_logprobs=None,
            rewards=torch.zeros(len(completions), 1),
            advantages=advantages,
            completion_mask=torch.ones(len(completions), dtype=torch.bool),
            metrics={},
            table={},
        )

    def by_token(self, values: Tensor) -> Tensor:
        """Values (B,) of completions on the CPU, at each of their tokens, (M,)."""
        return values.repeat_interleave(self.offsets.diff())

    def by_completion(self, values: Tensor) -> Tensor:
        """The sum of values (M,) over each completion's tokens, (B,) on the CPU."""
        values, owners = values.cpu(), self.by_token(torch.arange(len(self.completions)))
        return values.new_zeros(len(self.completions)).index_add_(0, owners, values)

    def lengths_of(self, chosen: list[bool]) -> list[int]:
        """Tokens of each chosen completion with its prompt; `chosen` has a truth value for each of the B."""
        return [length for length, is_chosen in zip(self.lengths, chosen, strict=True) if is_chosen]

    def prompt_of(self, completion: int) -> Prompt:
        return self.prompts[completion // self.num_generations]

    def mini_batches(self, count: int) -> "list[Rollout]":
        """The rollout split into count ones of equally many prompts, which all have its metrics and table."""
        if count == 1:
            return [self]
        size = len(self.prompts) // count
        return [self._part(start, start + size) for start in range(0, size * count, size)]

    def _part(self, start: int, stop: int) -> "Rollout":
        first, last = start * self.num_generations, stop * self.num_generations
        begin, end = self.offsets[[first, last]].tolist()
        over_tokens = (
            "sampling_logprobs", "proposal_logprobs", "old_logprobs", "ref_logprobs", "learn_mask", "token_advantages",
            "values", "returns", "sampled",
        )  # fmt: skip
        known = {name: getattr(self, name) for name in over_tokens}
        return replace(
            self,
            prompts=self.prompts[start:stop],
            completions=self.completions[first:last],
            offsets=self.offsets[first : last + 1] - begin,
            rewards=self.rewards[first:last],
            advantages=self.advantages[first:last],
            completion_mask=self.completion_mask[first:last],
            first_token_index=self.first_token_index + begin,
            **{name: None if value is None else value[begin:end] for name, value in known.items()},
        )

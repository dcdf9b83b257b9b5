"""What crosses from sampling to the update: prompts, completions, and everything a step knows about them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One row of a dataset, tokenized."""

    text: str | list[dict]  # as the dataset has it: a string, or a list of chat messages
    ids: list[int]
    columns: dict  # the row's other columns, which the reward functions get


@dataclass(frozen=True)
class Completion:
    ids: list[int]  # the end-of-sequence token included, where one was sampled
    # (T,) fp32 on the CPU each, or None where the sampler does not say: each token's log-probability under temperature
    # alone, which training computes too, and in the distribution it was drawn from, after penalty and truncation.
    logprobs: Tensor | None
    behaviour_logprobs: Tensor | None
    finish: str  # "eos", "stop" (a stop string) or "length" (cut off)


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
    rewards: Tensor  # (B, R) fp32, NaN where a reward does not apply
    advantages: Tensor  # (B,) fp32
    completion_mask: Tensor  # (B,) bool: whether the completion's tokens count
    metrics: dict[str, float]  # lengths, rewards, and what the reward functions logged
    table: dict[str, list]  # B rows for people to read: prompt, completion, rewards, advantage, logged columns

    @property
    def num_generations(self) -> int:
        return len(self.completions) // len(self.prompts)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every completion with its prompt, B of them."""
        return [len(self.prompt_of(b).ids) + len(c.ids) for b, c in enumerate(self.completions)]

    @classmethod
    def bare(cls, prompts: list[list[int]], completions: list[list[int]], advantages: Tensor) -> "Rollout":
        """Of ids alone, without rewards, metrics or text: what an update needs, to try or to measure one."""
        lengths = torch.tensor([0, *map(len, completions)])
        return cls(
            prompts=[Prompt("", ids, {}) for ids in prompts],
            completions=[Completion(ids, None, None, "eos") for ids in completions],
            offsets=lengths.cumsum(0),
            sampling_logprobs=None,
            rewards=torch.zeros(len(completions), 1),
            advantages=advantages,
            completion_mask=torch.ones(len(completions), dtype=torch.bool),
            metrics={},
            table={},
        )

    def prompt_of(self, completion: int) -> Prompt:
        return self.prompts[completion // self.num_generations]

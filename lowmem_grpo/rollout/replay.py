"""Groups of earlier steps that had a difference, kept to fill up steps that have too few of their own."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem_grpo.config.select import FINISHES
from lowmem_grpo.generate.completion import Completion

_LOGPROBS = ("logprobs", "proposal_logprobs")  # of a Completion


@dataclass(frozen=True)
class Group:
    position: int  # of its prompt in the stream of prompts
    completions: list[Completion]  # num_generations, with the log-probabilities that they were drawn with
    rewards: Tensor  # (num_generations, R)


class ReplayBuffer:
    """The newest `size` groups, each of which is replayed at most once."""

    def __init__(self, size: int):
        self.size = size
        self.groups: list[Group] = []  # a list that add, take and load replace, and never change
        self.saved: tuple[list[Group], dict[str, Tensor]] = (self.groups, {})  # some groups, and state() of them

    def add(self, groups: list[Group]) -> None:
        self.groups = (self.groups + groups)[-self.size :] if self.size else []

    def take(self, count: int) -> list[Group]:
        """Up to count groups, the newest first: their importance weights are nearest to 1."""
        kept = max(0, len(self.groups) - count)
        self.groups, taken = self.groups[:kept], self.groups[kept:]
        return taken[::-1]

    def state(self) -> dict[str, Tensor]:
        """All groups, for a checkpoint: flat over groups, completions and tokens."""
        if self.saved[0] is not self.groups:
            self.saved = self.groups, self._tensors()
        return self.saved[1]

    def _tensors(self) -> dict[str, Tensor]:
        completions = [completion for group in self.groups for completion in group.completions]
        if not completions:
            return {}
        return {
            "positions": torch.tensor([group.position for group in self.groups]),
            "rewards": torch.stack([group.rewards for group in self.groups]),
            "lengths": torch.tensor([len(completion.ids) for completion in completions]),
            "finishes": torch.tensor([FINISHES.index(completion.finish) for completion in completions]),
            "ids": torch.tensor([token for completion in completions for token in completion.ids]),
            **{name: torch.cat([getattr(completion, name) for completion in completions]) for name in _LOGPROBS},
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what state() returned."""
        if not tensors:
            return
        lengths, size = tensors["lengths"].tolist(), tensors["rewards"].shape[1]
        pieces = {name: tensors[name].split(lengths) for name in ("ids", *_LOGPROBS)}
        completions = [
            Completion(pieces["ids"][b].tolist(), *(pieces[name][b] for name in _LOGPROBS), finish=FINISHES[finish])
            for b, finish in enumerate(tensors["finishes"].tolist())
        ]
        self.groups = [
            Group(position, completions[g * size : (g + 1) * size], tensors["rewards"][g])
            for g, position in enumerate(tensors["positions"].tolist())
        ]

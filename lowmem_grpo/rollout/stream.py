"""The endless stream of prompts that a run draws from: epochs, each in a random order of its own."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.sections import RunFields
from lowmem_grpo.data.order import index_at
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.output.saved import whole
from lowmem_grpo.rollout.replay import ReplayBuffer


def prompts_at(prompts: Sequence[Prompt], positions: Iterable[int], config: GRPOConfig) -> list[Prompt]:
    """The prompts at these positions of the endless stream of epochs, each in a random order of its own.

    A function of its arguments alone, so that a resumed run sees the prompts it would have seen.
    """
    return [prompts[index_at(position, len(prompts), config)] for position in positions]


def next_positions(
    position: int, count: int, dull_prompts: set[int], num_prompts: int, config: GRPOConfig
) -> list[int]:
    """The next count positions from `position` on, without some of those of dull prompts.

    A dull prompt, whose last group had no difference, is passed over with the chance curriculum_skip, drawn anew at
    each position. A function of its arguments alone, so that a resumed run draws the positions it would have drawn.
    """
    chosen = []
    while len(chosen) < count:
        skips = (
            index_at(position, num_prompts, config) in dull_prompts
            and _chance(position, config) < config.curriculum_skip
        )
        chosen += [] if skips else [position]
        position += 1
    return chosen


def _chance(position: int, config: RunFields) -> float:
    return torch.rand((), generator=torch.Generator().manual_seed(config.seed * 2**31 + position)).item()


@dataclass
class Stream:
    """A run's place in its endless stream of prompts, and the memory of those it has seen.

    A part of a checkpoint, and so is its replay buffer.
    """

    replay: ReplayBuffer
    position: int = 0  # of the next prompt
    # By index, those whose last group had no difference; kept with curriculum_skip alone.
    dull_prompts: set[int] = field(default_factory=set)

    def state(self) -> dict[str, Any]:
        """The position, and the indices of the dull prompts."""
        return {"position": self.position, "dull_prompts": sorted(self.dull_prompts)}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what state() returned."""
        self.position = whole(state["position"], "position")
        self.dull_prompts = {whole(index, "an index in dull_prompts") for index in state["dull_prompts"]}

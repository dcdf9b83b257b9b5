"""The order of a run's rows: epochs without end, each in a random order of its own."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch


class Order(Protocol):
    """The settings that decide the order."""

    @property
    def seed(self) -> int: ...
    @property
    def shuffle_dataset(self) -> bool: ...


def index_at(position: int, count: int, config: Order) -> int:
    """The index, among `count` rows, of the row at a position of the endless stream of epochs.

    A function of its arguments alone, so that a resumed run sees the rows that it would have seen.
    """
    epoch, place = divmod(position, count)
    order: Sequence[int] = _shuffled(count, config.seed + epoch) if config.shuffle_dataset else range(count)
    return order[place]


@lru_cache(maxsize=4)
def _shuffled(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()

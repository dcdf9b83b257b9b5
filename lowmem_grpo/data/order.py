"""The order of a run's rows: epochs without end, each in a random order of its own."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
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


def mixed_index_at(position: int, sizes: Sequence[int], weights: Sequence[float], config: Order) -> int:
    """The index, among the rows of several datasets one after the other, at a position of their mixed stream.

    An epoch has as many rows as all datasets together, from each its share, spread evenly. Each dataset has endless
    epochs of its own, so that a small one with a large share repeats, and a large one goes on where it stopped.
    """
    counts = shares_of(sum(sizes), weights)
    epoch, place = divmod(position, sum(sizes))
    which, number = _spread(tuple(counts))[place]
    return sum(sizes[:which]) + index_at(epoch * counts[which] + number, sizes[which], config)


def shares_of(total: int, weights: Sequence[float]) -> list[int]:
    """How many of `total` rows come from each dataset: [6, 2] of 8 by the weights 3 and 1."""
    bounds = [round(total * part / sum(weights)) for part in accumulate(weights)]
    return [b - a for a, b in pairwise([0, *bounds])]


@lru_cache(maxsize=4)
def _spread(counts: tuple[int, ...]) -> list[tuple[int, int]]:
    """The rows of an epoch as (dataset, number of the row in it), each dataset's at equal distances."""
    rows = [((2 * number + 1) / count, which, number) for which, count in enumerate(counts) for number in range(count)]
    return [(which, number) for _, which, number in sorted(rows)]


@lru_cache(maxsize=4)
def _shuffled(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()

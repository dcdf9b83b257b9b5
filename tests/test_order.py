"""The order of a run's rows, also of several datasets."""

from collections import Counter
from types import SimpleNamespace

import pytest

from lowmem_grpo.data.order import index_at, mixed_index_at, shares_of

CONFIG = SimpleNamespace(seed=3, shuffle_dataset=True)


def test_shares_are_those_of_the_weights_and_add_up():
    assert shares_of(8, [3, 1]) == [6, 2]
    assert shares_of(10, [1, 1, 1]) == [3, 4, 3]
    assert shares_of(5, [0.2, 0.8]) == [1, 4]


def test_every_stretch_of_the_stream_has_the_shares():
    sizes, weights = [6, 30], [3, 1]
    for start in range(0, 200, 7):
        drawn = [mixed_index_at(place, sizes, weights, CONFIG) < 6 for place in range(start, start + 8)]
        assert 5 <= sum(drawn) <= 7


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_dataset_has_epochs_of_its_own(shuffle):
    """An epoch of 36 has 27 of the 6 rows and 9 of the 30: after 10 epochs each is seen 45 times, and 3 times."""
    sizes, weights, config = [6, 30], [3, 1], SimpleNamespace(seed=3, shuffle_dataset=shuffle)
    drawn = [mixed_index_at(place, sizes, weights, config) for place in range(360)]
    counts = Counter(drawn)
    assert [counts[row] for row in range(36)] == [45] * 6 + [3] * 30
    assert [row for row in drawn if row < 6] == [index_at(place, 6, config) for place in range(270)]
    assert [row - 6 for row in drawn if row >= 6] == [index_at(place, 30, config) for place in range(90)]

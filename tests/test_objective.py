import math

import pytest
import torch

from lowmem_grpo.advantages import group_advantages, nanstd
from lowmem_grpo.objective import token_weights

NAN = math.nan


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("grpo", [1 / (3 * 2), 1 / (3 * 4), 0]),
        ("dapo", [1 / 6, 1 / 6, 0]),
        ("luspo", [1 / 3, 1 / 3, 0]),
        ("dr_grpo", [1 / 30, 1 / 30, 0]),
    ],
)
def test_token_weights_by_hand(aggregation, expected):
    """Lengths 2, 4 and 8, the last masked out, of at most 10 tokens."""
    mask = torch.tensor([True, True, False])
    weights = token_weights(torch.tensor([2, 4, 8]), mask, aggregation=aggregation, max_completion_length=10)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32))


def test_an_unknown_aggregation_is_refused():
    with pytest.raises(ValueError, match="not one of grpo"):
        token_weights(torch.tensor([1]), torch.tensor([True]), aggregation="ppo", max_completion_length=1)


def advantages(rows, **settings):
    settings = dict(num_generations=2, reward_weights=None, scale_rewards="group") | settings
    return group_advantages(torch.tensor(rows), **settings)


def test_advantages_by_hand():
    """Groups (0, 2) and (1, 1): deviations sqrt(2) and 0."""
    found = advantages([[0.0], [2.0], [1.0], [1.0]])
    unit = 1 / (math.sqrt(2) + 1e-4)
    torch.testing.assert_close(found.advantages, torch.tensor([-unit, unit, 0.0, 0.0]))
    assert found.zero_std.tolist() == [False, False, True, True]


def test_scaling_by_the_batch_or_not_at_all():
    rows = [[0.0], [2.0], [1.0], [1.0]]
    deviation = torch.tensor([0.0, 2.0, 1.0, 1.0]).std().item() + 1e-4
    expected = torch.tensor([-1.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(advantages(rows, scale_rewards="batch").advantages, expected / deviation)
    torch.testing.assert_close(advantages(rows, scale_rewards="none").advantages, expected)


def test_weights_and_rewards_that_do_not_apply():
    found = advantages(
        [[1.0, NAN], [1.0, 4.0], [NAN, NAN], [3.0, NAN]], reward_weights=[2.0, 0.5], scale_rewards="none"
    )
    torch.testing.assert_close(found.rewards, torch.tensor([2.0, 4.0, NAN, 6.0]), equal_nan=True)
    torch.testing.assert_close(found.advantages, torch.tensor([-1.0, 1.0, 0.0, 0.0]))


def test_a_deviation_of_fewer_than_two_values_is_zero():
    assert nanstd(torch.tensor([1.0, NAN]), dim=0).item() == 0
    assert nanstd(torch.tensor([1.0, 2.0, NAN, 4.0]), dim=0).item() == pytest.approx(
        torch.tensor([1.0, 2.0, 4.0]).std().item()
    )

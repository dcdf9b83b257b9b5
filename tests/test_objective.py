import math

import pytest
import torch

from lowmem_grpo.advantages import group_advantages, nanstd
from lowmem_grpo.kernels.policy_loss import policy_loss
from lowmem_grpo.objective import token_weights

NAN = math.nan


def loss_of(ratio, advantage, *, ref_gap=None, **changes):
    """(loss, gradient, stats) of one token of weight 1 whose ratio and reference gap are given."""
    settings = dict(epsilon_low=0.2, epsilon_high=0.3, delta=None, beta=0.0, use_bias_correction_kl=False) | changes
    logprob = torch.tensor([math.log(ratio) - 1.0], dtype=torch.float64, requires_grad=True)
    reference = None if ref_gap is None else logprob.detach() + ref_gap
    one = torch.ones(1, dtype=torch.float64)
    loss, stats = policy_loss(logprob, -one, reference, advantage * one, one, **settings)
    loss.backward()
    return loss.item(), logprob.grad.item(), stats


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.2, 2.0, -2.4, -2.4),
        (1.5, 2.0, -2.6, 0.0),  # above 1.3 with a good answer: clipped
        (1.5, -2.0, 3.0, 3.0),  # above it with a bad one: not
        (0.5, 2.0, -1.0, -1.0),  # below 0.8 with a good answer: not
        (0.5, -2.0, 1.6, 0.0),  # below it with a bad one: clipped
    ],
)
def test_one_token_by_hand(ratio, advantage, loss, gradient):
    value, slope, stats = loss_of(ratio, advantage)
    assert value == pytest.approx(loss, rel=1e-12)
    assert slope == pytest.approx(gradient, rel=1e-12)
    assert bool(stats.clipped_low) == (ratio < 0.8 and advantage < 0)
    assert bool(stats.clipped_high) == (ratio > 1.3 and advantage > 0)


def test_delta_bounds_the_ratio_of_a_bad_answer():
    assert loss_of(5.0, -1.0, delta=2.0)[:2] == pytest.approx((2.0, 0.0))
    assert loss_of(5.0, 1.0, delta=2.0)[0] == pytest.approx(-1.3)


def test_the_kl_by_hand():
    gap = 0.5  # ref - logp
    k3 = math.exp(gap) - gap - 1
    value, slope, stats = loss_of(1.0, 0.0, ref_gap=gap, beta=0.1)
    assert value == pytest.approx(0.1 * k3)
    assert slope == pytest.approx(0.1 * (1 - math.exp(gap)))
    assert stats.kl.item() == pytest.approx(k3)


def test_bias_correction_multiplies_the_kl_by_the_ratio_and_its_gradient():
    gap, ratio = 0.5, 1.1
    k3 = math.exp(gap) - gap - 1
    value, slope, stats = loss_of(ratio, 0.0, ref_gap=gap, beta=0.1, use_bias_correction_kl=True)
    assert value == pytest.approx(0.1 * ratio * k3)
    assert slope == pytest.approx(0.1 * ratio * (k3 + 1 - math.exp(gap)))
    assert stats.kl.item() == pytest.approx(ratio * k3)


def test_beta_without_a_reference_is_refused():
    with pytest.raises(ValueError, match="needs ref_logprobs"):
        loss_of(1.0, 1.0, beta=0.1)


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("grpo", [1 / (3 * 2), 1 / (3 * 4), 0]),
        ("dapo", [1 / 6, 1 / 6, 0]),
        ("bnpo", [1 / 6, 1 / 6, 0]),
        ("dr_grpo", [1 / 30, 1 / 30, 0]),
    ],
)
def test_token_weights_by_hand(loss_type, expected):
    """Lengths 2, 4 and 8, the last masked out, of at most 10 tokens."""
    mask = torch.tensor([True, True, False])
    weights = token_weights(torch.tensor([2, 4, 8]), mask, loss_type=loss_type, max_completion_length=10)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32))


def test_an_unknown_loss_type_is_refused():
    with pytest.raises(ValueError, match="not one of grpo"):
        token_weights(torch.tensor([1]), torch.tensor([True]), loss_type="ppo", max_completion_length=1)


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

import math

import numpy as np
import pytest
import torch

from lowmem_grpo.objective.advantages import (
    compare,
    gdpo_advantages,
    group_advantages,
    nanstd,
    reinforce_plus_plus_advantages,
    rloo_advantages,
)
from lowmem_grpo.objective.formulas import kl_estimate, token_weights

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


def test_rloo_by_hand():
    """Rewards 0, 1 and 5: each against the mean of the two others; where nothing applies, nothing is compared."""
    given = dict(num_generations=3, reward_weights=None)
    found = rloo_advantages(torch.tensor([[0.0], [1.0], [5.0]]), **given)
    torch.testing.assert_close(found.advantages, torch.tensor([-3.0, -1.5, 4.5]))
    found = rloo_advantages(torch.tensor([[0.0], [NAN], [5.0], [NAN], [NAN], [2.0]]), **given)
    torch.testing.assert_close(found.advantages, torch.tensor([-5.0, 0.0, 5.0, 0.0, 0.0, 0.0]))
    assert found.zero_std.tolist() == [False] * 3 + [True] * 3


def test_reinforce_plus_plus_by_hand():
    """Rewards 0, 2, 2, 4: scaled over the batch, as they are or as distances -1, 1, -1, 1 from their groups' means."""
    rewards, given = torch.tensor([[0.0], [2.0], [2.0], [4.0]]), dict(num_generations=2, reward_weights=None)
    found = reinforce_plus_plus_advantages(rewards, **given, group_baseline=False).advantages
    torch.testing.assert_close(found, torch.tensor([-2.0, 0.0, 0.0, 2.0]) / (math.sqrt(8 / 3) + 1e-4))
    found = reinforce_plus_plus_advantages(rewards, **given, group_baseline=True).advantages
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0, -1.0, 1.0]) / (math.sqrt(4 / 3) + 1e-4))


def test_gdpo_by_hand():
    """A reward of hundreds and one of ones weigh the same: scaled to +-1 / sqrt(2) each, then summed and scaled."""
    rewards = torch.tensor([[0.0, 1.0], [300.0, 0.0], [0.0, 0.0], [100.0, 1.0]])
    found = gdpo_advantages(rewards, num_generations=2, reward_weights=None)
    torch.testing.assert_close(found.rewards, torch.tensor([1.0, 300.0, 0.0, 101.0]))
    unit = math.sqrt(2) / math.sqrt(4 / 3)  # the sums are 0, 0, -sqrt(2), sqrt(2), of deviation sqrt(4 / 3)
    torch.testing.assert_close(found.advantages, torch.tensor([0.0, 0.0, -unit, unit]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("scale", ["group", "batch", "none", "gdpo"])
def test_advantages_are_trls(scale, nan):
    """Its formulas, which stand in the middle of a method of 600 lines, in NumPy and fp64."""
    draw = torch.Generator().manual_seed(3)
    rewards = torch.randn(12, 3, generator=draw)
    if nan:
        rewards[torch.rand(12, 3, generator=draw) < 0.3] = NAN
        rewards[4] = NAN
    weights = [1.0, 0.3, 2.0]
    wide = rewards.double().numpy()

    def total(values):
        sums = np.nansum(values * np.array(weights), axis=1)
        sums[np.isnan(values).all(axis=1)] = np.nan
        return sums

    with np.errstate(all="ignore"):
        groups = wide.reshape(3, 4, 3)
        if scale == "gdpo":
            scaled = (groups - np.nanmean(groups, 1, keepdims=True)) / (
                np.nanstd(groups, 1, ddof=1, keepdims=True) + 1e-4
            )
            sums = total(scaled.reshape(12, 3))
            truth = (sums - np.nanmean(sums)) / (np.nanstd(sums, ddof=1) + 1e-4)
        else:
            sums = total(wide).reshape(3, 4)
            spread = {"group": np.nanstd(sums, 1, ddof=1, keepdims=True), "batch": np.nanstd(sums, ddof=1)}
            truth = (sums - np.nanmean(sums, 1, keepdims=True)) / (spread[scale] + 1e-4 if scale in spread else 1)
    found = compare(
        rewards, num_generations=4, reward_weights=weights, adv_estimator="grpo",
        scale_rewards="group" if scale == "gdpo" else scale,
        multi_objective_aggregation="normalize_then_sum" if scale == "gdpo" else "sum_then_normalize",
    )  # fmt: skip
    np.testing.assert_allclose(found.advantages, np.nan_to_num(truth.flatten()), rtol=1e-6, atol=2e-7)


def test_a_penalty_is_taken_from_each_reward():
    rewards, penalty = torch.tensor([[0.0], [2.0]]), torch.tensor([0.0, 3.0])
    found = compare(
        rewards, num_generations=2, reward_weights=None, adv_estimator="rloo", scale_rewards="group",
        multi_objective_aggregation="sum_then_normalize", penalty=penalty,
    )  # fmt: skip
    assert found.advantages.tolist() == [1.0, -1.0] and found.rewards.tolist() == [0.0, 2.0]


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


ESTIMATORS = [
    dict(adv_estimator="grpo", scale_rewards="group"), dict(adv_estimator="grpo", scale_rewards="batch"),
    dict(adv_estimator="grpo", scale_rewards="none"), dict(adv_estimator="rloo"),
    dict(adv_estimator="reinforce_plus_plus"), dict(adv_estimator="reinforce_plus_plus_baseline"),
    dict(adv_estimator="grpo", multi_objective_aggregation="normalize_then_sum"),
]  # fmt: skip


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("value", [NAN, math.inf])
def test_a_penalty_that_is_not_finite_shows_and_a_reward_that_does_not_apply_is_0(estimator, value):
    settings = dict(scale_rewards="group", multi_objective_aggregation="sum_then_normalize") | estimator
    rewards, penalty = torch.tensor([[0.0], [2.0], [NAN], [1.0]]), torch.zeros(4)
    compared = compare(rewards, num_generations=4, reward_weights=None, penalty=penalty, **settings).advantages
    assert compared.isfinite().all() and compared[2] == 0 and (compared[:2] != 0).all()
    penalty[1] = value
    compared = compare(rewards, num_generations=4, reward_weights=None, penalty=penalty, **settings).advantages
    assert not compared[1].isfinite() and compared[2] == 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rewards_too_large_for_fp32s_squares_are_told_apart(estimator):
    settings = dict(scale_rewards="group", multi_objective_aggregation="sum_then_normalize") | estimator
    rewards = torch.tensor([[0.0], [2.0], [0.0], [2.0]])
    for weight in (1.0, 1e30):
        found = compare(rewards, num_generations=2, reward_weights=[weight], **settings)
        assert (found.advantages.sign() == torch.tensor([-1, 1, -1, 1])).all() and not found.zero_std.any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_rewards_are_no_difference_however_they_round(estimator):
    """The mean of eight 0.1 is 0.1 + 7e-9 in fp32, and Adam would make a whole step of what is left over."""
    settings = dict(scale_rewards="group", multi_objective_aggregation="sum_then_normalize") | estimator
    for size in (2, 3, 6, 7, 8, 16):
        for value in (0.1, 0.2, 0.3, 1.2, 1 / 3, -0.7, 1e16):
            rewards = torch.full((2 * size, 1), value)
            rewards[0] = NAN  # left out
            found = compare(rewards, num_generations=size, reward_weights=None, **settings)
            assert (found.advantages == 0).all() and found.zero_std.all()
            assert nanstd(rewards, dim=0) == 0


def test_which_estimate_has_the_gradient_of_the_kl_and_which_that_of_the_kl_the_other_way_around():
    """Summed over all six tokens that a policy may say, times their probability, as in the mean over samples."""
    generator = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(2, 6, dtype=torch.float64, generator=generator)
    logits.requires_grad_()
    logprobs, ref_logprobs = logits.log_softmax(0), reference.log_softmax(0)
    probabilities, ratio = logprobs.exp().detach(), (logprobs - logprobs.detach()).exp()

    def slope(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    of_kl = slope((logprobs.exp() * (logprobs - ref_logprobs)).sum())
    of_the_other = slope((ref_logprobs.exp() * (ref_logprobs - logprobs)).sum())
    corrected = {"k1": of_kl, "k3": of_kl}
    as_it_is = {"k1": torch.zeros_like(of_kl), "k2": of_kl, "k3": of_the_other}
    for factor, expected in ((ratio, corrected), (1, as_it_is)):
        for estimator, gradient in expected.items():
            estimate = kl_estimate(logprobs, ref_logprobs, estimator=estimator)
            torch.testing.assert_close(slope((probabilities * factor * estimate).sum()), gradient, rtol=0, atol=1e-12)

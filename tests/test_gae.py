import pytest
import torch

from lowmem_grpo.objective.gae import gae, token_rewards, whiten
from lowmem_grpo.objective.value import explained_variance, value_losses


def test_advantages_and_returns_are_those_computed_by_hand():
    """The last token's error is 1 - .7 = .3, the one before it .7 - .6 + .95 x .3, the first .6 - .5 + .95 x .385."""
    offsets = torch.tensor([0, 3])
    rewards = token_rewards(torch.tensor([1.0]), offsets, None)
    assert rewards.tolist() == [0.0, 0.0, 1.0]
    advantages, returns = gae(rewards, torch.tensor([0.5, 0.6, 0.7]), offsets, gamma=1.0, lam=0.95)
    torch.testing.assert_close(advantages, torch.tensor([0.46575, 0.385, 0.3]))
    torch.testing.assert_close(returns, torch.tensor([0.96575, 0.985, 1.0]))


def test_a_discount_is_of_the_next_value_and_of_the_next_advantage():
    """gamma .5, lam .5: 1 - .4 = .6, and 2 + .5 x .4 - 1 + .25 x .6 = 1.35."""
    given = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.4]), torch.tensor([0, 2])
    advantages, returns = gae(*given, gamma=0.5, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([1.35, 0.6]))
    torch.testing.assert_close(returns, torch.tensor([2.35, 1.0]))


def test_a_score_is_the_last_tokens_and_a_penalty_each_tokens_own():
    scores, offsets = torch.tensor([2.0, 5.0, -1.0]), torch.tensor([0, 2, 2, 3])  # the second has no token
    rewards = token_rewards(scores, offsets, torch.tensor([0.25, 0.5, 0.75]))
    assert rewards.tolist() == [-0.25, 1.5, -1.75]


@pytest.mark.parametrize("seed", range(5))
def test_advantages_of_ragged_completions_are_a_double_loop(seed):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 9, (7,), generator=draw)
    lengths[seed % 7] = 9
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    rewards, values = torch.randn(2, int(offsets[-1]), generator=draw, dtype=torch.float64)
    gamma, lam = torch.rand(2, generator=draw).tolist()
    expected = torch.zeros_like(values)
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        for t in range(start, stop):
            for s in range(t, stop):
                following = values[s + 1] if s + 1 < stop else 0.0
                expected[t] += (gamma * lam) ** (s - t) * (rewards[s] + gamma * following - values[s])
    advantages, returns = gae(rewards, values, offsets, gamma=gamma, lam=lam)
    torch.testing.assert_close(advantages, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, expected + values, rtol=1e-12, atol=1e-12)


def test_with_lam_and_gamma_of_1_a_return_is_the_rest_of_the_rewards_whatever_the_values_are():
    offsets, rewards = torch.tensor([0, 2, 5]), torch.tensor([1.0, 2.0, 0.0, 0.0, 3.0])
    _, returns = gae(rewards, torch.tensor([9.0, -3.0, 4.0, 0.5, 7.0]), offsets, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, torch.tensor([3.0, 2.0, 3.0, 3.0, 3.0]))
    advantages, _ = gae(rewards, torch.zeros(5), offsets, gamma=1.0, lam=1.0)
    torch.testing.assert_close(advantages, returns, msg="without values, REINFORCE's")


def test_returns_of_rewards_that_are_alike_are_alike_whatever_the_values_are():
    """In fp32 their variance was 2e-14, of which a critic would explain -2e12."""
    draw = torch.Generator().manual_seed(0)
    offsets, values = 200 * torch.arange(9), 0.3 + 0.2 * torch.randn(1600, generator=draw)
    rewards = token_rewards(torch.full((8,), 1.2), offsets, None)
    advantages, returns = gae(rewards, values, offsets, gamma=1.0, lam=1.0)
    assert returns.unique().tolist() == [torch.tensor(1.2).item()] and advantages.dtype == torch.float32
    assert torch.tensor(explained_variance(values, returns)).isnan()


def test_whitened_advantages_have_mean_0_and_variance_1_over_the_counted_tokens():
    draw = torch.Generator().manual_seed(0)
    advantages, counted = 5 + 3 * torch.randn(50, generator=draw), torch.rand(50, generator=draw) < 0.7
    advantages[~counted] = 1e6
    found = whiten(advantages, counted)
    assert abs(found[counted].mean().item()) < 1e-6 and found[counted].var().item() == pytest.approx(1)
    assert (found[~counted] == 0).all()


def test_one_token_or_equal_advantages_are_whitened_to_0_and_not_to_infinity():
    one = torch.tensor([True, False])
    assert whiten(torch.tensor([3.0, 4.0]), one).tolist() == [0.0, 0.0]
    assert whiten(torch.full((8,), 0.1), torch.tensor([True] * 8)).tolist() == [0.0] * 8
    assert whiten(torch.tensor([3.0]), torch.tensor([False])).tolist() == [0.0]


@pytest.mark.parametrize(
    ("value", "cliprange", "loss", "gradient", "decided"),
    [
        (0.9, 0.2, 0.045, 0.0, True),  # clipped to .7, .3 from the return: worse than .9 itself
        (0.3, 0.2, 0.245, -0.7, False),
        (0.6, 0.2, 0.08, -0.4, False),  # within the range
        (0.9, None, 0.005, -0.1, False),
    ],
)
def test_the_clipped_value_loss_is_that_computed_by_hand(value, cliprange, loss, gradient, decided):
    """Of an old value of .5 and a return of 1."""
    values = torch.tensor([value], requires_grad=True)
    losses, clipped = value_losses(values, torch.tensor([0.5]), torch.tensor([1.0]), cliprange=cliprange)
    (found,) = torch.autograd.grad(losses.sum(), values)
    assert losses.item() == pytest.approx(loss) and found.item() == pytest.approx(gradient)
    assert clipped.item() is decided


def test_the_explained_variance_is_1_of_a_perfect_critic_and_0_of_a_constant_one():
    returns = torch.tensor([0.0, 1.0, 0.5, 0.25])
    assert explained_variance(returns + 7, returns) == pytest.approx(1)
    assert explained_variance(torch.full((4,), 0.3), returns) == pytest.approx(0, abs=1e-6)
    assert explained_variance(-returns, returns) == pytest.approx(-3)
    assert torch.tensor(explained_variance(returns, torch.ones(4))).isnan()


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.filterwarnings("error")
def test_fewer_than_two_returns_have_no_variance_and_no_warning(count):
    assert torch.tensor(explained_variance(torch.ones(count), torch.zeros(count))).isnan()

"""The policy loss, kernel and twin, against fp64 autograd of its definition and against TRL's own trainer."""

import itertools
import math

import pytest
import torch
from backends import CUDA, every_place
from trl_reference import padded, trl_loss

from lowmem_grpo.benchmarks import bench_policy_loss
from lowmem_grpo.kernels import policy_loss as module
from lowmem_grpo.kernels.policy_loss import BLOCK, policy_loss
from lowmem_grpo.objective.formulas import token_weights
from lowmem_grpo.objective.loss import LOSSES

SETTINGS = dict(epsilon_low=0.2, epsilon_high=0.28, delta=None, beta=0.0, use_bias_correction_kl=False)


# What is allocated and not written is NaN.
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def tokens(n, seed=0):
    """(logprobs, old, ref, advantages, weights), (n,) fp32 each: ratios from 0.2 to 5, both signs of advantage."""
    draw = torch.Generator().manual_seed(seed)
    logprobs = -4 * torch.rand(n, generator=draw)
    old, ref = (logprobs + 0.5 * torch.randn(n, generator=draw) for _ in range(2))
    return logprobs, old, ref, torch.randn(n, generator=draw), 0.1 + torch.rand(n, generator=draw)


def definition(
    logprobs, old, ref, advantages, weights, *, epsilon_low, epsilon_high, delta, beta, use_bias_correction_kl
):
    """(token losses weighted (N,), their gradient (N,), kl (N,) or None) in fp64, by autograd."""
    logprobs = logprobs.detach().double().requires_grad_()
    old = logprobs.detach() if old is None else old.double()
    ratio = torch.exp(logprobs - old)
    # Not by clamp, whose gradient at a bound is 1 up to torch 2.13, and 0 from 2.14 on.
    first = ratio if delta is None else torch.where(ratio > delta, delta, ratio)
    second = torch.where(ratio < 1 - epsilon_low, 1 - epsilon_low, ratio)
    second = torch.where(ratio > 1 + epsilon_high, 1 + epsilon_high, second)
    losses, kl = -torch.min(first * advantages.double(), second * advantages.double()), None
    if ref is not None:
        kl = torch.exp(ref.double() - logprobs) - (ref.double() - logprobs) - 1
        kl = kl * ratio if use_bias_correction_kl else kl
        losses = losses + beta * kl
    losses = losses * weights.double()
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    return losses.detach(), gradient, None if kl is None else kl.detach()


def evaluate(place, logprobs, old, ref, advantages, weights, **changes):
    """(loss, gradient, stats) of one backend, back on the CPU."""
    backend, device = place
    inputs = [None if x is None else x.to(device) for x in (logprobs, old, ref, advantages, weights)]
    inputs[0] = inputs[0].detach().requires_grad_()
    loss, stats = policy_loss(*inputs, **SETTINGS | changes, backend=backend)
    (gradient,) = torch.autograd.grad(loss, inputs[0])
    return loss.detach().cpu(), gradient.cpu(), type(stats)(*(None if x is None else x.cpu() for x in stats))


def assert_true(place, inputs, **changes):
    """By the definition: the loss to 1e-6 of the sum of magnitudes, the gradient to 3e-6 of itself and its largest entry."""
    settings = SETTINGS | changes
    loss, gradient, stats = evaluate(place, *inputs, **changes)
    losses, slope, kl = definition(*inputs, **settings)
    assert abs(loss.double() - losses.sum()) <= 1e-6 * losses.abs().sum()
    torch.testing.assert_close(
        gradient.double(), slope, rtol=3e-6, atol=3e-6 * float(slope.abs().max()) if len(slope) else 0
    )
    logprobs, old, _, advantages, _ = inputs
    ratio = torch.ones_like(logprobs) if old is None else (logprobs - old).exp()
    torch.testing.assert_close(stats.ratio, ratio, rtol=1e-6, atol=0)
    assert torch.equal(stats.clipped_low, (ratio < 1 - settings["epsilon_low"]) & (advantages < 0))
    assert torch.equal(stats.clipped_high, (ratio > 1 + settings["epsilon_high"]) & (advantages > 0))
    if kl is None:
        assert stats.kl is None
    else:
        torch.testing.assert_close(stats.kl.double(), kl, rtol=1e-6, atol=1e-7)


COMBINATIONS = [
    dict(old=old, ref=ref, delta=delta, use_bias_correction_kl=correction, beta=beta)
    for old, ref, delta, correction, beta in itertools.product((0, 1), (0, 1), (None, 1.5), (False, True), (0.0, 0.1))
    if ref or not beta
]


@every_place
@pytest.mark.parametrize("case", COMBINATIONS, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_every_combination_is_autograd_of_the_definition(place, case):
    case = dict(case)
    logprobs, old, ref, advantages, weights = tokens(3 * BLOCK + 7)
    inputs = logprobs, old if case.pop("old") else None, ref if case.pop("ref") else None, advantages, weights
    assert_true(place, inputs, **case)


@every_place
@pytest.mark.parametrize("n", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_any_number_of_tokens(place, n):
    assert_true(place, tokens(n, seed=n), delta=1.5, beta=0.1)
    assert_true(place, [tokens(n)[0], None, None, *tokens(n)[3:]])


def loss_of(place, ratio, advantage, *, ref_gap=None, **changes):
    """(loss, gradient, stats) of one token of weight 1 whose ratio and reference gap are given; fp64 in the twin."""
    dtype = torch.float64 if place[0] == "torch" else torch.float32
    logprob = torch.tensor([math.log(ratio) - 1.0], dtype=dtype)
    one = torch.ones(1, dtype=dtype)
    reference = None if ref_gap is None else logprob + ref_gap
    loss, gradient, stats = evaluate(
        place, logprob, -one, reference, advantage * one, one, **{"epsilon_high": 0.3, **changes}
    )
    return loss.item(), gradient.item(), stats


def close(place, value):
    return pytest.approx(value, rel=1e-12 if place[0] == "torch" else 1e-6, abs=0)


@every_place
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
def test_one_token_by_hand(place, ratio, advantage, loss, gradient):
    value, slope, stats = loss_of(place, ratio, advantage)
    assert value == close(place, loss)
    assert slope == close(place, gradient)
    assert stats.ratio.item() == close(place, ratio)
    assert bool(stats.clipped_low) == (ratio < 0.8 and advantage < 0)
    assert bool(stats.clipped_high) == (ratio > 1.3 and advantage > 0)


@every_place
def test_delta_bounds_the_ratio_of_a_bad_answer(place):
    assert loss_of(place, 5.0, -1.0, delta=2.0)[:2] == (close(place, 2.0), 0.0)
    assert loss_of(place, 5.0, 1.0, delta=2.0)[0] == close(place, -1.3)


@every_place
def test_the_kl_by_hand(place):
    gap = 0.5  # ref - logp
    k3 = math.exp(gap) - gap - 1
    value, slope, stats = loss_of(place, 1.0, 0.0, ref_gap=gap, beta=0.1)
    assert value == pytest.approx(0.1 * k3)
    assert slope == pytest.approx(0.1 * (1 - math.exp(gap)))
    assert stats.kl.item() == pytest.approx(k3)


@every_place
def test_bias_correction_multiplies_the_kl_by_the_ratio_and_its_gradient(place):
    gap, ratio = 0.5, 1.1
    k3 = math.exp(gap) - gap - 1
    value, slope, stats = loss_of(place, ratio, 0.0, ref_gap=gap, beta=0.1, use_bias_correction_kl=True)
    assert value == pytest.approx(0.1 * ratio * k3)
    assert slope == pytest.approx(0.1 * ratio * (k3 + 1 - math.exp(gap)))
    assert stats.kl.item() == pytest.approx(ratio * k3)


@every_place
def test_zero_advantages_leave_the_kl_alone(place):
    logprobs, old, ref, advantages, weights = tokens(BLOCK + 1)
    zero = torch.zeros_like(advantages)
    loss, gradient, stats = evaluate(place, logprobs, old, None, zero, weights)
    assert loss == 0 and (gradient == 0).all()
    assert not stats.clipped_low.any() and not stats.clipped_high.any()
    assert_true(place, (logprobs, old, ref, zero, weights), beta=0.1)


@every_place
@pytest.mark.parametrize("use_bias_correction_kl", [False, True])
def test_the_kl_keeps_its_precision_next_to_the_reference(place, use_bias_correction_kl):
    """exp(gap) - gap - 1 in fp32 would lose all digits of a gap of 1e-4, and 1 - exp(gap) four of seven."""
    gap = torch.cat([-torch.logspace(-6, 0.5, 100), torch.logspace(-6, 0.5, 100)])
    logprobs, one = torch.zeros(200), torch.ones(200)
    # The gap is exact in fp32 as ref - 0, and the ratio is 1.
    changes = dict(beta=1.0, use_bias_correction_kl=use_bias_correction_kl)
    _, gradient, stats = evaluate(place, logprobs, None, gap, 0 * one, one, **changes)
    kl = torch.expm1(gap.double()) - gap.double()
    slope = -gap.double() if use_bias_correction_kl else -torch.expm1(gap.double())
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-6, atol=0)
    # A GPU's exp() is good to 2e-7, of which exp(1) - 2 makes 1e-6; the twin cancels to 1e-7.
    torch.testing.assert_close(stats.kl.double(), kl, rtol=2e-6, atol=0 if place[0] == "triton" else 1e-7)


@every_place
@pytest.mark.parametrize(
    ("log_ratio", "advantage", "bound"), [(0.2, 1.0, "epsilon_high"), (-0.2, -1.0, "epsilon_low"), (0.6, -1.0, "delta")]
)
def test_a_ratio_exactly_at_a_bound_counts_as_inside(place, log_ratio, advantage, bound):
    """The bound is the ratio as the backend itself computes it, so that they are equal to the last bit."""
    logprobs, old, advantages = torch.tensor([log_ratio]), torch.zeros(1), torch.tensor([advantage])
    inputs = logprobs, old, None, advantages, torch.ones(1)
    ratio = evaluate(place, *inputs)[2].ratio

    def at(value):
        value = float(value)
        return (
            {"epsilon_high": value - 1}
            if bound == "epsilon_high"
            else {"epsilon_low": 1 - value}
            if bound == "epsilon_low"
            else {bound: value}
        )

    loss, gradient, stats = evaluate(place, *inputs, **at(ratio))
    assert loss == -advantage * ratio and gradient == -advantage * ratio
    assert not stats.clipped_low and not stats.clipped_high
    beyond = torch.nextafter(ratio, torch.tensor(1.0))  # the ratio is now one step outside
    loss, gradient, stats = evaluate(place, *inputs, **at(beyond))
    assert loss == -advantage * beyond and gradient == 0
    assert bool(stats.clipped_high) == (bound == "epsilon_high") and bool(stats.clipped_low) == (bound == "epsilon_low")


@every_place
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("delta", [None, 1.0])
def test_an_interval_of_no_width_agrees_with_autograd_at_its_only_point(place, advantage, delta):
    logprobs = torch.tensor([-1.5])
    inputs = logprobs, logprobs, None, torch.tensor([advantage]), torch.ones(1)
    assert_true(place, inputs, epsilon_low=0.0, epsilon_high=0.0, delta=delta)
    assert evaluate(place, *inputs, epsilon_low=0.0, epsilon_high=0.0, delta=delta)[1] == -advantage


@every_place
def test_what_stands_in_a_token_of_weight_0_reaches_nothing(place):
    live = torch.rand(2 * BLOCK + 5, generator=torch.Generator().manual_seed(1)) < 0.6
    whole = tokens(len(live))
    logprobs, old, ref, advantages = (
        torch.where(live, x, bad) for x, bad in zip(whole, (math.nan, math.inf, -math.inf, math.nan), strict=False)
    )
    settings = dict(beta=0.1, delta=1.5, use_bias_correction_kl=True)
    loss, gradient, stats = evaluate(place, logprobs, old, ref, advantages, whole[4] * live, **settings)
    losses, slope, _ = definition(*(x[live] for x in whole), **SETTINGS | settings)
    assert abs(loss.double() - losses.sum()) <= 1e-6 * losses.abs().sum()
    assert (gradient[~live] == 0).all()
    torch.testing.assert_close(gradient[live].double(), slope, rtol=1e-6, atol=1e-6 * float(slope.abs().max()))
    assert (stats.ratio[~live] == 1).all() and (stats.kl[~live] == 0).all()
    assert not (stats.clipped_low | stats.clipped_high)[~live].any()


@every_place
@pytest.mark.parametrize("which", range(5))
def test_a_nan_in_a_token_that_counts_shows(place, which):
    """tl.minimum and tl.clamp on a GPU (not in the interpreter) would turn it into a number, and training would go on."""
    inputs = list(tokens(9))
    inputs[which] = inputs[which].clone()
    inputs[which][4] = math.nan
    loss, gradient, _ = evaluate(place, *inputs, delta=1.5, beta=0.1)
    assert loss.isnan()
    assert gradient.isnan().tolist() == [token == 4 for token in range(9)]


@every_place
def test_repeated_runs_agree_bit_for_bit(place):
    runs = [evaluate(place, *tokens(5 * BLOCK + 3), beta=0.1, delta=1.5) for _ in range(3)]
    for loss, gradient, stats in runs[1:]:
        assert torch.equal(loss, runs[0][0]) and torch.equal(gradient, runs[0][1])
        assert all(torch.equal(a, b) for a, b in zip(stats, runs[0][2], strict=True))


@every_place
def test_views_and_other_dtypes_are_read_as_they_are(place):
    """Every second row of a matrix, one expanded number, and old log-probabilities in bf16."""
    logprobs, old, ref, advantages, weights = tokens(2 * BLOCK)
    old = old.bfloat16()
    strided = (
        logprobs[::2],
        old[::2],
        torch.stack([ref, ref], dim=1)[::2, 1],
        advantages[3].expand(BLOCK),
        weights[::2].half(),
    )
    loss, gradient, _ = evaluate(place, *strided, beta=0.1)
    plain = evaluate(place, *(x.float().contiguous() for x in strided), beta=0.1)
    # Not bit for bit: a GPU adds up in an order that depends on the strides.
    torch.testing.assert_close(loss, plain[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, plain[1], rtol=1e-6, atol=1e-7)


@every_place
def test_the_gradient_carries_the_upstream_scalar_and_is_there_once(place):
    backend, device = place
    inputs = [x.to(device) for x in tokens(BLOCK + 1)]
    _, gradient, _ = evaluate(place, *inputs, beta=0.1)
    inputs[0].requires_grad_()
    loss, stats = policy_loss(*inputs, **SETTINGS | {"beta": 0.1}, backend=backend)
    assert not any(x.requires_grad for x in stats)
    (3 * loss).backward(retain_graph=True)
    torch.testing.assert_close(inputs[0].grad.cpu(), 3 * gradient, rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_place
def test_a_second_derivative_is_refused_instead_of_taken_for_zero(place):
    backend, device = place
    inputs = [x.to(device) for x in tokens(5)]
    loss, _ = policy_loss(inputs[0].requires_grad_(), *inputs[1:], **SETTINGS, backend=backend)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, inputs[0], create_graph=True)


@every_place
def test_without_a_gradient_the_numbers_are_the_same(place):
    backend, device = place
    inputs = [x.to(device) for x in tokens(BLOCK + 1)]
    loss, stats = policy_loss(*inputs, **SETTINGS | {"beta": 0.1}, backend=backend)
    with_gradient = evaluate(place, *inputs, beta=0.1)
    assert not loss.requires_grad
    torch.testing.assert_close(loss.cpu(), with_gradient[0], rtol=1e-5, atol=1e-5)
    for a, b in zip(stats, with_gradient[2], strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-7)


def test_the_twins_gradient_is_right_in_fp64():
    logprobs, *others = (x.double() for x in tokens(40))
    for changes in ({}, {"beta": 0.1, "delta": 1.5}, {"beta": 0.1, "use_bias_correction_kl": True}):
        assert_close_to_finite_differences(logprobs, others, SETTINGS | changes)


def assert_close_to_finite_differences(logprobs, others, settings, step=1e-6):
    gradient = evaluate(("torch", "cpu"), logprobs, *others, **settings)[1]
    for token in range(len(logprobs)):
        moved = torch.zeros_like(logprobs)
        moved[token] = step
        above, below = (policy_loss(logprobs + sign * moved, *others, **settings)[0] for sign in (1, -1))
        assert gradient[token] == pytest.approx(float(above - below) / (2 * step), rel=1e-6, abs=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_a_million_tokens_on_a_gpu_without_being_told():
    """auto is the kernel there, and it holds beside its inputs only what it returns."""
    n = 1_000_003
    inputs = [x.cuda() for x in tokens(n)]
    inputs[0].requires_grad_()
    settings = SETTINGS | {"beta": 0.1, "delta": 1.5}
    policy_loss(*inputs, **settings)  # compile
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, stats = policy_loss(*inputs, **settings)  # stats are held while the peak is read
    (gradient,) = torch.autograd.grad(loss, inputs[0])
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 1.05 * (3 * 4 + 2) * n, stats  # slope, kl, ratio in fp32, two flags
    losses, slope, _ = definition(*inputs, **settings)
    assert abs(loss.detach().double() - losses.sum()) <= 1e-6 * losses.abs().sum()
    # A ratio within a rounding of a bound may fall on its other side: not one token in a thousand.
    wrong = (gradient.double() - slope).abs() > 1e-6 * slope.abs().clamp(min=1e-2)
    assert wrong.double().mean() < 1e-3


@every_place
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"old": None},
        {"delta": 1.5},
        {"beta": 0.1},
        {"beta": 0.1, "delta": 1.5},
        {"beta": 0.1, "use_bias_correction_kl": True},
    ],
    ids=str,
)
def test_trls_trainer_has_the_same_loss_gradient_and_metrics(place, loss_type, changes):
    settings = dict(delta=None, beta=0.0, use_bias_correction_kl=False) | changes
    logprobs, old, ref, advantages, mask, lengths, kept = padded()
    old = settings.pop("old", old)
    # Both get the fp32 numbers, TRL computes with them in fp64.
    logprobs, ref, advantages = logprobs.float(), ref.float() if settings["beta"] else None, advantages.float()
    old = None if old is None else old.float()
    wide = logprobs.double().requires_grad_()
    expected, metrics = trl_loss(
        wide, None if old is None else old.double(), None if ref is None else ref.double(), advantages.double(), mask,
        loss_type=loss_type, **settings,
    )  # fmt: skip
    expected.backward()

    weights = token_weights(lengths, kept, aggregation=LOSSES[loss_type].aggregation, max_completion_length=16)
    flat = (
        None if x is None else x[mask]
        for x in (logprobs, old, ref, advantages[:, None].expand_as(mask), weights[:, None].expand_as(mask))
    )
    loss, gradient, stats = evaluate(place, *flat, **settings)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-7)
    torch.testing.assert_close(gradient.double(), wide.grad[mask], rtol=1e-6, atol=1e-6 * float(wide.grad.abs().max()))
    assert (wide.grad[~mask] == 0).all()
    assert stats.clipped_low.float().mean().item() == pytest.approx(metrics["clip_ratio/low_mean"])
    assert stats.clipped_high.float().mean().item() == pytest.approx(metrics["clip_ratio/high_mean"])
    if settings["beta"]:
        assert stats.kl.mean().item() == pytest.approx(metrics["kl"], rel=1e-6)


def test_the_benchmark_measures_whatever_is_installed():
    found = bench_policy_loss.bench(bench_policy_loss.COMPLETION, torch.device("cpu"))
    assert next(iter(found)).startswith("lowmem_grpo")
    assert all(result["error"] < 1e-6 and result["peak_bytes"] > 0 for result in found.values())


def test_beta_without_a_reference_is_refused():
    logprobs, old, _, advantages, weights = tokens(3)
    with pytest.raises(ValueError, match="needs ref_logprobs"):
        policy_loss(logprobs, old, None, advantages, weights, **SETTINGS | {"beta": 0.1})


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        (0, lambda x: x.bfloat16(), "must be \\(N,\\) float32, not \\(4,\\) torch.bfloat16"),
        (0, lambda x: x[None], "must be \\(N,\\) float32, not \\(1, 4\\)"),
        (1, lambda x: x[:3], "old_logprobs \\(3,\\) on cpu must be as logprobs is"),
        (2, lambda x: x.to("meta"), "ref_logprobs \\(4,\\) on meta must be as logprobs is"),
        (4, lambda x: x.requires_grad_(), "loss_weights asks for a gradient, and only logprobs gets one; detach it"),
    ],
)
def test_inputs_that_do_not_belong_together_are_refused(which, change, message):
    inputs = list(tokens(4))
    inputs[which] = change(inputs[which])
    with pytest.raises(ValueError, match=message):
        policy_loss(*inputs, **SETTINGS)


@pytest.mark.skipif(CUDA or module.triton is None, reason="the interpreter is for machines without CUDA")
def test_the_kernel_computes_in_fp32_alone():
    with pytest.raises(ValueError, match="computes in float32; torch.float64 is for backend='torch'"):
        policy_loss(*(x.double() for x in tokens(5)), **SETTINGS, backend="triton")

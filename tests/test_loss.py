"""Every objective against TRL's own code, in value and gradient, and by hand where TRL has none."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from trl_reference import padded, trl_loss

from lowmem_grpo import train
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.losses import LOSS_TYPES, OWN_LOSS
from lowmem_grpo.errors import InputError
from lowmem_grpo.objective.coefficients import (
    Coefficients,
    Controllers,
)
from lowmem_grpo.objective.loss import (
    LOSSES,
    Tokens,
    importance_weights,
    loss_weights,
    micro_batch_loss,
    register_objective,
    try_out,
)

LEVELS = ("token", "sequence")
CASES = [
    *[dict(loss_type=loss, importance_sampling_level=level) for loss in ("dapo", "grpo", "bnpo", "dr_grpo", "luspo") for level in LEVELS],
    *[dict(loss_type="cispo", epsilon_high=high, importance_sampling_level=level) for high in (1.2, 5.0) for level in LEVELS],
    *[dict(loss_type="sapo", importance_sampling_level=level) for level in LEVELS],
    dict(loss_type="sapo", sapo_temperature_pos=0.7, sapo_temperature_neg=2.0), dict(loss_type="vespo"),
    dict(loss_type="vespo", vespo_k_pos=1.0, vespo_lambda_pos=0.5, vespo_k_neg=2.0, vespo_lambda_neg=0.1),
    dict(loss_type="gmpo", epsilon=0.4, epsilon_high=0.4), dict(delta=1.5), dict(delta=1.5, importance_sampling_level="sequence"),
]  # fmt: skip
EXTRAS = [
    {}, {"old": None}, dict(beta=0.1), dict(beta=0.1, use_bias_correction_kl=True), dict(off_policy_mask_threshold=0.02),
    dict(top_entropy_quantile=0.4), dict(entropy_coef=0.3), dict(entropy_coef=0.3, top_entropy_quantile=0.4),
    dict(mode="sequence_mask"), dict(mode="sequence_truncate", beta=0.1), dict(mode="token_truncate"), dict(mode="token_mask"),
]  # fmt: skip


def config_of(settings) -> GRPOConfig:
    given = {"epsilon_high": 0.28, **({"use_bias_correction_kl": False} if "beta" in settings else {})} | settings
    if given.get("loss_type") in ("sapo", "vespo"):
        given.pop("epsilon_high")
    return GRPOConfig(max_completion_length=16, **given)


def ours(config, logprobs, old, ref, advantages, mask, lengths, kept, *, entropies=None, proposal=None, sampling=None):
    """(loss, gradient (N,), entropy's gradient (N,), what was recorded), from the same (B, T) tensors."""
    owner = torch.arange(len(lengths))[:, None].expand_as(mask)
    weights = loss_weights(lengths, kept, config)

    def flat(values) -> Any:
        return None if values is None else values[mask].detach()

    logprobs = flat(logprobs).requires_grad_()
    entropy = (torch.zeros_like(logprobs) if entropies is None else flat(entropies)).detach().requires_grad_()
    learn_mask = None
    if config.top_entropy_quantile < 1:
        learn_mask = entropy >= torch.quantile(entropy, 1 - config.top_entropy_quantile)
    old_logprobs = logprobs.detach() if old is None else flat(old)
    tokens = Tokens(
        logprobs=logprobs, old_logprobs=old_logprobs, ref_logprobs=flat(ref) if config.beta else None, entropy=entropy,
        advantages=flat(advantages[:, None].expand_as(mask)), loss_weights=flat(weights[:, None].expand_as(mask)),
        sequences=owner[mask], num_completions=len(lengths), on_policy=old is None, learn_mask=learn_mask,
        importance_weights=importance_weights(old_logprobs, flat(proposal), owner[mask], len(lengths), config),
        sampling_logprobs=flat(sampling),
    )  # fmt: skip
    counted = len(logprobs) if learn_mask is None else int(learn_mask.sum())
    loss, recorded = micro_batch_loss(tokens, 1 / counted, Coefficients(config.beta, config.entropy_coef), config)
    gradients = torch.autograd.grad(loss, (logprobs, entropy), allow_unused=True)
    return loss.detach(), *gradients, recorded


@pytest.mark.parametrize("extra", EXTRAS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_gradient_and_metrics_are_those_of_trls_own_code(case, extra):
    """fp64 on both sides, 1e-6 relative; ours is fused for the clipped losses at token level."""
    settings = {**case, **extra}
    mode, trainer = settings.pop("mode", None), None
    if case.get("loss_type") == "gmpo":
        if mode or not {"off_policy_mask_threshold", "entropy_coef", "use_bias_correction_kl"}.isdisjoint(extra):
            pytest.skip("TRL's GMPO has no importance weights, off-policy mask, entropy bonus or bias correction")
        trainer = pytest.importorskip("trl.experimental.gmpo").GMPOTrainer
    logprobs, old, ref, advantages, mask, lengths, kept = padded()
    if trainer is not None:  # TRL's GMPO adds -A of a completion that is masked out, which has no gradient
        advantages = advantages * kept
    old = settings.pop("old", old)
    draw = torch.Generator().manual_seed(7)
    entropies = torch.rand(mask.shape, generator=draw, dtype=torch.float64)
    sampling = (logprobs if old is None else old) + 0.2 * torch.randn(mask.shape, generator=draw, dtype=torch.float64)
    bounds = dict(importance_sampling_clip_max=1.3, importance_sampling_clip_min=0.8)
    importance = dict(importance_sampling_mode=mode, **bounds) if mode else dict(importance_sampling_correction=False)
    config = config_of({**settings, **importance})
    loss, gradient, entropy_gradient, recorded = ours(
        config, logprobs, old, ref, advantages, mask, lengths, kept, entropies=entropies, proposal=sampling,
        sampling=sampling,
    )  # fmt: skip

    wide, wide_entropies = logprobs.clone().requires_grad_(), entropies.clone().requires_grad_()
    given = None
    if mode is not None:
        given = torch.ones_like(logprobs)
        given[mask] = recorded["importance_weights"]
        if mode.startswith("sequence"):  # TRL has one number a completion, (B, 1)
            given = torch.stack([row[m][:1] if m.any() else row[:1] for row, m in zip(given, mask, strict=True)])
    expected, metrics = trl_loss(
        wide, old, ref if config.beta else None, advantages, mask, entropies=wide_entropies, importance_weights=given,
        sampling=sampling, trainer_class=trainer, **settings,
    )  # fmt: skip
    expected.backward()
    assert wide.grad is not None
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-9)
    torch.testing.assert_close(gradient, wide.grad[mask], rtol=1e-6, atol=1e-6 * float(wide.grad.abs().max()))
    if config.entropy_coef:
        assert wide_entropies.grad is not None
        torch.testing.assert_close(entropy_gradient, wide_entropies.grad[mask], rtol=1e-6, atol=1e-9)
    if config.beta:
        assert recorded["kl"].mean().item() == pytest.approx(metrics["kl"], rel=1e-6)
    masked = mode is not None or "off_policy_mask_threshold" in extra or "top_entropy_quantile" in extra
    if "clip_ratio/low_mean" in metrics and config.importance_sampling_level == "token" and not masked:
        assert recorded["clipped_low"].float().mean().item() == pytest.approx(metrics["clip_ratio/low_mean"])
        assert recorded["clipped_high"].float().mean().item() == pytest.approx(metrics["clip_ratio/high_mean"])
    if config.loss_type == "cispo" and config.importance_sampling_level == "token" and not masked:
        assert recorded["cispo_clipped"].float().mean().item() == pytest.approx(metrics["cispo_clip_ratio"])


def one(config, *, new, old, advantage, ref=None, weight=1.0, proposal=None, entropy=0.0, **known):
    """(loss, d loss / d logp of each) of one completion, from probabilities."""
    logprobs = torch.tensor(new, dtype=torch.float64).log().requires_grad_()
    count = len(new)
    old = torch.tensor(old, dtype=torch.float64).log()
    sequences = torch.zeros(count, dtype=torch.long)
    drawn = None if proposal is None else torch.tensor(proposal, dtype=torch.float64).log()
    tokens = Tokens(
        logprobs=logprobs, old_logprobs=old, entropy=torch.full_like(old, entropy), sequences=sequences, num_completions=1,
        ref_logprobs=None if ref is None else torch.tensor(ref, dtype=torch.float64).log(),
        advantages=torch.full_like(old, advantage), loss_weights=torch.full_like(old, weight),
        importance_weights=importance_weights(old, drawn, sequences, 1, config), **known,
    )  # fmt: skip
    loss, _ = micro_batch_loss(tokens, 1 / count, Coefficients(config.beta, config.entropy_coef), config)
    (slope,) = torch.autograd.grad(loss, logprobs)
    return loss.item(), slope.tolist()


@pytest.mark.parametrize(
    ("settings", "new", "advantage", "loss", "slope"),
    [
        # ratio 1.5, clipped at 1.2 or not
        (dict(), 0.75, 2.0, -2.4, 0.0),
        (dict(), 0.75, -2.0, 3.0, 3.0),
        (dict(delta=1.25), 0.75, -2.0, 2.5, 0.0),
        (dict(importance_sampling_level="sequence"), 0.55, 2.0, -2.2, -2.2),
        (dict(importance_sampling_level="sequence_token"), 0.55, 2.0, -2.2, -2.2),
        (dict(loss_type="cispo", epsilon_high=1.3), 0.75, 2.0, -1.3 * 2 * math.log(0.75), -2.6),
        (dict(loss_type="sapo"), 0.75, 2.0, -8 / (1 + math.exp(-0.5)), -8 * 1.5 * math.exp(-0.5) / (1 + math.exp(-0.5)) ** 2),
        # phi(1.5) = e^3 1.5^2 e^-4.5
        (dict(loss_type="vespo"), 0.75, 2.0, -2 * 2.25 * math.exp(-1.5) * math.log(0.75), -2 * 2.25 * math.exp(-1.5)),
        (dict(loss_type="gmpo", epsilon=0.4), 0.55, 2.0, -2.2, -2.2),
        (dict(loss_type="gmpo", epsilon=0.4), 0.99, 2.0, -2 * math.exp(0.4), 0.0),
        (dict(loss_type="gmpo", epsilon=0.4), 0.99, -2.0, 2 * 1.98, 2 * 1.98),
    ],
)  # fmt: skip
def test_one_token_by_hand(settings, new, advantage, loss, slope):
    found, (gradient,) = one(GRPOConfig(**settings), new=[new], old=[0.5], advantage=advantage)
    assert found == pytest.approx(loss, rel=1e-12)
    assert gradient == pytest.approx(slope, rel=1e-12, abs=1e-15)


def test_gspo_token_has_gspos_value_and_each_tokens_own_gradient():
    """Ratios 1.1 and 0.9: their geometric mean s weighs both; GSPO's gradient is half of s A at each."""
    found = {
        level: one(GRPOConfig(importance_sampling_level=level), new=[0.55, 0.45], old=[0.5, 0.5], advantage=1.0)
        for level in ("sequence", "sequence_token")
    }
    s = math.sqrt(0.99)
    assert found["sequence"][0] == pytest.approx(-2 * s) == found["sequence_token"][0]
    assert found["sequence"][1] == pytest.approx([-s, -s]) == found["sequence_token"][1]
    uneven: dict[str, Any] = dict(
        new=[0.55, 0.45], old=[0.5, 0.5], advantage=1.0, learn_mask=torch.tensor([True, False])
    )
    assert one(GRPOConfig(importance_sampling_level="sequence"), **uneven)[1] == pytest.approx([-s / 2, -s / 2])
    assert one(GRPOConfig(importance_sampling_level="sequence_token"), **uneven)[1] == pytest.approx([-s, 0])


def test_gmpo_clips_tokens_before_their_mean():
    """Ratios 0.5 and 2 within [e^-0.4, e^0.4]: with A > 0 only the second is bounded."""
    loss, slope = one(GRPOConfig(loss_type="gmpo", epsilon=0.4), new=[0.2, 0.8], old=[0.4, 0.4], advantage=3.0)
    mean = math.exp((math.log(0.5) + 0.4) / 2)
    assert loss == pytest.approx(-2 * 3 * mean)
    assert slope == pytest.approx([-3 * mean, 0])


@pytest.mark.parametrize(
    ("estimator", "kl", "slope"),
    [
        ("k1", math.log(2), 1.0),
        ("k2", math.log(2) ** 2 / 2, math.log(2)),
        ("k3", 0.5 - 1 + math.log(2), 0.5),
        ("abs", math.log(2), 1.0),
    ],
)
def test_kl_estimators_by_hand(estimator, kl, slope):
    """pi = 0.5, ref = 0.25: d = log 2; bias-corrected, the gradient is that of r kl at r = 1."""
    given: dict[str, Any] = dict(new=[0.5], old=[0.5], ref=[0.25], advantage=0.0)
    config = GRPOConfig(beta=0.1, kl_estimator=estimator, use_bias_correction_kl=False)
    loss, (gradient,) = one(config, **given)
    assert loss == pytest.approx(0.1 * kl) and gradient == pytest.approx(0.1 * slope)
    corrected = dataclasses.replace(config, use_bias_correction_kl=True)
    loss, (gradient,) = one(corrected, **given)
    assert loss == pytest.approx(0.1 * kl) and gradient == pytest.approx(0.1 * (slope + kl))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_truncate", [2.0, 1.0, 0.8]),
        ("token_mask", [0.0, 1.0, 0.0]),
        ("sequence_truncate", [1.6 / 1.5] * 3),
        ("sequence_mask", [1.6 / 1.5] * 3),
    ],
)
def test_importance_weights_by_hand(mode, expected):
    """Ratios 2.5, 1 and 0.4266: a product of 1.0666, bounded to [0.8, 2]."""
    old = torch.tensor([0.5, 0.5, 0.16])
    proposal = torch.tensor([0.2, 0.5, 0.375])
    config = GRPOConfig(
        importance_sampling_mode=mode, importance_sampling_clip_min=0.8, importance_sampling_clip_max=2.0
    )
    weights = importance_weights(old.log(), proposal.log(), torch.zeros(3, dtype=torch.long), 1, config)
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=5e-7, atol=0)
    off = GRPOConfig(importance_sampling_correction=False)
    assert importance_weights(old.log(), proposal.log(), torch.zeros(3, dtype=torch.long), 1, off) is None


def test_an_importance_weight_multiplies_the_policys_part_and_not_the_kl():
    config = GRPOConfig(beta=0.1, use_bias_correction_kl=False, importance_sampling_mode="token_truncate")
    loss, (slope,) = one(config, new=[0.5], old=[0.5], ref=[0.25], advantage=1.0, proposal=[0.4])
    assert loss == pytest.approx(-1.25 + 0.1 * (0.5 - 1 + math.log(2)))
    assert slope == pytest.approx(-1.25 + 0.1 * 0.5)


def test_the_off_policy_mask_drops_what_was_bad_and_has_drifted():
    config = GRPOConfig(off_policy_mask_threshold=0.5)
    near: dict[str, Any] = dict(new=[0.5], old=[0.5])
    far: dict[str, Any] = dict(new=[0.25], old=[0.5])  # log 2 = 0.69
    assert one(config, **near, advantage=-1.0)[0] == pytest.approx(1.0)
    assert one(config, **far, advantage=-1.0) == (0.0, [0.0])
    assert one(config, **far, advantage=1.0)[0] == pytest.approx(-0.5)
    sampled = torch.tensor([0.25], dtype=torch.float64).log()
    assert one(config, **far, advantage=-1.0, sampling_logprobs=sampled)[0] == pytest.approx(0.8), "clipped, kept"


def test_the_entropy_bonus_is_the_mean_over_the_step():
    assert one(GRPOConfig(entropy_coef=0.5), new=[0.5, 0.5], old=[0.5, 0.5], advantage=0.0, entropy=1.5)[0] == -0.75


def test_a_registered_objective_is_trained_like_any_other():
    @register_objective("reinforce", aggregation="grpo")
    def reinforce(tokens, config):
        return -tokens.advantages * tokens.logprobs

    try:
        config = GRPOConfig(loss_type="reinforce", importance_sampling_mode="token_truncate")
        weights = loss_weights(torch.tensor([2, 1]), torch.tensor([True, True]), config)
        torch.testing.assert_close(weights, torch.tensor([0.25, 0.5]))
        loss, slope = one(config, new=[0.5], old=[0.5], advantage=2.0, proposal=[0.25])
        assert loss == pytest.approx(-4 * math.log(0.5)) and slope == [-4.0]
        with pytest.raises(ValueError, match="'dapo' is built in; choose another name"):
            register_objective("dapo")
        with pytest.raises(ValueError, match="aggregation 'mean' is not one of dapo, dr_grpo, grpo, luspo"):
            register_objective("other", aggregation="mean")
        register_objective("reinforce")(lambda tokens, config: tokens.logprobs.sum())
        with pytest.raises(ValueError, match="returned \\(\\); return a loss for each of the 1 tokens"):
            one(config, new=[0.5], old=[0.5], advantage=2.0)
    finally:
        del LOSS_TYPES["reinforce"], LOSSES["reinforce"]


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda tokens, config: tokens.advantages, "returned losses without a gradient; compute them from tokens.log"),
        (lambda tokens, config: None, "returned NoneType; return a loss for each of the 5 tokens"),
        (lambda tokens, config: tokens.logprobs.mean(), "returned \\(\\); return a loss for each of the 5 tokens"),
    ],
)
def test_an_objective_that_cannot_work_is_refused_before_a_model_is_loaded(objective, message):
    register_objective("useless")(objective)
    try:
        with pytest.raises(InputError, match=f"loss_type 'useless' {message}"):
            train("/no/such/model", [lambda completions, **_: [0.0] * len(completions)], [{"prompt": "1"}],
                  config=GRPOConfig(loss_type="useless"))  # fmt: skip
    finally:
        del LOSS_TYPES["useless"], LOSSES["useless"]


def test_an_objective_is_tried_with_all_that_a_run_gives_it_and_draws_nothing_of_the_runs():
    given: dict[str, Any] = dict(beta=0.1, entropy_coef=0.1, top_entropy_quantile=0.5, off_policy_mask_threshold=1.0)
    seen = []

    @register_objective("whole")
    def whole(tokens, config):
        torch.rand(1)
        seen.append({name for name, value in vars(tokens).items() if value is None})
        on = tokens.logprobs.new_zeros(tokens.num_completions)
        of_groups = on.index_add(0, tokens.sequences, tokens.logprobs).view(-1, config.num_generations)
        assert (of_groups.device.type, len(of_groups)) == ("meta", config.prompts_per_step)
        return -tokens.advantages * tokens.logprobs

    try:
        before = torch.get_rng_state()
        for config in (GRPOConfig(loss_type="whole", **given), GRPOConfig(loss_type="whole"), GRPOConfig()):
            try_out(config, torch.device("meta"))
        assert seen == [set(), {"ref_logprobs", "learn_mask"}] and torch.equal(torch.get_rng_state(), before)
    finally:
        del LOSS_TYPES["whole"], LOSSES["whole"]


def test_the_entropy_controller_follows_its_target():
    """TRL's rule: no bonus in the first step, then the coefficient as it stands wherever the entropy was low."""
    config = GRPOConfig(
        entropy_coef=0.1, use_adaptive_entropy=True, entropy_coef_delta=0.05, entropy_coef_max=0.18, entropy_target=1.0
    )
    controllers = Controllers(config)
    assert controllers.coefficients().entropy_coef == 0
    controllers.move_entropy_coef(0.9)
    assert controllers.coefficients().entropy_coef == pytest.approx(0.15)
    for value in (math.nan, math.inf, None):
        before = controllers.state()
        controllers.move_entropy_coef(value)
        assert controllers.state() == before
    other = Controllers(config)
    other.load(controllers.state())
    other.move_entropy_coef(1.0)
    assert other.entropy_coef == pytest.approx(0.18)
    controllers.move_entropy_coef(1.1)
    assert controllers.entropy_coef == pytest.approx(0.1) and controllers.coefficients().entropy_coef == 0
    fixed = Controllers(GRPOConfig(entropy_coef=0.1))
    fixed.move_entropy_coef(9.0)
    assert fixed.coefficients().entropy_coef == 0.1


def test_the_kl_controller_follows_its_target():
    config = GRPOConfig(beta=0.1, kl_target=0.02, kl_horizon=1000)

    def beta_after(kl, num_completions, config=config):
        controllers = Controllers(config)
        controllers.move_beta(kl, num_completions)
        return controllers.beta

    assert beta_after(0.02, 64) == pytest.approx(0.1)
    assert beta_after(0.021, 100) == pytest.approx(0.1 * (1 + 0.05 * 0.1))
    assert beta_after(9.0, 100) == pytest.approx(0.1 * 1.02)
    assert beta_after(0.0, 100) == pytest.approx(0.1 * 0.98)
    assert beta_after(0.0, 10**6) == pytest.approx(0.08), "never below a fifth less"
    assert {beta_after(value, 100) for value in (math.nan, math.inf, -math.inf, None)} == {0.1}
    assert beta_after(9.0, 64, GRPOConfig(beta=0.1)) == 0.1


def test_every_built_in_objective_is_compared_with_trl():
    assert {case.get("loss_type", "dapo") for case in CASES} == set(LOSS_TYPES)


def test_every_loss_type_has_a_row_of_functions_and_a_row_of_settings():
    assert set(LOSSES) == set(LOSS_TYPES)
    assert all(hasattr(GRPOConfig, name) for loss in LOSS_TYPES.values() for name in loss.reads)


def test_a_loss_reads_the_settings_that_its_row_names_and_no_other():
    changed = dict(
        epsilon=0.01, epsilon_high=0.05, delta=1.3, importance_sampling_level="sequence", sapo_temperature_pos=0.5,
        sapo_temperature_neg=0.5, vespo_k_pos=1.0, vespo_lambda_pos=1.0, vespo_k_neg=1.0, vespo_lambda_neg=1.0,
    )  # fmt: skip
    assert set(changed) == set(OWN_LOSS.reads)
    logprobs, old, _, advantages, mask, lengths, kept = padded()
    for loss_type, settings in LOSS_TYPES.items():
        config = config_of({"loss_type": loss_type})
        read = set()
        for name, value in changed.items():
            # Past the check, which would refuse what is not read.
            other = dataclasses.replace(config)
            object.__setattr__(other, name, value)
            losses = [ours(c, logprobs, old, None, advantages, mask, lengths, kept)[0] for c in (config, other)]
            read |= {name} if losses[0] != losses[1] else set()
        assert read == set(settings.reads), loss_type

"""A micro-batch's loss, as configured: one row a loss_type, importance weights and masks, KL and entropy."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.losses import LOSS_TYPES, OWN_LOSS
from lowmem_grpo.config.sections import ObjectiveFields
from lowmem_grpo.errors import InputError
from lowmem_grpo.kernels.policy_loss import TokenStats, policy_loss
from lowmem_grpo.objective import formulas
from lowmem_grpo.objective.coefficients import Coefficients


@dataclass(frozen=True)
class Tokens:
    """N tokens, all that the policy drew of some completions, as an objective gets them; (N,) fp32 or as is said."""

    logprobs: Tensor  # of the policy, under temperature; carries the gradient
    old_logprobs: Tensor  # of the policy that sampled, as training computes them
    ref_logprobs: Tensor | None  # of the reference, where there is a KL in the loss
    entropy: Tensor  # carries a gradient where there is an entropy bonus
    advantages: Tensor  # an objective gets them with importance weights and masks multiplied in
    loss_weights: Tensor  # the normalisation: the loss is the sum of loss_weights times token losses
    sequences: Tensor  # int64: which completion of the step each token is of
    num_completions: int  # B, of the step
    on_policy: bool = False  # old_logprobs are the values of logprobs
    learn_mask: Tensor | None = None  # bool: the tokens that top_entropy_quantile leaves
    importance_weights: Tensor | None = None  # of the training's policy over the sampler's
    sampling_logprobs: Tensor | None = None  # by the sampler, under temperature alone

    def log_ratios(self, level: str) -> Tensor:
        """Log of new policy over old, with its gradient, at "token", "sequence" or "sequence_token" level."""
        return formulas.log_ratios(self.logprobs, self.old_logprobs, self.sequences, self.num_completions, level=level)


Objective = Callable[[Tokens, GRPOConfig], Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss_type: its token losses, and how they become the loss of a step."""

    token_losses: Objective  # (N,), without the KL and the entropy bonus
    aggregation: str  # of the token losses, see formulas.token_weights
    fused: bool = False  # kernels/policy_loss.py computes them, with ratios of tokens and the k3 estimate of the KL
    # A ratio outside of these is cut off, which clip_ratio counts.
    clip_bounds: Callable[[ObjectiveFields], tuple[float, float]] = lambda config: (0.0, math.inf)
    importance_weights_inside: bool = False  # token_losses reads them; else they multiply the advantages
    learn_mask_inside: bool = False  # token_losses reads it; else it multiplies the advantages
    zero_advantage_has_no_gradient: bool = True  # so that such a completion need not be computed
    # What is recorded of each token besides TokenStats.
    token_metrics: Callable[[Tokens, TokenStats, ObjectiveFields], dict[str, Tensor]] = lambda tokens, stats, config: {}


def _ratios(tokens: Tokens, config: ObjectiveFields) -> Tensor:
    return tokens.log_ratios(config.importance_sampling_level).exp()


def _clipped(tokens: Tokens, config: ObjectiveFields) -> Tensor:
    return formulas.clipped_loss(
        _ratios(tokens, config), tokens.advantages,
        epsilon_low=config.epsilon, epsilon_high=config.upper_epsilon, delta=config.delta,
    )  # fmt: skip


def _cispo(tokens: Tokens, config: ObjectiveFields) -> Tensor:
    return formulas.cispo_loss(
        tokens.logprobs, _ratios(tokens, config), tokens.advantages, epsilon_high=config.upper_epsilon
    )


def _sapo(tokens: Tokens, config: ObjectiveFields) -> Tensor:
    return formulas.sapo_loss(
        _ratios(tokens, config), tokens.advantages,
        temperature_pos=config.sapo_temperature_pos, temperature_neg=config.sapo_temperature_neg,
    )  # fmt: skip


def _vespo(tokens: Tokens, config: ObjectiveFields) -> Tensor:
    return formulas.vespo_loss(tokens.logprobs, _phi(tokens, config), tokens.advantages)


def _phi(tokens: Tokens, config: ObjectiveFields) -> Tensor:
    return formulas.vespo_weights(
        tokens.log_ratios("token"), tokens.advantages, _log_importance_weights(tokens, config), tokens.sequences,
        tokens.num_completions, k_pos=config.vespo_k_pos, lambda_pos=config.vespo_lambda_pos, k_neg=config.vespo_k_neg,
        lambda_neg=config.vespo_lambda_neg,
    )  # fmt: skip


def _log_importance_weights(tokens: Tokens, config: ObjectiveFields) -> Tensor | None:
    """Log importance weight of each token's completion, (N,), as VESPO takes it."""
    if tokens.importance_weights is None:
        return None
    log_weights = tokens.importance_weights.log().clamp(formulas.LOWEST, formulas.HIGHEST)
    if config.importance_sampling_mode.startswith("sequence"):
        return log_weights
    return formulas.sequence_sum(log_weights, tokens.sequences, tokens.num_completions)


def _gmpo(tokens: Tokens, config: ObjectiveFields) -> Tensor:
    return formulas.gmpo_loss(
        tokens.log_ratios("token"), tokens.advantages, tokens.learn_mask, tokens.sequences, tokens.num_completions,
        epsilon_low=config.epsilon, epsilon_high=config.upper_epsilon,
    )  # fmt: skip


_clipped_loss = partial(
    Loss, _clipped, fused=True, clip_bounds=lambda config: (1 - config.epsilon, 1 + config.upper_epsilon)
)
LOSSES: dict[str, Loss] = {
    "dapo": _clipped_loss("dapo"),
    "grpo": _clipped_loss("grpo"),
    "bnpo": _clipped_loss("dapo"),  # its batch is the whole step here
    "dr_grpo": _clipped_loss("dr_grpo"),
    "luspo": _clipped_loss("luspo"),
    "cispo": Loss(
        _cispo, "dapo", clip_bounds=lambda config: (0.0, config.upper_epsilon),
        token_metrics=lambda tokens, stats, config: {"cispo_clipped": stats.clipped_high},
    ),
    "sapo": Loss(_sapo, "grpo"),
    "vespo": Loss(
        _vespo, "dapo", importance_weights_inside=True,
        token_metrics=lambda tokens, stats, config: {"phi_seq": _phi(tokens, config)},
    ),
    "gmpo": Loss(
        _gmpo, "grpo", learn_mask_inside=True,
        clip_bounds=lambda config: (math.exp(-config.epsilon), math.exp(config.upper_epsilon)),
    ),
}  # fmt: skip
_BUILT_IN = frozenset(LOSSES)


def register_objective(name: str, *, aggregation: str = "dapo") -> Callable[[Objective], Objective]:
    """Make a function the loss_type `name`: it gets Tokens and the config, and returns token losses (N,).

    They are weighted as `aggregation` says ("dapo", "grpo", "dr_grpo" or "luspo", see formulas.token_weights), and
    importance weights, masks, KL and entropy bonus are added as for every other loss_type. A run tries the function
    once on made-up tokens before the model is loaded.

    Raises:
        InputError: the name is taken, or the aggregation is none.
    """
    aggregations = sorted({loss.aggregation for loss in LOSSES.values()})
    if name in _BUILT_IN:
        raise InputError(f"loss_type {name!r} is built in; choose another name")
    if aggregation not in aggregations:
        raise InputError(f"aggregation {aggregation!r} is not one of {', '.join(aggregations)}")

    def register(function: Objective) -> Objective:
        # What it makes of an advantage of 0, nobody knows.
        LOSSES[name] = Loss(function, aggregation, zero_advantage_has_no_gradient=False)
        LOSS_TYPES[name] = OWN_LOSS
        return function

    return register


def try_out(config: GRPOConfig, device: torch.device) -> None:
    """Call a registered objective once, on five made-up tokens of a step's first two completions.

    Raises:
        InputError: it returned no loss for each token, or losses without a gradient.
    """
    if config.loss_type in _BUILT_IN:
        return
    num_completions = max(2, config.num_generations * (config.prompts_per_step // config.steps_per_generation))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        logprobs = torch.full((5,), -1.0, device=device, requires_grad=True)
        old, sequences = torch.full_like(logprobs, -1.1), torch.tensor([0, 0, 0, 1, 1], device=device)
        lengths = torch.tensor([3, 2], device=device)
        tokens = Tokens(
            logprobs=logprobs, old_logprobs=old, ref_logprobs=old if config.beta and not config.kl_in_reward else None,
            entropy=torch.full_like(old, 0.5, requires_grad=config.has_entropy_bonus),
            advantages=torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0], device=device),
            loss_weights=loss_weights(lengths, lengths > 0, config)[sequences],
            sequences=sequences, num_completions=num_completions, sampling_logprobs=old,
            learn_mask=sequences == 0 if config.top_entropy_quantile < 1 else None,
            importance_weights=importance_weights(old, old, sequences, num_completions, config),
        )  # fmt: skip
        loss, _ = micro_batch_loss(tokens, 0.2, Coefficients(config.beta, config.entropy_coef), config)
    if not loss.requires_grad:
        raise InputError(
            f"loss_type {config.loss_type!r} returned losses without a gradient; compute them from tokens.logprobs"
        )


def loss_weights(lengths: Tensor, completion_mask: Tensor, config: GRPOConfig) -> Tensor:
    """Weight in the step's loss of a token of each completion, (B,) fp32."""
    return formulas.token_weights(
        lengths, completion_mask,
        aggregation=LOSSES[config.loss_type].aggregation, max_completion_length=config.max_completion_length,
    )  # fmt: skip


def importance_weights(
    old_logprobs: Tensor,
    proposal_logprobs: Tensor | None,
    sequences: Tensor,
    num_completions: int,
    config: ObjectiveFields,
) -> Tensor | None:
    """Importance weights (N,) between the sampler and the policy that training computes; None where there are none."""
    if not config.importance_sampling_correction or proposal_logprobs is None:
        return None
    return formulas.importance_weights(
        old_logprobs, proposal_logprobs, sequences, num_completions, mode=config.importance_sampling_mode,
        clip_min=config.importance_sampling_clip_min, clip_max=config.importance_sampling_clip_max,
    )  # fmt: skip


def micro_batch_loss(
    tokens: Tokens,
    entropy_weight: float,  # of each token in the entropy bonus: 1 over the number of those that learn in the step
    coefficients: Coefficients,
    config: GRPOConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's share of the step's loss, a scalar, and values to record of its tokens, (N,) by name."""
    loss = LOSSES[config.loss_type]
    tokens = replace(tokens, advantages=_scaled_advantages(loss, tokens, config))
    by_kernel = loss.fused and config.importance_sampling_level == "token" and config.kl_estimator == "k3"
    value, stats = (_fused if by_kernel else _composed)(tokens, coefficients.beta, config)
    if coefficients.entropy_coef:
        entropy = tokens.entropy if tokens.learn_mask is None else tokens.entropy * tokens.learn_mask
        value = value - coefficients.entropy_coef * entropy_weight * entropy.sum()
    recorded = {
        **stats._asdict(),
        **loss.token_metrics(tokens, stats, config),
        "entropy": tokens.entropy,
        "importance_weights": tokens.importance_weights,
        "difference": _sampling_difference(tokens),
    }
    return value, {name: values for name, values in recorded.items() if values is not None}


def _scaled_advantages(loss: Loss, tokens: Tokens, config: ObjectiveFields) -> Tensor:
    """Advantages (N,) times importance weights and masks, but for those that the loss reads itself."""
    factors = [
        _off_policy_mask(tokens, config),
        None if loss.importance_weights_inside else tokens.importance_weights,
        None if loss.learn_mask_inside else tokens.learn_mask,
    ]
    return math.prod((factor for factor in factors if factor is not None), start=tokens.advantages)


def _off_policy_mask(tokens: Tokens, config: ObjectiveFields) -> Tensor | None:
    if config.off_policy_mask_threshold is None:
        return None
    return formulas.low_divergence(
        tokens.logprobs, tokens.old_logprobs if tokens.sampling_logprobs is None else tokens.sampling_logprobs,
        tokens.advantages, tokens.sequences, tokens.num_completions, threshold=config.off_policy_mask_threshold,
    )  # fmt: skip


def _sampling_difference(tokens: Tokens) -> Tensor | None:
    """Distance (N,) of the sampler's log-probabilities from training's, of the policy that sampled."""
    return None if tokens.sampling_logprobs is None else (tokens.old_logprobs - tokens.sampling_logprobs).abs()


def _fused(tokens: Tokens, beta: float, config: ObjectiveFields) -> tuple[Tensor, TokenStats]:
    return policy_loss(
        tokens.logprobs, None if tokens.on_policy else tokens.old_logprobs, tokens.ref_logprobs, tokens.advantages,
        tokens.loss_weights, epsilon_low=config.epsilon, epsilon_high=config.upper_epsilon, delta=config.delta,
        beta=0.0 if tokens.ref_logprobs is None else beta,  # where the KL is in the reward
        use_bias_correction_kl=config.use_bias_correction_kl,
    )  # fmt: skip


def _composed(tokens: Tokens, beta: float, config: GRPOConfig) -> tuple[Tensor, TokenStats]:
    loss = LOSSES[config.loss_type]
    losses = loss.token_losses(tokens, config)
    shape = getattr(losses, "shape", None)
    if shape != tokens.logprobs.shape:
        returned = type(losses).__name__ if shape is None else tuple(shape)
        raise InputError(
            f"loss_type {config.loss_type!r} returned {returned}; return a loss for each of the {len(tokens.logprobs)} "
            "tokens, as a tensor"
        )
    ratios, kl = _ratios(tokens, config), None
    if tokens.ref_logprobs is not None:
        kl = formulas.kl_estimate(tokens.logprobs, tokens.ref_logprobs, estimator=config.kl_estimator)
        kl = kl * ratios if config.use_bias_correction_kl else kl
        losses = losses + beta * kl
    lowest, highest = loss.clip_bounds(config)
    stats = TokenStats(
        kl=None if kl is None else kl.detach(),
        ratio=ratios.detach(),
        clipped_low=(ratios < lowest) & (tokens.advantages < 0),
        clipped_high=(ratios > highest) & (tokens.advantages > 0),
    )
    # A token of weight 0 is left out, NaN or not.
    return torch.where(tokens.loss_weights != 0, losses * tokens.loss_weights, 0).sum(), stats

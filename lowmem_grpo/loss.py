"""From the configuration to a micro-batch's loss: the objective by name, what multiplies it, the KL and the entropy."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lowmem_grpo import objective
from lowmem_grpo.config import BUILT_IN, CLIPPED, LOSS_TYPES, GRPOConfig
from lowmem_grpo.objective import TokenStats

# How the token losses of an objective are weighted; bnpo's batch is the whole step here, which makes it dapo.
AGGREGATION = {
    "dapo": "dapo", "grpo": "grpo", "bnpo": "dapo", "dr_grpo": "dr_grpo", "luspo": "luspo", "cispo": "dapo",
    "sapo": "grpo", "vespo": "dapo", "gmpo": "grpo",
}  # fmt: skip


@dataclass(frozen=True)
class Tokens:
    """N tokens of whole completions, as an objective gets them; (N,) fp32 where nothing else is said."""

    logprobs: Tensor  # of the policy, under temperature; carries the gradient
    old_logprobs: Tensor  # of the policy that sampled, as training computes them
    ref_logprobs: Tensor | None  # of the reference, where there is one
    entropy: Tensor  # carries a gradient where there is an entropy bonus
    advantages: Tensor  # with importance weights and masks multiplied in
    weights: Tensor  # the normalisation: the loss is the sum of weights times token losses
    sequences: Tensor  # int64: which completion of the step each token is of
    completions: int  # B, of the step
    keep: Tensor | None = None  # bool: the tokens that top_entropy_quantile leaves
    correction: Tensor | None = None  # importance weights, at each token
    sampling_logprobs: Tensor | None = None  # by the sampler, under temperature alone

    def log_ratios(self, level: str) -> Tensor:
        """log of new policy to old, with its gradient, at "token", "sequence" or "sequence_token" level."""
        return objective.log_ratios(self.logprobs, self.old_logprobs, self.sequences, self.completions, level=level)


class Coefficients(NamedTuple):
    """What a controller may move from step to step."""

    beta: float
    entropy_coef: float


Objective = Callable[[Tokens, GRPOConfig], Tensor]


def register_objective(name: str, *, aggregation: str = "dapo") -> Callable[[Objective], Objective]:
    """Make a function the loss_type `name`: it gets Tokens and the config, and returns token losses (N,).

    They are weighted as `aggregation` says ("dapo", "grpo", "dr_grpo" or "luspo", see objective.token_weights), and
    importance weights, masks, KL and entropy bonus are added as for every other loss_type.

    Raises:
        ValueError: the name is taken, or the aggregation is none.
    """
    if name in BUILT_IN:
        raise ValueError(f"loss_type {name!r} is built in; choose another name")
    if aggregation not in AGGREGATION.values():
        raise ValueError(f"aggregation {aggregation!r} is not one of {', '.join(sorted(set(AGGREGATION.values())))}")

    def register(function: Objective) -> Objective:
        _OBJECTIVES[name], AGGREGATION[name] = function, aggregation
        if name not in LOSS_TYPES:
            LOSS_TYPES.append(name)
        return function

    return register


def step_weights(lengths: Tensor, completion_mask: Tensor, config: GRPOConfig) -> Tensor:
    """objective.token_weights of the configured loss, (B,) fp32."""
    return objective.token_weights(
        lengths, completion_mask,
        aggregation=AGGREGATION[config.loss_type], max_completion_length=config.max_completion_length,
    )  # fmt: skip


def first_coefficients(config: GRPOConfig) -> dict[str, float]:
    """The state of the two controllers before the first step."""
    return {"beta": config.beta, "entropy_coef": config.entropy_coef, "last_entropy": math.inf}


def coefficients_of(state: dict[str, float], config: GRPOConfig) -> Coefficients:
    """With use_adaptive_entropy there is a bonus only where the last step's entropy was at most entropy_target."""
    bonus = not config.use_adaptive_entropy or state["last_entropy"] <= config.entropy_target
    return Coefficients(state["beta"], state["entropy_coef"] if bonus else 0.0)


def coefficient_metrics(state: dict[str, float], config: GRPOConfig) -> dict[str, float]:
    """The coefficients that the next step has, where a controller or the entropy bonus makes them worth a look."""
    found = {"entropy_coef": state["entropy_coef"]} if config.has_entropy_bonus else {}
    return found if config.kl_target is None else {**found, "beta": state["beta"]}


def after_entropy(state: dict[str, float], entropy: float | None, config: GRPOConfig) -> dict[str, float]:
    """The state after an optimizer step over tokens of this mean entropy (Skywork-OR1, arXiv:2505.22312).

    None, where no token was computed, leaves it as it is, and so does what is not finite.
    """
    if not config.use_adaptive_entropy or entropy is None or not math.isfinite(entropy):
        return state
    change = config.entropy_coef_delta if entropy <= config.entropy_target else -config.entropy_coef_delta
    moved = min(max(state["entropy_coef"] + change, config.entropy_coef_min), config.entropy_coef_max)
    return {**state, "entropy_coef": moved, "last_entropy": entropy}


def after_kl(state: dict[str, float], kl: float | None, completions: int, config: GRPOConfig) -> dict[str, float]:
    """The state after a step of this mean KL a token: beta moves by at most 20 % a horizon (arXiv:1909.08593).

    None, where no token was computed, leaves it as it is, and so does what is not finite.
    """
    if config.kl_target is None or kl is None or not math.isfinite(kl):
        return state
    error = min(max(kl / config.kl_target - 1, -0.2), 0.2)
    return {**state, "beta": state["beta"] * (1 + error * min(1.0, completions / config.kl_horizon))}


def correction(
    old_logprobs: Tensor, proposal_logprobs: Tensor | None, sequences: Tensor, completions: int, config: GRPOConfig
) -> Tensor | None:
    """Importance weights (N,) between the sampler and the policy that training computes; None where there are none."""
    if not config.importance_sampling_correction or proposal_logprobs is None:
        return None
    return objective.importance_weights(
        old_logprobs, proposal_logprobs, sequences, completions, mode=config.importance_sampling_mode,
        clip_min=config.importance_sampling_clip_min, clip_max=config.importance_sampling_clip_max,
    )  # fmt: skip


def micro_batch_loss(
    tokens: Tokens,
    on_policy: bool,  # old_logprobs are those of this very forward
    entropy_weight: float,  # of each kept token in the entropy bonus: 1 over their number in the step
    coefficients: Coefficients,
    config: GRPOConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's share of the step's loss, a scalar, and what happened to its tokens, (N,) each by name."""
    loss_type = config.loss_type
    if config.off_policy_mask_threshold is not None:
        sampled = tokens.old_logprobs if tokens.sampling_logprobs is None else tokens.sampling_logprobs
        near = objective.low_divergence(
            tokens.logprobs, sampled, tokens.advantages, tokens.sequences, tokens.completions,
            threshold=config.off_policy_mask_threshold,
        )  # fmt: skip
        tokens = replace(tokens, advantages=tokens.advantages * near)
    if tokens.correction is not None and loss_type != "vespo":  # VESPO has it in its weights
        tokens = replace(tokens, advantages=tokens.advantages * tokens.correction)
    if tokens.keep is not None and loss_type != "gmpo":  # GMPO has it in its mean
        tokens = replace(tokens, advantages=tokens.advantages * tokens.keep)
    if loss_type in CLIPPED and config.importance_sampling_level == "token" and config.kl_estimator == "k3":
        loss, stats = _fused(tokens, on_policy, coefficients.beta, config)
        happened = {}
    else:
        loss, stats, happened = _composed(tokens, coefficients.beta, config)
    if coefficients.entropy_coef:
        kept = tokens.entropy if tokens.keep is None else tokens.entropy * tokens.keep
        loss = loss - coefficients.entropy_coef * entropy_weight * kept.sum()
    if loss_type == "cispo":
        happened["cispo_clipped"] = stats.clipped_high
    happened |= {name: value for name, value in stats._asdict().items() if value is not None}
    return loss, happened


def _fused(tokens: Tokens, on_policy: bool, beta: float, config: GRPOConfig) -> tuple[Tensor, TokenStats]:
    return objective.policy_loss(
        tokens.logprobs, None if on_policy else tokens.old_logprobs, tokens.ref_logprobs, tokens.advantages,
        tokens.weights, epsilon_low=config.epsilon, epsilon_high=config.upper_epsilon, delta=config.delta,
        beta=0.0 if tokens.ref_logprobs is None else beta,  # where the KL is in the reward
        use_bias_correction_kl=config.use_bias_correction_kl,
    )  # fmt: skip


def _composed(tokens: Tokens, beta: float, config: GRPOConfig) -> tuple[Tensor, TokenStats, dict[str, Tensor]]:
    losses = _OBJECTIVES[config.loss_type](tokens, config)
    if losses.shape != tokens.logprobs.shape:
        raise ValueError(
            f"loss_type {config.loss_type!r} returned {tuple(losses.shape)}; return a loss for each of the "
            f"{len(tokens.logprobs)} tokens"
        )
    ratio, kl = tokens.log_ratios(config.importance_sampling_level).exp(), None
    if tokens.ref_logprobs is not None:
        kl = objective.kl_estimate(tokens.logprobs, tokens.ref_logprobs, estimator=config.kl_estimator)
        kl = kl * ratio if config.use_bias_correction_kl else kl
        losses = losses + beta * kl
    low, high = _BOUNDS[config.loss_type](config) if config.loss_type in _BOUNDS else (0.0, torch.inf)
    low, high = (ratio < low) & (tokens.advantages < 0), (ratio > high) & (tokens.advantages > 0)
    stats = TokenStats(None if kl is None else kl.detach(), ratio.detach(), low, high)
    happened = {"phi_seq": _phi(tokens, config)} if config.loss_type == "vespo" else {}
    # A token of weight 0 is left out, NaN or not.
    return torch.where(tokens.weights != 0, losses * tokens.weights, 0).sum(), stats, happened


def _clipped(tokens: Tokens, config: GRPOConfig) -> Tensor:
    return objective.clipped_loss(
        tokens.log_ratios(config.importance_sampling_level).exp(), tokens.advantages,
        epsilon_low=config.epsilon, epsilon_high=config.upper_epsilon, delta=config.delta,
    )  # fmt: skip


def _cispo(tokens: Tokens, config: GRPOConfig) -> Tensor:
    ratio = tokens.log_ratios(config.importance_sampling_level).exp()
    return objective.cispo_loss(tokens.logprobs, ratio, tokens.advantages, epsilon_high=config.upper_epsilon)


def _sapo(tokens: Tokens, config: GRPOConfig) -> Tensor:
    return objective.sapo_loss(
        tokens.log_ratios(config.importance_sampling_level).exp(), tokens.advantages,
        temperature_pos=config.sapo_temperature_pos, temperature_neg=config.sapo_temperature_neg,
    )  # fmt: skip


def _vespo(tokens: Tokens, config: GRPOConfig) -> Tensor:
    return objective.vespo_loss(tokens.logprobs, _phi(tokens, config), tokens.advantages)


def _gmpo(tokens: Tokens, config: GRPOConfig) -> Tensor:
    return objective.gmpo_loss(
        tokens.log_ratios("token"), tokens.advantages, tokens.keep, tokens.sequences, tokens.completions,
        epsilon_low=config.epsilon, epsilon_high=config.upper_epsilon,
    )  # fmt: skip


def _phi(tokens: Tokens, config: GRPOConfig) -> Tensor:
    return objective.vespo_weights(
        tokens.log_ratios("token"), tokens.advantages, _log_correction(tokens, config), tokens.sequences,
        tokens.completions, k_pos=config.vespo_k_pos, lambda_pos=config.vespo_lambda_pos, k_neg=config.vespo_k_neg,
        lambda_neg=config.vespo_lambda_neg,
    )  # fmt: skip


def _log_correction(tokens: Tokens, config: GRPOConfig) -> Tensor | None:
    """log of old policy to sampler of each token's completion, (N,), as VESPO's weight takes it."""
    if tokens.correction is None:
        return None
    log_weights = tokens.correction.log().clamp(objective.LOWEST, objective.HIGHEST)
    if config.importance_sampling_mode.startswith("sequence"):
        return log_weights
    return objective.sequence_sum(log_weights, tokens.sequences, tokens.completions)


_OBJECTIVES: dict[str, Objective] = {
    **dict.fromkeys(CLIPPED, _clipped), "cispo": _cispo, "sapo": _sapo, "vespo": _vespo, "gmpo": _gmpo
}  # fmt: skip
# Outside of these a ratio is cut off: what clip_ratio counts.
_BOUNDS: dict[str, Callable[[GRPOConfig], tuple[float, float]]] = {
    **dict.fromkeys(CLIPPED, lambda config: (1 - config.epsilon, 1 + config.upper_epsilon)),
    "cispo": lambda config: (0.0, config.upper_epsilon),
    "gmpo": lambda config: (math.exp(-config.epsilon), math.exp(config.upper_epsilon)),
}

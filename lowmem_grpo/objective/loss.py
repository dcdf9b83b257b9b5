"""From the configuration to a micro-batch's loss: the objective by name, what multiplies it, the KL and the entropy."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowmem_grpo.config.grpo import BUILT_IN, CLIPPED, LOSS_TYPES, GRPOConfig
from lowmem_grpo.errors import InputError
from lowmem_grpo.kernels.policy_loss import TokenStats, policy_loss
from lowmem_grpo.objective import formulas
from lowmem_grpo.objective.coefficients import Coefficients

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
        return formulas.log_ratios(self.logprobs, self.old_logprobs, self.sequences, self.completions, level=level)


Objective = Callable[[Tokens, GRPOConfig], Tensor]


def register_objective(name: str, *, aggregation: str = "dapo") -> Callable[[Objective], Objective]:
    """Make a function the loss_type `name`: it gets Tokens and the config, and returns token losses (N,).

    They are weighted as `aggregation` says ("dapo", "grpo", "dr_grpo" or "luspo", see formulas.token_weights), and
    importance weights, masks, KL and entropy bonus are added as for every other loss_type.

    Raises:
        InputError: the name is taken, or the aggregation is none.
    """
    if name in BUILT_IN:
        raise InputError(f"loss_type {name!r} is built in; choose another name")
    if aggregation not in AGGREGATION.values():
        raise InputError(f"aggregation {aggregation!r} is not one of {', '.join(sorted(set(AGGREGATION.values())))}")

    def register(function: Objective) -> Objective:
        _OBJECTIVES[name], AGGREGATION[name] = function, aggregation
        if name not in LOSS_TYPES:
            LOSS_TYPES.append(name)
        return function

    return register


def step_weights(lengths: Tensor, completion_mask: Tensor, config: GRPOConfig) -> Tensor:
    """formulas.token_weights of the configured loss, (B,) fp32."""
    return formulas.token_weights(
        lengths, completion_mask,
        aggregation=AGGREGATION[config.loss_type], max_completion_length=config.max_completion_length,
    )  # fmt: skip


def correction(
    old_logprobs: Tensor, proposal_logprobs: Tensor | None, sequences: Tensor, completions: int, config: GRPOConfig
) -> Tensor | None:
    """Importance weights (N,) between the sampler and the policy that training computes; None where there are none."""
    if not config.importance_sampling_correction or proposal_logprobs is None:
        return None
    return formulas.importance_weights(
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
        near = formulas.low_divergence(
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
    return policy_loss(
        tokens.logprobs, None if on_policy else tokens.old_logprobs, tokens.ref_logprobs, tokens.advantages,
        tokens.weights, epsilon_low=config.epsilon, epsilon_high=config.upper_epsilon, delta=config.delta,
        beta=0.0 if tokens.ref_logprobs is None else beta,  # where the KL is in the reward
        use_bias_correction_kl=config.use_bias_correction_kl,
    )  # fmt: skip


def _composed(tokens: Tokens, beta: float, config: GRPOConfig) -> tuple[Tensor, TokenStats, dict[str, Tensor]]:
    losses = _OBJECTIVES[config.loss_type](tokens, config)
    if losses.shape != tokens.logprobs.shape:
        raise InputError(
            f"loss_type {config.loss_type!r} returned {tuple(losses.shape)}; return a loss for each of the "
            f"{len(tokens.logprobs)} tokens"
        )
    ratio, kl = tokens.log_ratios(config.importance_sampling_level).exp(), None
    if tokens.ref_logprobs is not None:
        kl = formulas.kl_estimate(tokens.logprobs, tokens.ref_logprobs, estimator=config.kl_estimator)
        kl = kl * ratio if config.use_bias_correction_kl else kl
        losses = losses + beta * kl
    low, high = _BOUNDS[config.loss_type](config) if config.loss_type in _BOUNDS else (0.0, torch.inf)
    low, high = (ratio < low) & (tokens.advantages < 0), (ratio > high) & (tokens.advantages > 0)
    stats = TokenStats(None if kl is None else kl.detach(), ratio.detach(), low, high)
    happened = {"phi_seq": _phi(tokens, config)} if config.loss_type == "vespo" else {}
    # A token of weight 0 is left out, NaN or not.
    return torch.where(tokens.weights != 0, losses * tokens.weights, 0).sum(), stats, happened


def _clipped(tokens: Tokens, config: GRPOConfig) -> Tensor:
    return formulas.clipped_loss(
        tokens.log_ratios(config.importance_sampling_level).exp(), tokens.advantages,
        epsilon_low=config.epsilon, epsilon_high=config.upper_epsilon, delta=config.delta,
    )  # fmt: skip


def _cispo(tokens: Tokens, config: GRPOConfig) -> Tensor:
    ratio = tokens.log_ratios(config.importance_sampling_level).exp()
    return formulas.cispo_loss(tokens.logprobs, ratio, tokens.advantages, epsilon_high=config.upper_epsilon)


def _sapo(tokens: Tokens, config: GRPOConfig) -> Tensor:
    return formulas.sapo_loss(
        tokens.log_ratios(config.importance_sampling_level).exp(), tokens.advantages,
        temperature_pos=config.sapo_temperature_pos, temperature_neg=config.sapo_temperature_neg,
    )  # fmt: skip


def _vespo(tokens: Tokens, config: GRPOConfig) -> Tensor:
    return formulas.vespo_loss(tokens.logprobs, _phi(tokens, config), tokens.advantages)


def _gmpo(tokens: Tokens, config: GRPOConfig) -> Tensor:
    return formulas.gmpo_loss(
        tokens.log_ratios("token"), tokens.advantages, tokens.keep, tokens.sequences, tokens.completions,
        epsilon_low=config.epsilon, epsilon_high=config.upper_epsilon,
    )  # fmt: skip


def _phi(tokens: Tokens, config: GRPOConfig) -> Tensor:
    return formulas.vespo_weights(
        tokens.log_ratios("token"), tokens.advantages, _log_correction(tokens, config), tokens.sequences,
        tokens.completions, k_pos=config.vespo_k_pos, lambda_pos=config.vespo_lambda_pos, k_neg=config.vespo_k_neg,
        lambda_neg=config.vespo_lambda_neg,
    )  # fmt: skip


def _log_correction(tokens: Tokens, config: GRPOConfig) -> Tensor | None:
    """log of old policy to sampler of each token's completion, (N,), as VESPO's weight takes it."""
    if tokens.correction is None:
        return None
    log_weights = tokens.correction.log().clamp(formulas.LOWEST, formulas.HIGHEST)
    if config.importance_sampling_mode.startswith("sequence"):
        return log_weights
    return formulas.sequence_sum(log_weights, tokens.sequences, tokens.completions)


_OBJECTIVES: dict[str, Objective] = {
    **dict.fromkeys(CLIPPED, _clipped), "cispo": _cispo, "sapo": _sapo, "vespo": _vespo, "gmpo": _gmpo
}  # fmt: skip
# Outside of these a ratio is cut off: what clip_ratio counts.
_BOUNDS: dict[str, Callable[[GRPOConfig], tuple[float, float]]] = {
    **dict.fromkeys(CLIPPED, lambda config: (1 - config.epsilon, 1 + config.upper_epsilon)),
    "cispo": lambda config: (0.0, config.upper_epsilon),
    "gmpo": lambda config: (math.exp(-config.epsilon), math.exp(config.upper_epsilon)),
}

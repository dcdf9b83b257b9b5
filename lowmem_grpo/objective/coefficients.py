"""Coefficients that controllers move from step to step: beta towards a KL, the entropy bonus towards an entropy."""

import math
from typing import NamedTuple

from lowmem_grpo.config.grpo import GRPOConfig


class Coefficients(NamedTuple):
    """What a controller may move from step to step."""

    beta: float
    entropy_coef: float


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

"""Coefficients that controllers move from step to step: beta towards a KL, the entropy bonus towards an entropy."""

import math
from typing import Any, NamedTuple

from lowmem_grpo.config.sections import ObjectiveFields
from lowmem_grpo.output.saved import number


class Coefficients(NamedTuple):
    """The weights of the KL and of the entropy in the loss of one optimizer step."""

    beta: float
    entropy_coef: float


class Controllers:
    """beta and entropy_coef, which follow kl_target and entropy_target where those are set. A part of a checkpoint."""

    def __init__(self, config: ObjectiveFields):
        self.config = config
        self.beta, self.entropy_coef, self.last_entropy = config.beta, config.entropy_coef, math.inf

    def coefficients(self) -> Coefficients:
        """The coefficients of the next optimizer step.

        With use_adaptive_entropy there is a bonus only where the last step's entropy was at most entropy_target.
        """
        bonus = not self.config.use_adaptive_entropy or self.last_entropy <= self.config.entropy_target
        return Coefficients(self.beta, self.entropy_coef if bonus else 0.0)

    def move_entropy_coef(self, entropy: float | None) -> None:
        """Move entropy_coef after an optimizer step over tokens of this mean entropy (Skywork-OR1, arXiv:2505.22312).

        None, where no token was computed, moves nothing, and neither does what is not finite.
        """
        config = self.config
        if not config.use_adaptive_entropy or entropy is None or not math.isfinite(entropy):
            return
        change = config.entropy_coef_delta if entropy <= config.entropy_target else -config.entropy_coef_delta
        self.entropy_coef = min(max(self.entropy_coef + change, config.entropy_coef_min), config.entropy_coef_max)
        self.last_entropy = entropy

    def move_beta(self, kl: float | None, num_completions: int) -> None:
        """Move beta after a step of this mean KL a token, by at most 20 % a horizon (arXiv:1909.08593).

        None, where no token was computed, moves nothing, and neither does what is not finite.
        """
        config = self.config
        if config.kl_target is None or kl is None or not math.isfinite(kl):
            return
        error = min(max(kl / config.kl_target - 1, -0.2), 0.2)
        self.beta *= 1 + error * min(1.0, num_completions / config.kl_horizon)

    def metrics(self) -> dict[str, float]:
        """The coefficients of the next step, where a controller or the entropy bonus is on."""
        found = {"entropy_coef": self.entropy_coef} if self.config.has_entropy_bonus else {}
        return found if self.config.kl_target is None else {**found, "beta": self.beta}

    def state(self) -> dict[str, Any]:
        """Both coefficients, and the entropy of the last optimizer step; infinite before the first."""
        return {"beta": self.beta, "entropy_coef": self.entropy_coef, "last_entropy": self.last_entropy}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what state() returned, as far as controllers move it."""
        if self.config.kl_target is not None:
            self.beta = number(state["beta"], "beta")
        if self.config.use_adaptive_entropy:
            self.entropy_coef = number(state["entropy_coef"], "entropy_coef")
            self.last_entropy = number(state["last_entropy"], "last_entropy")

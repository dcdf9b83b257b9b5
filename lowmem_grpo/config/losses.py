"""The names that loss_type may have, and what each reads of the settings. Standard library only."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LossSettings:
    """The settings that a loss_type reads, of those that not every one reads, and what it asks of them."""

    reads: tuple[str, ...]
    highest_epsilon: float = 1.0  # a ratio is never below 0
    highest_epsilon_high: float = math.inf
    needs_epsilon_high: bool = False
    by_token: bool = True  # a token may have an advantage of its own


_CLIPPED = LossSettings(("epsilon", "epsilon_high", "delta", "importance_sampling_level"))
# A row for each loss_type; the functions are in objective/loss.py, where register_objective adds rows of both.
LOSS_TYPES = {
    **dict.fromkeys(("dapo", "grpo", "bnpo", "dr_grpo", "luspo"), _CLIPPED),
    "cispo": LossSettings(("epsilon_high", "importance_sampling_level"), needs_epsilon_high=True),
    "sapo": LossSettings(("importance_sampling_level", "sapo_temperature_pos", "sapo_temperature_neg")),
    "vespo": LossSettings(("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")),
    # The bounds are of log-ratios; fp32's largest number is exp(88.7).
    "gmpo": LossSettings(("epsilon", "epsilon_high"), highest_epsilon=80, highest_epsilon_high=80, by_token=False),
}
# Methods that are no loss_type by themselves, and the settings that make them.
METHODS = {
    "gspo": "set loss_type='grpo' and importance_sampling_level='sequence'",
    "ppo": "set adv_estimator='gae'",
    **{name: f"set adv_estimator={name!r}" for name in ("rloo", "reinforce_plus_plus", "gae")},
    "gdpo": "set multi_objective_aggregation='normalize_then_sum'",
}
# The row of a registered loss, which may read all of them.
OWN_LOSS = LossSettings(tuple(dict.fromkeys(name for loss in LOSS_TYPES.values() for name in loss.reads)))

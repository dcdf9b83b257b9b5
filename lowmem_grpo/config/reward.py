"""RewardConfig, made of the fields in sections.py, with TRL's names and defaults but for the number of epochs.

Standard library only. docs/coming-from-trl.md lists each deliberate difference from TRL.
"""

from dataclasses import dataclass
from typing import ClassVar

from lowmem_grpo.config.fields import option
from lowmem_grpo.config.sections import (
    AdapterFields,
    EvaluationFields,
    ModelFields,
    OptimizerFields,
    PairFields,
    ReportingFields,
    RunFields,
    SavingFields,
    UpdateFields,
)
from lowmem_grpo.config.sft import ASSUMED_LENGTH


@dataclass(frozen=True, kw_only=True)
class RewardConfig(  # from the last to the first: the fields of the last base come first
    ReportingFields,
    SavingFields,
    EvaluationFields,
    OptimizerFields,
    UpdateFields,
    PairFields,
    AdapterFields,
    ModelFields,
    RunFields,
):
    """Settings of one training of a reward model, in the order in which the loop meets them.

    Raises:
        UnknownNameError: a field of TRL's that is not supported here, with the remedy, or a misspelt one.
        InputError: a value out of its range, or one that contradicts another.
    """

    learning_rate: float = option(1e-4, "peak learning rate", common=True, at_least=0)
    # Preferences are soon learnt by heart: InstructGPT's reward model saw each once (arXiv:2203.02155, C.2).
    num_train_epochs: float = option(
        1.0, "passes over the data, where max_steps is -1", common=True, may_change=True, above=0, at_most=10**6
    )
    output_dir: str = option(
        "reward-output", "folder for checkpoints, the adapter and metrics.jsonl", common=True, may_change=True
    )

    kind: ClassVar[str] = "reward"
    samples: ClassVar[bool] = False  # completions, as a training by rewards does
    measured: ClassVar[tuple[str, ...]] = ("eval_accuracy", "eval_loss")  # by an evaluation, foremost first
    # To the planner, a pair is a prompt of one token with two completions, of which the last tokens are scored.
    max_prompt_length: ClassVar[int] = 1
    num_generations: ClassVar[int] = 2
    has_entropy_bonus: ClassVar[bool] = False

    @property
    def prompts_per_step(self) -> int:
        """Pairs of a step."""
        return self.pairs_per_step

    @property
    def max_completion_length(self) -> int:
        """Most tokens of a text after its first, with one that is packed after its last."""
        return self.max_length or ASSUMED_LENGTH

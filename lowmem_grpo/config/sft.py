"""SFTConfig, made of the fields in sections.py, with TRL's names, and its defaults but for LoRA's learning rate.

Standard library only. docs/coming-from-trl.md lists each deliberate difference from TRL.
"""

from dataclasses import dataclass
from typing import ClassVar

from lowmem_grpo.config.fields import option
from lowmem_grpo.config.sections import (
    AdapterFields,
    EvaluationFields,
    ExampleFields,
    ModelFields,
    OptimizerFields,
    ReportingFields,
    RunFields,
    SavingFields,
    UpdateFields,
)

ASSUMED_LENGTH = 1024  # of an example, by a plan that knows none, where max_length is none


@dataclass(frozen=True, kw_only=True)
class SFTConfig(  # from the last to the first: the fields of the last base come first
    ReportingFields,
    SavingFields,
    EvaluationFields,
    OptimizerFields,
    UpdateFields,
    ExampleFields,
    AdapterFields,
    ModelFields,
    RunFields,
):
    """Settings of one supervised fine-tuning run, in the order in which the loop meets them.

    Raises:
        UnknownNameError: a field of TRL's that is not supported here, with the remedy, or a misspelt one.
        InputError: a value out of its range, or one that contradicts another.
    """

    # Ten times TRL's, which is for all weights: https://thinkingmachines.ai/blog/lora/
    learning_rate: float = option(2e-4, "peak learning rate", common=True, at_least=0)
    output_dir: str = option(
        "sft-output", "folder for checkpoints, the adapter and metrics.jsonl", common=True, may_change=True
    )

    kind: ClassVar[str] = "sft"
    samples: ClassVar[bool] = False  # completions, as a training by rewards does
    measured: ClassVar[tuple[str, ...]] = ("eval_loss", "eval_mean_token_accuracy")  # by an evaluation, foremost first
    # To the planner, an example is a prompt of one token with one completion, all of which is learnt.
    max_prompt_length: ClassVar[int] = 1
    num_generations: ClassVar[int] = 1
    has_entropy_bonus: ClassVar[bool] = False

    @property
    def prompts_per_step(self) -> int:
        """Examples of a step."""
        return self.examples_per_step

    @property
    def max_completion_length(self) -> int:
        """Most tokens of an example that are learnt."""
        return (self.max_length or ASSUMED_LENGTH) - 1

"""SampleConfig: the settings of completions that are sampled into a file, without any training.

Standard library only. Names and defaults are those of GRPOConfig, whose sections these are parts of.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from lowmem_grpo.config.fields import option
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.sections import (
    BudgetFields,
    CompletionFields,
    LoadFields,
    OutputFields,
    PromptFields,
    ScoreFields,
)
from lowmem_grpo.config.trl import refuse_unknown_fields


@dataclass(frozen=True, kw_only=True)
class SamplerConfig(GRPOConfig):
    """The configuration that a policy is loaded by and a sampler draws by, training's settings at their defaults."""

    learns: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class SampleConfig(  # from the last to the first: the fields of the last base come first
    BudgetFields, ScoreFields, CompletionFields, PromptFields, LoadFields, OutputFields
):
    """Settings of one file of sampled completions.

    Raises:
        UnknownNameError: a field that only a training has, or a misspelt one.
        InputError: a value out of its range, or one that contradicts another.
    """

    prompts_per_step: int = option(
        8, "prompts sampled at a time; what is sampled of a prompt does not depend on it", common=True,
        may_change=True, above=0,
    )  # fmt: skip
    num_generations: int = option(8, "completions sampled of each prompt", common=True, above=0)

    kind: ClassVar[str] = "sample"

    def __new__(cls, **given: Any):
        refuse_unknown_fields(given, cls)
        return object.__new__(cls)

    def for_sampler(self) -> SamplerConfig:
        """The settings in the form that loading, sampling, scoring and planning read."""
        shared = {field.name for field in dataclasses.fields(SamplerConfig)}
        return SamplerConfig(**{name: value for name, value in vars(self).items() if name in shared})

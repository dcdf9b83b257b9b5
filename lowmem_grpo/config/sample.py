"""SampleConfig: the settings of completions that are sampled into a file, without any training.

Standard library only. Names and defaults are those of GRPOConfig, whose sections these are parts of.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from lowmem_grpo.config.fields import option
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.sections import (
    BudgetFields,
    CompletionFields,
    EndpointFields,
    LoadFields,
    OutputFields,
    PromptFields,
    ScoreFields,
)
from lowmem_grpo.errors import InputError

# Of the settings of sampling, those that have a meaning for a model behind an endpoint.
OF_ENDPOINT = {
    "output", "dataset_config", "dataset_split", "dataset_streaming", "dataset_take", "system_prompt",
    "num_generations", "max_completion_length", "temperature", "top_p", "stop_strings", "reward_weights",
    "reward_timeout", *(field.name for field in dataclasses.fields(EndpointFields)),
}  # fmt: skip
# Not in OpenAI's requests, and known to many servers.
OF_SOME_SERVERS = ("top_k", "min_p", "repetition_penalty", "chat_template_kwargs")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig(GRPOConfig):
    """The configuration that a policy is loaded by and a sampler draws by, training's settings at their defaults."""

    learns: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class SampleConfig(  # from the last to the first: the fields of the last base come first
    EndpointFields, BudgetFields, ScoreFields, CompletionFields, PromptFields, LoadFields, OutputFields
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

    def check(self) -> None:
        own = {field.name for field in dataclasses.fields(EndpointFields)}
        for field in dataclasses.fields(self):
            name = field.name
            if getattr(self, name) == field.default:
                continue
            if self.base_url is None and name in own:
                raise InputError(f"{name} is about an endpoint; give its base_url, or leave {name} out")
            if self.base_url is not None and name in OF_SOME_SERVERS:
                raise InputError(
                    f"{name} is not among what every endpoint reads; leave it out, or write it into extra_body as your "
                    "server names it"
                )
            if self.base_url is not None and name not in OF_ENDPOINT:
                raise InputError(f"{name} is about a model on this machine, and not behind base_url; leave {name} out")
        if "seed" in (self.extra_body or {}):
            raise InputError("extra_body has 'seed', with which a prompt's completions would be alike; leave it out")

    def for_sampler(self) -> SamplerConfig:
        """The settings in the form that loading, sampling, scoring and planning read."""
        shared = {field.name for field in dataclasses.fields(SamplerConfig)}
        return SamplerConfig(**{name: value for name, value in vars(self).items() if name in shared})

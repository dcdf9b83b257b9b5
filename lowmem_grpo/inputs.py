"""What a run is given, checked before long work: models, data, rewards, settings that contradict each other."""

from typing import Any

from peft import PeftModel

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.errors import InputError
from lowmem_grpo.model.load import is_adapter
from lowmem_grpo.model.policy import Policy


def check_budgets(prompts: list[Prompt], config: GRPOConfig) -> None:
    """Raise InputError if one sequence may have more tokens than a budget, which would then be no bound on memory."""
    longest = max(len(prompt.ids) for prompt in prompts) + config.max_completion_length
    for name in ("token_budget", "rollout_token_budget"):
        if longest > getattr(config, name):
            raise InputError(
                f"the longest prompt and its completion may have {longest} tokens, more than {name}="
                f"{getattr(config, name)}; raise it, or lower max_prompt_length or max_completion_length"
            )


def check_vocabulary(prompts: list[Prompt], policy: Policy) -> None:
    largest, size = max(max(prompt.ids) for prompt in prompts), policy.head.weight.shape[0]
    if largest >= size:
        raise InputError(f"the tokenizer makes id {largest}, and the model has {size}; pass the tokenizer of the model")


# Fields that are read only where there is an eval_dataset.
EVALUATION = (
    "eval_steps", "num_generations_eval", "metric_for_best_model", "greater_is_better", "load_best_model_at_end"
)  # fmt: skip


def is_continued(model: Any) -> bool:
    return isinstance(model, PeftModel) or (isinstance(model, str) and is_adapter(model))

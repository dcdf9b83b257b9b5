"""Reward functions: the built-in ones, and what runs them.

A reward function is called by keyword with `prompts`, `completions`, `completion_ids`, every other dataset column,
`trainer_state`, `log_extra(column, values)` and `log_metric(name, value)`, and returns one float for each completion,
or None where it does not apply. It may be `async`. Completions are strings, or lists of one chat message where the
prompt is a chat. An exception in a completion's place says that its scoring failed: it has no reward, and is counted.
"""

from lowmem_grpo.rewards.accuracy import accuracy_reward, exact_match_reward, reasoning_accuracy_reward
from lowmem_grpo.rewards.code import code_reward, get_code_reward
from lowmem_grpo.rewards.format import (
    answer_format_reward,
    get_regex_reward,
    solution_format_reward,
    tag_count_reward,
    think_format_reward,
)
from lowmem_grpo.rewards.isolation.processes import in_processes
from lowmem_grpo.rewards.judge import get_judge_reward
from lowmem_grpo.rewards.language import get_language_consistency_reward, language_consistency_reward
from lowmem_grpo.rewards.length import (
    get_cosine_scaled_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
)
from lowmem_grpo.rewards.names import reads_gold, resolve_reward_funcs
from lowmem_grpo.rewards.reward_adapter import get_adapter_reward
from lowmem_grpo.rewards.reward_model import get_model_reward
from lowmem_grpo.rewards.route import get_routed_reward
from lowmem_grpo.rewards.runner import RewardRunner

BUILT_IN = {
    function.__name__: function
    for function in (
        accuracy_reward, reasoning_accuracy_reward, exact_match_reward, think_format_reward, answer_format_reward,
        tag_count_reward, solution_format_reward, language_consistency_reward, code_reward,
    )
}  # fmt: skip
BUILT_IN_FACTORIES = {
    function.__name__: function
    for function in (
        get_cosine_scaled_reward, get_soft_overlong_punishment, get_repetition_penalty_reward, get_regex_reward,
        get_language_consistency_reward, get_code_reward, get_model_reward, get_judge_reward, get_routed_reward,
        get_adapter_reward,
        in_processes,
    )
}  # fmt: skip

__all__ = [
    "BUILT_IN",
    "BUILT_IN_FACTORIES",
    "RewardRunner",
    "accuracy_reward",
    "answer_format_reward",
    "code_reward",
    "exact_match_reward",
    "get_adapter_reward",
    "get_code_reward",
    "get_cosine_scaled_reward",
    "get_judge_reward",
    "get_language_consistency_reward",
    "get_model_reward",
    "get_regex_reward",
    "get_repetition_penalty_reward",
    "get_routed_reward",
    "get_soft_overlong_punishment",
    "in_processes",
    "language_consistency_reward",
    "reads_gold",
    "reasoning_accuracy_reward",
    "resolve_reward_funcs",
    "solution_format_reward",
    "tag_count_reward",
    "think_format_reward",
]

"""Reward functions: the built-in ones, and what runs them.

A reward function is called by keyword with `prompts`, `completions`, `completion_ids`, every other dataset column,
`trainer_state`, `log_extra(column, values)` and `log_metric(name, value)`, and returns one float for each completion,
or None where it does not apply. It may be `async`. Completions are strings, or lists of one chat message where the
prompt is a chat. An exception in a completion's place says that its scoring failed: it has no reward, and is counted.

Each is imported as it is asked for, since what scores by a model takes seconds to import.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    name: home
    for home, names in {
        "accuracy": "accuracy_reward exact_match_reward reasoning_accuracy_reward",
        "code": "code_reward get_code_reward",
        "format": "answer_format_reward get_regex_reward solution_format_reward tag_count_reward think_format_reward",
        "isolation.processes": "in_processes",
        "judge": "get_judge_reward",
        "language": "get_language_consistency_reward language_consistency_reward",
        "length": "get_cosine_scaled_reward get_repetition_penalty_reward get_soft_overlong_punishment",
        "names": "reads_gold resolve_reward_funcs",
        "reward_adapter": "get_adapter_reward",
        "reward_model": "get_model_reward",
        "route": "get_routed_reward",
        "runner": "RewardRunner",
    }.items()
    for name in names.split()
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


class Named(Mapping[str, Callable]):
    """Functions of this package by their names."""

    def __init__(self, *names: str):
        self.names = names

    def __getitem__(self, name: str) -> Callable:
        if name not in self.names:
            raise KeyError(name)
        return __getattr__(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names


BUILT_IN = Named(
    "accuracy_reward", "reasoning_accuracy_reward", "exact_match_reward", "think_format_reward", "answer_format_reward",
    "tag_count_reward", "solution_format_reward", "language_consistency_reward", "code_reward",
)  # fmt: skip
BUILT_IN_FACTORIES = Named(
    "get_cosine_scaled_reward", "get_soft_overlong_punishment", "get_repetition_penalty_reward", "get_regex_reward",
    "get_language_consistency_reward", "get_code_reward", "get_model_reward", "get_judge_reward", "get_routed_reward",
    "get_adapter_reward", "in_processes",
)  # fmt: skip

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

"""Reward functions: the built-in ones, and what runs them.

A reward function is called by keyword with `prompts`, `completions`, `completion_ids`, every other dataset column,
`trainer_state`, `log_extra(column, values)` and `log_metric(name, value)`, and returns one float for each completion,
or None where it does not apply. It may be `async`. Completions are strings, or lists of one chat message where the
prompt is a chat.
"""

from lowmem_grpo.rewards.accuracy import accuracy_reward
from lowmem_grpo.rewards.format import think_format_reward
from lowmem_grpo.rewards.names import resolve_reward_funcs
from lowmem_grpo.rewards.processes import in_processes
from lowmem_grpo.rewards.runner import RewardRunner

BUILT_IN = {function.__name__: function for function in (accuracy_reward, think_format_reward)}

__all__ = ["BUILT_IN", "RewardRunner", "accuracy_reward", "in_processes", "resolve_reward_funcs", "think_format_reward"]

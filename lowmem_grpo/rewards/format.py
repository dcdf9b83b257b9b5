"""Rewards that look at the form of a completion alone."""

import re

from lowmem_grpo.rewards.text import completion_text

THINK = re.compile(r"<think>(?!.*<think>)(.*?)</think>.*", re.DOTALL)


def think_format_reward(completions: list, **kwargs) -> list[float]:
    """1.0 where a completion begins with a think block, `<think>...</think>`, and opens no second one; else 0.0."""
    return [float(THINK.fullmatch(completion_text(completion)) is not None) for completion in completions]

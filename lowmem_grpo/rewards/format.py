"""Rewards of a completion's form alone."""

import re
from collections.abc import Callable

from lowmem_grpo.data.text import completion_text
from lowmem_grpo.errors import InputError
from lowmem_grpo.rewards.made import made

THINK = re.compile(r"<think>(?!.*<think>)(.*?)</think>.*", re.DOTALL)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
THINK_THEN_ANSWER = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)
FINAL_MARK = re.compile(r"\\boxed\{|^[ \t]*####", re.MULTILINE)


def think_format_reward(completions: list, **kwargs) -> list[float]:
    """1.0 where a completion begins with a think block, `<think>...</think>`, and opens no second one; else 0.0."""
    return [float(THINK.fullmatch(completion_text(completion)) is not None) for completion in completions]


def answer_format_reward(completions: list, **kwargs) -> list[float]:
    """1.0 for `<think>...</think> <answer>...</answer>` and nothing around, each tag exactly once; else 0.0."""
    texts = [completion_text(completion) for completion in completions]
    # Tags first: among many of them the pattern would look for every pair.
    return [float(_single_tags(text) == 4 and THINK_THEN_ANSWER.fullmatch(text) is not None) for text in texts]


def tag_count_reward(completions: list, **kwargs) -> list[float]:
    """A quarter for each of `<think>`, `</think>`, `<answer>` and `</answer>` that stands exactly once."""
    return [_single_tags(completion_text(completion)) / 4 for completion in completions]


def _single_tags(text: str) -> int:
    return sum(text.count(tag) == 1 for tag in TAGS)


def solution_format_reward(completions: list, **kwargs) -> list[float]:
    r"""1.0 where a completion marks one final answer, with one `\boxed{` or one line that begins with `####`."""
    return [float(len(FINAL_MARK.findall(completion_text(completion))) == 1) for completion in completions]


def get_regex_reward(pattern: str, full: bool = False, name: str = "regex_reward") -> Callable:
    """1.0 where the pattern is found in a completion, or with `full` matches it all; `.` matches newlines.

    Raises:
        InputError: no regular expression.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise InputError(f"get_regex_reward: {pattern!r} is no regular expression: {error}") from error
    return made(regex_reward, compiled, full, name=name)


def regex_reward(pattern: re.Pattern, full: bool, /, completions: list, **kwargs) -> list[float]:
    matches = pattern.fullmatch if full else pattern.search
    return [float(matches(completion_text(completion)) is not None) for completion in completions]

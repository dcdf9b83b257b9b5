"""A collapsed model's completion, 100,000 characters of anything, takes no built-in reward more than a moment."""

import time

import pytest

from lowmem_grpo.rewards import BUILT_IN, resolve_reward_funcs
from lowmem_grpo.tasks.countdown import countdown_reward

LENGTH = 100_000
MOST_S = 2.0  # of CPU time for one text; what is quadratic takes a minute
PIECES = [
    "\n", " ", "\t", " \n", "\r\n", "a", "1", "1,", "1 ", "1.", "-", "$", "\\", "{", "}", "(", "[1,", "####", "#### 1\n", "\n####",
    "`", "```\n", "```python\n", "<think>", "</think>", "<answer>", "</answer>", "</think><answer>", "<think></think><answer></answer>",
    "<answer>\n", "\\boxed{", "\\boxed{1}", "\\boxed{1} and ", "$1$", "$$", "\\frac{", "\\frac{1}{2}", "\\text{", "\\text{a} ", "^", "_{", "1/",
    "%", "=", "x = 1, ", "x=", ".\n", "1. ", "A) ", "**", "one ", "forty two ", "half ", "5 cm ", "€", "é", "e\u0301", "漢", "\u200b", "\U0001f600",
    "\ud800", "\x00", "\u2028", "½", "10^", "1e9", "0", "01", "(1, ", "\\left(", "\\begin{pmatrix}", "or ", "is ", "answer is ", "Jan 2, ", "7:00 ", "'", '"',
]  # fmt: skip
CALLS = [
    *(name for name in BUILT_IN if name != "code_reward"), "get_repetition_penalty_reward()", "get_regex_reward(pattern='a+b', full=True)",
    "get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=5)", "get_language_consistency_reward(scripts=['CJK'])",
]  # fmt: skip

SLOWER = ("accuracy", "exact_match", "language")  # of which the slow test below has all texts


def texts():
    for piece in PIECES:
        text = piece * (LENGTH // len(piece))
        yield from (
            text,
            f"<think>{text}</think><answer>{text[: LENGTH // 2]}</answer>",
            f"{text}\\boxed{{{text}}}",
            f"#### {text}",
        )


def seconds(function, text, gold):
    columns = {"solution": [gold], "numbers": [[1, 2, 3]], "target": [6], "completion_ids": [[1] * 1000]}
    started = time.process_time()
    function(prompts=["How many?"], completions=[text], **columns)
    return time.process_time() - started


def slowest(function, gold, several):
    return max((seconds(function, text, gold), text[:30], text[-30:]) for text in several)


@pytest.mark.parametrize("call", CALLS)
def test_a_built_in_reward_is_linear_in_a_hostile_text(call):
    reward = resolve_reward_funcs(call)[0]
    step = 7 if any(word in call for word in SLOWER) else 1  # 7: some of each of the four kinds of texts
    several = list(texts())[::step]
    assert slowest(reward, "5", several)[0] < MOST_S, slowest(reward, "5", several)


@pytest.mark.slow
@pytest.mark.parametrize("gold", ["5", "x + 1", "Paris", r"\frac{1}{2}", "5 cm", "(1, 2)"])
@pytest.mark.parametrize("call", ["accuracy_reward", "reasoning_accuracy_reward", "exact_match_reward"])
def test_answers_are_found_in_linear_time_whatever_is_asked(call, gold):
    found = slowest(BUILT_IN[call], gold, texts())
    assert found[0] < MOST_S, found


def test_countdown_is_linear_in_a_hostile_text():
    assert slowest(countdown_reward, "5", texts())[0] < MOST_S

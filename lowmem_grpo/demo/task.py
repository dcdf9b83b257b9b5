"""Sums of three two-digit numbers: the demo's problems, its worked and lazy answers, and its two rewards.

A worked completion computes the two partial sums before it answers; a lazy one answers at once and is nearly always
wrong. Both are well-formed, so only the answer tells them apart.
"""

import random
import re

ANSWER_FORMAT = re.compile(r"<think>[^<>]*</think><answer>(\d+)</answer>")
NUM_TRAIN, NUM_EVAL = 2000, 256

Problem = tuple[int, int, int]


def splits() -> tuple[list[Problem], list[Problem]]:
    """NUM_TRAIN training problems and NUM_EVAL held-out ones, all different."""
    draw = random.Random(0)
    problems: dict[Problem, None] = {}  # a dict keeps the order of insertion
    while len(problems) < NUM_TRAIN + NUM_EVAL:
        problems[random_problem(draw)] = None
    drawn = list(problems)
    return drawn[:NUM_TRAIN], drawn[NUM_TRAIN:]


def random_problem(draw: random.Random) -> Problem:
    return draw.randint(10, 99), draw.randint(10, 99), draw.randint(10, 99)


def question(problem: Problem) -> str:
    return "{}+{}+{}=".format(*problem)


def worked(problem: Problem) -> str:
    a, b, c = problem
    return f"<think>{a}+{b}={a + b};{a + b}+{c}={a + b + c}</think><answer>{a + b + c}</answer>"


def lazy(problem: Problem) -> str:
    return f"<think></think><answer>{sum(problem)}</answer>"


def rows(problems: list[Problem]) -> list[dict]:
    """Dataset rows: a chat `prompt`, and the gold `solution` that the reward compares with."""
    return [{"prompt": [{"role": "user", "content": question(p)}], "solution": str(sum(p))} for p in problems]


def answer_reward(completions: list, solution: list[str], **kwargs) -> list[float]:
    """1.0 where the number in the first answer tag is the sum, else 0.0. The format is the other reward's business."""
    found = [re.search(r"<answer>(\d+)</answer>", completion[0]["content"]) for completion in completions]
    return [
        float(match is not None and int(match[1]) == int(gold)) for match, gold in zip(found, solution, strict=True)
    ]


def tag_format_reward(completions: list, **kwargs) -> list[float]:
    """1.0 where the whole completion is one think block followed by one answer block, else 0.0."""
    return [float(ANSWER_FORMAT.fullmatch(completion[0]["content"]) is not None) for completion in completions]

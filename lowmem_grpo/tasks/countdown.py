"""Countdown: make the target from the numbers, each used once, with + - * / and parentheses.

The task of TinyZero (https://github.com/Jiayi-Pan/TinyZero), with problems and a verifier of our own.
"""

import ast
import random
import re
import zlib
from fractions import Fraction

from lowmem_grpo.data.text import completion_text, tagged_answer
from lowmem_grpo.errors import InputError
from lowmem_grpo.tasks.options import MOST_HELD_OUT, MOST_PROBLEMS, check_count
from lowmem_grpo.tasks.task import Task

MOST_CHARACTERS = 200  # of an expression: four numbers need 30
MOST_IN_VAIN = 20_000  # draws in a row without a new problem, after which there are taken to be no more
ALPHABET = re.compile(r"[0-9+\-*/() ]+")
QUESTION = (
    "Using the numbers {numbers}, make an expression that equals {target}. You may use + - * / and parentheses, and "
    "each number exactly once."
)
# The template of R1-Zero (https://arxiv.org/abs/2501.12948), for a model that was never taught to chat.
BASE_PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The Assistant "
    "first thinks about it and then gives the user the answer: the thoughts between <think> and </think>, the "
    "expression alone between <answer> and </answer>, such as <answer> (1 + 2) / 3 </answer>.\n"
    "User: {question}\nAssistant: "
)
CHAT_PROMPT = "Think between <think> and </think>, then give the expression alone between <answer> and </answer>."


def countdown_task(
    *,
    size: int = 2000,
    eval_size: int = 128,
    seed: int = 0,
    min_numbers: int = 3,
    max_numbers: int = 4,
    max_target: int = 100,
    chat: bool = False,
) -> Task:
    """size problems to train on and eval_size others: texts in R1-Zero's form for a base model, or chats.

    Raises:
        InputError: an option out of its range, or fewer problems than were asked for.
    """
    check_count("size", size, at_most=MOST_PROBLEMS)
    check_count("eval_size", eval_size, at_least=0, at_most=MOST_HELD_OUT)
    check_count("seed", seed, at_least=0)
    check_count("min_numbers", min_numbers, at_least=2)
    check_count("max_target", max_target, at_least=10)
    if not isinstance(max_numbers, int) or not min_numbers <= max_numbers <= 6:
        raise InputError(f"max_numbers={max_numbers!r} must be from min_numbers={min_numbers} to 6")
    if not isinstance(chat, bool):
        raise InputError(f"chat={chat!r} must be true or false")
    rows, eval_rows = (
        [_row(numbers, target, solution, chat) for (numbers, target), solution in problems.items()]
        for problems in _problems(random.Random(seed), (size, eval_size), min_numbers, max_numbers, max_target)
    )
    return Task(
        rows, countdown_reward, eval_rows=eval_rows or None, system_prompt=CHAT_PROMPT if chat else None,
        stop_strings=None if chat else ["</answer>"],
    )  # fmt: skip


def is_held_out(numbers: tuple[int, ...], target: int) -> bool:
    """Tell whether a problem is in the eighth of all that no run trains on, whatever its seed and size."""
    return zlib.crc32(repr((numbers, target)).encode()) % 8 == 0


def _problems(draw: random.Random, counts: tuple[int, int], fewest: int, most: int, max_target: int) -> list[dict]:
    """{(sorted numbers, target): a solution}, all different: so many to train on, and so many held out."""
    split: list[dict[tuple[tuple[int, ...], int], str]] = [{}, {}]
    in_vain = 0
    while in_vain < MOST_IN_VAIN and any(len(problems) < count for problems, count in zip(split, counts, strict=True)):
        in_vain += 1
        numbers = [draw.randint(1, 99) for _ in range(draw.randint(fewest, most))]
        value, expression = random_expression(draw, numbers)
        if value.denominator == 1 and 1 <= value <= max_target and value not in numbers:
            key = (tuple(sorted(numbers)), int(value))
            problems, count = split[is_held_out(*key)], counts[is_held_out(*key)]
            if key not in problems and len(problems) < count:
                in_vain, problems[key] = 0, expression
    for what, problems, count in zip(("to train on", "to hold out"), split, counts, strict=True):
        if len(problems) < count:
            raise InputError(
                f"there are fewer than {count} such problems {what}; lower size or eval_size, or raise max_numbers or "
                "max_target"
            )
    return split


def random_expression(draw: random.Random, numbers: list[int]) -> tuple[Fraction, str]:
    """A random expression of the numbers, so that every target is reachable: two are joined until one is left."""
    parts = [(Fraction(number), str(number)) for number in numbers]
    while len(parts) > 1:
        (a, left), (b, right) = (parts.pop(draw.randrange(len(parts))) for _ in range(2))
        operation = draw.choice("+-*/" if b else "+-*")
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else a}[operation]
        parts.append((value, f"({left} {operation} {right})"))
    value, expression = parts[0]
    return value, expression[1:-1]


def _row(numbers: tuple[int, ...], target: int, solution: str, chat: bool) -> dict:
    question = QUESTION.format(numbers=list(numbers), target=target)
    prompt = [{"role": "user", "content": question}] if chat else BASE_PROMPT.format(question=question)
    return {"prompt": prompt, "numbers": list(numbers), "target": target, "one_solution": solution}


def countdown_reward(completions: list, numbers: list, target: list, **kwargs) -> list[float]:
    """1.0 where the last answer tag holds an expression of exactly these numbers that equals the target, else 0.0."""
    answers = [tagged_answer(completion_text(completion)) for completion in completions]
    return [
        float(answer is not None and solves(answer, own, goal))
        for answer, own, goal in zip(answers, numbers, target, strict=True)
    ]


def solves(expression: str, numbers: list[int], target: int) -> bool:
    """Tell whether a text is arithmetic of exactly these numbers that equals the target, in exact fractions."""
    if len(expression) > MOST_CHARACTERS or not ALPHABET.fullmatch(expression):
        return False
    used: list[int] = []
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False
    return sorted(used) == sorted(numbers) and value == target


def _value(node: ast.expr, used: list[int]) -> Fraction:
    """The value of a tree of + - * / over whole numbers, which are noted in `used`; ValueError for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if not isinstance(node, ast.BinOp):
        raise InputError("not arithmetic")
    a, b = _value(node.left, used), _value(node.right, used)
    if isinstance(node.op, ast.Add):
        return a + b
    if isinstance(node.op, ast.Sub):
        return a - b
    if isinstance(node.op, ast.Mult):
        return a * b
    if isinstance(node.op, ast.Div):
        return a / b
    raise InputError("not arithmetic")

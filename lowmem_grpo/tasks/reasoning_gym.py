"""Every task of reasoning-gym by name, with its own verifier (https://github.com/open-thought/reasoning-gym).

An optional dependency: `pip install reasoning-gym`.
"""

import dataclasses
import json
import re
import zlib
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any
from urllib.parse import urlencode

from lowmem_grpo.data.text import completion_text, tagged_answer
from lowmem_grpo.errors import InputError, did_you_mean, in_a_line
from lowmem_grpo.rewards.final_answer import extract_answer, only_number
from lowmem_grpo.rewards.isolation.limit import OutOfTime, call_within
from lowmem_grpo.rewards.number import as_number
from lowmem_grpo.tasks.options import MOST_HELD_OUT, MOST_PROBLEMS, check_count, options_of, refuse_unknown_options
from lowmem_grpo.tasks.task import Task

SYSTEM_PROMPT = (
    "Think about the problem step by step. Then give the final answer alone between <answer> and </answer>, in the "
    "form that the problem asks for."
)
MOST_CHARACTERS = 20_000  # of an answer; the largest grids have some thousand
# Verifiers that hand a model's answer to Python's eval, or to sympy's parser, which calls eval. An answer reaches them
# only if it can do nothing there: no call, no loop and nothing that grows; or plain algebra with small exponents.
EVALUATED = {"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"}
ALGEBRA = {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
CAN_ACT = re.compile(r"[(*<%{]|\bfor\b")
# Verifiers of 0.1.25 that pay in full for other answers: gsm_symbolic for -405 as for 405, coin_flip for 0.9 as for
# 0.9375 (they begin alike), and game_of_life_halting for whatever is said. So the gold answer has to be met, too.
UNSOUND = {"coin_flip", "game_of_life_halting", "gsm_symbolic"}
CLOSE = Fraction(1, 10_000)  # as near as coin_flip asks for
FULL = 1 - 1e-6  # a verifier's score of a solution, which may be a sum or an exponential of floats
LEAD = re.compile(r"(?i).*\banswer(?:\s+is)?\s*:?[*_]*\s+")  # The answer is
SLOWEST_S = 10.0  # for the first problem; those of the default options take 0.5 s at most
HELD_OUT_SEED = 2**30  # far away: problem i of seed s is problem i - 1 of seed s + 1
WORD = re.compile(r"[^\W\d]\w*")
FUNCTIONS = {"sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "exp", "log", "ln", "sqrt", "pi", "Abs"}
POWER = re.compile(r"\*\*|\^")
SMALL_POWER = re.compile(r"(?:\*\*|\^)\s*(?:\d{1,2}|\(\s*-?\d{1,2}(?:\s*/\s*\d{1,2})?\s*\))(?!\d|\s*(?:\*\*|\^))")


def reasoning_gym_task(
    name: str, /, *, size: int = 2000, eval_size: int = 128, seed: int = 0, partial: bool = False, **options: Any
) -> Task:
    """size problems of a reasoning-gym task to train on, and up to eval_size others.

    Options are those of the task's own config. With `partial` its verifier's score is the reward as it is: 0.01 for a
    wrong answer in a good form, say, which in a group where nothing is solved is as large an advantage as a solution is
    elsewhere.

    Raises:
        InputError: the package is not installed, it has no such task or option, or nothing is left to hold out.
    """
    check_count("size", size, at_most=MOST_PROBLEMS)
    check_count("eval_size", eval_size, at_least=0, at_most=MOST_HELD_OUT)
    check_count("seed", seed, at_least=0)
    if not isinstance(partial, bool):
        raise InputError(f"partial={partial!r} must be true or false")
    refuse_unknown(name, options)
    reward = reasoning_gym_partial_reward if partial else reasoning_gym_reward
    rows = _rows(_full_name(name, seed=seed, size=2 * size + 64, **options), size, held_out=False)
    if len(rows) < size:
        raise InputError(f"reasoning_gym:{name} has fewer than {size} problems to train on; lower size")
    if not eval_size:
        return Task(rows, reward, system_prompt=SYSTEM_PROMPT)
    others = _full_name(name, seed=seed + HELD_OUT_SEED, size=16 * eval_size + 64, **options)
    eval_rows = _rows(others, eval_size, held_out=True)
    if not eval_rows:
        raise InputError(f"reasoning_gym:{name} has no problem to hold out; set eval_size=0")
    return Task(rows, reward, eval_rows=eval_rows, system_prompt=SYSTEM_PROMPT)


def refuse_unknown(name: str, options: dict[str, Any]) -> None:
    datasets = _registry()
    if name not in datasets:
        hint = did_you_mean(name, datasets, f"it has {', '.join(sorted(datasets))}")
        raise InputError(f"reasoning_gym has no task {name!r}; {hint}")
    known = [field.name for field in dataclasses.fields(datasets[name][1])]
    refuse_unknown_options(f"reasoning_gym:{name}", options, [*known, "eval_size", "partial"])


def _registry() -> dict[str, tuple[type, type]]:
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise InputError(f"reasoning_gym cannot be imported ({error}); pip install reasoning-gym") from error
    return DATASETS


def _full_name(name: str, **options: Any) -> str:
    return f"{name}?{urlencode({key: json.dumps(value) for key, value in sorted(options.items())})}"


def _rows(task: str, count: int, *, held_out: bool) -> list[dict]:
    """Up to count problems of the kind that is held out, an eighth of all, or of the others.

    Which kind a question is of says its own text, so that no size or seed trains on what another one holds out. A row
    says which problem it is, and the problem is made again from that: its metadata has no one form. A problem whose own
    answer its verifier may not see (an integral that sympy could not solve) is left out.

    Raises:
        InputError: reasoning-gym cannot make a problem of these options, or not in SLOWEST_S.
    """
    name = task.partition("?")[0]
    try:
        call_within(SLOWEST_S, partial(problem, task, 0))
        return _rows_of(task, count, held_out)
    except OutOfTime:
        raise InputError(
            f"reasoning_gym:{name} makes no problem of these options in {SLOWEST_S:g} s; choose smaller ones"
        ) from None
    except InputError:
        raise
    except Exception as error:  # whatever a generator raises on options that its own checks let pass
        raise InputError(f"reasoning_gym:{name} makes no problem of these options: {in_a_line(error)}") from error


def _rows_of(task: str, count: int, held_out: bool) -> list[dict]:
    rows: list[dict] = []
    for index in range(dataset(task).size):
        question, gold = (problem(task, index)[part] for part in ("question", "answer"))
        solvable = gold is None or harmless(gold, task.partition("?")[0])
        if solvable and len(rows) < count and (zlib.crc32(question.encode()) % 8 == 0) == held_out:
            rows.append({"prompt": [{"role": "user", "content": question}], "task": task, "index": index})
        if len(rows) == count:
            break
    return rows


@lru_cache(maxsize=8)
def dataset(task: str) -> Any:
    """reasoning-gym's own dataset for `name?options`.

    Raises:
        InputError: options that it does not take.
    """
    from reasoning_gym import create_dataset

    name, _, query = task.partition("?")
    try:
        return create_dataset(name, **options_of(task, query))
    except (AssertionError, TypeError, ValueError) as error:
        raise InputError(f"reasoning_gym:{name} does not take these options: {error}") from error


@lru_cache(maxsize=65536)
def problem(task: str, index: int) -> dict[str, Any]:
    return dataset(task)[index]


def reasoning_gym_reward(completions: list, task: list[str], index: list[int], **kwargs) -> list[float]:
    """1.0 where the verifier takes the answer for a solution, else 0.0, however good its form or beginning.

    The answer is the last answer tag, else the last line; where the problem's own answer is a number, a completion
    without a tag is also asked for its last number.
    """
    scores = reasoning_gym_partial_reward(completions, task, index)
    return [float(score >= FULL) for score in scores]


def reasoning_gym_partial_reward(completions: list, task: list[str], index: list[int], **kwargs) -> list[float]:
    """The verifier's own score, 1.0 for a solution and often a little for a good form; 0.0 where it raises.

    The answer is read as by reasoning_gym_reward.
    """
    texts = [completion_text(completion) for completion in completions]
    return [
        max(score(answer, own, place) for answer in answers_of(text, problem(own, place)["answer"]))
        for text, own, place in zip(texts, task, index, strict=True)
    ]


def answers_of(text: str, gold: str | None) -> list[str]:
    """Texts to try as the answer: the last answer tag; else the last line in three readings.

    Each that is found is asked, and the best counts: a verifier may want `$1/2$` where 1/2 is the last number.
    """
    tagged = tagged_answer(text)
    if tagged is not None:
        return [tagged]
    line = (text.strip().splitlines() or [""])[-1].strip()
    answers = [line, LEAD.sub("", line).removesuffix(".").strip("*`").removesuffix(".")]
    if gold is not None and as_number(gold) is not None:
        number = (extract_answer(text, gold) or "").replace("$", "").replace("\N{MINUS SIGN}", "-")
        answers.append(number.replace(",", ""))
    return answers


def score(answer: str, task: str, index: int) -> float:
    name = task.partition("?")[0]
    if not harmless(answer, name):
        return 0.0
    try:
        entry = problem(task, index)
        if name in UNSOUND and not agrees(answer, entry["answer"]):
            return 0.0
        return float(dataset(task).score_answer(answer, entry))
    except Exception:  # whatever it makes of a model's text, it is not the answer
        return 0.0


def agrees(answer: str, gold: str) -> bool:
    """Tell whether an answer is the gold number, whatever words are beside it, or the gold word."""
    wanted, given = as_number(gold), as_number(only_number(answer) or answer)
    if wanted is None:
        return answer.strip().casefold() == gold.casefold()
    return given is not None and abs(given - wanted) <= CLOSE


def harmless(answer: str, name: str) -> bool:
    """Tell whether a task's verifier, which may evaluate an answer, may see this one."""
    if name in EVALUATED:
        return len(answer) <= MOST_CHARACTERS and not CAN_ACT.search(answer)
    if name in ALGEBRA:
        words, rest = WORD.findall(answer), WORD.sub("", answer)
        return (
            len(answer) <= 500
            and all(word in FUNCTIONS or (len(word) == 1 and word.isascii()) for word in words)
            and re.fullmatch(r"[0-9.+\-*/^(),\s]*", rest) is not None
            and len(POWER.findall(answer)) == len(SMALL_POWER.findall(answer)) <= 20
        )
    return len(answer) <= MOST_CHARACTERS

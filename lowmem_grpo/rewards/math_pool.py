"""math_equal(): are two answers equal? By math-verify in worker processes, so that one which takes for ever ends.

math-verify's own limit is an alarm signal, which works only in a main thread; in a worker it is one.
"""

import re
from fractions import Fraction
from pathlib import Path

from lowmem_grpo.rewards.workers import WorkerPool

POOL = WorkerPool(Path(__file__).with_name("math_worker.py"))
TIME_LIMIT_S = 10.0  # for one comparison
START_LIMIT_S = 120.0  # for the first one, since a worker imports sympy before it
MOST_CHARACTERS = 1000  # no answer is longer, and Python refuses to read an integer of more than 4,300 digits
NUMBER = re.compile(r"[-+]?(?:\d+|\d{1,3}(?:,\d{3})+)?(?:\.\d+)?(?:/[1-9]\d*)?")


def math_equal(pairs: list[tuple[str, str]]) -> list[bool]:
    """Whether each (gold, answer) is equal: plain numbers at once, the others by math-verify in the workers."""
    verdicts: list[bool | None] = []
    for gold, answer in pairs:
        if max(len(gold), len(answer)) > MOST_CHARACTERS:
            verdicts.append(gold == answer)
            continue
        numbers = as_number(gold), as_number(answer)
        if numbers[0] is not None and len({as_number(side) for side in answer.split("=")} - {None}) > 1:
            verdicts.append(False)  # 17 = 18, of which math-verify would take a side
            continue
        verdicts.append(True if gold == answer else None if None in numbers else numbers[0] == numbers[1])
    open_pairs = [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict is None]
    if not open_pairs:
        return [verdict is True for verdict in verdicts]
    verified = dict(zip(open_pairs, POOL.ask_all(open_pairs, TIME_LIMIT_S, START_LIMIT_S), strict=True))
    return [
        verified[pair] is True if verdict is None else verdict for pair, verdict in zip(pairs, verdicts, strict=True)
    ]


def as_number(text: str) -> Fraction | None:
    """A plain number, with thousands separators, a dollar or percent sign, or a full stop at its end; else None."""
    plain = (
        text.strip()
        .replace("\N{MINUS SIGN}", "-")
        .replace("\\$", "")
        .replace("$", "")
        .rstrip(".")
        .removesuffix("%")
        .strip()
    )
    if not NUMBER.fullmatch(plain) or not plain[-1:].isdigit() or ("/" in plain and "." in plain):
        return None
    return Fraction(plain.replace(",", ""))

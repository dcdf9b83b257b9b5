"""math_equal(): tells whether answers are equal, by math-verify in worker processes, which can be ended.

math-verify's own limit is an alarm signal, which works only in a main thread; a worker's only thread is one.
"""

from pathlib import Path

from lowmem_grpo.rewards.isolation.workers import WorkerPool
from lowmem_grpo.rewards.number import as_number, exact, same_number, with_decimal_comma
from lowmem_grpo.rewards.units import other_unit
from lowmem_grpo.rewards.words import (
    MOST_CHARACTERS,
    TIME,
    begins_with_zero,
    reading,
    same_product,
    with_letter_unit,
)

POOL = WorkerPool(Path(__file__).with_name("math_worker.py"))
TIME_LIMIT_S = 10.0  # for one comparison
START_LIMIT_S = 120.0  # for the first one, since a worker imports sympy before it


def math_equal(pairs: list[tuple[str, str]]) -> list[bool]:
    """A truth value for each (gold, answer): plain numbers and words at once, formulas by math-verify."""
    verdicts = [_verdict(gold, answer) for gold, answer in pairs]
    open_pairs = list(dict.fromkeys(verdict for verdict in verdicts if isinstance(verdict, tuple)))
    if not open_pairs:
        return [verdict is True for verdict in verdicts]
    verified = dict(zip(open_pairs, POOL.ask_all(open_pairs, TIME_LIMIT_S, START_LIMIT_S), strict=True))
    return [(verified[verdict] if isinstance(verdict, tuple) else verdict) is True for verdict in verdicts]


def _verdict(gold: str, answer: str) -> bool | tuple[str, str]:
    """True or false of a gold text and an answer, or the two formulas that math-verify has to compare."""
    if gold == answer or max(len(gold), len(answer)) > MOST_CHARACTERS:
        return gold == answer
    if "%" not in gold + answer and not gold.lstrip("-+$").startswith("0"):  # at once, as with most answers
        numbers = as_number(gold), as_number(answer)
        if None not in numbers:
            return numbers[0] == numbers[1]
    own, given = reading(gold), reading(answer)
    if exact(own.value or ""):
        given = with_letter_unit(given)
    elif given.unit and exact(given.value or ""):
        own = with_letter_unit(own)
    if other_unit(own.unit, given.unit):
        return False
    if same_product(gold, answer):
        return True
    if own.value is None or given.value is None or begins_with_zero(gold):
        return own.text == given.text
    if own.value == given.value:
        return True
    if TIME.fullmatch(own.value) and TIME.fullmatch(given.value):  # 12:30 is not 2:05, though 12/30 is 2/5
        return False
    wanted, found = exact(own.value), exact(given.value)
    if wanted is None and found is not None:
        wanted = exact(with_decimal_comma(own.value))
    elif found is None and wanted is not None:
        found = exact(with_decimal_comma(given.value))
    if wanted is not None and found is not None:
        unit = given.unit if wanted.is_percent else own.unit
        return same_number(wanted, found) and not (unit and wanted.is_percent != found.is_percent)  # 12 % and 12 cm
    if wanted is not None and len({as_number(side) for side in given.value.split("=")} - {None}) > 1:
        return False  # 17 = 18, of which math-verify would take a side
    return own.value, given.value

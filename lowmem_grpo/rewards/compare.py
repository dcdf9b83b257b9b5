"""compare(): is an answer the gold one? Numbers, units and words are told at once, and formulas left to math-verify."""

import re

from lowmem_grpo.rewards.kinds import CLOCK, case_counts, same_of_a_kind
from lowmem_grpo.rewards.number import (
    MOST_CHARACTERS,
    Number,
    as_number,
    exact,
    is_left_to_do,
    same_number,
    with_decimal_comma,
)
from lowmem_grpo.rewards.units import conversion
from lowmem_grpo.rewards.words import (
    Reading,
    begins_with_zero,
    reading,
    same_product,
    with_letter_unit,
    without_name,
)

NO_FACTOR = re.compile(r"[=<>,;]|\\(?:[{\[]|l?eq?|g?eq?|in|pm|cup|begin)(?![a-z])")  # of lists, equations, intervals

BARE_RELATION = re.compile(r" *(?:[<>]|\\[lg]eq?(?![a-z]))")
VARIABLE = re.compile(rf" *([a-zA-Z]){BARE_RELATION.pattern}")
ROWS = re.compile(r"\[(?:\[[^\[\]]+\],?)+\]")


def compare(gold: str, answer: str) -> bool | tuple[str, str]:
    """True or false of a gold text and an answer, or the two formulas that math-verify has to compare."""
    if gold == answer or max(len(gold), len(answer)) > MOST_CHARACTERS:
        return gold == answer
    if "%" not in gold + answer and not gold.lstrip("-+$").startswith("0"):  # at once, as with most answers
        numbers = as_number(gold), as_number(answer)
        if None not in numbers and "/" not in gold + answer:
            return numbers[0] == numbers[1]
    own, given = reading(gold), reading(answer)
    if ("=" in own.written) != ("=" in given.written):
        own, given = reading(without_name(own.written)), reading(without_name(given.written))
    if own.text == given.text and case_counts(own.written, given.written):
        return False
    of_a_kind = same_of_a_kind(own.written, given.written)
    if of_a_kind is not None:
        return of_a_kind
    if exact(own.value or ""):
        given = with_letter_unit(given)
    elif given.unit and exact(given.value or ""):
        own = with_letter_unit(own)
    own, given = _in_radians(own, given), _in_radians(given, own)
    own, given = _with_variable(own, given), _with_variable(given, own)
    own, given = _as_matrix(own, given), _as_matrix(given, own)
    factor = conversion(own.unit, given.unit)
    if factor is None:
        return False
    if same_product(gold, answer):
        return True
    if own.value is None or given.value is None or begins_with_zero(gold):
        return own.text == given.text
    wanted, found = _numbers(own.value, given.value)
    if wanted is not None:
        sides = given.value.split("=")
        left = [is_left_to_do(side, wanted) for side in sides]
        if any(left) and not any(exact(side) and not undone for side, undone in zip(sides, left, strict=True)):
            return False  # 88 + 49 is the question, and not its answer
    if wanted is not None and found is not None:
        unit = given.unit if wanted.is_percent else own.unit
        wanted = wanted._replace(value=wanted.value * factor)
        return same_number(wanted, found) and not (unit and wanted.is_percent != found.is_percent)  # 12 % and 12 cm
    if factor != 1:  # 5\sqrt{2} m and 500\sqrt{2} cm
        if any(NO_FACTOR.search(side) for side in (own.value, given.value)):
            return False
        return rf"\frac{{{factor.numerator}}}{{{factor.denominator}}} \cdot ({own.value})", given.value
    if own.value == given.value:
        return True
    if CLOCK.fullmatch(own.value) and CLOCK.fullmatch(given.value):  # 12:30 is not 2:05, though 12/30 is 2/5
        return False
    if wanted is not None and len({as_number(side) for side in given.value.split("=")} - {None}) > 1:
        return False  # 17 = 18, of which math-verify would take a side
    return own.value, given.value


def _in_radians(side: Reading, other: Reading) -> Reading:
    r"""Read 90 degrees as \frac{\pi}{180} times 90, where the other side is in radians: \frac{\pi}{2}."""
    if side.unit != "degree" or other.unit not in ("", "radian") or r"\pi" not in (other.value or ""):
        return side
    name, equals, degrees = (side.value or "").rpartition("=")
    if exact(degrees) is None:
        return side
    return side._replace(value=rf"{name}{equals} \frac{{\pi}}{{180}} \cdot ({degrees})", unit=other.unit)


def _with_variable(side: Reading, other: Reading) -> Reading:
    r"""Read `\ge 3`, or `at least 3`, as the inequality of the other side's variable, or of x."""
    if not BARE_RELATION.match(side.value or ""):
        return side
    variable = VARIABLE.match(other.value or "")
    return side._replace(value=f"{variable[1] if variable else 'x'} {side.value}")


def _as_matrix(side: Reading, other: Reading) -> Reading:
    """Read a list of rows, [[1, 2], [3, 4]], as a matrix, where the other side is one."""
    written = side.written.replace(" ", "")
    if r"\begin" not in (other.value or "") or not ROWS.fullmatch(written):
        return side
    rows = written[2:-2].replace("],[", r"\\").replace(",", "&")
    return side._replace(value=rf"\begin{{pmatrix}}{rows}\end{{pmatrix}}")


def _numbers(value: str, other: str) -> tuple[Number | None, Number | None]:
    """The numbers that two values are; 3,75 is one where the other value is a number without its comma."""
    numbers = exact(value), exact(other)
    if (numbers[0] is None) == (numbers[1] is None):
        return numbers
    return numbers[0] or exact(with_decimal_comma(value)), numbers[1] or exact(with_decimal_comma(other))

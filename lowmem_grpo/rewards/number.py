r"""Numbers that are compared exactly and at once, without math-verify: `1,234.50`, `50\%`, `\frac{1}{2}`, `3.5/7`."""

import re
from fractions import Fraction
from typing import NamedTuple

MOST_CHARACTERS = 1000  # of an answer; Python refuses to read a whole number of more than 4,300 digits
PLAIN = re.compile(r"[-+]?(?=[\d.])(?:\d+|[1-9]\d{0,2}(?:,\d{3})+)?(?:\.\d+)?(?:/[1-9]\d*)?")
FRACTION = re.compile(r"([-+]?) *\\frac\{ *([-+]?\d+) *\}\{ *([-+]?\d+) *\}")
MIXED = re.compile(r"([-+]?) *\((\d+)\+\\frac\{(\d+)\}\{(\d+)\}\)")
# A computation of plain numbers: 88 + 49, 3 \cdot 4, (2)(3), 7/0.5. Powers, roots and 5! are values.
ARITHMETIC = re.compile(r"(?:[\d.,()\[\]{} +*/$-]|\\(?:times|cdot|div|d?frac|left|right|[%$])(?![a-z]))+")
SUM_OR_PRODUCT = re.compile(r"[\d.)\]}%] *(?:[-+*]|\\(?:times|cdot)(?![a-z]))|\d *[(\[]|[)\]] *[\d(\[]")
TIMES_TEN = re.compile(r"(.*\d) \\times 10\^\{(-?\d{1,4})\}")
# 3,75, 12,5\\% and 0,5; but 3,5 may be two numbers, and 3,500 is three thousand and five hundred.
DECIMAL_COMMA = re.compile(r"[-+]?(?:0,\d+|[1-9]\d*,(?:\d\d|\d{4,})|[1-9]\d+,\d|[1-9]\d{3,},\d+)(?:\\?%)?")
ROUNDED = Fraction(1, 10**9)  # how far a decimal may be, relatively, from what was rounded to it: 0.3333333333 for 1/3


class Number(NamedTuple):
    value: Fraction
    places: int | None  # of a decimal; None for a fraction
    is_percent: bool = False


def as_number(text: str) -> Fraction | None:
    """A plain number, with thousands separators, a dollar or percent sign, or a full stop at its end; else None.

    A text of more than MOST_CHARACTERS is none.
    """
    number = _plain(text)
    return None if number is None else Fraction(number)


def is_number(text: str) -> bool:
    return _plain(text) is not None


def _plain(text: str) -> str | None:
    if len(text) > MOST_CHARACTERS:
        return None
    text = text.strip().replace("\N{MINUS SIGN}", "-").replace("\\$", "").replace("$", "")
    text = text.removesuffix(".").removesuffix("%").strip()
    if not PLAIN.fullmatch(text) or not text[-1:].isdigit() or ("/" in text and "." in text):
        return None
    return text.replace(",", "")


def exact(text: str) -> Number | None:
    """The number that a text is, in the notation of notation.plain; None for anything else."""
    number = text.strip().removesuffix(".").removesuffix("%").removesuffix("\\").strip()
    is_percent = "%" in text[len(number) :]
    plain = as_number(number)
    if plain is not None:
        return Number(plain, None if "/" in number else len(number.partition(".")[2]), is_percent)
    if found := FRACTION.fullmatch(number):
        sign, numerator, denominator = found.groups()
        if int(denominator) == 0:
            return None
        return Number(Fraction(int(numerator), int(denominator)) * int(sign + "1"), None, is_percent)
    if found := MIXED.fullmatch(number):
        sign, whole, numerator, denominator = found.groups()
        return Number((int(whole) + Fraction(int(numerator), int(denominator))) * int(sign + "1"), None, is_percent)
    if (found := TIMES_TEN.fullmatch(number)) and (decimal := as_number(found[1])) is not None:
        places = len(found[1].partition(".")[2]) - int(found[2])
        return Number(decimal * Fraction(10) ** int(found[2]), max(places, 0), is_percent)
    return None


def with_decimal_comma(text: str) -> str:
    """A text such as 3,75 as 3.75; any other as it is."""
    return text.replace(",", ".") if DECIMAL_COMMA.fullmatch(text.strip()) else text


def is_left_to_do(text: str, gold: Number) -> bool:
    """Tell whether a text is a computation of plain numbers, such as 88 + 49, where gold is what it may come to.

    5/2 is a number, and 274/2, which is a whole one, a computation. Where gold is a fraction, computations of fractions
    are taken for notations of it.
    """
    if gold.places is None or not ARITHMETIC.fullmatch(text):
        return False
    number = exact(text.replace(" ", "").replace(r"\div", "/"))
    if number is not None:
        return number.places is None and number.value.denominator == 1
    is_quotient = gold.value.denominator == 1 and re.search(r"/|frac|div", text)
    return bool(is_quotient or SUM_OR_PRODUCT.search(text))


def same_number(gold: Number, answer: Number) -> bool:
    """Tell whether two numbers are equal, up to a decimal's last place; 50 % is 0.5, and 50 where percent are asked."""
    if _equal(gold, answer):
        return True
    return gold.is_percent != answer.is_percent and _equal(_in_ones(gold), _in_ones(answer))


def _equal(gold: Number, answer: Number) -> bool:
    difference = abs(gold.value - answer.value)
    if difference == 0 or (gold.places is None) == (answer.places is None):
        return difference == 0
    places = gold.places if answer.places is None else answer.places
    return difference < Fraction(1, 10 ** (places or 0)) and difference <= ROUNDED * abs(gold.value)


def _in_ones(number: Number) -> Number:
    if not number.is_percent:
        return number
    return Number(number.value / 100, None if number.places is None else number.places + 2)

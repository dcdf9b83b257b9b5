r"""reading(): what an answer is compared as: a value with a unit, which math-verify is asked about, or a text.

math-verify drops what it has no use for: `204_5` is 204 to it, and `2t` is 2, the t being a unit.
"""

import re
from functools import lru_cache
from typing import NamedTuple

from lowmem_grpo.rewards.letters import END, POWER, SEGMENT, WORD, is_formula, with_words_marked
from lowmem_grpo.rewards.notation import plain
from lowmem_grpo.rewards.units import CODES, CURRENCY, UNITS, is_unit, known, unit_name

# Of LaTeX, what says nothing.
LOOKS = re.compile(
    r"\\(?:left|right|middle|displaystyle|textstyle|[bB]igg?[lr]?|[lL]arge|LARGE|[hH]uge|small|tiny|normalsize|bf|it|rm|sf|tt)"
    r"(?![a-zA-Z])|\\color *\{\w+\}|^\s*\\approx(?![a-zA-Z])|\\!\s*"
)
BALANCED = r"\{((?:[^{}]|\{[^{}]*\})*)\}"
IN_A_BOX = re.compile(
    r"\\(?:fbox|boldsymbol|bm|underline|mathbf(?= *\{[^{}]*\{)|textcolor *\{\w+\}) *" + BALANCED + f"|^{BALANCED}$"
)
BUILDER = re.compile(r"^\{( *[A-Za-z] *(?:\\mid|[|:]).*)\}$")  # {x | x > 3}
PERCENT = re.compile(
    r"(?<=\d) *\\?(?:%|\\(?:text|mbox|mathrm) *\{ *(?:per ?cent|pct|%) *\}|(?:per ?cent|percentage|pct)$)"
)
ROUGHLY = re.compile(r"(?<=[\d)}]) *\\approx(?![a-zA-Z]).*$")  # behind the exact value
DOLLAR = re.compile(r"(?<!\\)\$")
BRACKETS = re.compile(r"(?<!\\)\\\(|(?<!\\)\\\)|^\\\[|\\\]$")
ANSWER_IS = re.compile(
    r"^\s*(?:the )?(?:(?:final |correct )?answer(?: is|:)|(?:option|choice)(?= \(?[A-Z]\b))\s*(?=\S)", re.IGNORECASE
)
MOST_CHARACTERS = 1000  # no answer is longer, and Python refuses to read an integer of more than 4,300 digits
CURRENCY_IN_TYPE = re.compile(rf"\\(?:text\w*|math(?:rm|bf)|mbox) *\{{ *({CURRENCY}) *\}}")
MONEY = re.compile(rf"^(-?) *({CURRENCY}|(?:{CODES}|Rs\.?|kr\.?)(?![a-z])) *(?=[-\d.(\\])|(?<=[\d)}}]) *({CURRENCY})$")
DEGREE = re.compile(rf"(?<=[\d.}})]) *(?:\^ *\{{? *\\circ *\}}?|\\degree) *{WORD}?([CF]?){END}?$")
UNIT = re.compile(rf"(?<=[\d}})\]%]) *({WORD}[^{END}]*{END}(?: */ *{WORD}?[^\W\d_]+{END}?)?){POWER}")
# Before a letter that is a unit; in 2x^2 h it is a factor.
NUMBER_ALONE = re.compile(r"-?[\d.,/]+ (?:\\times 10\^\{-?\d+\} )?")
LETTER_UNIT = re.compile(rf"(?<=[\d}}]) ([mgshlL](?:/[smhlL])?){POWER}")
LETTER_BEHIND = re.compile(r"(-?[\d.,]+)([msghlL](?:\^\{[23]\})?)")  # 540m, 30m²
# \text{ cubic inches}, \mathrm{m s^{-1}} or \text{kg}\cdot\text{m} at the end of a formula.
IN_TYPE = (
    r"\\(?:text(?:rm|sf|tt|up|normal|bf|it)?|math(?:rm|sf|tt|normal)|mbox) *\{(?:[^{}\\]|\^ *\{[^{}]*\}|\\cdot)*\}"
)
EXPONENT = r"(?: *\^ *(?:\{ *-?\d *\}|\d))?"
MARKED_UNIT = re.compile(
    rf"(?<=[\w}})\]!%|']) *({IN_TYPE}{EXPONENT}(?: *(?:\\(?:cdot|times)(?![a-zA-Z])|/)? *{IN_TYPE}{EXPONENT})*)$"
)
ENDS_A_VALUE = re.compile(
    r"(?:[\d})\]!%|']|\\(?:pi|theta|alpha|beta|phi|lambda|infty)|(?<![^\W\d_])(?<!\\)[^\W\d_]{1,2}) *$"
)
OPTION = re.compile(r"\(?[A-Z]\)?[.:]?")
PRODUCT = re.compile(r"[A-Za-z]{2,4}|[A-Za-z](?: *(?:\\cdot|\\times|\*) *[A-Za-z](?![A-Za-z])| [A-Za-z](?![A-Za-z]))+")
NUMBER_IN_BASE = re.compile(r"(?:\d[A-F]*|\d *\)|\([0-9A-F.]+\)) *_|[A-F]\d[\dA-F]*_")
IN_TEN = re.compile(r"(-?[\d.]+) *_ *\{? *10 *\}?")
LEADING_ZERO = re.compile(r"-?0\d+(?:\.\d+)?|0\d:\d\d|\d\d?:0\d|\d{4}-\d\d-\d\d")
TIME = re.compile(r"\d{1,2}:\d\d")
# 5'10", 3/4/2021 and 2021-03-04, 2:3:4, 10.0.0.1, a list that goes on, 1 2 3, 0x1A, B12, a molecule, an option with its
# text: math-verify computes with each of them. (And 1E999999999, with which it is never done.)
NO_FORMULA = re.compile(
    r"\d *['\"\u2019\u201d]|\d */ *\d+ */ *\d|(?<!\d)\d{4}-\d\d-\d\d(?!\d)|\d *: *\d+ *: *\d|\\[lc]?dots|\.\.\."
    r"|\d\.\d+\.\d|(?<![_^\d])\d+ +\.?\d"
    r"|(?<!\w)0[xXbBoO][\dA-Fa-f]|(?<![\\\w])[A-Za-z]{1,3}\d|(?<=\d)[A-DF-Za-df-z]\d|\d[eE][-+]?\d{5}"
    r"|[A-Z][a-z]?_(?:\{\d+\}|\d)[A-Z]|^\(?[A-Z]\) *(?![-+*/=^_\\<>,:\s]|$)|^[A-Z][.:] "
)
QUOTED = re.compile("^[\"'\u2018\u201c\u201d](.*)[\"'\u2019\u201d\u201c]$")  # a pair: the quote of A' is a prime
PRIMES = re.compile(r"(?<=[A-Za-z])(?:\^ *\{? *((?:\\prime *)+)\}?|(['\u2019]+))")
LETTER_E = re.compile(r"\\(?:text\w*|mbox) *\{ *e *\}")  # a letter in type, and not the number
LETTERS_ALONE = re.compile(r"[^\W\d_](?:[\s,;&]+(?:and |or )?[^\W\d_])*")
NUMERALS = {
    "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9",
    "ten": "10", "eleven": "11", "twelve": "12", "sixteen": "16",
}  # fmt: skip


class Reading(NamedTuple):
    r"""How an answer is compared: `18 \text{ cm}` has the value 18 and the unit centimeter, `Paris` has no value."""

    text: str  # the words, without case, style and needless spaces
    value: str | None  # what math-verify is to read; None where the text alone counts
    unit: str


@lru_cache(maxsize=8192)
def reading(answer: str) -> Reading:
    text, currency = _without_currency(_tidy(answer))
    text, unit = _without_marked_unit(text)  # what the money is paid for: $5 per day
    marked = with_words_marked(text)
    if not unit:
        marked, unit = _without_unit(marked)
    value = None if LETTER_E.fullmatch(answer.strip()) else _as_formula(marked)
    return Reading(_as_text(marked), value, currency or unit)


def has_words(answer: str) -> bool:
    return len(answer) <= MOST_CHARACTERS and WORD in with_words_marked(_tidy(answer))


def begins_with_zero(gold: str) -> bool:
    """Tell whether a gold answer is one number such as 0110 or 07:30, whose digits count and not its size."""
    return LEADING_ZERO.fullmatch(reading(gold).value or "") is not None


def same_product(gold: str, answer: str) -> bool:
    r"""Tell whether two products have equal letters in order, signs aside: `IR` and `V = I \cdot R`."""
    sides = [_tidy(gold), _tidy(answer)]
    if sum("=" in side for side in sides) == 1:
        sides = [re.sub(r"^[A-Za-z](?:_\w)? *= *", "", side) for side in sides]
    if not all(PRODUCT.fullmatch(side) for side in sides):
        return False
    return len({re.sub(r"\\cdot|\\times|[* ]", "", side) for side in sides}) == 1


def with_letter_unit(side: Reading) -> Reading:
    """Read `540m` as 540 metres, where the other side is a number; else it is 540 times m."""
    found = LETTER_BEHIND.fullmatch(side.value or "")
    return Reading(side.text, found[1], unit_name(found[2])) if found else side


def _tidy(answer: str) -> str:
    """An answer in plain notation, without what sets a formula apart, and without a subscript for base ten."""
    text = ANSWER_IS.sub("", answer.replace(WORD, "").replace(END, "").strip().strip("*`").strip())
    if len(DOLLAR.findall(text)) % 2 == 0:  # a single one is money
        text = DOLLAR.sub("", text)
    text = ROUGHLY.sub("", LOOKS.sub("", plain(BRACKETS.sub("", text)))).strip()
    text = BUILDER.sub(r"\\{\1\\}", text)
    while IN_A_BOX.search(text):
        text = IN_A_BOX.sub(lambda box: box[1] or box[2] or "", text).strip()
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    text = PERCENT.sub(r"\\%", CURRENCY_IN_TYPE.sub(r"\1", text))
    in_ten = IN_TEN.fullmatch(text)
    return in_ten[1] if in_ten else text


def _without_marked_unit(text: str) -> tuple[str, str]:
    r"""The formula and unit of `16\pi \text{ cubic inches}`, where \text{} behind a formula marks a unit."""
    found = MARKED_UNIT.search(text)
    if not found:
        return text, ""
    value = text[: found.start()].rstrip()
    content = re.sub(r"\\[a-zA-Z]+|[{}^]", " ", found[1])
    names = [name.lower() for name in re.findall(r"[^\W\d_]+", content)]
    if not names or re.search(r"(?<![-\w ])\d|[^\w\s/.'-]", content) or not ENDS_A_VALUE.search(value):
        return text, ""
    if not is_unit(names) or OPTION.fullmatch(value) or (len(names[0]) == 1 and names[0] not in UNITS):
        return text, ""
    if len(names[0]) == 1 and value[-1].isalpha() and found[0][0] != " " and not re.search(r"\{ ", found[1]):
        return text, ""  # R\mathrm{h}
    is_product = re.fullmatch("[A-Za-z]{2}", value) and known(unit_name(content))  # lw \text{ cm}^2
    if not is_product and WORD in with_words_marked(value).rpartition("=")[2]:
        return text, ""
    return value, unit_name(content)


def _without_currency(text: str) -> tuple[str, str]:
    money = MONEY.search(text)
    if not money:
        return text, ""
    return text[: money.start()] + (money[1] or "") + text[money.end() :], unit_name(money[2] or money[3])


def _without_unit(marked: str) -> tuple[str, str]:
    """The value and the one name of the unit at its end, or ''."""
    degree = DEGREE.search(marked)
    if degree:
        return marked[: degree.start()], "degree" + degree[1].lower()
    found = UNIT.search(marked) or (LETTER_UNIT.search(marked) if NUMBER_ALONE.match(marked) else None)
    if not found:
        return marked, ""
    value = marked[: found.start()]
    words = [word.lower() for word in re.findall(r"[^\W\d_]+", found[1])]
    if not words or not is_unit(words) or re.search(r"\d", found[1]) or WORD in value.rpartition("=")[2]:
        return marked, ""
    if found[0][0] == WORD and not all(word in UNITS or not word.isascii() for word in words):  # 2abcd
        return marked, ""
    return value.rstrip(), unit_name(found[1], found[2] or "")


def _as_formula(marked: str) -> str | None:
    """A formula for math-verify, with each word (AB, or Area =) as a single symbol; None for text."""
    only_option = re.fullmatch(r"[\s()\[\]{}.:]*[A-Z]?[\s()\[\]{}.:]*", marked)
    if only_option or NO_FORMULA.search(marked) or NUMBER_IN_BASE.search(marked):
        return None
    in_formula, letters = is_formula(marked), set(re.findall(r"[^\W\d_]", marked))
    several = len(letters) > 1 and not letters <= set("xyz")
    if not in_formula and several and (any(map(str.isupper, letters)) or LETTERS_ALONE.fullmatch(marked)):
        return None
    for word in SEGMENT.finditer(marked):
        is_symbol = word[1].isupper() or re.match(" *=", marked[word.end() :])
        if not (in_formula and is_symbol and word[1].isascii() and word[1].isalpha()):
            return None
    return PRIMES.sub(_subscript_of_primes, SEGMENT.sub(r"\\text{\1}", marked))


def _subscript_of_primes(found: re.Match) -> str:
    """f' written as f_{p}, since math-verify drops the quote."""
    count = len(found[2]) if found[2] else found[1].count("prime")
    return "_{" + count * "p" + "}"


def _as_text(marked: str) -> str:
    text = marked.replace(WORD, "").replace(END, "").casefold()
    text = re.sub(r"\(? *(?:in )?base[- ]?(\w+) *\)?$", r"_\1", text)
    text = re.sub(r" *_ *(?:\{ *(\w+) *\}|(\w+))", _subscript, text)
    text = re.sub(r"\(([\w.]+)\)(?=_)", r"\1", text)
    text = re.sub(r",? and | ?& ?", ",", text)
    text = re.sub(r"\s*([^\w\s])\s*", r"\1", re.sub(r"\s+", " ", text))
    text = QUOTED.sub(r"\1", text.strip(".,;:! ")).strip(".,;:! ")
    if len(text) > 1 and re.fullmatch(r"\([^()]*\)|\[[^\[\]]*\]|[^()]\)", text):  # (a), [a], a)
        text = text.strip("()[]")
    return text


def _subscript(found: re.Match) -> str:
    name = str(found[1] or found[2])
    return "_" + NUMERALS.get(name, name)

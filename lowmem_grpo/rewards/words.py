r"""reading(): what an answer is compared as: a value with a unit, which math-verify is asked about, or a text.

math-verify drops what it has no use for: `204_5` is 204 to it, and `2t` is 2, the t being a unit.
"""

import re
from functools import lru_cache
from typing import NamedTuple

from lowmem_grpo.rewards.amounts import amount, amount_in_parts
from lowmem_grpo.rewards.letters import END, SEGMENT, WORD, is_formula, with_words_marked, without_style
from lowmem_grpo.rewards.notation import plain
from lowmem_grpo.rewards.number import MOST_CHARACTERS, as_number
from lowmem_grpo.rewards.units import CURRENCY, unit_name

# Of LaTeX, what says nothing.
LOOKS = re.compile(
    r"\\(?:left|right|middle|displaystyle|textstyle|[bB]igg?[lr]?|[lL]arge|LARGE|[hH]uge|small|tiny|normalsize|bf|it|rm|sf|tt)"
    r"(?![a-zA-Z])|\\color *\{\w+\}|^\s*\\approx(?![a-zA-Z])|\\!\s*"
)
BALANCED = r"\{((?:[^{}]|\{[^{}]*\})*)\}"
ARROW = re.compile(r"\\(?:to|(?:long)?rightarrow)(?![a-z])|->")
IN_A_BOX = re.compile(
    r"\\(?:fbox|ce|boldsymbol|bm|underline|mathbf(?= *\{[^{}]*\{)|textcolor *\{\w+\}) *" + BALANCED + f"|^{BALANCED}$"
)
BUILDER = re.compile(r"^\{( *[A-Za-z] *(?:\\mid|[|:]).*)\}$")  # {x | x > 3}
PERCENT = re.compile(
    r"(?<=\d) *\\?(?:%|\\(?:text|mbox|mathrm) *\{ *(?:per ?cent|pct|%) *\}|"
    r"(?:per ?cent|percentage|pct|Prozent|pour ?cent|por ciento|процент\w*)$)"
)
ROUGHLY = re.compile(r"(?<=[\d)}]) *\\approx(?![a-zA-Z]).*$")  # behind the exact value
DOLLAR = re.compile(r"(?<!\\)\$")
BRACKETS = re.compile(r"(?<!\\)\\\(|(?<!\\)\\\)|^\\\[|\\\]$")
ANSWER_IS = re.compile(
    r"^\s*(?:the )?(?:(?:final |correct )?answer(?: is|:)|(?:option|choice)s?(?= \(?[A-Z]\b))\s*(?=\S)", re.IGNORECASE
)
PRODUCT = re.compile(r"[A-Za-z]{2,4}|[A-Za-z](?: *(?:\\cdot|\\times|\*) *[A-Za-z](?![A-Za-z])| [A-Za-z](?![A-Za-z]))+")
CURRENCY_IN_TYPE = re.compile(rf"\\(?:text\w*|math(?:rm|bf)|mbox) *\{{ *({CURRENCY}) *\}}")
LETTER_BEHIND = re.compile(r"(-?[\d.,]+)([msghlL](?:\^\{[23]\})?)")  # 540m, 30m²
INCH, FOOT = re.compile(r"^([\d./]+)(?:\"|'')$"), re.compile(r"^([\d./]+)'$")
DECADE = re.compile(r"[12]\d\d0s")  # 1990s
IN_BRACKETS = re.compile(rf"\(((?:{CURRENCY})[\d.,]+)\)")  # a negative sum, in accounts
NUMBER_IN_BASE = re.compile(r"(?:\d[A-F]*|\d *\)|\([0-9A-F.]+\)) *_|[A-F]\d[\dA-F]*_")
IN_TEN = re.compile(r"(-?[\d.]+) *_ *\{? *10 *\}?")
LEADING_ZERO = re.compile(r"-?0\d+(?:\.\d+)?|0\d:\d\d|\d\d?:0\d|\d{4}-\d\d-\d\d")
# 5'10", 3/4/2021 and 2021-03-04, 2:3:4, 10.0.0.1, a list that goes on, 1 2 3, 0x1A, B12, a molecule, an option with its
# text: math-verify computes with each of them. (And 1E999999999, with which it is never done.)
NO_FORMULA = re.compile(
    r"\d *['\"\u2019\u201d]|\d */ *\d+ */ *\d|(?<!\d)\d{4}-\d\d-\d\d(?!\d)|\d *: *\d+ *: *\d|\\[lc]?dots|\.\.\."
    r"|\d\.\d+\.\d|(?<![_^\d])\d+ +\.?\d"
    r"|(?<!\w)0[xXbBoO][\dA-Fa-f]|(?<![\\\w])[A-Za-z]{1,3}\d|(?<=\d)[A-DF-Za-df-z]\d|\d[eE][-+]?\d{5}"
    r"|\\(?:simeq|cong|equiv|partial)(?![a-zA-Z])|^\d{3,4}-\d{4}$|(?:^|[\[{(,:]) *['\"]"
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
POINTS = r"[A-Z](?:_(?:\w|\{\w+\})|[A-Z])?"
OF_A_DRAWING = re.compile(
    rf"^(?:pH|(?:m *)?\\angle *[A-Z]{{1,3}}"
    rf"|\|[A-Z]{{1,2}}\||\\frac *\{{{POINTS}\}} *\{{{POINTS}\}}|{POINTS}(?: ?: ?{POINTS})+) *= *(?=[^=]+$)"
)
SETS_IN_WORDS = {
    re.compile(
        r"(?:x is )?(?:the set of )?(?:all|any) real(?:s| numbers?)|(?:the )?(?:set of )?real numbers"
    ): r"\mathbb{R}",
    re.compile(r"(?:x is )?(?:the set of )?(?:all|any) integers?"): r"\mathbb{Z}",
    re.compile(r"-\\infty ?< ?[a-z] ?< ?\\infty ?"): r"\mathbb{R}",
    re.compile(r"(?:there (?:is|are) )?no (?:real )?solutions?(?: exists?)?|(?:the )?empty set"): r"\emptyset",
}


ALL_BUT = re.compile(
    r"(?:x is )?(?:all|any) real(?: numbers?|s) (?:except|excluding|other than) (?:for )?(?:x ?= ?)?(.+)"
)
IN_BRACKETS_OF_A_LIST = re.compile(r"\([^()]*\)|\[[^\[\]]*\]")


class Reading(NamedTuple):
    r"""How an answer is compared: `18 \text{ cm}` has the value 18 and the unit centimeter, `Paris` has no value."""

    written: str  # the answer without style and needless spaces
    text: str  # and without case
    value: str | None  # what math-verify is to read; None where the text alone counts
    unit: str


@lru_cache(maxsize=8192)
def reading(answer: str) -> Reading:
    tidy = _tidy(answer)
    written = without_style(tidy)
    in_parts = amount_in_parts(written)
    if in_parts:
        return Reading(written, written.casefold(), *in_parts)
    marked, unit = amount(tidy)
    value = None if LETTER_E.fullmatch(answer.strip()) else _as_formula(marked)
    return Reading(written, _as_text(marked), value, unit)


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


def without_name(written: str) -> str:
    r"""The value of an equation that names a length or ratio of a drawing: 1:2 of `A:B = 1:2`, 1 of `|AB| = 1`."""
    return OF_A_DRAWING.sub("", written)


def with_letter_unit(side: Reading) -> Reading:
    """Read `540m` as 540 metres, where the other side is a number; else it is 540 times m."""
    found = LETTER_BEHIND.fullmatch(side.value or "")
    if found and DECADE.fullmatch(found[0]):
        return side
    return side._replace(value=found[1], unit=unit_name(found[2])) if found else side


def _tidy(answer: str) -> str:
    """An answer in plain notation, without what sets a formula apart, and without a subscript for base ten."""
    text = ANSWER_IS.sub("", answer.replace(WORD, "").replace(END, "").strip().strip("*`").strip())
    if len(DOLLAR.findall(text)) % 2 == 0:  # a single one is money
        text = DOLLAR.sub("", text)
    text = ROUGHLY.sub("", LOOKS.sub("", plain(BRACKETS.sub("", text)))).strip()
    text = IN_BRACKETS.sub(r"-\1", text) if IN_BRACKETS.fullmatch(text) else text
    text = BUILDER.sub(r"\\{\1\\}", text)
    while IN_A_BOX.search(text):
        text = IN_A_BOX.sub(_unboxed, text).strip()
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    text = FOOT.sub(r"\1 ft", INCH.sub(r"\1 in", text))
    text = PERCENT.sub(r"\\%", CURRENCY_IN_TYPE.sub(r"\1", text))
    in_ten = IN_TEN.fullmatch(text)
    text = in_ten[1] if in_ten else text
    in_words = without_style(text).lower()
    if but := ALL_BUT.fullmatch(in_words):
        return rf"\mathbb{{R}} \setminus \{{{but[1].replace(' and ', ', ')}\}}"
    return next((formula for phrase, formula in SETS_IN_WORDS.items() if phrase.fullmatch(in_words)), text)


def _unboxed(box: re.Match) -> str:
    r"""The content of a box; of braces around a list, in which people write a set, {1, 2} as \{1, 2\}."""
    content = box[1] or box[2] or ""
    is_set = box[2] is not None and as_number(content) is None and "," in IN_BRACKETS_OF_A_LIST.sub("", content)
    return rf"\{{{content}\}}" if is_set or box[0] == "{}" else content


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
    text = marked.replace(WORD, "").replace(END, "").replace('"', "'").casefold()
    text = re.sub(r"\\[lc]?dots(?![a-z])|(?<=\d)\.\.\.|\.\.\.(?=\d)|(?<=,) ?\.\.\.", "\u2026", text)  # 5... is no 5
    text = ARROW.sub("\u2192", text)
    text = re.sub(r"^(?:the|an?) (?=\w{3})", "", text.strip())
    text = re.sub(r"(?<=\d) (?:remainder|r) ?(?=\d)", " r ", text)  # 2 R 3
    text = re.sub(r"^(?:the limit )?dne$", "does not exist", text)
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

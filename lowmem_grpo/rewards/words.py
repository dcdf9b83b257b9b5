r"""Letters in an answer: words, which are compared as text, units of a number, or a formula's variables.

math-verify takes every letter for a variable, so that `listen` equals `silent`, and drops what it has no use for:
`204_5` is 204 to it, and `2t` is 2, the t being a unit.
"""

import re
import unicodedata
from functools import lru_cache
from typing import NamedTuple

# Of LaTeX, what sets its argument in type, and what says nothing.
STYLE = re.compile(r"\\(text(?:bf|it|rm|sf|tt|up|normal)?|math(?:rm|bf|it|sf|tt|normal)|mbox|emph) *\{([^{}]*)\}")
LOOKS = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|[bB]igg?[lr]?|[lL]arge|LARGE|[hH]uge|small|tiny|normalsize|bf|it|rm|sf|tt)"
    r"(?![a-zA-Z])|\\color *\{\w+\}|^\s*\\approx(?![a-zA-Z])|\\!\s*|(?<=\d)\{,\}(?=\d)"
)
BALANCED = r"\{((?:[^{}]|\{[^{}]*\})*)\}"
IN_A_BOX = re.compile(
    r"\\(?:fbox|boldsymbol|bm|underline|mathbf(?= *\{[^{}]*\{)|textcolor *\{\w+\}) *" + BALANCED + f"|^{BALANCED}$"
)
PERCENT = re.compile(r"(?<=\d) *(?:\\(?:text|mbox|mathrm) *\{ *percent *\}|percent$)")
GROUPS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,? *\\!|\\[,;: ]|~|\{,\}) *\d{3})+(?!\d)")  # 10\,080, 10,\!080, 10{,}080
SPACE = re.compile(r"(?:(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|~|\s)+")
DOLLAR = re.compile(r"(?<!\\)\$")
BRACKETS = re.compile(r"(?<!\\)\\\(|(?<!\\)\\\)|^\\\[|\\\]$")
MOST_CHARACTERS = 1000  # no answer is longer, and Python refuses to read an integer of more than 4,300 digits
WORD, END = "\x02", "\x03"  # around what is words
SEGMENT = re.compile(f"{WORD}([^{END}]*){END}")
BETWEEN_WORDS = re.compile(f"{END} *{WORD}")
# Words that are known, a command with the name that it has or stands on, a subscript, or a run of letters.
TOKEN = re.compile(
    rf"{WORD}[^{END}]*{END}|\\(?:begin|end) *\{{\w+\*?\}}(?:\{{[lcr|]*\}})?"
    r"|\\(?:operatorname\*?|overline|overrightarrow|vec|bar|hat|widehat|tilde|widetilde|d?dot|math(?:bb|cal|frak))"
    r" *\{\w*\}|\\[a-zA-Z]+|_ *(?:\{[^{}]*\}|\w)|[^\W\d_]+"
)
FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "arccot", "sinh", "cosh", "tanh", "log",
    "ln", "lg", "exp", "lim", "max", "min", "gcd", "lcm", "det", "mod", "sqrt", "frac", "pi", "inf", "infty",
    "infinity", "and", "or", "percent", "percentage", "pct",
}  # fmt: skip
# Commands of geometry, which stand beside names of points.
NAMES = re.compile(
    r"\\(?:angle|triangle|parallel|perp|sim|cong|overline|overrightarrow|vec|bar|hat|widehat|to|[lL]?rightarrow)\b"
)
# What no word has in it: a digit, an operator, another command, a minus sign that is no hyphen, f(.
FORMULA = re.compile(
    r"[\d^_+*=<>|\\]|(?<= )[-/](?= )|^ *-"
    r"|(?<![^\W_])(?:[a-z] ?[-/] ?[a-zA-Z]|[A-Z] ?[-/] ?[a-z])(?![^\W_])|(?<![^\W_])[a-z]\("
)
# A unit's other names; the plural is known without them.
UNITS = {
    "cm": "centimeter", "mm": "millimeter", "m": "meter", "metre": "meter", "km": "kilometer", "mg": "milligram",
    "g": "gram", "kg": "kilogram", "ml": "milliliter", "l": "liter", "litre": "liter", "ft": "foot", "feet": "foot",
    "in": "inch", "inches": "inch", "yd": "yard", "mi": "mile", "lb": "pound", "lbs": "pound", "oz": "ounce",
    "s": "second", "sec": "second", "min": "minute", "h": "hour", "hr": "hour", "hrs": "hour", "mph": "mph",
    "kph": "kph", "am": "am", "pm": "pm", "kw": "kw", "hz": "hz", "kwh": "kwh", "pt": "point", "pts": "point",
    "$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee", "deg": "degree", "n": "newton", "j": "joule",
    "kmh": "kph",
}  # fmt: skip
# Each differs from every other one, however they are combined.
KNOWN_UNITS = {*UNITS.values(), "day", "week", "month", "year", "cent", "degreec", "degreef"} - {"newton", "joule"}
# What is counted, in words that say nothing of what it is: no other unit than any.
COUNTS = {
    "unit", "way", "arrangement", "possibilitie", "combination", "permutation", "solution", "piece", "item", "thing",
    "people", "person", "total", "number", "integer", "value",
}  # fmt: skip
CURRENCIES = {"dollar", "euro", "yen", "rupee"}
COMPOUND = {"mph": {"mile": 1, "hour": -1}, "kph": {"kilometer": 1, "hour": -1}}
RAISED = {"squared": 2, "cubed": 3, "²": 2, "³": 3}
# Words that make another number of the one beside them.
OTHER_NUMBERS = {
    "minus", "negative", "not", "plus", "times", "half", "third", "quarter", "dozen", "hundred", "thousand", "million",
    "billion", "trillion", "root", "sqrt", "pi", "squared", "cubed", "factorial", "log", "ln", "sin", "cos", "tan",
}  # fmt: skip
MONEY = re.compile(r"^(-?) *(\\?\$|[€£¥₹₩₽]) *(?=[\d.])|(?<=\d) *(\\?\$|[€£¥₹₩₽])$")
DEGREE = re.compile(rf"(?<=[\d.}}]) *(?:\^ *\{{? *\\circ *\}}?|°|\\degree) *{WORD}?([CF]?){END}?$")
POWER = r" *(?:\^ *\{?(\d)\}?|([²³]))?$"
UNIT = re.compile(rf"(?<=[\d}})\]%]) *({WORD}[^{END}]*{END}(?: */ *{WORD}?[^\W\d_]+{END}?)?){POWER}")
LETTER_BEHIND = re.compile(r"(-?[\d.,]+)([msghlL])")  # 540m
LETTER_UNIT = re.compile(rf"(?<=\d) ([mgshlL](?:/[smhlL])?){POWER}")
NUMBER_ALONE = re.compile(r"-?[\d.,/]+ ")  # before a letter that is a unit: in 2x^2 h it is a factor
NUMBER_IN_BASE = re.compile(r"(?:\d[A-F]*|\d *\)|\([0-9A-F.]+\)) *_|[A-F]\d[\dA-F]*_")
IN_TEN = re.compile(r"(-?[\d.]+) *_ *\{? *10 *\}?")
LEADING_ZERO = re.compile(r"0\d+(?:\.\d+)?|0\d:\d\d|\d\d?:0\d|\d{4}-\d\d-\d\d")
# \text{ cubic inches}, \mathrm{m s^{-1}} or \text{kg}\cdot\text{m} at the end of a formula.
IN_TYPE = r"\\(?:text(?:rm|sf|tt|up|normal)?|math(?:rm|sf|tt|normal)|mbox) *\{(?:[^{}\\]|\^ *\{[^{}]*\}|\\cdot)*\}"
EXPONENT = r"(?: *\^ *(?:\{ *-?\d *\}|\d)|[²³])?"
MARKED_UNIT = re.compile(
    rf"(?<=[\w}})\]!%|']) *({IN_TYPE}{EXPONENT}(?: *(?:\\(?:cdot|times)(?![a-zA-Z])|[/·])? *{IN_TYPE}{EXPONENT})*)$"
)
ENDS_A_VALUE = re.compile(
    r"(?:[\d})\]!%|']|\\(?:pi|theta|alpha|beta|phi|lambda|infty)|(?<![^\W\d_])(?<!\\)[^\W\d_]{1,2}) *$"
)
PRODUCT = re.compile(
    r"[A-Za-z]{2,4}|[A-Za-z](?: *(?:\\cdot|\\times|[*·×]) *[A-Za-z](?![A-Za-z])| [A-Za-z](?![A-Za-z]))+"
)
OPTION = re.compile(r"\(?[A-Z]\)?[.:]?")
NO_NOUN = {
    "and", "or", "if", "is", "are", "for", "where", "when", "base", "percent", "percentage", "pct", "e", "i", "d",
}  # fmt: skip
UNIT_PART = re.compile(r"[^\W\d_²³]+|[/$€£¥₹₩₽]|-?\d|[²³]")
TIME = re.compile(r"\d{1,2}:\d\d")
# 5'10", 3/4/2021, 2:3:4, 0x1A, B12, a list that goes on, a molecule, an option with its text: math-verify computes with
# each of them. (And 1E999999999, with which it is never done.)
NO_FORMULA = re.compile(
    r"\d *['\"\u2019\u201d]|\d */ *\d+ */ *\d|\d *: *\d+ *: *\d|\\[lc]?dots|\.\.\.|\u2026"
    r"|(?<!\w)0[xXbBoO][\dA-Fa-f]|(?<![\\\w])[A-Za-z]{1,3}\d|(?<=\d)[A-DF-Za-df-z]\d|\d[eE][-+]?\d{5}"
    r"|[A-Z][a-z]?_(?:\{\d+\}|\d)[A-Z]|^\(?[A-Z]\) *(?![-+*/=^_\\<>,:\s]|$)|^[A-Z][.:] "
)
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
    text, unit = _without_marked_unit(_tidy(answer))
    marked = _with_words_marked(text)
    if not unit or MONEY.search(marked):  # $5\text{ per day}
        marked, unit = _without_unit(marked)
    value = None if LETTER_E.fullmatch(answer.strip()) else _as_formula(marked)
    return Reading(_as_text(marked), value, unit)


def has_words(answer: str) -> bool:
    return len(answer) <= MOST_CHARACTERS and WORD in _with_words_marked(_tidy(answer))


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
    return len({re.sub(r"\\cdot|\\times|[*·× ]", "", side) for side in sides}) == 1


def other_unit(unit: str, other: str) -> bool:
    """Tell whether two units differ: cm and km, apples and pears; but not balls and red balls."""
    if "degree" in (unit, other) and unit.startswith("degree") and other.startswith("degree"):
        return False
    if not CURRENCIES.isdisjoint(set(unit.split()) & set(other.split())):  # dollars, and dollars per day
        return False
    if sorted(unit) == sorted(other):  # dogs and gods
        return unit != other
    names, others = _names(unit), _names(other)
    if names and others and names | others <= KNOWN_UNITS:
        return unit != other  # cm is not cm^2
    return bool(names and others) and names.isdisjoint(others) and COUNTS.isdisjoint(names | others)


def _names(unit: str) -> set[str]:
    """The names in a unit, without their exponents."""
    return {re.sub(r"-?\d$", "", name) for name in unit.split()}


def with_letter_unit(side: Reading) -> Reading:
    """Read `540m` as 540 metres, where the other side is a number; else it is 540 times m."""
    found = LETTER_BEHIND.fullmatch(side.value or "")
    return Reading(side.text, found[1], _unit(found[2])) if found else side


def _tidy(answer: str) -> str:
    """An answer without spacing, without what sets a formula apart, and without a subscript for base ten."""
    text = unicodedata.normalize("NFC", answer).replace(WORD, "").replace(END, "").strip().strip("*`").strip()
    if len(DOLLAR.findall(text)) % 2 == 0:  # a single one is money
        text = DOLLAR.sub("", text)
    text = PERCENT.sub(r"\\%", text)
    text = GROUPS.sub(lambda number: re.sub(r"\D", "", number[0]), BRACKETS.sub("", text))
    text = SPACE.sub(" ", LOOKS.sub("", text)).strip()
    while IN_A_BOX.search(text):
        text = IN_A_BOX.sub(lambda box: box[1] or box[2] or "", text).strip()
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    in_ten = IN_TEN.fullmatch(text)
    return in_ten[1] if in_ten else text


def _with_words_marked(text: str) -> str:
    while STYLE.search(text):
        text = STYLE.sub(_without_style, text)
    in_formula = _is_formula(text)
    marked = TOKEN.sub(lambda token: token[0] if _is_math(token, in_formula) else f"{WORD}{token[0]}{END}", text)
    return BETWEEN_WORDS.sub(" ", marked)


def _without_style(found: re.Match) -> str:
    """An answer whose \\text{} and the like are taken off, and marked where they hold words or a unit."""
    content = found[2].replace(WORD, "").replace(END, "")
    name = content.strip()
    if name in ("and", "or"):
        return f" {name} "
    if name in FUNCTIONS:
        return f" \\{name} "
    before, after = found.string[: found.start()].rstrip(), found.string[found.end() :]
    is_last = _ends_a_number(before) and re.fullmatch(POWER, after.strip())
    is_unit = is_last and name not in ("e", "i", "d", "") and found[1] not in ("mathbf", "mathit")
    if re.search(r"[^\W\d_]{2}", content) or (is_unit and not re.search(r"\d", name)):
        return f" {WORD}{content}{END}"
    return content


def _is_formula(marked: str) -> bool:
    return FORMULA.search(NAMES.sub(" ", SEGMENT.sub(" ", marked))) is not None


def _ends_a_number(before: str) -> bool:
    return before[-1:].isdigit() or before[-1:] in ("}", ")", "]")


def _is_math(token: re.Match, in_formula: bool) -> bool:
    """Tell whether a token is no word but a command, a function's name, or letters that are variables."""
    run, before, after = token[0], token.string[: token.start()], token.string[token.end() :]
    if run in ("min", "sec") and re.search(r"\d *$", before) and not after:
        return False
    if not run[0].isalpha() or run.lower() in FUNCTIONS or set(run) <= set("xyz"):
        return True
    latin = "".join(letter for letter in run if not "\u0370" <= letter <= "\u03ff")  # the others are Greek
    if len(run) == 1 or not latin:
        return latin.isascii() and (len(run) == 1 or in_formula)
    if not in_formula or not latin.isascii() or len(run) > 3 or run.isupper():
        return False
    behind_number = _ends_a_number(before.rstrip())
    if behind_number and run.lower() in UNITS:
        return False
    touches = before[-1:].isdigit() or before[-1:] in ("}", "^", "{") or after[:1] in ("^", "_", "{", "}")
    beside = {before.rstrip()[-1:], after.lstrip()[:1]} & set("+-*/=<>^|") or re.match(r" *\) *[-+*/^=]", after)
    behind_command = re.search(r"\\[a-zA-Z]+ *$", before) or (run[0] == "d" and "\\int" in before)
    if touches or beside or behind_command or set(run) <= set("abcxyz"):
        return True
    return behind_number and not set(run.lower()) & set("aeiouy")


def _without_marked_unit(text: str) -> tuple[str, str]:
    r"""The formula and unit of `16\pi \text{ cubic inches}`, where \text{} behind a formula marks a unit."""
    found = MARKED_UNIT.search(text)
    if not found:
        return text, ""
    value = text[: found.start()].rstrip()
    content = re.sub(r"\\[a-zA-Z]+|[{}^]", " ", found[1])
    names = [name.lower() for name in re.findall(r"[^\W\d_]+", content)]
    if not names or re.search(r"(?<![-\w ])\d|[^\w\s/.·²³'-]", content) or not ENDS_A_VALUE.search(value):
        return text, ""
    if _is_no_unit(names) or OPTION.fullmatch(value) or (len(names[0]) == 1 and names[0] not in UNITS):
        return text, ""
    if len(names[0]) == 1 and value[-1].isalpha() and found[0][0] != " " and not re.search(r"\{ ", found[1]):
        return text, ""  # R\mathrm{h}
    is_product = re.fullmatch("[A-Za-z]{2}", value) and _names(_unit(content)) <= KNOWN_UNITS  # lw \text{ cm}^2
    if not is_product and WORD in _with_words_marked(value).rpartition("=")[2]:
        return text, ""
    return value, _unit(content)


def _is_no_unit(names: list[str]) -> bool:
    r"""Tell whether words behind a value are no unit: `2 \text{ or}`, `18 thousand`; but `5 units squared`."""
    first = names[0]
    if first in NO_NOUN or first in OTHER_NUMBERS or (first in FUNCTIONS and first not in UNITS):
        return True
    return not OTHER_NUMBERS.isdisjoint(set(names) - {"squared", "cubed"})


def _without_unit(marked: str) -> tuple[str, str]:
    """The value and the one name of the unit at its end or of its currency, or ''."""
    money = MONEY.search(marked)
    if money:
        return marked[: money.start()] + (money[1] or "") + marked[money.end() :], _unit(money[2] or money[3])
    degree = DEGREE.search(marked)
    if degree:
        return marked[: degree.start()], "degree" + degree[1].lower()
    found = UNIT.search(marked) or (LETTER_UNIT.search(marked) if NUMBER_ALONE.match(marked) else None)
    if not found:
        return marked, ""
    value = marked[: found.start()]
    words = [word.lower() for word in re.findall(r"[^\W\d_]+", found[1])]
    if not words or _is_no_unit(words) or re.search(r"\d", found[1]) or WORD in value.rpartition("=")[2]:
        return marked, ""
    if found[0][0] == WORD and not all(word in UNITS or not word.isascii() for word in words):  # 2abcd
        return marked, ""
    return value.rstrip(), _unit(found[1], found[2] or found[3] or "")


def _unit(text: str, power: str = "") -> str:
    """The names of a unit with their exponents, in one order: `hour-1 mile` of mph and of miles per hour."""
    exponents: dict[str, int] = {}
    sign, following, last = 1, 1, ""
    for part in UNIT_PART.findall(text + power):
        name = part.lower()
        if name in ("/", "per"):
            sign = -1
        elif name in ("square", "sq", "cubic", "cu"):
            following = 2 if name.startswith("sq") else 3
        elif last and (name in RAISED or re.fullmatch(r"-?\d", name)):
            exponents[last] *= RAISED.get(name) or int(name)
        else:
            name = UNITS.get(name) or UNITS.get(name.removesuffix("s")) or _singular(name)
            for last, exponent in COMPOUND.get(name, {name: 1}).items():
                exponents[last] = exponents.get(last, 0) + sign * following * exponent
            following = 1
    return " ".join(name + (str(count) if count != 1 else "") for name, count in sorted(exponents.items()))


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _as_formula(marked: str) -> str | None:
    """A formula for math-verify, with each word (AB, or Area =) as a single symbol; None for text."""
    only_option = re.fullmatch(r"[\s()\[\]{}.:]*[A-Z]?[\s()\[\]{}.:]*", marked)
    if only_option or NO_FORMULA.search(marked) or NUMBER_IN_BASE.search(marked):
        return None
    in_formula, letters = _is_formula(marked), set(re.findall(r"[^\W\d_]", marked))
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
    text = text.strip("\"'\u2018\u2019\u201c\u201d.,;:! ")
    if len(text) > 1 and re.fullmatch(r"\([^()]*\)|\[[^\[\]]*\]|[^()]\)", text):  # (a), [a], a)
        text = text.strip("()[]")
    return text


def _subscript(found: re.Match) -> str:
    name = str(found[1] or found[2])
    return "_" + NUMERALS.get(name, name)

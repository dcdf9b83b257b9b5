r"""What an answer's letters are: words, which are compared as text; the unit of a number; or the letters of a formula.

math-verify takes every letter for a variable, so that `listen` equals `silent`, and drops what it has no use for:
`204_5` is 204 to it, and `2t` is 2, the t being a unit.
"""

import re
import unicodedata
from functools import lru_cache
from typing import NamedTuple

# Of LaTeX, what sets its argument in type, and what says nothing.
STYLE = re.compile(r"\\(text(?:bf|it|rm|sf|tt|up|normal)?|math(?:rm|bf|it|sf|tt|normal)|mbox|emph) *\{([^{}]*)\}")
LOOKS = re.compile(r"\\(?:left|right|displaystyle|[bB]igg?[lr]?)(?![a-zA-Z])|\\!\s*|(?<=\d)\{,\}(?=\d)")
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
FORMULA = re.compile(r"[\d^_+*=<>|\\]|(?<= )[-/](?= )|^ *-|(?<![^\W_])[a-z] ?[-/] ?[a-z](?![^\W_])|(?<![^\W_])[a-z]\(")
# A unit's other names; the plural is known without them.
UNITS = {
    "cm": "centimeter", "mm": "millimeter", "m": "meter", "metre": "meter", "km": "kilometer", "mg": "milligram",
    "g": "gram", "kg": "kilogram", "ml": "milliliter", "l": "liter", "litre": "liter", "ft": "foot", "feet": "foot",
    "in": "inch", "inches": "inch", "yd": "yard", "mi": "mile", "lb": "pound", "lbs": "pound", "oz": "ounce",
    "s": "second", "sec": "second", "min": "minute", "h": "hour", "hr": "hour", "hrs": "hour", "mph": "mph",
    "kph": "kph", "am": "am", "pm": "pm", "kw": "kw", "hz": "hz", "kwh": "kwh", "pt": "point", "pts": "point",
    "$": "dollar", "€": "euro", "deg": "degree", "per": "/",
}  # fmt: skip
# Words that make another number of the one beside them.
OTHER_NUMBERS = {
    "minus", "negative", "not", "plus", "times", "half", "third", "quarter", "dozen", "hundred", "thousand", "million",
    "billion", "trillion", "root", "sqrt", "pi", "squared", "cubed", "factorial", "log", "ln", "sin", "cos", "tan",
}  # fmt: skip
MONEY = re.compile(r"^(-?) *(\\?\$|[€£¥₹₩₽]) *(?=[\d.])|(?<=\d) *(\\?\$|[€£¥₹₩₽])$")
DEGREE = re.compile(rf"(?<=[\d.}}]) *(?:\^ *\{{? *\\circ *\}}?|°|\\degree) *{WORD}?([CF]?){END}?$")
POWER = r" *(?:\^ *\{?(\d)\}?|([²³]))?$"
UNIT = re.compile(rf"(?<=[\d}})\]]) *({WORD}[^{END}]*{END}(?: */ *{WORD}?[^\W\d_]+{END}?)?){POWER}")
LETTER_UNIT = re.compile(rf"(?<=\d) ([mgshlL](?:/[smhlL])?){POWER}")
NUMBER_ALONE = re.compile(r"-?[\d.,/]+ ")  # before a letter that is a unit: in 2x^2 h it is a factor
NUMBER_IN_BASE = re.compile(r"(?:\d[A-F]*|\d *\)|\([0-9A-F.]+\)) *_|[A-F]\d[\dA-F]*_")
IN_TEN = re.compile(r"(-?[\d.]+) *_ *\{? *10 *\}?")
LEADING_ZERO = re.compile(r"(?<![\w.,])0\d|(?<=,)0\d(?!\d\b)")
TIME = re.compile(r"\d{1,2}:\d\d")
# 5'10", 3/4/2021, 2:3:4, 0x1A, B12, a list that goes on, a molecule, an option with its text: math-verify computes with
# each of them. (And 1E999999999, with which it is never done.)
NO_FORMULA = re.compile(
    r"\d *['\"\u2019\u201d]|\d */ *\d+ */ *\d|\d *: *\d+ *: *\d|\\[lc]?dots|\.\.\.|\u2026"
    r"|(?<!\w)0[xXbBoO][\dA-Fa-f]|(?<![\\\w])[A-Za-z]{1,3}\d|(?<=\d)[A-DF-Za-df-z]\d|\d[eE][-+]?\d{5}"
    r"|[A-Z][a-z]?_(?:\{\d+\}|\d)[A-Z]|^\(?[A-Z]\) *(?![-+*/=^_\\<>,:\s]|$)|^[A-Z][.:] "
)
PRIMES = re.compile(r"(?<=[A-Za-z])(?:\^ *\{? *((?:\\prime *)+)\}?|(['\u2019]+))")
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
    marked, unit = _without_unit(_with_words_marked(_tidy(answer)))
    return Reading(_as_text(marked), _as_formula(marked), unit)


def has_words(answer: str) -> bool:
    return len(answer) <= MOST_CHARACTERS and WORD in _with_words_marked(_tidy(answer))


def begins_with_zero(gold: str) -> bool:
    """Whether a gold answer has a number such as 0110 or 07:30, whose digits count and not its size."""
    return LEADING_ZERO.search(gold) is not None


def _tidy(answer: str) -> str:
    """Without what only sets a formula apart or spaces it, and without a subscript that says base ten."""
    text = unicodedata.normalize("NFC", answer).replace(WORD, "").replace(END, "").strip().strip("*`").strip()
    if len(DOLLAR.findall(text)) % 2 == 0:  # a single one is money
        text = DOLLAR.sub("", text)
    text = SPACE.sub(" ", LOOKS.sub("", BRACKETS.sub("", text))).strip()
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
    """What stands in \\text{} or the like, marked where it is words, or the unit of a number."""
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
    """Whether a token is no word: a command, the name of a function, or letters of which each may be a variable."""
    run, before, after = token[0], token.string[: token.start()], token.string[token.end() :]
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


def _without_unit(marked: str) -> tuple[str, str]:
    """What is left, and the one name of the unit at its end or of its currency, or ''."""
    money = MONEY.search(marked)
    if money:
        return marked[: money.start()] + (money[1] or "") + marked[money.end() :], _unit(money[2] or money[3])
    degree = DEGREE.search(marked)
    if degree:
        return marked[: degree.start()], "degree" + degree[1]
    found = UNIT.search(marked) or (LETTER_UNIT.search(marked) if NUMBER_ALONE.match(marked) else None)
    if not found:
        return marked, ""
    value = marked[: found.start()]
    words = {word.lower() for word in re.findall(r"[^\W\d_]+", found[1])}
    if words & OTHER_NUMBERS or re.search(r"\d", found[1]) or WORD in value.rpartition("=")[2]:
        return marked, ""
    if found[0][0] == WORD and not all(word in UNITS or not word.isascii() for word in words):  # 2abcd
        return marked, ""
    return value.rstrip(), _unit(found[1], found[2] or found[3] or "")


def _unit(text: str, power: str = "") -> str:
    names = [name.lower() for name in re.findall(r"[^\W\d_]+|[/$€£¥₹₩₽]", text)]
    for words, exponent in ((("square", "sq"), "2"), (("cubic", "cu"), "3")):
        if names[0] in words:
            names, power = names[1:], exponent
    known = [UNITS.get(name) or UNITS.get(name.removesuffix("s")) or _singular(name) for name in names]
    return " ".join(known) + {"²": "2", "³": "3"}.get(power, power)


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _as_formula(marked: str) -> str | None:
    """What math-verify may read, with a word in a formula (AB, or Area =) as a single symbol; None for text."""
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
    """f' as f_{p}, since math-verify drops the quote."""
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

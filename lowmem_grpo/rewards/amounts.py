r"""amount(): the value and the unit of an answer: 18 and centimeter of `18 \text{ cm}`, 5/2 and hour of `2h 30m`."""

import re
from fractions import Fraction
from itertools import pairwise

from lowmem_grpo.rewards.letters import END, LETTERS, POWER, TOUCHING, WORD, with_words_marked
from lowmem_grpo.rewards.units import CODES, CURRENCY, SYMBOLS, conversion, is_known, is_symbol, is_unit, unit_name

MONEY = re.compile(rf"^(-?) *({CURRENCY}|(?:{CODES}|Rs\.?|kr\.?)(?![a-z])) *(?=[-\d.(\\])|(?<=[\d)}}]) *({CURRENCY})$")
DEGREE = re.compile(rf"(?<=[\d.}})]) *(?:\^ *\{{? *\\circ *\}}?|\\degree|{WORD}degrees?{END}) *{WORD}?([CF]?){END}?$")
UNIT = re.compile(rf"(?<=[\d}})\]%]) *({WORD}[^{END}]*{END}(?: */ *{WORD}?[^\W\d_]+{END}?)?){POWER}")
# Symbols of units behind a number alone; in 2x^2 h a letter is a factor.
SYMBOL = r"[a-zA-Z\u00b5\u03bcΩ]{1,4}(?: *\^ *(?:\{ *-?\d *\}|-?\d))?"
NUMBER_AND_SYMBOLS = re.compile(
    r"((?:[A-Za-z](?:_(?:\w|\{\w+\}))? *= *)?"  # F = 10 N
    r"-?(?:[\d.,/]+|\\frac\{\d+\}\{\d+\})(?: \\times 10\^\{-?\d+\})?(?: ?\\pi)?) "
    rf"({SYMBOL}(?:(?: *(?:/|\*|\\cdot) *| ){SYMBOL})*)"
)
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
PER = re.compile(r"(?<=\d) ?/ ?(?=[^\W\d_]{2})")  # $5/hour
OPTION = re.compile(r"\(?[A-Z]\)?[.:]?")
FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
FEET_AND_INCHES = re.compile(r"^(\d+)' *(\d+(?:\.\d+)?)(?:\"|'')$")
DEGREES_AND_MINUTES = re.compile(r"(\d+) ?\^\\circ (\d+)'(?: ?(\d+)(?:\"|''))?")
PART = re.compile(r"(\d+(?:\.\d+)?) ?([^\W\d_]+)")
IN_PARTS = re.compile(rf"{PART.pattern}(?:,? (?:and )?{PART.pattern}){{1,3}}|\d+h ?\d+m(?:in)?")


def amount(text: str) -> tuple[str, str]:
    """The value of an answer in plain notation, with its words marked, and the unit; '' without any."""
    text, currency = _without_currency(text)
    if currency:
        text = PER.sub(" per ", text)
    text, unit = _without_marked_unit(text)  # what the money is paid for: $5 per day
    marked = with_words_marked(text)
    if not unit:
        marked, unit = _without_unit(marked)
    if currency and re.search(r"-\d", unit):  # $5 per kg
        return marked, " ".join(sorted([currency, *unit.split()]))
    return marked, currency or unit


def amount_in_parts(written: str) -> tuple[str, str] | None:
    """The value and unit of an amount such as 2h 30m, 5'10\" and 45° 30', in its first unit: 5/2 of hours."""
    if degrees := DEGREES_AND_MINUTES.fullmatch(written):
        return str(sum(Fraction(part or 0) / 60**n for n, part in enumerate(degrees.groups()))), "degree"
    written = FEET_AND_INCHES.sub(r"\1 ft \2 in", written)
    if not IN_PARTS.fullmatch(written):
        return None
    parts = PART.findall(written)
    is_time = any(unit_name(unit) in ("hour", "second") for _, unit in parts)
    parts = [(Fraction(value), unit_name("min" if unit == "m" and is_time else unit)) for value, unit in parts]
    first_unit, total = parts[0][1], parts[0][0]
    for (_, larger), (value, unit) in pairwise(parts):
        factor = conversion(unit, larger)
        if factor is None or not (is_known(unit) and is_known(larger)) or factor >= 1:
            return None
        total += value * (conversion(unit, first_unit) or 0)
    return str(total), first_unit


def _without_marked_unit(text: str) -> tuple[str, str]:
    r"""The formula and unit of `16\pi \text{ cubic inches}`, where \text{} behind a formula marks a unit."""
    found = MARKED_UNIT.search(text)
    if not found:
        return text, ""
    value = text[: found.start()].rstrip()
    content = re.sub(r"\\[a-zA-Z]+|[{}^]", " ", found[1])
    names = re.findall(LETTERS, content)
    if not names or re.search(r"(?<![-\w ])\d|[^\w\s/.'-]", content) or not ENDS_A_VALUE.search(value):
        return text, ""
    if not is_unit(names) or OPTION.fullmatch(value) or (len(names[0]) == 1 and not is_symbol(names[0])):
        return text, ""
    if len(names[0]) == 1 and value[-1].isalpha() and found[0][0] != " " and not re.search(r"\{ ", found[1]):
        return text, ""  # R\mathrm{h}
    is_product = re.fullmatch("[A-Za-z]{2}", value) and is_known(unit_name(content))  # lw \text{ cm}^2
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
    if degree and not FUNCTION.search(marked[: degree.start()]):  # the sine of 30 degrees has no unit
        return marked[: degree.start()], "degree" + degree[1].lower()
    symbols = NUMBER_AND_SYMBOLS.fullmatch(marked.replace(WORD, "").replace(END, ""))
    unit = re.sub(r"\\cdot", " ", symbols[2]) if symbols else ""
    known = TOUCHING if symbols and "pi" in symbols[1] else {"h", "in", *SYMBOLS}
    if symbols and known.issuperset(re.findall(r"[^\W\d_]+", unit)):
        return symbols[1], unit_name(unit)
    found = UNIT.search(marked)
    if not found:
        return marked, ""
    value = marked[: found.start()]
    words = re.findall(LETTERS, found[1])
    if not words or not is_unit(words) or re.search(r"\d", found[1]) or WORD in value.rpartition("=")[2]:
        return marked, ""
    if found[0][0] == WORD and not all(is_symbol(word) or not word.isascii() for word in words):  # 2abcd
        return marked, ""
    return value.rstrip(), unit_name(found[1], found[2] or "")

r"""Letters in an answer that are words, told from those that are a formula's variables.

math-verify takes every letter for a variable, so that `listen` equals `silent`. with_words_marked finds the words.
"""

import re
import unicodedata

from lowmem_grpo.rewards.units import is_symbol

WORD, END = "\x02", "\x03"  # around what is words
SEGMENT = re.compile(f"{WORD}([^{END}]*){END}")
BETWEEN_WORDS = re.compile(f"{END} *{WORD}")
POWER = r" *(?:\^ *\{? *(-?\d) *\}?)?$"  # of a unit
# Of LaTeX, what sets its argument in type.
STYLE = re.compile(r"\\(text(?:bf|it|rm|sf|tt|up|normal)?|math(?:rm|bf|it|sf|tt|normal)|mbox|emph) *\{([^{}]*)\}")
# No letters to Python, though Indian and Thai scripts write vowels with them.
MARKS = "".join(chr(code) for code in range(0x300, 0x1800) if unicodedata.category(chr(code)).startswith("M"))
LETTERS = rf"[^\W\d_](?:[^\W\d_]|[{MARKS}])*"
# Words that are known, a command with the name that it has or stands on, a subscript, or a run of letters.
TOKEN = re.compile(
    rf"{WORD}[^{END}]*{END}|\\(?:begin|end) *\{{\w+\*?\}}(?:\{{[lcr|]*\}})?"
    r"|\\(?:operatorname\*?|overline|overrightarrow|vec|bar|hat|widehat|tilde|widetilde|d?dot|math(?:bb|cal|frak))"
    r" *\{\w*\}|\\[a-zA-Z]+|_ *(?:\{[^{}]*\}|\w)|" + LETTERS
)
FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "arccot", "sinh", "cosh", "tanh", "log",
    "ln", "lg", "exp", "lim", "max", "min", "gcd", "lcm", "det", "mod", "sqrt", "frac", "pi", "inf", "infty",
    "infinity", "and", "or", "percent", "percentage", "pct",
}  # fmt: skip
# Units that a number may touch: 5cm; but 3nm is a product.
TOUCHING = {
    "cm", "mm", "km", "mg", "kg", "ml", "ft", "in", "yd", "mi", "lb", "lbs", "oz", "hr", "hrs", "min", "sec", "pt",
    "pts", "mph", "kph", "deg", "am", "pm", "usd", "eur", "gbp", "rs", "kr",
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


def with_words_marked(text: str) -> str:
    """An answer without \\text{} and the like, with marks around each run of words: `18 cm` is `18 [cm]`."""
    while STYLE.search(text):
        text = STYLE.sub(_marked_style, text)
    in_formula = is_formula(text)
    marked = TOKEN.sub(lambda token: token[0] if _is_math(token, in_formula) else f"{WORD}{token[0]}{END}", text)
    return BETWEEN_WORDS.sub(" ", marked)


def _marked_style(found: re.Match) -> str:
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


def without_style(text: str) -> str:
    """An answer without \\text{} and the like, and with a single space between its words."""
    while STYLE.search(text):
        text = STYLE.sub(r"\2", text)
    return " ".join(text.split())


def is_formula(marked: str) -> bool:
    return FORMULA.search(NAMES.sub(" ", SEGMENT.sub(" ", marked))) is not None


def _ends_a_number(before: str) -> bool:
    return before[-1:].isdigit() or before[-1:] in ("}", ")", "]")


def _is_math(token: re.Match, in_formula: bool) -> bool:
    """Tell whether a token is no word but a command, a function's name, or letters that are variables."""
    run, before, after = token[0], token.string[: token.start()], token.string[token.end() :]
    if run in ("min", "sec") and re.search(r"\d *$", before) and not after:
        return False
    if not run[0].isalpha() or run.lower() in FUNCTIONS:
        return True
    if set(run) <= set("xyz") and (in_formula or len(run) < 3):
        return True
    latin = "".join(letter for letter in run if not "\u0370" <= letter <= "\u03ff")  # the others are Greek
    if len(run) == 1 or not latin:
        return latin.isascii() and (len(run) == 1 or in_formula)
    if not in_formula or not latin.isascii() or len(run) > 3 or run.isupper():
        return False
    behind_number = _ends_a_number(before.rstrip())
    if behind_number and is_symbol(run) and (before[-1:] == " " or run in TOUCHING or not run.islower()):
        return False
    touches = before[-1:].isdigit() or before[-1:] in ("}", "^", "{") or after[:1] in ("^", "_", "{", "}")
    beside = {before.rstrip()[-1:], after.lstrip()[:1]} & set("+-*/=<>^|") or re.match(r" *\) *[-+*/^=]", after)
    behind_command = re.search(r"\\[a-zA-Z]+ *$", before) or (run[0] == "d" and "\\int" in before)
    if touches or beside or behind_command or set(run) <= set("abcxyz"):
        return True
    return behind_number and not set(run.lower()) & set("aeiouy")

r"""typed(): a formula as people type it, or as code has it, in LaTeX: `sqrt(2)` becomes `\sqrt{2}`, `x**2` x^2."""

import re
from decimal import Decimal

from lowmem_grpo.rewards.number_words import MAGNITUDE, magnitude

POWER = re.compile(r"(?<=[\w)\]}])(?:\*\*| \*\* )(?=[\w(\\{-])")
ALONE = r"(?<![a-zA-Z\\])"  # of letters and LaTeX's backslash
TYPED = [
    (re.compile(ALONE + r"[Pp]i(?![a-zA-Z])"), r"\\pi "),
    (re.compile(ALONE + r"(?:infinity|inf)(?![a-zA-Z])"), r"\\infty "),
    (re.compile(ALONE + r"(theta|alpha|beta|gamma|lambda|omega)(?! ?[a-zA-Z])"), r"\\\1 "),
    (re.compile(ALONE + r"sqrt ?(\d+)"), r"\\sqrt{\1}"),
    (re.compile(ALONE + r"(arc(?:sin|cos|tan)|(?:sin|cos|tan)h?|cot|csc|log|ln)(?=[ (^_\d])"), r"\\\1 "),
    (re.compile(r"\^ ?-(\d+|[a-z])"), r"^{-\1}"),
    (re.compile(r"(\d+) choose (\d+)"), r"\\binom{\1}{\2}"),
    (re.compile(r"^(\d+) (?:in|out of) (\d+)$"), r"\1/\2"),
    (re.compile(r"^(?:approx\.?|approximately|about|roughly|exactly) (?=[-\d.$\\])"), ""),
    (re.compile(r"^(?:negative|minus) (?=[\d.$\\])"), "-"),
    (re.compile(r"(?<=\d )sq\.? (?=[a-z])"), "square "),
    (re.compile(r"(?<=\d )cu\.? (?=[a-z])"), "cubic "),
    (re.compile(r"(?<=\w) an? (?=(?:second|minute|hour|day|week|month|year|piece|person|kilo|mile)\b)"), " per "),
]
CALL = re.compile(r"(?<![a-zA-Z\\])\\?(sqrt|cbrt|exp|abs)\(|\^\(")
CALLS = {
    "sqrt": (r"\sqrt{", "}"),
    "cbrt": (r"\sqrt[3]{", "}"),
    "exp": ("e^{", "}"),
    "abs": ("|", "|"),
    "^": ("^{", "}"),
}
# 5 million, 2.5\\text{ billion dollars}, 1,5 Millionen, 18万; and behind a sign of money $5M and €5k.
BEHIND_MONEY = {"k": 10**3, "m": 10**6, "b": 10**9}
MAGNIFIED = re.compile(
    r"(?<![\w.,/])(?:(?P<money>[$€£]) ?)?(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:[.,]\d+)?)"
    rf"(?P<type> *\\(?:text|mathrm|mbox) *\{{)? *(?P<name>{MAGNITUDE}|(?(money)[kmb]\b|(?!)))",
    re.IGNORECASE,
)


def typed(text: str) -> str:
    r"""An answer with `sqrt(2)`, `x**2`, `2*pi`, `5 choose 2` and `5 million` in LaTeX."""
    text = POWER.sub("^", text.replace("=/=", r"\ne ")).replace(":=", "=").replace("==", "=")
    for pattern, usual in TYPED:
        text = pattern.sub(usual, text)
    while calls := list(CALL.finditer(text)):
        call = calls[-1]  # the innermost of those that are nested
        before, after = CALLS[call[1] or "^"]
        end = _closing(text, call.end())
        text = text[: call.start()] + before + text[call.end() : end] + after + text[end + 1 :]
    return MAGNIFIED.sub(_magnified, text)


def _closing(text: str, start: int) -> int:
    """The position at which the bracket that opens before another one is closed, or the end of the text."""
    depth = 1
    for bracket in re.compile(r"[()]").finditer(text, start):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return bracket.start()
    return len(text)


def _magnified(found: re.Match) -> str:
    """The number that `2.5 million` is, and what stood around the word."""
    size = BEHIND_MONEY.get(found["name"].lower()) or magnitude(found["name"])
    number = re.sub(r",(?=\d{3}(?!\d))", "", found["number"]).replace(",", ".")
    return f"{found['money'] or ''}{Decimal(number) * size:f}{found['type'] or ''}"

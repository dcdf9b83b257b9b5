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
    (re.compile(r"(?:the )?square root of (\d+)"), r"\\sqrt{\1}"),
    (re.compile(r"\(? ?(?<![a-zA-Z])\\?[pb]?mod *(?:\{ *(\w+) *\}|(\w+)) *\)?$"), r"\\pmod{\1\2}"),
    (re.compile(r"(?<=[)\]}]) ?U ?(?=[(\[\\{])"), r" \\cup "),
    (re.compile(r"\\(?:hat|vec|widehat) *\{ *\\?([ijk])(?:math)? *\}"), r"\1"),
    (re.compile(r"(?<=.), *(?:where |with |for )?[a-z] *\\in *\\mathbb *\{? *Z *\}?$"), ""),  # 2k, k \in Z
    (re.compile(r"^(?:the point )?[A-Z] ?(?=\([^()]*\d[^()]*,[^()]*\)$)|^the point (?=\()"), ""),  # P(3, 4)
    (re.compile(r"^(?:negative|minus) (?=[\d.$\\])"), "-"),
    (re.compile(r"(?<=\d )sq\.? (?=[a-z])"), "square "),
    (re.compile(r"(?<=\d )cu\.? (?=[a-z])"), "cubic "),
    (re.compile(r"(?<=\w) an? (?=(?:second|minute|hour|day|week|month|year|piece|person|kilo|mile)\b)"), " per "),
]
# x is at least 3, and at least 3; not at least 3 apples.
RELATIONS = {
    r"\ge": "at least|greater than or equal to|(?:no|not) less than",
    r"\le": "at most|less than or equal to|(?:no|not) (?:more|greater) than",
    ">": "greater than|more than|larger than|above|over",
    "<": "less than|fewer than|smaller than|below|under",
}
IN_WORDS = {
    sign: re.compile(
        rf"^(?:([a-zA-Z]) (?:is|must be) )?(?:{words}) (?!.*(?<![\\a-zA-Z])[a-zA-Z]{{2}})(?=-?[\d\\][^<>=]*$)"
    )
    for sign, words in RELATIONS.items()
}
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
    text = POWER.sub("^", text.replace("=/=", r"\ne ")).replace(":=", "=").replace("==", "=").replace("=<", r"\le ")
    for sign, words in IN_WORDS.items():
        text = words.sub(lambda found, sign=sign: f"{found[1] or ''} {sign} ".lstrip(), text)
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

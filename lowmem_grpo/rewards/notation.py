r"""plain(): an answer with Unicode's signs, and a number's many notations, as the LaTeX that math-verify reads.

`3½` and `3 1/2` become `(3+\frac{1}{2})`, `1.5e3` and `1.5×10³` become `1.5 \times 10^{3}`, `0.\overline{3}` becomes
`\frac{3}{9}`, and `1 000`, `1\,000` and `1{,}000` become `1000`.
"""

import re
import unicodedata

from lowmem_grpo.rewards.typed import typed

SIGNS = str.maketrans({
    "\N{MINUS SIGN}": "-", "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "∗": "*",
    "±": r"\pm ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ",
    "∞": r"\infty ", "π": r"\pi ", "∪": r"\cup ", "∩": r"\cap ", "∖": r"\setminus ", "∈": r"\in ", "∅": r"\emptyset ",
    "∨": r"\lor ", "∧": r"\land ", "°": r"^\circ ", "º": r"^\circ ", "℃": r"^\circ C", "℉": r"^\circ F", "′": "'",
    "∠": r"\angle ", "△": r"\triangle ", "⟨": r"\langle ", "⟩": r"\rangle ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}",
    "ℚ": r"\mathbb{Q}", "ℕ": r"\mathbb{N}", "ℂ": r"\mathbb{C}", "\N{FRACTION SLASH}": "/", "。": ".", "、": ", ",
    "…": r"\ldots ", "≅": r"\cong ", "≡": r"\equiv ",
})  # fmt: skip
RAISED, LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱᵃᵇᶜᵈᵉᵏᵐᵗˣʸᶻ", "₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙᵢₐₖₘₜₓⱼ"
OF_NORMAL_SIZE = str.maketrans(RAISED + LOWERED, "0123456789+-()niabcdekmtxyz" + "0123456789+-()niakmtxj")
SMALL_FRACTION = re.compile(r"([⁰¹²³⁴⁵⁶⁷⁸⁹]+)[/⁄]([₀₁₂₃₄₅₆₇₈₉]+)|[¼½¾⅐-⅞]")
ROOT = re.compile(r"([√∛∜]) *(?:\(((?:[^()]|\([^()]*\))*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|\w))")
DEGREES = {"√": "", "∛": "[3]", "∜": "[4]"}
DASH = re.compile(r"^[\u2012-\u2015](?=[\d.\\])")  # for a minus sign
WIDE = re.compile("[\uff01-\uff5e\uffe0-\uffe6]")  # ％, １ and ￥

CASES = re.compile(r"\\begin\{cases\} *((?:[^\\]|\\(?!end))*?)(?:\\\\)? *\\end\{cases\}")  # of equations
DOUBLED = re.compile(r"\\\\(?=[a-zA-Z]{2})")  # \\\\frac, escaped once too often
# 10\,080, 10,\!080, 10{,}080, 10 080 with a space of any width, 10'080; 1,00,000 and 1.000.000
GROUPS = re.compile(r"(?<![\w.,])\d{1,3}(?:(?:,? *\\!|\\[,;: ]|~|[^\S\n]|['’]| *\{ *, *\}) *\d{3})+(?![\d/])")
OTHER_GROUPS = re.compile(r"(?<![\w.,])(?:\d{1,2}(?:,\d\d)+,\d{3}|\d{1,3}(?:\.\d{3}){2,})(?![\d,.])")
ROUGHLY_EQUAL = re.compile("~=(?!~)| =~ ")  # or unequal, in some languages
DOTS_AND_COMMA = re.compile(r"(?<![\w.,])(\d{1,3}(?:\.\d{3})+),(\d{1,2})(?![\d,.])")  # 1.234,56
SPACE = re.compile(r"(?:(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|~|\s)+")
SHORT_FRACTION = re.compile(r"\\[dtc]?frac *(?:\{ *(\d+) *\}|(\d)) *(?:\{ *(\d+) *\}|(\d))")  # \frac12
# At the end of an answer, units that LaTeX has no sign for: 5 \mu m and 5\,\mu\mathrm{F}, but 2\mu N is a force of
# friction; 10\ \mathrm{k}\Omega, and 3\,\frac{\text{m}}{\text{s}^2}.
TYPE = r"\\(?:text|math)(?:rm|normal)? *"
MICRO = re.compile(
    rf"(?<=[\d}}]) *(?:{TYPE}\{{ *)?\\mu *"
    rf"(?:{TYPE}\{{ *([a-zA-Z]{{1,3}}) *\}}|([msLlAFCVWH]|Pa|mol|Hz)(?![a-zA-Z]) *\}}?)$"
)
OHM = re.compile(rf"(?<=[\d}}]) *(?:{TYPE}\{{ *([kMGm]?) *\}}? *)?\\Omega *\}}?$")
UNIT_IN_FRACTION = re.compile(
    rf"(?<=[\d}}]) *\\frac *\{{ *{TYPE}\{{ *(\w+) *\}} *\}} *"
    rf"\{{ *{TYPE}\{{ *(\w+)(?:\^(\d))? *\}}(?: *\^ *\{{? *(\d) *\}}?)? *\}}$"
)
REPEATING = re.compile(
    r"(?<![\w.])(\d*)[.,](\d*)(?:\\(?:overline|bar|dot) *(?:\{ *(\d+) *\}|(\d))|\((\d+)\)"  # 0.1\overline{6}, 0.1(6)
    r"|\\dot *(?:\{(\d)\}|(\d))(\d*)\\dot *(?:\{(\d)\}|(\d))"  # 0.\dot{1}4285\dot{7}
    r"|((?:\d[\u0304\u0305\u0307])+))(?:\.\.\.|\\[lc]?dots)?(?!\.?\d)"  # a line or a dot above each digit
)
GOES_ON = re.compile(r"(?<![\w.])(\d+)\.(\d*?)(?:(\d)\3\3+|(\d{2,}?)\4+)(?:\.\.\.|\\[lc]?dots)")  # 0.333...
DECIMAL = r"(?<![\w.])(\d+(?:\.\d+)?|\.\d+)"
SCIENTIFIC = re.compile(rf"{DECIMAL}[eE]([-+]?\d{{1,4}})(?![\w.])")
TIMES_TEN = re.compile(
    rf"{DECIMAL} *(?:[xX*]|\\times(?![a-z])|\\cdot(?![a-z])) *10 *(?:\^|\*\*)"
    r" *(?:\{ *([-+]?\d+) *\}|([-+]?\d+))(?![\w.])"
)
MIXED = re.compile(
    r"(?<![\w.}^_/\\])(?<![\d}] )(\d+)(?: +(\d+) */ *(\d+)(?![\w/.^])| *\\frac\{(\d+)\}\{(\d+)\}(?! *\^))"
)


def plain(text: str) -> str:
    """An answer in the LaTeX and with the ASCII digits that math-verify reads, a single space between its words."""
    if not text.isascii():
        text = _without_unicode(unicodedata.normalize("NFC", text))
    if "\\\\" in text and r"\begin" not in text:
        text = DOUBLED.sub(r"\\", text)
    if r"\begin{cases}" in text and "&" not in text:
        text = CASES.sub(lambda cases: cases[1].replace(r"\\", ", "), text)
    text = ROUGHLY_EQUAL.sub(r" \\simeq ", text)
    text = DOTS_AND_COMMA.sub(lambda number: f"{number[1].replace('.', '')}.{number[2]}", text)
    text = SPACE.sub(" ", OTHER_GROUPS.sub(_digits, GROUPS.sub(_digits, text)))
    if "\\mu" in text or "\\Omega" in text or "\\frac" in text:
        text = OHM.sub(lambda ohm: f" \\text{{{ohm[1] or ''}\N{GREEK CAPITAL LETTER OMEGA}}}", text)
        text = MICRO.sub(lambda micro: f" \\text{{\N{MICRO SIGN}{micro[1] or micro[2]}}}", text)
        text = UNIT_IN_FRACTION.sub(_unit_in_a_line, text)
    text = typed(text)
    text = SHORT_FRACTION.sub(r"\\frac{\1\2}{\3\4}", text)
    text = GOES_ON.sub(_repeating, REPEATING.sub(_repeating, text))
    text = TIMES_TEN.sub(_times_ten, SCIENTIFIC.sub(_times_ten, text))
    return MIXED.sub(_mixed, text)


def _without_unicode(text: str) -> str:
    text = SMALL_FRACTION.sub(_small_fraction, DASH.sub("-", text))
    text = re.sub(f"[{RAISED}]+", lambda raised: f"^{{{raised[0].translate(OF_NORMAL_SIZE)}}}", text)
    text = re.sub(f"[{LOWERED}]+", lambda lowered: f"_{{{lowered[0].translate(OF_NORMAL_SIZE)}}}", text)
    while ROOT.search(text):
        text = ROOT.sub(lambda root: rf"\sqrt{DEGREES[root[1]]}{{{root[2] or root[3] or root[4]}}}", text)
    text = WIDE.sub(lambda wide: unicodedata.normalize("NFKC", wide[0]), text.translate(SIGNS))
    return re.sub(r"\d", lambda digit: str(int(digit[0])), text)  # those of other scripts


def _small_fraction(found: re.Match) -> str:
    numerator, _, denominator = unicodedata.normalize("NFKC", found[0]).replace("/", "⁄").partition("⁄")
    return rf" \frac{{{numerator}}}{{{denominator}}}"


def _unit_in_a_line(found: re.Match) -> str:
    exponent = found[3] or found[4]
    return rf" \text{{ {found[1]}/{found[2]}{'^' + exponent if exponent else ''}}}"


def _digits(found: re.Match) -> str:
    return re.sub(r"\D", "", found[0])


def _repeating(found: re.Match) -> str:
    """The fraction that a repeating decimal is: 0.1\\overline{6} is (16 - 1) / 90."""
    whole, before, *period = found.groups()
    repeated = re.sub(r"\D", "", "".join(filter(None, period)))
    numerator = int(whole + before + repeated) - int("0" + whole + before)
    denominator = int("9" * len(repeated) + "0" * len(before))
    return rf"\frac{{{numerator}}}{{{denominator}}}" if numerator % denominator else str(numerator // denominator)


def _times_ten(found: re.Match) -> str:
    decimal, *exponent = filter(None, found.groups())
    return rf"{decimal} \times 10^{{{int(exponent[0])}}}"


def _mixed(found: re.Match) -> str:
    r"""A whole number and a proper fraction as their sum; 2 3/2 stays what it is."""
    whole, numerator, denominator = filter(None, found.groups())
    if int(numerator) >= int(denominator):
        return found[0]
    return rf"({whole}+\frac{{{numerator}}}{{{denominator}}})"

"""The reply of a math-verify worker to (gold, answer): true or false.

What math-verify rounds is compared exactly here: it chops a difference of numbers at 1e-15, so that 2^{-99} is 2^{-98}
to it, and rounds decimals to six places. It also takes the letter at the end of `2t` for a unit, R for r, and of a text
that it cannot read the last number.
"""

import logging
import re
import signal
from collections.abc import Callable
from string import ascii_lowercase
from typing import Any, NamedTuple

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy, normalize_latex
from math_verify import grader
from math_verify.errors import TimeoutException
from math_verify.parser import get_last_eq
from sympy.core.function import AppliedUndef

PARSING_LIMIT_S, VERIFYING_LIMIT_S = 3, 3
NORMAL = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
ROUNDED = 1e-9  # how far a decimal may be, relatively, from the number that was rounded to it: 0.3333333333 for 1/3
DIGITS = 300  # to which a difference of irrational numbers is computed
ZERO = sympy.Float(f"1e-{DIGITS - 50}")  # relative; a difference that is none comes out below 1e-{DIGITS}
MOST_DIGITS = 100_000  # of a whole number that is written out

USUAL_SIGNS = {
    r"\\langle(?![a-z])": "(", r"\\rangle(?![a-z])": ")", r"\\lbrace(?![a-z])": r"\\{",
    r"\\rbrace(?![a-z])": r"\\}", r"\\varnothing|\\\{ *\\\}": r"\\emptyset", r"\\(?:lor|vee)(?![a-z])": r" \\lor ",
    r"\\(?:land|wedge)(?![a-z])": r" \\land ",
}  # fmt: skip
# \sin 30^\circ, of which latex2sympy leaves the sign for degrees out.
OF_DEGREES = re.compile(
    r"(\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])(?: *\^ *\{?\d\}?)? *[({]? *)"
    r"(\d+(?:\.\d+)?) *\^ *(?:\\circ(?![a-z])|\{ *\\circ *\})"
)
INTERVAL = re.compile(r"([\[\]])([^\[\]]*[,;][^\[\]]*)([\[\]])")
# D = (0, 1) or (x, y) = (1, 2); but not y = (x + 1)(x + 2)
NAMED_BRACKETS = re.compile(
    r"((?:\\?[A-Za-z]+|\([^()]*\))(?:_\{?\w+\}?)?) *= *((?:\(|\[|\\\{)[^()\[\]]*,[^()\[\]]*[)\]}])"
)
ELEMENT = re.compile(r"([A-Za-z](?:_\{?\w+\}?)?) *\\in(?![a-z]) *(.+)")
SET_BUILDER = re.compile(
    r"\\\{ *[A-Za-z] *(?:\\in *(?:\\mathbb *\{ *R *\}|R) *)?(?:\\mid|\\vert|\\colon|[:|]) *(.+)\\\}"
)
CONDITION_IN_SET = re.compile(r"\\mid(?![a-z])|:|\\colon|^[^|]*\|[^|]*$")
BRACKET = re.compile(r"[()\[\]{}]")
OPENING, CLOSING = set("([{"), set(")]}")
SEPARATOR = re.compile(
    r"[()\[\]{}]|\s*[,;]?\s*(?<![\\a-zA-Z])(?:and|or)(?![a-zA-Z])\s*|\s*\\l(?:and|or)(?![a-z])\s*|[,;]"
)
LOGICAL = {r"\land": "and", r"\lor": "or"}
UNION = re.compile(r"[()\[\]{}]|\\cup(?![a-z])")
SEMICOLON = re.compile(r"[()\[\]{};]")
THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")


class Group(NamedTuple):
    r"""Items in brackets or between commas: (1, 2) in its order, \{1, 2\} and 1, 2 in any."""

    bracket: str  # "(", "{", or "" for a list without any
    items: tuple
    joined: str = ""  # "and" or "or" between statements: x > 1 or y > 2, p \land q; 1 and 2 are values


class Solutions(NamedTuple):
    r"""The real numbers of which a condition is true, such as 1 < x < 2 or x \in (1, 2)."""

    variable: str
    numbers: sympy.Set


def timeout(timeout_seconds: int) -> Callable:
    """A decorator that limits a function's CPU time; math-verify's limits wall time, of which a loaded machine eats.

    Raises:
        TimeoutException (the function): math-verify's own, at the limit and each second after it.
    """

    def end(number: int, frame: Any) -> None:
        raise TimeoutException

    def limited(function: Callable) -> Callable:
        def call(*arguments: Any) -> Any:
            signal.signal(signal.SIGPROF, end)
            signal.setitimer(signal.ITIMER_PROF, timeout_seconds, 1)
            try:
                return function(*arguments)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)

        return call

    return limited


def is_equal(gold: str, answer: str) -> bool:
    """Tell whether two formulas are equal; where one is no formula, whether their texts are."""
    texts = [_in_usual_signs(text) for text in (gold, answer)]
    keep_case = any(_has_both_cases(text) for text in texts)
    names = {NAMED_BRACKETS.sub(r"\1", text) for text in texts if NAMED_BRACKETS.fullmatch(text)}
    if len(names) > 1:  # D = (0, 1) is not E = (0, 1)
        return False
    sides = [timeout(PARSING_LIMIT_S)(structure)(text, keep_case) for text in texts]
    if None in sides:
        return len({normalize_latex(text, NORMAL).replace(" ", "") for text in texts}) == 1
    return same(*sides)


def _in_usual_signs(text: str) -> str:
    for sign, usual in USUAL_SIGNS.items():
        text = re.sub(sign, usual, text)
    text = OF_DEGREES.sub(r"\1\\frac{\2\\pi}{180}", text)
    interval = INTERVAL.fullmatch(text.strip())
    if interval:  # ]0, 1[ and [0; 1]
        left, ends, right = interval.groups()
        ends = ends if "," in ends else ends.replace(";", ",")
        text = ("(" if left == "]" else "[") + ends + (")" if right == "[" else "]")
    return text.strip()


def structure(text: str, keep_case: bool) -> Any:
    """The Group or Solutions that a text describes, else the formula that latex2sympy reads; None without any."""
    end = _end_of_brackets(text)
    if text.startswith(r"\{") and end == len(text):
        builder = SET_BUILDER.fullmatch(text)
        if builder:
            return structure(builder[1], keep_case)
        return None if CONDITION_IN_SET.search(text) else _group("{", text[2:-2], keep_case)
    union = [structure(part, keep_case) for part in _split(text, UNION)[::2]] if text.startswith(r"\{") else []
    if union and all(isinstance(part, Group) and part.bracket == "{" for part in union):
        return _set(tuple(item for part in union for item in part.items))
    if text.startswith("(") and text.endswith(")") and end == len(text) and len(_split(text[1:-1])) > 1:
        is_statement = set(_split(text[1:-1])[1::2]) <= set(LOGICAL)  # (p \lor q), and no point
        return structure(text[1:-1], keep_case) if is_statement else _group("(", text[1:-1], keep_case)
    if text.startswith("[") and text.endswith("]") and end == len(text) and len(_split(text[1:-1])) > 3:
        return _group("(", text[1:-1], keep_case)  # a list as Python writes it; [1, 2] is an interval
    if not BRACKET.search(text):
        text = THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    separators = set(_split(text)[1::2])
    if {";", ","} <= separators:  # x = 1, y = 2; x = 3, y = 4
        return _group("", text, keep_case, SEMICOLON)
    if separators:
        group = _group("", text, keep_case)
        words = {LOGICAL.get(separator, separator) for separator in separators}
        return group and (_joined_conditions(group, words) or _joined_statements(group, separators))
    named = NAMED_BRACKETS.fullmatch(text)
    if named:
        return structure(named[2], keep_case)
    element = ELEMENT.fullmatch(text)
    if element:
        values = structure(element[2], keep_case)
        numbers = _as_set(values)
        return values if numbers is None else Solutions(element[1], numbers)
    formula = parsed(normalize_latex(text, NORMAL), keep_case)
    if r"\pm" in text and isinstance(formula, sympy.FiniteSet):
        return Group("", formula.args)
    if r"\pm" in text and isinstance(formula, sympy.Eq) and isinstance(formula.rhs, sympy.FiniteSet):
        return Group("", tuple(sympy.Eq(formula.lhs, value, evaluate=False) for value in formula.rhs.args))
    return formula


def _group(bracket: str, text: str, keep_case: bool, separator: re.Pattern = SEPARATOR) -> Group | None:
    items = tuple(structure(part, keep_case) for part in _split(text, separator)[::2])
    if None in items:
        return None
    return _set(items) if bracket == "{" else Group(bracket, items)


def _set(items: tuple) -> Group:
    return Group("{", tuple(item for n, item in enumerate(items) if item not in items[:n]))


def _split(text: str, separator: re.Pattern = SEPARATOR) -> list[str]:
    """Parts of a list and, between them, what separates them: ["x < 1", "or", "x > 2"]."""
    parts, start, depth = [], 0, 0
    for found in separator.finditer(text):
        if found[0] in OPENING:
            depth += 1
        elif found[0] in CLOSING:
            depth -= 1
        elif depth == 0:
            parts += [text[start : found.start()].strip(), found[0].strip(" ,") or ","]
            start = found.end()
    return [*parts, text[start:].strip()]


def _end_of_brackets(text: str) -> int:
    """The end of the brackets that a text begins with; 0 where it begins with none."""
    depth = 0
    for found in BRACKET.finditer(text):
        depth += 1 if found[0] in OPENING else -1
        if depth == 0:
            return found.end() if text.startswith(("(", "[", r"\{")) else 0
    return 0


def _joined_conditions(group: Group, separators: set[str]) -> Solutions | None:
    """Join several inequalities of one variable; a comma means `or` where no number is in all of them."""
    conditions = [_solutions(item) for item in group.items]
    known = [condition for condition in conditions if condition is not None]
    if len(known) < len(conditions) or len({condition.variable for condition in known}) > 1:
        return None
    numbers = sympy.Intersection(*(condition.numbers for condition in known))
    if "or" in separators or ("and" not in separators and numbers.is_empty):
        numbers = sympy.Union(*(condition.numbers for condition in known))
    return Solutions(known[0].variable, numbers)


def _joined_statements(group: Group, separators: set[str]) -> Group | None:
    r"""Say what joins inequalities, or what \land and \lor stand between; None where several do."""
    words = {LOGICAL.get(separator, separator) for separator in separators} & {"and", "or"}
    has_inequality = any(grader.is_relation(item) and not grader.is_equation(item) for item in group.items)
    if not has_inequality and separators.isdisjoint(LOGICAL):
        return group
    return None if len(words) > 1 else group._replace(joined=words.pop() if words else "and")


def _solutions(side: Any) -> Solutions | None:
    """The numbers of which an inequality of one variable is true; None for anything else."""
    if isinstance(side, Solutions):
        return side
    if not grader.is_relation(side) or grader.is_equation(side):
        return None
    try:
        relation: Any = grader.unwrap_fcs(side)  # f(x) > 0
        (variable,) = relation.free_symbols
        return Solutions(str(variable), relation.as_set())
    except Exception:  # several variables, or what sympy cannot solve
        return None


def _as_set(side: Any) -> sympy.Set | None:
    if isinstance(side, sympy.Set):
        return side
    if isinstance(side, Group) and side.bracket == "(" and len(side.items) == 2:
        return sympy.Interval.open(*side.items)
    return None


def same(gold: Any, answer: Any) -> bool:
    """Compare two structures or formulas."""
    if isinstance(gold, Group) and isinstance(answer, Group):
        return _same_group(gold, answer)
    for side, other in ((gold, answer), (answer, gold)):
        if isinstance(side, Group) and len(side.items) == 1 and not isinstance(side.items[0], Group | sympy.Set):
            return same(*((side.items[0], other) if side is gold else (other, side.items[0])))
    if not any(isinstance(side, Group | Solutions) for side in (gold, answer)) and _same_single(gold, answer):
        return True
    own, given = _solutions(gold), _solutions(answer)
    if own and given and own.variable != given.variable:
        return False
    numbers, others = own.numbers if own else _as_set(gold), given.numbers if given else _as_set(answer)
    if numbers is None or others is None:
        return False
    return _same_single(_in_fractions(numbers), _in_fractions(others))


def _same_group(gold: Group, answer: Group) -> bool:
    """Compare item by item: in order where brackets or different names (x = 1, y = 2) say which is which."""
    brackets = {gold.bracket, answer.bracket}
    if brackets == {"(", "{"} or len(gold.items) != len(answer.items):
        return False
    if gold.joined and answer.joined and gold.joined != answer.joined:
        return False
    for side, other in ((gold, answer), (answer, gold)):
        if side.joined and not other.joined and not all(isinstance(item, sympy.Eq) for item in side.items):
            return False  # p \lor q is not p, q; but x = 1 \lor x = 2 is 1, 2
    names = [{str(item.lhs) for item in side.items if isinstance(item, sympy.Eq)} for side in (gold, answer)]
    if "(" in brackets or (names[0] != names[1] and max(map(len, names)) > 1):
        sides = [_by_name(side) if "(" in brackets and not side.bracket else side.items for side in (gold, answer)]
        return all(_same_item(own, given) for own, given in zip(*sides, strict=True))
    left = list(answer.items)
    for item in gold.items:
        found = (
            left.index(item)
            if item in left
            else next((i for i, other in enumerate(left) if _same_item(item, other)), None)
        )
        if found is None:
            return False
        del left[found]
    return True


def _by_name(group: Group) -> tuple:
    """The items of a point: y = 1, x = 2 in the order of the alphabet, and m = 2, b = 3 as they stand."""
    names = [str(item.lhs) if isinstance(item, sympy.Eq) else "" for item in group.items]
    if "".join(sorted(names)) not in ascii_lowercase or not all(map(len, names)):
        return group.items
    return tuple(item for _, item in sorted(zip(names, group.items, strict=True), key=lambda pair: pair[0]))


def _same_item(gold: Any, answer: Any) -> bool:
    r"""Compare two items of groups, of which \{3\} is not 3."""
    alone = [isinstance(side, Group) and len(side.items) == 1 for side in (gold, answer)]
    return alone[0] == alone[1] and same(gold, answer)


def _same_single(gold: Any, answer: Any) -> bool:
    if isinstance(answer, sympy.Eq) and not answer.free_symbols and not same_number(answer.lhs, answer.rhs):
        return False  # 1/3 = 1/2, of which math-verify would take a side
    for side, other in ((gold, answer), (answer, gold)):
        equations = _equations(side)
        if equations and not _equations(other) and not any(map(_gives_a_value, equations)):
            return False  # x + y = 3, of which math-verify would take the 3
    return bool(grader.verify(gold, answer, timeout_seconds=VERIFYING_LIMIT_S))


def _equations(side: Any) -> list[sympy.Eq]:
    """The equations of x = 3, or of a chain such as A = 2r = 4; none for anything else."""
    parts = side.args if isinstance(side, sympy.And) else (side,)
    return [part for part in parts if isinstance(part, sympy.Eq)]


def _gives_a_value(equation: sympy.Eq) -> bool:
    """Tell whether an equation says what one name is, such as y = 2x and f(x) = 2x, or computes: 2 + 3 = 5."""
    return not equation.free_symbols or any(isinstance(side, sympy.Symbol | AppliedUndef) for side in equation.args)


def _has_both_cases(text: str) -> bool:
    """Tell whether a letter is there as a capital and as a small one: math-verify takes R - r for 0."""
    letters = set(filter(str.isalpha, text))
    return any(letter.isupper() and letter.lower() in letters for letter in letters)


def parsed(text: str, keep_case: bool) -> Any:
    """The formula of a text, or the last side of a long equation that is one; None without any."""
    config = ConversionConfig(lowercase_symbols=not keep_case)
    for part in dict.fromkeys((text, get_last_eq(text))):
        try:
            is_real = not grader.should_treat_as_complex(part)
            formula = latex2sympy(part, is_real=is_real, normalization_config=None, conversion_config=config)
            return _with_imaginary_unit(formula)
        except Exception:  # whatever it makes of a text that is no LaTeX
            continue
    return None


def _with_imaginary_unit(formula: Any) -> Any:
    """A number whose only letter is i, as a complex number: -1 is i^2."""
    if isinstance(formula, sympy.Eq):
        return sympy.Eq(formula.lhs, _with_imaginary_unit(formula.rhs), evaluate=False)
    symbols = formula.free_symbols if isinstance(formula, sympy.Basic) else set()
    return formula.subs(symbols.pop(), sympy.I) if {str(symbol) for symbol in symbols} == {"i"} else formula


def same_number(a: Any, b: Any, *_: int) -> bool:
    """Compare two values exactly, but for a decimal that the other is rounded to; replaces math-verify's own."""
    if isinstance(a, sympy.MatrixBase | sympy.MatrixExpr) and isinstance(b, sympy.MatrixBase | sympy.MatrixExpr):
        a, b = a.doit(), b.doit()
        return a.shape == b.shape and all(
            same_number(x, y) or same_formula(x, y) for x, y in zip(a.flat(), b.flat(), strict=True)
        )
    if all(grader.is_atomic_or_pct_atomic(side, sympy.Integer) for side in (a, b)):  # 9 % is 9
        return grader.get_pct_val(a, a) == grader.get_pct_val(b, b)
    if a.free_symbols or b.free_symbols:
        return False
    is_decimal = [isinstance(side, sympy.Float) for side in (a, b)]
    a, b = (_with_hundredths(side) for side in (a, b))
    sizes = [abs(side).evalf(15) for side in (a, b)]
    if not all(size.is_comparable and size.is_finite for size in sizes):
        return False
    if abs((a - b).evalf(15)) > ROUNDED * max(sizes):
        return False
    if max(abs(sympy.log(size, 10).evalf(5)) if size else 0 for size in sizes) > MOST_DIGITS:
        return False
    a, b = (_in_fractions(side) for side in (a, b))
    exact = a.doit(), b.doit()
    if all(side.is_Rational for side in exact):
        difference, close_enough = abs(exact[0] - exact[1]), sympy.Integer(0)
    else:
        difference, close_enough = abs(sympy.Add(a, -b, evaluate=False).evalf(15, maxn=DIGITS)), ZERO * max(sizes)
    if is_decimal[0] != is_decimal[1] and difference < _last_place(a if is_decimal[0] else b):
        return True
    return bool(difference <= close_enough)


def _last_place(decimal: Any) -> Any:
    """The value of a decimal's last place: 1/100 for 0.25."""
    return sympy.Rational(1, 10 ** next(places for places in range(MOST_DIGITS) if (decimal * 10**places).is_integer))


def same_formula(a: Any, b: Any) -> bool:
    """Compare two formulas, without rounding their decimals; replaces math-verify's own comparison."""
    if not (a.free_symbols or b.free_symbols):
        return False
    try:
        difference = sympy.simplify(_in_fractions(a) - _in_fractions(b))
    except Exception:  # what sympy cannot subtract, or simplify
        return False
    return bool(difference.is_zero_matrix if isinstance(difference, sympy.MatrixBase) else difference.is_zero)


def _with_hundredths(value: Any) -> Any:
    """A percentage as a number of hundredths, where math-verify holds its percent sign back."""
    return value.xreplace({held: held.args[0] for held in value.atoms(sympy.UnevaluatedExpr)})


def _in_fractions(value: Any) -> Any:
    """The formula with each decimal as a fraction."""
    return value.xreplace({decimal: sympy.Rational(str(decimal)) for decimal in value.atoms(sympy.Float)})


def _only_with_solutions(compare: Callable) -> Callable:
    """Compare two equations that have solutions; without any, math-verify finds x^2 = -1 and x^2 = -4 equal."""

    def compare_solutions(gold: Any, answer: Any, *rounding: int) -> bool:
        return bool(sympy.solve(gold, gold.free_symbols)) and compare(gold, answer, *rounding)

    return compare_solutions


# math-verify finds these by name, for what stands in a set, a tuple, an interval, a matrix or an equation, too.
grader.timeout = timeout
grader.sympy_numeric_eq = same_number
grader.sympy_symbolic_eq = same_formula
grader.sympy_solve_and_compare = _only_with_solutions(grader.sympy_solve_and_compare)


def reply(pair: tuple[str, str]) -> bool:
    """Tell whether an answer is the gold one."""
    logging.disable(logging.CRITICAL)
    try:
        return is_equal(*pair)
    except BaseException:  # whatever sympy makes of a model's output, or no end of it: it is not the gold answer
        return False

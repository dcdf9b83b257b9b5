"""The program of a math-verify worker: gets (gold, answer), and sends true or false.

What math-verify rounds is compared exactly here: it chops a difference of numbers at 1e-15, so that 2^{-99} is 2^{-98}
to it, and rounds decimals to six places. It also takes the letter at the end of `2t` for a unit, R for r, and of a text
that it cannot read the last number.
"""

import logging
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy, normalize_latex
from math_verify import grader
from math_verify.parser import get_last_eq
from math_verify.utils import timeout

PARSING_LIMIT_S, VERIFYING_LIMIT_S = 3, 3
NORMAL = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
ROUNDED = 1e-9  # how far a decimal may be, relatively, from the number that was rounded to it: 0.3333333333 for 1/3
DIGITS = 300  # to which a difference of irrational numbers is computed
ZERO = sympy.Float(f"1e-{DIGITS - 50}")  # relative; a difference that is none comes out below 1e-{DIGITS}
MOST_DIGITS = 100_000  # of a whole number that is written out


def is_equal(gold: str, answer: str) -> bool:
    """math-verify's verdict on two formulas; of others, whether their texts are equal."""
    texts = [normalize_latex(text, NORMAL) for text in (gold, answer)]
    keep_case = any(_has_both_cases(text) for text in texts)
    formulas = [timeout(PARSING_LIMIT_S)(parsed)(text, keep_case) for text in texts]
    if None in formulas:
        return texts[0].replace(" ", "") == texts[1].replace(" ", "")
    if (
        isinstance(formulas[1], sympy.Eq)
        and not formulas[1].free_symbols
        and not same_number(formulas[1].lhs, formulas[1].rhs)
    ):
        return False  # 1/3 = 1/2, of which math-verify would take a side
    return bool(grader.verify(*formulas, timeout_seconds=VERIFYING_LIMIT_S))


def _has_both_cases(text: str) -> bool:
    """Tell whether a letter is there as a capital and as a small one: math-verify takes R - r for 0."""
    letters = {text[i] for i in range(len(text)) if text[i].isalpha()}
    return any(letter.isupper() and letter.lower() in letters for letter in letters)


def parsed(text: str, keep_case: bool) -> Any:
    """The formula of a text, or the last side of a long equation that is one; None without any."""
    config = ConversionConfig(lowercase_symbols=not keep_case)
    for part in dict.fromkeys((text, get_last_eq(text))):
        try:
            is_real = not grader.should_treat_as_complex(part)
            return latex2sympy(part, is_real=is_real, normalization_config=None, conversion_config=config)
        except Exception:  # whatever it makes of a text that is no LaTeX
            continue
    return None


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
grader.sympy_numeric_eq = same_number
grader.sympy_symbolic_eq = same_formula
grader.sympy_solve_and_compare = _only_with_solutions(grader.sympy_solve_and_compare)


def main() -> None:
    logging.disable(logging.CRITICAL)
    trainer = Connection(int(sys.argv[1]))
    while True:
        try:
            gold, answer = trainer.recv()
        except EOFError:  # the trainer is gone
            return
        try:
            verdict = is_equal(gold, answer)
        except BaseException:  # whatever sympy makes of a model's output, or no end of it: it is not the gold answer
            verdict = False
        trainer.send(verdict)


if __name__ == "__main__":
    main()

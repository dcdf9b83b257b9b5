"""python: the tool that runs a program of the model's in a sandbox, and says what it printed."""

from lowmem_grpo.rewards.isolation.sandbox import Limits, cannot_isolate, run_program

LIMITS = Limits(seconds=10.0, memory_mb=1024)
MOST_CHARACTERS = 4000  # of what is said back
# Runs code whose last line may be an expression, whose value is printed as Python's prompt does; an error is printed.
RUN = """
import ast, traceback
try:
    tree = ast.parse({code!r})
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    names = {{"__name__": "__main__"}}
    exec(compile(tree, "program", "exec"), names)
    value = None if last is None else eval(compile(ast.Expression(last.value), "program", "eval"), names)
    if value is not None:
        print(repr(value))
except BaseException as error:
    if not isinstance(error, SystemExit):
        print("".join(traceback.format_exception_only(error)).strip())
"""


def python(code: str) -> str:
    """Run a Python program and return what it prints, and the value of its last line.

    Args:
        code: the program; each call begins anew, with the standard library and without files or network.
    """
    printed = run_program(RUN.format(code=code), "", LIMITS)
    if printed is None:
        return f"The program was ended: by itself, or for more than {LIMITS.seconds:g} s, or too much memory or output."
    printed = printed.strip() or "The program printed nothing."
    return printed if len(printed) <= MOST_CHARACTERS else f"{printed[:MOST_CHARACTERS]}\n... (cut off)"


def why_not() -> str | None:
    """The reason why this system cannot run programs of a model's, or None."""
    return cannot_isolate()

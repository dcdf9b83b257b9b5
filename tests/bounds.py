"""Lists how near each assertion of the suite comes to its bound, over the instruction sets of this processor.

    python tests/bounds.py                                # the default suite: tens of CPU-minutes
    python tests/bounds.py tests/test_loss.py -k gmpo     # any arguments of pytest

Rounding differs between instruction sets, so a bound that holds on one processor can fail on another. A first run
with the processor's own instruction set finds the tests that compare anything inexact; only those run again with the
other sets. A line of the list is a line of a test:

    0.34  0.0006  tests/test_update.py:96  default  1.34e-07 < 4e-07  test_micro_batches_add_up_to_the_whole_batch[gemma2-dapo]

The error came to 0.34 of its bound, at most, with that instruction set in that case; of the cases of the test the
least came to 0.0006 of it. Seen are torch.testing.assert_close, numpy.testing.assert_allclose, pytest.approx and
comparisons with < and > in an assert. A comparison of times or counts is listed as well, where one side is a float.
"""

import ast
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from math import isfinite
from pathlib import Path

# PyTorch's own kernels, oneDNN's products in bf16 and MKL's in fp32. "own" is what the processor has (AMX, on a Xeon).
INSTRUCTION_SETS = {
    "own": {},
    "default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx512_bf16": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
}
LOG = "LOWMEM_GRPO_BOUNDS"  # the file that a run under this plugin writes to
TESTS = Path(__file__).parent
seen: dict[str, tuple[float, str]] = {}  # by place in a test file, of the test that is running: (share, values)


def note(share: float, values: str) -> None:
    """Keep the largest share of its bound that an error had at the line of a test file that is being run."""
    frame = sys._getframe(1)
    while frame and (Path(frame.f_code.co_filename).parent != TESTS or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    if frame and 0 <= share <= 1:  # more is no bound: of a comparison within another, or of one that was denied
        place = f"tests/{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        seen[place] = max(seen.get(place, (-1.0, "")), (share, values))


def compared(left, operator: str, right):
    """The comparison's result, noted where a side is a float: of `error < bound` the share is error / bound."""
    import numpy
    import torch

    result = left < right if operator == "<" else left <= right
    try:
        sides = [numpy.asarray(side.detach().cpu() if torch.is_tensor(side) else side) for side in (left, right)]
        if any(side.dtype.kind == "f" for side in sides) and all(side.dtype.kind in "fi" for side in sides):
            low, high = (side.astype(float) for side in sides)
            shares = low / high
            if shares.size and (low > 0).all() and (high > 0).all():
                note(float(shares.max()), f"{float(low.max()):.3g} {operator} {float(high.max()):.3g}")
    except (TypeError, ValueError):
        pass
    return result


LESS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: "<", ast.GtE: "<="}


class InAssert(ast.NodeTransformer):
    """Make `a < b`, `b > a` and each pair of `a < b < c` a call of compared(a, "<", b)."""

    def visit_Compare(self, node):
        self.generic_visit(node)
        sides = [node.left, *node.comparators]
        pairs = [self.pair(*triple) for triple in zip(sides, node.ops, sides[1:], strict=False)]
        return ast.copy_location(pairs[0] if len(pairs) == 1 else ast.BoolOp(ast.And(), pairs), node)

    def pair(self, left, operator, right) -> ast.expr:
        if type(operator) not in LESS:
            return ast.Compare(left, [operator], [right])
        low, high = (right, left) if isinstance(operator, (ast.Gt, ast.GtE)) else (left, right)
        call = ast.parse("__import__('bounds').compared()", mode="eval").body
        for node in ast.walk(call):
            ast.copy_location(node, left)
        call.args = [low, ast.Constant(LESS[type(operator)]), high]  # type: ignore[attr-defined] # an ast.Call
        return call


class Asserts(ast.NodeTransformer):
    def visit_Assert(self, node):
        node.test = InAssert().visit(node.test)
        return node


def watch() -> None:
    """Wrap what tests compare with, before they are imported."""
    import numpy
    import pytest
    import torch
    from _pytest.assertion import rewrite

    def tensors(actual, expected) -> Iterator:
        if isinstance(expected, dict):
            for name in expected:
                yield from tensors(actual[name], expected[name])
        elif isinstance(expected, (list, tuple)):
            for a, b in zip(actual, expected, strict=True):
                yield from tensors(a, b)
        else:
            yield torch.as_tensor(actual).detach().cpu(), torch.as_tensor(expected).detach().cpu()

    def share_of(actual, expected, rtol, atol) -> None:
        for a, b in tensors(actual, expected):
            if a.shape != b.shape or not a.numel() or not (a.is_floating_point() or b.is_floating_point()):
                continue
            defaults = {torch.float64: (1e-7, 1e-7), torch.float32: (1.3e-6, 1e-5), torch.bfloat16: (1.6e-2, 1e-5)}
            relative, absolute = (rtol, atol) if rtol is not None else defaults.get(a.dtype, (1e-3, 1e-5))
            error = (a.double() - b.double()).abs()
            shares = (error / (absolute + relative * b.double().abs())).where(error > 0, 0)
            where = int(shares.nan_to_num(0).argmax())
            note(float(shares.flatten()[where]), f"{float(error.flatten()[where]):.3g} of {b.flatten()[where]:.3g}")

    ours, theirs = torch.testing.assert_close, numpy.testing.assert_allclose

    def assert_close(actual, expected, *, rtol=None, atol=None, **others):
        ours(actual, expected, rtol=rtol, atol=atol, **others)
        share_of(actual, expected, rtol, atol)

    def assert_allclose(actual, desired, rtol=1e-7, atol=0, **others):
        theirs(actual, desired, rtol=rtol, atol=atol, **others)
        share_of(actual, desired, rtol, atol)

    torch.testing.assert_close, numpy.testing.assert_allclose = assert_close, assert_allclose
    number = type(pytest.approx(1.0))
    equal, rewritten = number.__eq__, rewrite.rewrite_asserts

    def is_near(self, actual):
        result = equal(self, actual)
        if result and isinstance(actual, float) and isfinite(self.expected) and self.tolerance > 0:
            note(abs(actual - self.expected) / self.tolerance, f"{actual:.3g}, {actual - self.expected:.3g} off")
        return result

    def rewrite_asserts(tree, *arguments):
        rewritten(ast.fix_missing_locations(Asserts().visit(tree)), *arguments)

    number.__eq__, rewrite.rewrite_asserts = is_near, rewrite_asserts


if LOG in os.environ:  # imported by `pytest -p bounds`
    watch()

    def pytest_runtest_setup(item):
        seen.clear()

    def pytest_runtest_logreport(report):
        if report.when == "call":
            with open(os.environ[LOG], "a") as file:
                file.write(json.dumps([report.nodeid, report.outcome, seen]) + "\n")


def run(name: str, arguments: list[str], folder: Path) -> list:
    """(test, outcome, what was noted) of each test of a run with one instruction set."""
    log = folder / f"{name}.jsonl"
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    # The cache of compiled tests is another one: the asserts are others.
    own = {LOG: str(log), "PYTHONPATH": path, "PYTHONPYCACHEPREFIX": str(folder / "compiled")}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "bounds", *arguments]
    subprocess.run(command, env={**os.environ, **own, **INSTRUCTION_SETS[name]}, cwd=TESTS.parent, check=False)
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def main(arguments: list[str]) -> None:
    """Run pytest once for each instruction set, and print the list, the nearest first."""
    if not any(argument.startswith("-m") for argument in arguments):
        arguments = ["-m", "not slow and not gpu", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        runs = {"own": run("own", arguments, Path(folder))}
        inexact = [test for test, _, noted in runs["own"] if any(share > 0 for share, _ in noted.values())]
        chosen = Path(folder) / "inexact.txt"
        chosen.write_text("\n".join(inexact))
        for name in INSTRUCTION_SETS:
            if name != "own" and inexact:
                runs[name] = run(name, [f"@{chosen}"], Path(folder))
    rows: dict[str, list] = {}
    for name, tests in runs.items():
        for test, outcome, noted in tests:
            if outcome == "failed":
                print(f"failed  {name}  {test}")
            for place, (share, values) in noted.items():
                rows.setdefault(place, []).append((share, name, values, test))
    for place, found in sorted(rows.items(), key=lambda row: -max(row[1])[0]):
        share, name, values, test = max(found)
        least = min(share for share, *_ in found)
        if share > 0:
            print(f"{share:8.2g} {least:8.2g}  {place}  {name}  {values}  {test.split('::')[-1]}")


if __name__ == "__main__":
    main(sys.argv[1:])

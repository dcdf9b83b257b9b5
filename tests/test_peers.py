"""Other people's own tests of rewards, fetched where they can be had: none of their data is kept here.

A folder with checkouts named Math-Verify and trl in the variable LOWMEM_GRPO_PEERS takes the place of a network.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem_grpo.rewards import accuracy_reward

pytestmark = pytest.mark.slow
FEWEST_THAT_AGREE = 250  # of 269; 259 do
# What Math-Verify does not pay, and is right: x in [-2, 7] for -2 <= x <= 7, with an option of its that is off.
RIGHT_ALL_THE_SAME = {(r"$x \in [-2,7]$", r"$-2 \\le x \\le 7$")}
TRL_TAG = "v1.16.0"


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """A function from a repository and its revision to a folder with its tests."""

    def fetch(name: str, revision: str) -> Path:
        if folder := os.environ.get("LOWMEM_GRPO_PEERS"):
            return Path(folder) / name / "tests"
        folder = tmp_path_factory.mktemp(name)
        address = f"https://github.com/huggingface/{name}"
        command = ["git", "clone", "-q", "--depth", "1", "--branch", revision, address, str(folder)]
        try:
            subprocess.run(
                command, check=True, timeout=120, capture_output=True, env=os.environ | {"GIT_TERMINAL_PROMPT": "0"}
            )
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"{address} cannot be fetched: {error}")
        return folder / "tests"

    return fetch


def triples(tests: Path) -> list[tuple[str, str, bool]]:
    """(gold, prediction, expected) of every parametrize of Math-Verify's tests that has the three."""
    found = []
    for path in sorted(tests.glob("test_*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (
                isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "parametrize"
            ):
                continue
            names = ast.literal_eval(call.args[0])
            names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
            expected = next((names.index(name) for name in ("expected", "result") if name in names), None)
            if names[:2] != ["gold", "pred"] or expected is None:
                continue
            rows = eval(compile(ast.Expression(call.args[1]), str(path), "eval"), {"math": __import__("math")})
            found += [(row[0], row[1], bool(row[expected])) for row in rows]
    return found


def test_math_verifys_triples_agree_and_no_wrong_answer_is_paid(peers):
    rows = triples(peers("Math-Verify", "0.8.0"))
    got = accuracy_reward([row[1] for row in rows], solution=[row[0] for row in rows])
    paid = [row[:2] for row, reward in zip(rows, got, strict=True) if reward == 1.0 and not row[2]]
    assert set(paid) <= RIGHT_ALL_THE_SAME
    assert len(rows) >= 269
    assert sum((reward == 1.0) == row[2] for row, reward in zip(rows, got, strict=True)) >= FEWEST_THAT_AGREE


def test_trls_tests_of_rewards_pass_with_another_import(peers, tmp_path):
    text = (peers("trl", TRL_TAG) / "test_rewards.py").read_text(encoding="utf-8")
    text = text.replace("from trl.rewards import", "from lowmem_grpo.rewards import")
    (tmp_path / "test_rewards.py").write_text(text.replace("from .testing_utils import", "from testing_utils import"))
    (tmp_path / "testing_utils.py").write_text(
        "class TrlTestCase: pass\ndef require_math_latex(test): return test\n"  # theirs need the whole of TRL's tests
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_rewards.py"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-3000:]

"""Pipelines that are killed in each phase, and go on: a few here, and as many as you like by pipeline_kills.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = Path(__file__).parent / "pipeline_kills.py"


@pytest.mark.parametrize(
    ("arguments", "count"),
    [(["--short"], 1), pytest.param(["--kills", "12"], 13, marks=pytest.mark.slow)],
    ids=["two phases", "all phases, and at random"],
)
def test_pipelines_that_are_killed_end_as_one_that_was_not(arguments, count):
    """The same adapters, files, metrics and evaluations, byte for byte."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(KILLS), *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{count} of {count} killed pipelines are equal" in done.stdout, done.stdout
    assert "not reached" not in done.stdout or count > 1

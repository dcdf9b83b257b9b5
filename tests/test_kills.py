"""Runs that are killed and resumed: three here, and a hundred in `make test-kill`. kills.py has the how."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kills import PACKAGE, PLACES, differences

KILLS = Path(__file__).parent / "kills.py"


def test_runs_that_are_killed_end_as_those_that_are_not():
    """In the variant that saves and removes the most."""
    command = [sys.executable, str(KILLS), "--kills", "3", "--seed", "2", "--variants", "limit"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 killed runs are equal" in done.stdout, done.stdout


def test_a_place_to_strike_is_one_that_is_there():
    for start in [start for starts in PLACES.values() for start in starts if start.endswith((".py", "/"))]:
        assert start == "optim/" or Path(PACKAGE, start).exists(), f"{start}, of neither torch nor the package"


@pytest.fixture
def pair(tmp_path):
    """Folders of two runs that differ in their times alone."""
    for name, seconds in (("whole", 1.0), ("struck", 2.0)):
        (tmp_path / name / "out/best").mkdir(parents=True)
        (tmp_path / name / "out/best/adapter.safetensors").write_bytes(bytes(range(256)))
        (tmp_path / name / "out/metrics.jsonl").write_text(f'{{"step": 1, "loss": 0.5, "step_time": {seconds}}}\n')
        (tmp_path / name / "callbacks.jsonl").write_text('[1, {"loss": "0.5"}]\n' * int(seconds))
    return tmp_path / "whole", tmp_path / "struck"


def test_runs_that_differ_in_their_times_alone_are_equal(pair):
    assert differences(*pair) == []


def test_a_bit_a_metric_a_call_and_a_file_that_differ_are_found(pair):
    whole, struck = pair
    best = struck / "out/best/adapter.safetensors"
    best.write_bytes(bytes([best.read_bytes()[0] ^ 1]) + best.read_bytes()[1:])
    (struck / "out/metrics.jsonl").write_text('{"step": 1, "loss": 0.5000001, "step_time": 1.0}\n')
    (struck / "callbacks.jsonl").write_text('[1, {"loss": "0.6"}]\n')
    (struck / "out/best.being-written").write_text("")
    (whole / "out/adapter.json").write_text("")
    assert differences(whole, struck) == [
        "out/adapter.json is missing", "out/best.being-written is left", "callbacks.jsonl is another",
        "out/best/adapter.safetensors is another", "out/metrics.jsonl is another",
    ]  # fmt: skip

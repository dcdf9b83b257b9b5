"""Runs and pipelines that are struck and go on: one of each here, and hundreds by `make test-kill`.

kills.py and pipeline_kills.py have the how.
"""

import os
import subprocess
import sys
from pathlib import Path

import pipeline_kills
import pytest
from kills import PACKAGE, PLACES, differences
from ranks import forking

FOLDER = Path(__file__).parent


def said_by(*arguments):
    """What a process of Python prints, which ends well."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_run_and_a_pipeline_that_are_struck_end_as_those_that_are_not(tmp_path):
    """A run struck four times, and a pipeline once, forked from what has imported torch, which takes 7 CPU s."""
    process = forking().Process(target=pipeline_kills.both_in_short, args=(tmp_path / "said",))
    process.start()
    process.join()
    said = (tmp_path / "said").read_text(encoding="utf-8")
    assert process.exitcode == 0, said
    assert "a run that was struck in turn is equal to an undisturbed one" in said
    assert "1 of 1 killed pipelines are equal" in said
    assert said.count(": struck") == 5 and "not reached" not in said, said


@pytest.mark.slow
def test_a_pipeline_that_is_killed_in_every_phase_ends_as_one_that_is_not():
    said = said_by("pipeline_kills.py")
    assert "1 of 1 killed pipelines are equal" in said
    assert said.count(": struck") == len(pipeline_kills.POINTS), said


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

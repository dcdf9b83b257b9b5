"""One run a folder: what a second one is told, and that nothing of an earlier one, or of a person, is lost to a new."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from test_train import ROWS, run

from lowmem_grpo.errors import InputError
from lowmem_grpo.output import lock
from lowmem_grpo.output.lock import lock_file, lock_folder, releasing_locks
from lowmem_grpo.output.results import refuse_results

HOLDER = """
import os, sys, time
from pathlib import Path
from lowmem_grpo.output.lock import lock_folder, releasing_locks
with releasing_locks():
    lock_folder(Path(sys.argv[1]))
    if os.fork() == 0:  # as a reward's pool does, whose processes outlive a run that is killed
        print(os.getpid(), flush=True)
    time.sleep(600)
"""


def go(folder, **changes):
    return run(folder, max_completion_length=2, doctor="off", **changes)


def test_a_folder_is_one_runs_alone_until_that_is_killed(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    assert other.stdout is not None
    orphan = int(other.stdout.readline())
    try:
        words = rf"{tmp_path} is in use by another run \(process {other.pid} on .*\); wait for its end, or choose"
        with releasing_locks(), pytest.raises(InputError, match=words):
            lock_folder(tmp_path)
        other.kill()
        other.wait()
        with releasing_locks():
            lock_folder(tmp_path)
            assert (tmp_path / "run.lock").read_text().startswith(f"process {os.getpid()} on ")
        assert not list(tmp_path.iterdir())
    finally:
        other.kill()
        os.kill(orphan, signal.SIGKILL)


@pytest.mark.parametrize("resume", [None, True])
def test_a_second_run_is_refused_before_it_changes_anything(tmp_path, resume):
    seen = []

    def callback(step, metrics, policy):
        files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
        with pytest.raises(InputError, match=rf"out is in use by another run \(process {os.getpid()} on "):
            go(tmp_path, resume_from_checkpoint=resume, max_steps=2)
        assert files == {path: path.read_bytes() for path in files}
        seen.append(step)

    go(tmp_path, callbacks=callback, max_steps=1)
    assert seen == [1] and not (tmp_path / "out/run.lock").exists()


def test_a_run_that_fails_lets_its_folder_go(tmp_path):
    def callback(step, metrics, policy):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError) as error:
        go(tmp_path, callbacks=callback, max_steps=1)
    go(tmp_path, resume_from_checkpoint=True, max_steps=1)
    del error  # its frames lived until here, as in a notebook


def test_a_lock_whose_file_its_holder_removes_is_taken_anew(tmp_path, monkeypatch):
    """In between the opening of the file and its lock."""
    flock, calls = lock.fcntl.flock, []

    def removed(descriptor, how):
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / "run.lock").unlink()
        flock(descriptor, how)

    monkeypatch.setattr(lock, "fcntl", SimpleNamespace(**{**vars(lock.fcntl), "flock": removed}))
    with releasing_locks():
        lock_folder(tmp_path)
        assert len(calls) == 2 and (tmp_path / "run.lock").is_file()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, None])
def test_where_no_lock_is_to_be_had_a_run_warns(tmp_path, monkeypatch, number):
    def refuses(descriptor, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock, "fcntl", number and SimpleNamespace(LOCK_EX=2, LOCK_NB=4, flock=refuses))
    with releasing_locks(), pytest.warns(UserWarning, match="cannot be locked .*; take care that no other run writes"):
        lock_folder(tmp_path)


def test_a_finished_run_without_its_checkpoints_is_not_replaced(tmp_path):
    go(tmp_path, eval_dataset=ROWS[-2:], log_completions=True, max_steps=1)
    os.rename(tmp_path / "out/checkpoint-1", tmp_path / "elsewhere")
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for resume, held in ((None, "adapter and metrics.jsonl and completions"), ("auto", "adapter")):
        with pytest.raises(InputError, match=f"out holds {held} of an earlier run, but no checkpoint of it"):
            go(tmp_path, resume_from_checkpoint=resume)
    assert files == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


BEFORE_TRAINING = json.dumps({"step": 0, "eval_reward": 0.5}) + "\n"
STEP = json.dumps({"step": 3, "loss": 0.5}) + "\n"
BEST = json.dumps({"step": 2, "metric": "eval_reward", "value": 0.5})


@pytest.mark.parametrize(
    ("files", "held", "by_auto"),
    [
        ({"metrics.jsonl": ""}, None, None),
        ({"metrics.jsonl": BEFORE_TRAINING, "best/best.json": BEST.replace("2", "0")}, None, None),
        ({"metrics.jsonl": BEFORE_TRAINING + '{"step": 1, "lo', "data_preview.txt": "x"}, None, None),
        ({"metrics.jsonl": BEFORE_TRAINING + STEP}, "metrics.jsonl", None),
        ({"metrics.jsonl": BEFORE_TRAINING + STEP.rstrip()}, "metrics.jsonl", None),
        ({"best/best.json": BEST}, "best", None),
        ({"completions/completions_00003.parquet": ""}, "completions", None),
        ({"completions/mine.txt": ""}, None, None),
        ({"adapter/adapter_config.json": "{}"}, "adapter", "adapter"),
        ({"adapter/mine.txt": ""}, "adapter", "adapter"),
        ({"adapter": "a file"}, "adapter", "adapter"),
        ({"best/mine.txt": ""}, "best", "best"),
        ({"best/best.json": "[]"}, "best", "best"),
        ({"metrics.jsonl/mine.txt": ""}, "metrics.jsonl", "metrics.jsonl"),
        ({"metrics.jsonl": "of mine\n"}, "metrics.jsonl", "metrics.jsonl"),
    ],
)
def test_what_stands_in_a_folder_is_begun_anew_or_refused(tmp_path, files, held, by_auto):
    write(tmp_path, files)
    for begin_anew, refused in ((False, held), (True, by_auto)):
        refusal = pytest.raises(InputError, match=f"holds {refused} of an earlier run") if refused else None
        with refusal or contextlib.nullcontext():
            refuse_results(tmp_path, None, begin_anew=begin_anew)


@pytest.mark.parametrize(
    ("files", "is_refused"),
    [
        ({"adapter/adapter_config.json": "{}"}, False),
        ({"adapter/mine.txt": ""}, True),
        ({"adapter": ""}, True),
        ({}, False),
    ],
)
def test_a_resumed_run_replaces_no_folder_of_a_persons(tmp_path, files, is_refused):
    write(tmp_path, files)
    refusal = pytest.raises(InputError, match="holds adapter that no run wrote, and would lose it")
    with refusal if is_refused else contextlib.nullcontext():
        refuse_results(tmp_path, tmp_path / "checkpoint-1", begin_anew=False)


def test_a_file_is_locked_by_whatever_link_it_is_named(tmp_path):
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    with releasing_locks():
        lock_file(tmp_path / "a.jsonl")
        with releasing_locks(), pytest.raises(InputError, match="in use by another run"):
            lock_file(tmp_path / "b.jsonl")

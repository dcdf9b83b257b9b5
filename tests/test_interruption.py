"""Signals at any moment of a run: what was done is saved, and the resumed run is the one that was never stopped."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import comparable
from test_train import ROWS, run
from tiny_models import DEMO_MODEL

from lowmem_grpo.errors import LostRankError
from lowmem_grpo.output.folder import read_state
from lowmem_grpo.run.checkpoint import save_checkpoint
from lowmem_grpo.run.evaluations import Evaluations
from lowmem_grpo.run.interruption import Interruption
from lowmem_grpo.run.log import MetricsLog
from lowmem_grpo.run.rest import Rest
from lowmem_grpo.update.optimizer import Learner

pytestmark = pytest.mark.usefixtures("known_trials")

STRUCK = 2  # the step whose evaluation, table and callbacks an interruption strikes
SETTINGS = dict(
    max_steps=4, eval_steps=2, log_completions=True, load_best_model_at_end=True, save_steps=100, learning_rate=2e-2,
    max_completion_length=6, seed=0,
)  # fmt: skip


def reward(completions, **kwargs):
    return [sum(map(ord, completion[0]["content"])) % 11 / 11 for completion in completions]


class Caller:
    """A callback that notes what it was called with, once it is through; another one, struck while it runs."""

    def __init__(self):
        self.calls, self.strike = [], lambda: None

    def first(self, step, metrics, policy):
        torch.rand(step)
        self.calls.append(("first", step, repr(comparable([metrics]))))

    def second(self, step, metrics, policy):
        if step == STRUCK:
            self.strike()
        self.calls.append(("second", step, repr(comparable([metrics]))))


def go(folder, caller, **changes):
    settings = {**SETTINGS, "rewards": reward, "eval_dataset": ROWS[-3:], **changes}
    return run(folder, callbacks=[caller.first, caller.second], **settings)


def results(folder):
    """Every tensor in the adapter, the best one and the last checkpoint, and every table of completions."""
    out = folder / "out"
    files = [out / name for name in ("adapter", "best", "checkpoint-4")]
    tensors = {path.relative_to(out): load_file(path) for file in files for path in file.glob("*.safetensors")}
    return tensors, {path.name: pq.read_table(path).to_pylist() for path in out.glob("completions/*.parquet")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder, caller = tmp_path_factory.mktemp("undisturbed"), Caller()
    result = go(folder, caller)
    assert json.loads((folder / "out/best/best.json").read_text())["step"] == STRUCK, "it is what is trained at the end"
    return folder, result, caller.calls


def in_step(number, function, of_step):
    """The function, before which a signal strikes once: where of_step(its arguments) is the step."""
    strikes = [number]

    def struck(*args, **kwargs):
        if strikes and of_step(*args, **kwargs):
            signal.raise_signal(strikes.pop())
        return function(*args, **kwargs)

    return struck


POINTS = {
    "weights changed": (Learner, "release", lambda learner: learner.scheduler.last_epoch == STRUCK - 1),
    "log written": (MetricsLog, "write", lambda log, line: line["step"] == STRUCK and "loss" in line),
    "table written": ("lowmem_grpo.run.run", "write_completions", lambda folder, step, table: step == STRUCK),
    "evaluation": (Evaluations, "at", lambda evaluations, step, shown: step == STRUCK),
    "evaluation logged": (MetricsLog, "write", lambda log, line: line["step"] == STRUCK and "eval_reward" in line),
    "callback": (Caller, "strike", None),
}


@pytest.mark.parametrize(
    ("point", "number"),
    [
        ("evaluation", signal.SIGHUP),
        ("callback", signal.SIGINT),
        *(
            pytest.param(point, signal.SIGTERM, marks=pytest.mark.slow)
            for point in POINTS
            if point not in ("evaluation", "callback")
        ),
    ],
)
def test_a_step_that_a_signal_cuts_off_is_completed_by_the_resumed_run(tmp_path, undisturbed, point, number):
    where, name, of_step = POINTS[point]
    caller = Caller()
    with pytest.MonkeyPatch.context() as patched, pytest.raises((KeyboardInterrupt, SystemExit)):
        if point == "callback":
            caller.strike = lambda: signal.raise_signal(number)
        else:
            where = sys.modules[where] if isinstance(where, str) else where
            patched.setattr(where, name, in_step(number, getattr(where, name), of_step))
        go(tmp_path, caller)
    assert read_state(tmp_path / f"out/checkpoint-{STRUCK}")["step"] == STRUCK
    caller.strike = lambda: None
    resumed = go(tmp_path, caller, resume_from_checkpoint=True)
    folder, whole, calls = undisturbed
    assert comparable(resumed.history) == comparable(whole.history)
    assert comparable(resumed.eval_history) == comparable(whole.eval_history)
    assert caller.calls == calls
    (ours, tables), (theirs, their_tables) = results(tmp_path), results(folder)
    assert tables == their_tables and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[file][key], value) for file, of in theirs.items() for key, value in of.items())


def test_a_last_checkpoint_that_is_saved_late_has_the_last_adapter_and_not_the_best(tmp_path, monkeypatch, undisturbed):
    """Its disk refuses once, and then takes it."""
    refusals = [OSError(errno.ENOSPC, "full")]

    def save(*args):
        if refusals:
            raise refusals.pop()
        save_checkpoint(*args)

    monkeypatch.setattr("lowmem_grpo.run.run.save_checkpoint", save)
    go(tmp_path, Caller())
    (ours, _), (theirs, _) = results(tmp_path), results(undisturbed[0])
    assert not refusals and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[file][key], value) for file, of in theirs.items() for key, value in of.items())


@pytest.mark.parametrize("state", [{"metrics": {"loss": "x"}, "num_called": 0}, {"metrics": {}, "num_called": -1}])
def test_a_rest_that_no_run_wrote_is_refused(state):
    with pytest.raises(ValueError, match=r"loss is 'x', which is no number|num_called is -1"):
        Rest().load(state)


def test_a_signal_waits_while_it_is_held(capfd):
    finished, handler = [], signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interruption() as interruption:
        interruption.hold()
        signal.raise_signal(signal.SIGINT)
        finished.append(True)
        interruption.release()
        finished.append("not reached")
    assert finished == [True] and "the run ends as soon as what is done is saved" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_of_many_signals_one_is_raised(number, capfd):
    with pytest.raises(SystemExit) as caught, Interruption() as interruption:
        with pytest.raises(SystemExit):
            signal.raise_signal(number)
        for _ in range(5):
            signal.raise_signal(number)
        assert capfd.readouterr().err.split("\n").count("the run ends as soon as what is done is saved") == 5
        interruption.check()
    assert caught.value.code == 128 + number


def test_the_third_ctrl_c_ends_the_run_at_once(capfd):
    with pytest.raises(KeyboardInterrupt), Interruption() as interruption:
        interruption.hold()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert "a third Ctrl-C ends it at once, unsaved" in capfd.readouterr().err
        signal.raise_signal(signal.SIGINT)


def test_sighup_stays_ignored_where_it_was():
    """As nohup leaves it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_further_signals_while_a_run_is_saved_do_not_end_it(tmp_path, monkeypatch, capfd):
    def save(*args):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGINT):
            signal.raise_signal(number)
        save_checkpoint(*args)

    def callback(step, metrics, policy):
        monkeypatch.setattr("lowmem_grpo.run.run.save_checkpoint", save)
        signal.raise_signal(signal.SIGHUP)

    with pytest.raises(SystemExit) as caught:
        run(tmp_path, callbacks=callback, max_completion_length=2)
    assert caught.value.code == 129
    assert read_state(tmp_path / "out/checkpoint-1")["step"] == 1 and not list((tmp_path / "out").glob("*.tmp"))
    said = capfd.readouterr().err
    assert said.count("the run ends as soon as what is done is saved") == 4 and "stopped; " in said


@pytest.mark.parametrize(("kind", "raised"), [(RuntimeError, SystemExit), (LostRankError, LostRankError)])
def test_a_signal_while_an_error_is_saved_is_raised_afterwards(tmp_path, monkeypatch, kind, raised):
    """But for one that torchrun sends since another process has ended, which is what is said."""

    def save(*args):
        signal.raise_signal(signal.SIGTERM)
        save_checkpoint(*args)

    def callback(step, metrics, policy):
        monkeypatch.setattr("lowmem_grpo.run.run.save_checkpoint", save)
        raise kind("the callback is broken")

    with pytest.raises(raised) as caught:
        run(tmp_path, callbacks=callback, max_completion_length=2)
    errors = caught.value, caught.value.__context__  # whose own may be of a reward that another test has cut off
    assert any("callback is broken" in str(error) for error in errors)
    assert getattr(caught.value, "code", 143) == 143 and (tmp_path / "out/checkpoint-1").is_dir()


def swallows(step, awaited):
    """A reward that swallows what a signal raises in it after some steps, of which made-up completions follow 0."""

    def swallow():
        try:
            signal.raise_signal(signal.SIGTERM)
        except:  # noqa: E722 # as many verifiers have it
            return

    def at_once(completions, trainer_state, **kwargs):
        if trainer_state.global_step == step:
            swallow()
        return [float(place) for place in range(len(completions))]

    async def later(**kwargs):
        return at_once(**kwargs)

    return later if awaited else at_once


@pytest.mark.parametrize(("step", "awaited"), [(0, False), (1, True)])
def test_a_signal_that_a_reward_swallows_ends_the_run(tmp_path, capsys, step, awaited):
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, rewards=swallows(step, awaited), max_completion_length=2, max_steps=4)
    assert caught.value.code == 143
    said = capsys.readouterr().err
    if step:
        assert read_state(tmp_path / "out/checkpoint-1")["step"] == 1 and "has everything up to step 1" in said
    else:
        assert "stopped outside of any step; nothing is lost" in said and not list(tmp_path.glob("out/checkpoint-*"))


def test_a_signal_that_an_evaluation_swallows_leaves_no_result_of_it(tmp_path):
    def reward(completions, held_out, **kwargs):
        if held_out[0] and "<think>trial</think>" not in str(completions):
            try:
                signal.raise_signal(signal.SIGINT)
            except:  # noqa: E722
                return [9.0] * len(completions)
        return [1.0] * len(completions)

    rows = [{**row, "held_out": False} for row in ROWS]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, rewards=reward, rows=rows, eval_dataset=[{**row, "held_out": True} for row in ROWS[:2]])
    assert "eval_reward" not in (tmp_path / "out/metrics.jsonl").read_text()


@pytest.mark.parametrize("what", ["loading", "evaluation"])
def test_a_signal_before_the_first_step_says_that_nothing_is_lost(tmp_path, monkeypatch, capsys, what):
    def strike(*args, **kwargs):
        signal.raise_signal(signal.SIGHUP)

    loaded = ("lowmem_grpo.inputs.training", "load_policy"), ("lowmem_grpo.run.evaluations", "measure")
    monkeypatch.setattr(".".join(loaded[what == "evaluation"]), strike)
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, eval_dataset=ROWS[:2])
    assert caught.value.code == 129
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stopped")]
    where = "before the end of the first step; there is nothing to save"
    assert said == [f"stopped {where}" if what == "evaluation" else "stopped outside of any step; nothing is lost"]


SCRIPT = """
    import sys, time
    from lowmem_grpo import GRPOConfig, train
    from lowmem_grpo.demo import task

    def slow_reward(completions, trainer_state, **kwargs):
        if trainer_state.global_step == 2:
            print("third step", flush=True)
            time.sleep(600)
        return [float(len(c[0]["content"])) for c in completions]

    def run(folder):
        config = GRPOConfig(output_dir=folder, use_cpu=True, max_steps=9, prompts_per_step=2, num_generations=2,
                            max_completion_length=8, gradient_checkpointing=False)
        train(sys.argv[1], slow_reward, task.rows(task.splits()[0][:20]), config=config)

    try:
        run(sys.argv[2] + "/terminated")
    except SystemExit as error:
        print(error.code, flush=True)
    run(sys.argv[2] + "/interrupted")
"""


def ended_at_its_third_step(folder, number) -> Any:
    """Let a run get a signal from outside while a reward of its third step sleeps; returns what it then raised."""

    def slow_reward(completions, trainer_state, **kwargs):
        if trainer_state.global_step == 2:
            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
            time.sleep(600)
        return reward(completions)

    with pytest.raises((SystemExit, KeyboardInterrupt)) as caught:
        run(folder, rewards=slow_reward, max_steps=9, max_completion_length=2)
    return caught.value


def test_a_run_that_gets_a_signal_in_a_long_reward_saves_first(tmp_path, capfd):
    """SIGTERM ends one with the status of a terminated program, and Ctrl-C another as Python itself would."""
    assert ended_at_its_third_step(tmp_path / "terminated", signal.SIGTERM).code == 143
    assert type(ended_at_its_third_step(tmp_path / "interrupted", signal.SIGINT)) is KeyboardInterrupt
    errors = capfd.readouterr().err
    for name in ("terminated", "interrupted"):
        assert f"{name}/out/checkpoint-2 has everything up to step 2" in errors
        state = read_state(tmp_path / name / "out/checkpoint-2")
        assert (state["step"], state["parts"]["stream"]["position"]) == (2, 4)


# A Ctrl-C ends a script with -SIGINT, or with 1 where the package tabulate is installed: torch imports it at the exit,
# which evaluates a text, and so Python forgets that the interrupt was not handled.
@pytest.mark.slow
def test_an_interrupted_run_saves_first(tmp_path):
    """One process, two runs: SIGTERM ends the first, with the status of a terminated program, and Ctrl-C the second."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(script), str(DEMO_MODEL), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for number, said in ((signal.SIGTERM, "143\n"), (signal.SIGINT, "")):
        assert process.stdout.readline() == "third step\n"
        process.send_signal(number)
        assert process.stdout.readline() == said
    _, errors = process.communicate()
    assert process.returncode in {-signal.SIGINT, 1}, errors
    for name in ("terminated", "interrupted"):
        assert f"{name}/checkpoint-2 has everything up to step 2" in errors
        state = read_state(tmp_path / name / "checkpoint-2")
        assert (state["step"], state["parts"]["stream"]["position"]) == (2, 4)

"""Trackers are given a run's numbers, cost it nothing, and go on with it. TensorBoard's files and trackio's are real."""

import contextlib
import io
import json
import os
import random
import re
import sqlite3
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from hub_server import Hub
from huggingface_hub import constants
from tiny_models import DEMO_MODEL
from transformers import AutoTokenizer

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.sft import SFTConfig
from lowmem_grpo.demo import task
from lowmem_grpo.errors import InputError
from lowmem_grpo.exporting.export import export
from lowmem_grpo.loops.grpo import train
from lowmem_grpo.loops.sft import sft
from lowmem_grpo.output import trackers
from lowmem_grpo.output.saved import read_lines
from lowmem_grpo.output.trackers import KINDS, Place, Trackers, as_tracked, tracker_names

ROWS = task.rows(task.splits()[0][:10])


class Own(GeneralTracker):
    """A tracker of a user's own, which keeps what it is given."""

    name = "own"
    requires_logging_directory = False
    made: ClassVar[list["Own"]] = []

    def __init__(self, run_name, **_):
        super().__init__()
        self.project, self.given, self.settings, self.is_finished = run_name, [], {}, False
        Own.made.append(self)

    @property
    def tracker(self):
        return self

    def start(self):  # draws from everything that a run draws from
        assert all((torch.rand(1) < 1, random.random() < 1, np.random.rand() < 1))
        assert threading.current_thread() is not threading.main_thread()

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None, **_):
        self.given.append((step, values))

    def finish(self):
        self.is_finished = True


class Broken(Own):
    """A tracker of which every call raises that its class says."""

    where = ("log", "finish")

    def start(self):
        if "start" in self.where:
            raise SystemExit(1)

    def log(self, values, step=None, **_):
        if "log" in self.where:
            raise ConnectionError("no net\x1b[31m")

    def finish(self):
        if "finish" in self.where:
            raise BaseException("no end")  # as pyo3's panics are


@pytest.fixture(autouse=True)
def own(monkeypatch):
    for name, kind in (("own", Own), ("broken", Broken)):
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, kind)
    monkeypatch.setattr(Own, "made", [])


def run(folder, *callbacks, **changes):
    """History, standard error and a draw after each step of a run of 4 steps, with a checkpoint after the second."""
    config = GRPOConfig(
        output_dir=str(folder), use_cpu=True, max_steps=4, prompts_per_step=1, num_generations=2, save_steps=2,
        max_completion_length=4, gradient_checkpointing=False, eval_steps=2, **changes,
    )  # fmt: skip
    tokenizer, said, draws = AutoTokenizer.from_pretrained(DEMO_MODEL), io.StringIO(), []

    def draw(*_):
        draws.append((torch.rand(1).item(), random.random(), np.random.rand()))

    with contextlib.redirect_stderr(said):
        result = train(
            str(DEMO_MODEL),
            task.answer_reward,
            ROWS,
            ROWS[:3],
            config,
            tokenizer=tokenizer,
            callbacks=[draw, *callbacks],
        )
    return result.history, said.getvalue(), draws


def stop(step, metrics, policy):
    if step == 3:
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A run with trackers that was stopped in its third step and resumed from its second, and one without any."""
    folder, lines = tmp_path_factory.mktemp("runs"), {}
    with pytest.MonkeyPatch.context() as patch, Hub() as hub:
        for name, kind in (("own", Own), ("broken", Broken)):
            patch.setitem(LOGGER_TYPE_TO_CLASS, name, kind)
        patch.setattr(constants, "ENDPOINT", hub.address)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setenv("HF_TOKEN", "hf_of_a_test")
        names = ["tensorboard", "own", "broken"]
        with pytest.raises(KeyboardInterrupt):
            run(folder / "out", stop, report_to=names, project="sums")
        first = Own.made[0]
        lines["stopped"] = read_lines(folder / "out/metrics.jsonl")[0]
        (folder / "out/checkpoint-3").rename(folder / "checkpoint-3")
        given = ["--model", "/tmp", "--dataset=//srv-of-al/rows.jsonl", "--system_prompt", "</think> /no_think"]
        patch.setattr(sys, "argv", ["lowmem-grpo", "train", *given])
        name = r"\\srv-of-al\share\x, 'file://srv-of-al/my rows', ~srv-of-al/x or file=/tmp"
        history, said, draws = run(
            folder / "out", report_to=names, resume_from_checkpoint=True, push_to_hub=True, run_name=name
        )
        export(str(folder / "out/adapter"), str(folder / "merged"), num_texts=0, push="me/merged", use_cpu=True)
        hub.refusals = [403] * 9
        plain = run(folder / "plain", push_to_hub=True, hub_model_id="me/sums")
    made = [one for one in Own.made if type(one) is Own]
    Own.made = []
    return SimpleNamespace(
        folder=folder,
        history=history,
        said=said,
        draws=draws,
        plain=plain,
        first=first,
        second=made[-1],
        lines=lines,
        hub=hub,
    )


def of_what_is_computed(history):
    return [
        {name: value for name, value in line.items() if not name.startswith(("time/", "memory/", "tokens_per_s/", "step_time"))}
        for line in history
    ]  # fmt: skip


def test_a_run_computes_the_same_with_trackers_as_without(found):
    assert of_what_is_computed(found.history) == of_what_is_computed(found.plain[0])
    assert found.draws == found.plain[2][2:]


def test_tensorboard_has_each_step_of_a_resumed_run_once_as_the_log_has_it(found):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(found.folder / "out/runs"))
    events.Reload()
    lines = read_lines(found.folder / "out/metrics.jsonl")[0]
    for tag, name in (("train/step_time", "step_time"), ("train/loss", "loss"), ("eval/reward", "eval_reward")):
        logged = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        assert [(one.step, one.value) for one in events.Scalars(tag)] == [(n, pytest.approx(v)) for n, v in logged]
    assert len(events.Scalars("train/loss")) == 4 and len(events.Scalars("eval/reward")) == 3
    assert any(tag.startswith("doctor/") for tag in events.Tags()["tensors"])
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_a_tracker_of_ones_own_gets_the_settings_and_every_line_of_the_log_once(found):
    assert found.first.project == "sums" and found.first.settings["learning_rate"] == 1e-5
    assert found.first.settings["model"] == str(DEMO_MODEL) and found.first.settings["kind"] == "grpo"
    assert all(type(value) in (str, int, float, bool) for value in found.first.settings.values())
    for tracker, lines in (
        (found.first, found.lines["stopped"]),
        (found.second, [one for one in read_lines(found.folder / "out/metrics.jsonl")[0] if one["step"] > 2]),
    ):
        again = {3} if tracker is found.second else set()  # which the first process has sent
        sent = [(one["step"], as_tracked(one, texts=False)) for one in lines if "doctor" not in one]
        assert tracker.given == [one for one in sent if one[0] not in again] and tracker.is_finished


def test_a_tracker_that_fails_is_told_once_and_without_its_escapes(found):
    told = [line for line in found.said.splitlines() if "broken" in line]
    assert told == ["broken has failed (no net\\x1b[31m); the run goes on, and metrics.jsonl has everything"]


def test_the_adapter_is_uploaded_after_training(found):
    adapter = found.folder / "out/adapter"
    there = {path.name: path.read_bytes() for path in adapter.iterdir()}
    uploaded = dict(found.hub.files["me/out@main"])
    assert b"<h1>" in uploaded.pop("report.html")
    of_base = json.loads(uploaded["adapter_config.json"]).pop("base_model_name_or_path")
    assert of_base == "./model" and json.loads(there["adapter_config.json"])["base_model_name_or_path"] != of_base
    del uploaded["adapter_config.json"], there["adapter_config.json"]
    assert uploaded == there and f"{adapter} is uploaded to {found.hub.address}/me/out" in found.said


def test_nothing_that_is_uploaded_names_a_place_of_this_machine(found):
    """Of an adapter and of the model that it was merged into: card, page, configurations and tensors' headers."""
    places = {str(path).encode() for path in (found.folder, DEMO_MODEL.parent, Path.cwd(), Path.home(), "srv-of-al")}
    report = found.folder / "out/report.html"
    assert str(DEMO_MODEL).encode() in report.read_bytes(), "which stays here, and can be done again by its names"
    for repository in ("me/out@main", "me/merged@main"):
        files = found.hub.files[repository]
        assert {"README.md", "tokenizer_config.json"} <= files.keys()
        named = {(name, place) for name, content in files.items() for place in places if place in content}
        assert not named and not re.search(rb"(?<![.\w])/tmp\b", files["README.md"] + files.get("report.html", b""))
    assert b"--system_prompt '</think> /no_think'" in found.hub.files["me/out@main"]["README.md"]


def test_what_the_hub_refuses_is_told_after_a_run_that_has_ended_well(found):
    adapter = found.folder / "plain/adapter"
    assert f"{adapter} was not uploaded to me/sums (the token may not write there" in found.plain[1]
    assert f"`hf upload me/sums {adapter}` does it" in found.plain[1] and len(found.plain[0]) == 4


def place(folder, step=0, **changes):
    return Place(**{"folder": folder, "project": "sums", "run_name": "a/b", "id": None, "first_step": step, **changes})


def lines(first, last, offset=0.0):
    return [{"step": step, "loss": step + offset, "reward": float("nan")} for step in range(first, last + 1)]


def reported(names, folder, given, **of):
    """The trackers after some lines, ended, and what was told of them."""
    of = {"is_resumed": False, **of}
    them = Trackers(names, of.pop("place", place(folder)), **of)
    them.start({"beta": 0.1, "stop_strings": ["a"], "top_k": None})
    told = them.news()
    for line in given:
        them.log(line)
    them.finish()
    return told + them.news()


def test_trackio_has_each_step_of_a_resumed_run_once_under_one_id(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # it is read at the first import
    pytest.importorskip("trackio")
    from trackio.utils import TRACKIO_DIR

    project = f"sums-{os.getpid()}-{time.monotonic_ns()}"
    there = place(tmp_path, project=project)
    found = {"step": 3, "doctor": "all_truncated", "text": "all were cut off"}
    assert reported(["trackio"], tmp_path, [{"step": 0, "eval_reward": 0.5}, *lines(1, 4), found], place=there) == []
    again = [*lines(3, 6, 0.5), {"step": 4, "eval_reward": 0.6}]
    assert (
        reported(["trackio"], tmp_path, again, place=replace(there, first_step=2), is_resumed=True, known=lines(3, 4))
        == []
    )
    (path,) = [one for one in TRACKIO_DIR.glob("*.db") if project in one.name]
    with contextlib.closing(sqlite3.connect(path)) as base:
        rows = base.execute("SELECT run_name, run_id, step, metrics FROM metrics ORDER BY step, id").fetchall()
        (config,) = base.execute("SELECT config FROM configs").fetchone()
    by_name = {}
    for _, _, step, metrics in rows:
        for name, value in json.loads(metrics).items():
            by_name.setdefault(name, []).append((step, value))
    assert by_name == {
        "eval/reward": [(0, 0.5), (4, 0.6)], "doctor/all_truncated": [(3, "all were cut off")],
        "train/loss": [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.5), (6, 6.5)],
    }  # fmt: skip
    assert {row[0] for row in rows} == {"a/b"} and len({row[1] for row in rows}) == 1
    assert json.loads(config)["beta"] == 0.1 and json.loads(config)["stop_strings"] == '["a"]'


@pytest.mark.parametrize(("where", "why"), [("start", "1"), ("log", "no net"), ("finish", "no end")])
def test_a_failure_at_the_start_in_a_step_or_at_the_end_is_one_sentence(where, why, tmp_path, monkeypatch):
    monkeypatch.setattr(Broken, "where", (where,))
    (told,) = reported(["broken", "own"], tmp_path, lines(1, 3))
    assert told.startswith(f"broken has failed ({why}")
    assert len(Own.made[1].given) == 3 and Own.made[1].is_finished


@pytest.mark.parametrize(
    ("where", "word"), [("start", "started"), ("log", "taken everything"), ("finish", "taken everything")]
)
def test_a_tracker_that_never_returns_holds_up_nothing(where, word, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "START_S", 0.05)
    never = threading.Event()
    monkeypatch.setattr(Own, where, lambda *_, **__: never.wait())
    started = time.monotonic()
    told = reported(["own"], tmp_path, lines(1, 3))
    never.set()
    assert told == [f"own has not {word} within 0.05 s; the run goes on, and metrics.jsonl has everything"]
    assert (tmp_path / trackers.FILE).exists() == (where != "start")
    assert time.monotonic() - started < 2


def test_a_tracker_that_would_ask_for_a_key_is_told_that_nobody_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Own, "start", lambda self: print("Your key?", input(), sys.stdin.isatty()))
    (told,) = reported(["own"], tmp_path, [])
    assert "own has failed (" in told and "EOF" in told and capsys.readouterr().out == ""


def test_a_damaged_file_of_ids_begins_new_runs_and_a_full_disk_is_said(tmp_path, monkeypatch):
    for content in ("{", "[]", '{"own": 3}'):
        (tmp_path / trackers.FILE).write_text(content, encoding="utf-8")
        assert reported(["own"], tmp_path, lines(3, 4), is_resumed=True, known=lines(3, 3)) == []
        assert [step for step, _ in Own.made[-1].given] == [3, 4]
    assert json.loads((tmp_path / trackers.FILE).read_text(encoding="utf-8")) == {"own": "-"}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trackers, "write_file", full)
    (told,) = reported(["own"], tmp_path, [])
    assert "trackers.json cannot be written (No space left on device)" in told


def test_no_tracker_begins_a_process_group_or_asks_what_accelerate_knows_of_others(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(PartialState, "_shared_state", {})
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 0,
    }.items():
        monkeypatch.setenv(name, str(value))  # as by torchrun, of one process
    with caplog.at_level("DEBUG", "accelerate.tracking"):
        assert reported(["tensorboard", "own"], tmp_path, lines(1, 3)) == []
    assert "TensorBoard writer closed" in caplog.messages
    assert not torch.distributed.is_initialized() and PartialState._shared_state == {}


def test_names_of_metrics_are_those_that_transformers_gives_to_trackers():
    line = {
        "step": 3,
        "loss": 0.5,
        "rewards/f(x='@')/mean": 1,
        "eval_pass@1": 0.25,
        "kl": float("nan"),
        "entropy": None,
    }
    assert as_tracked(line, texts=True) == {"train/loss": 0.5, "train/rewards/f(x='@')/mean": 1, "eval/pass@1": 0.25}
    doctor = {"step": 3, "doctor": "slow", "text": "it is"}
    assert as_tracked(doctor, texts=True) == {"doctor/slow": "it is"} and as_tracked(doctor, texts=False) == {}


def test_a_tracker_of_plain_names_gets_no_others(tmp_path, monkeypatch):
    monkeypatch.setitem(
        KINDS, "own", replace(KINDS["mlflow"], arguments=lambda at: {"run_name": at.project}, id_of=str)
    )
    reported(["own"], tmp_path, [{"step": 1, "eval_pass@1": 0.5, "rewards/f(a='1')/mean": 1}])
    assert Own.made[0].given == [(1, {"eval/pass_1": 0.5, "train/rewards/f_a__1__/mean": 1})]


def test_unknown_and_missing_trackers_are_refused_with_the_remedy(monkeypatch):
    with pytest.raises(
        InputError, match=r"report_to='tensorbord' is no tracker of accelerate's; did you mean tensorboard\?"
    ):
        tracker_names(["tensorbord"])
    monkeypatch.setitem(KINDS, "wandb", replace(KINDS["wandb"], module="not_there"))
    with pytest.raises(InputError, match=r"report_to='wandb' needs not_there, which is not installed; `pip install"):
        tracker_names(["own", "wandb"])
    assert set(tracker_names(["all", "own"])) >= {"own"} and tracker_names([]) == []


def test_each_training_refuses_a_missing_tracker_or_token_before_it_reads_anything(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="is no tracker of accelerate's"):
        sft("no/model", [], config=SFTConfig(output_dir=str(tmp_path / "a"), report_to="azure_ml"))
    assert not (tmp_path / "a").exists()
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match="run `hf auth login`"):
        train("no/model", "accuracy_reward", [], config=GRPOConfig(output_dir=str(tmp_path / "a"), push_to_hub=True))
    assert not (tmp_path / "a").exists()


def test_every_tracker_of_accelerates_has_a_row():
    assert set(KINDS) == set(LOGGER_TYPE_TO_CLASS) - {"own", "broken"}

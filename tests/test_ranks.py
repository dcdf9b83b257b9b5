"""Trainings of several processes: they do what one does, one of them writes, and the end of one is the end of all."""

import json
import logging
import math
from functools import partial

import pytest
import rank_runs
from rank_runs import each_of
from safetensors.torch import load_file

from lowmem_grpo import cli, distributed, run_pipeline, sample
from lowmem_grpo.cli.output import PrintableFormatter
from lowmem_grpo.errors import InputError

UNLIKE = ("time/", "memory/", "tokens_per_s/", "step_time", "rollout/")  # metrics of the machine


def adapter(folder):
    return load_file(folder / "adapter/adapter_model.safetensors")


def assert_alike(folder, other, *, rel):
    """Both folders hold one adapter and one log."""
    weights, others = adapter(folder), adapter(other)
    assert weights.keys() == others.keys()
    for name, values in weights.items():
        apart = (values - others[name]).norm() / others[name].norm().clamp(min=1e-12)
        assert apart <= rel, name
    logs = [(path / "metrics.jsonl").read_text().splitlines() for path in (folder, other)]
    for line, known in zip(*(map(json.loads, log) for log in logs), strict=True):
        for name in line.keys() | known.keys():
            if not name.startswith(UNLIKE) and line[name] != known[name]:
                assert math.isclose(line[name], known[name], rel_tol=max(rel, 1e-12) * 10, abs_tol=1e-6), name


@pytest.mark.parametrize(
    "learn", [pytest.param(rank_runs.learn_examples, marks=pytest.mark.slow), rank_runs.learn_pairs]
)
def test_two_processes_learn_what_one_does(tmp_path, learn):
    """In fp32, to its rounding; shares are uneven."""
    learn = partial(learn, eval_steps=2, max_steps=2, save_steps=2)
    ((_, alone),) = each_of(1, learn, str(tmp_path / "one"))
    together = each_of(2, learn, str(tmp_path / "two"))
    assert alone["error"] is None and [(status, found["error"]) for status, found in together] == [(0, None)] * 2
    assert_alike(tmp_path / "two", tmp_path / "one", rel=1e-5)
    (_, first), (_, second) = together
    assert first["found"] == second["found"]  # to the last bit, times included
    assert "step 2/2" in first["said"] and not second["said"]


def stopped(folder, **settings):
    """Have rank 1 of a run of two stopped after its second step."""
    learn = partial(rank_runs.sample_and_learn, **settings)
    (_, first), (_, second) = each_of(2, learn, str(folder), rank_runs.stop_rank_1)
    assert first["error"] == second["error"] == "SystemExit: 143"
    assert "checkpoint-2 has everything up to step 2" in first["said"] and not second["said"]


def test_a_stop_of_one_is_a_stop_of_all_with_one_checkpoint(tmp_path):
    stopped(tmp_path, save_steps=100)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "run.lock").exists()


@pytest.mark.slow
def test_what_a_callback_of_one_ends_is_over_for_all(tmp_path):
    found = each_of(2, rank_runs.learn_examples, str(tmp_path), rank_runs.enough_for_rank_1)
    assert [of["error"] for _, of in found] == [None, None]
    assert [len(of["found"]["history"]) for _, of in found] == [1, 1]
    assert (tmp_path / "adapter").is_dir()


@pytest.mark.slow
def test_a_stopped_run_is_resumed_bit_for_bit_by_as_many_processes(tmp_path):
    """With lora_dropout, whose masks are each rank's own."""
    (_, first), (_, second) = each_of(2, rank_runs.sample_and_learn, str(tmp_path / "whole"))
    assert first["error"] is None and str(first["found"]) == str(second["found"])
    stopped(tmp_path / "struck")
    again = partial(rank_runs.sample_and_learn, resume_from_checkpoint=True)
    assert [found["error"] for _, found in each_of(2, again, str(tmp_path / "struck"))] == [None, None]
    assert_alike(tmp_path / "struck", tmp_path / "whole", rel=0)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, size):
    """Without lora_dropout, whose masks follow the ranks, that is the run of two to the rounding of fp32."""
    learn = partial(rank_runs.sample_and_learn, lora_dropout=0.0)
    each_of(2, learn, str(tmp_path / "two"))
    stopped(tmp_path / "struck", lora_dropout=0.0)
    again = partial(learn, resume_from_checkpoint=True)
    assert [found["error"] for _, found in each_of(size, again, str(tmp_path / "struck"))] == [None] * size
    assert_alike(tmp_path / "struck", tmp_path / "two", rel=1e-4)


def test_a_killed_rank_ends_the_other_which_saves_what_is_whole(tmp_path):
    learn = partial(rank_runs.learn_examples, save_steps=100)
    (_, first), (status, _) = each_of(2, learn, str(tmp_path), rank_runs.kill_rank_1)
    assert status == -9 and first["error"].startswith("LostRankError: rank 1 (process")
    assert "checkpoint-2 has everything up to step 2" in first["said"] and (tmp_path / "checkpoint-2").is_dir()
    assert json.loads((tmp_path / "run.json").read_text())["ended"]["why"].startswith("rank 1 (process")


@pytest.mark.slow
@pytest.mark.parametrize("save_steps", [1, 100])
def test_where_rank_0_is_killed_another_says_what_is_left(tmp_path, save_steps):
    learn = partial(rank_runs.learn_examples, save_steps=save_steps)
    (status, _), (_, second) = each_of(2, learn, str(tmp_path), partial(rank_runs.kill_rank_1, killed=0))
    left = f"the last whole checkpoint is {tmp_path / 'checkpoint-1'}" if save_steps == 1 else "there is no checkpoint"
    assert status == -9 and second["error"].startswith("LostRankError: rank 0 (process")
    assert f"is gone, and this one cannot go on alone; {left}" in second["error"] and second["speaks"]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"] * (save_steps == 1)


@pytest.mark.parametrize("gone, speaks", [(10, 1), (11, 0), (12, 0)])
def test_of_three_ranks_one_says_that_another_is_gone(gone, speaks, monkeypatch):
    monkeypatch.setattr(distributed, "_processes", [10, 11, 12])
    monkeypatch.setattr(distributed, "_is_alive", lambda process: process != gone)
    said = []
    for number in {0, 1, 2} - {gone - 10}:
        monkeypatch.setattr(distributed, "rank", lambda number=number: number)
        said += [number] if distributed._lost("one").speaks else []
    assert said == [speaks]


def test_a_signal_ends_a_run_whose_other_rank_hangs_in_an_update(tmp_path):
    learn = partial(rank_runs.learn_examples, save_steps=100)
    (_, first), (status, _) = each_of(2, learn, str(tmp_path), rank_runs.hang_on_rank_1)
    assert status == -9 and first["error"] == "SystemExit: 143"
    assert "checkpoint-2 has everything up to step 2" in first["said"] and (tmp_path / "checkpoint-2").is_dir()


@pytest.mark.slow
def test_an_error_of_one_rank_ends_the_others_with_its_reason(tmp_path):
    (_, first), (_, second), (_, third) = each_of(3, rank_runs.learn_examples, str(tmp_path), rank_runs.fail_on_rank_1)
    assert second["error"] == "KeyError: 'of rank 1'"
    reason = "LostRankError: rank 1 stopped with KeyError (KeyError('of rank 1')), and this one cannot go on alone"
    assert first["error"] == third["error"] == reason
    assert "checkpoint-2 has everything up to step 2" in first["said"]


@pytest.mark.slow
def test_a_disk_that_refuses_rank_0_is_the_end_of_all_and_said_once(tmp_path):
    (_, first), (_, second) = each_of(2, rank_runs.on_a_full_disk, str(tmp_path))
    assert first["error"] == second["error"] and first["error"].startswith("NotSavedError: checkpoint-3 cannot be")
    assert "the run goes on" in first["said"] and not second["said"]


def test_more_processes_than_examples_are_refused_on_all_and_before_long_work(tmp_path):
    found = each_of(2, partial(rank_runs.learn_examples, examples_per_step=1), str(tmp_path))
    words = "InputError: torchrun has started 2 processes, and examples_per_step=1 does not give each something to do"
    assert all(one["error"].startswith(words) for _, one in found)


def test_processes_with_settings_of_their_own_are_refused_by_name(tmp_path):
    """With seeds of their own they would draw other prompts, and put the completions together as if of one."""
    found = each_of(2, rank_runs.learn_with_its_own, str(tmp_path))
    words = "InputError: the processes were given different settings (seed, output_dir)"
    assert all(one["error"].startswith(words) for _, one in found)


def test_processes_that_evaluate_on_other_rows_or_see_other_folders_are_refused(tmp_path, monkeypatch):
    """Where one finds a checkpoint and the other none, they would be at other steps."""
    for rank in ("1", "0"):
        (tmp_path / rank).mkdir()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.chdir(tmp_path / "0")
    rank_runs.learn_with_its_own_evaluation(str(tmp_path))
    found = each_of(2, rank_runs.learn_with_its_own_evaluation, str(tmp_path))
    words = "InputError: the processes were given different inputs (eval_dataset, resume_from_checkpoint)"
    assert all((one["error"] or "none").startswith(words) for _, one in found)


def test_processes_come_together_as_often_as_a_script_trains():
    assert [one["found"] for _, one in each_of(2, rank_runs.join_twice)] == [[[0, 1], [0, 1]]] * 2


def test_the_work_of_one_process_is_refused_to_several(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    words = "is the work of one process, and torchrun has started 2"
    with pytest.raises(InputError, match=r"sample\(\) " + words):
        sample("model", "data")
    with pytest.raises(InputError, match=r"run_pipeline\(\) " + words):
        run_pipeline("model", [], str(tmp_path))
    for command in (["eval", "--model", "m", "--dataset", "d"], ["bench", "--list"]):
        assert cli.main(command) == 2
        assert f"`lowmem-grpo {command[0]}` {words}" in capsys.readouterr().err


def test_the_log_of_a_command_names_the_rank_of_all_but_the_first(monkeypatch):
    """A reward function that fails is told by each process that called it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    lines = []
    for number in ("0", "1"):
        monkeypatch.setenv("RANK", number)
        lines.append(PrintableFormatter().format(logging.makeLogRecord({"msg": "reward function a failed"})))
    assert lines == ["reward function a failed", "rank 1: reward function a failed"]


def test_a_plan_of_several_processes_is_that_of_a_share(capsys):
    """Of 5 prompts 3 are the larger share of two processes."""
    plans = []
    for share in (["--prompts_per_step", "5", "--ranks", "2"], ["--prompts_per_step", "3"]):
        cli.main(["plan", "--model", str(rank_runs.DEMO_MODEL), "--use_cpu", "true", "--json", *share])
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[0]["peaks"] == plans[1]["peaks"]
    assert plans[0]["assumptions"][0].endswith("has a device of its own and 3 of prompts_per_step=5.")
    assert cli.main(["plan", "--model", str(rank_runs.DEMO_MODEL), "--prompts_per_step", "2", "--ranks", "3"]) == 2

"""Disks that are full, and folders that are gone or in the way: what a run says, what it keeps, and how it goes on."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import comparable
from test_train import ROWS, run, varied_reward
from tiny_models import DEMO_MODEL

from lowmem_grpo import cli
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.errors import InputError, NotSavedError
from lowmem_grpo.output.folder import checkpoints, write_folder
from lowmem_grpo.run.log import MetricsLog, write_completions
from lowmem_grpo.run.room import look_for_room

pytestmark = pytest.mark.usefixtures("known_trials")

MIB = 2**20


def go(folder, steps, **changes):
    settings = dict(rewards=varied_reward, max_completion_length=2, log_completions=True, doctor="off")
    return run(folder, max_steps=steps, **settings, **changes)


@pytest.fixture
def small_disk(tmp_path):
    """A function that gives a disk a size, such as "4m", and returns its folder."""
    folder, mounted = tmp_path / "disk", []

    def size(text):
        options = f"remount,size={text}" if mounted else f"size={text}"
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no right to mount a small disk")
        mounted.append(folder)
        return folder

    yield size
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # files may still be mapped


def test_a_run_outlives_a_full_disk_and_resumes_to_the_same_end(tmp_path, small_disk, capsys):
    """Room for two checkpoints of 1.5 MiB each, the adapter and the log."""
    folder = small_disk("3600k")
    with pytest.raises(NotSavedError) as error:
        go(folder, 3, save_steps=1)
    said = capsys.readouterr().err
    assert "free, and what the run saves takes" in said and "3 checkpoints of 1.3 MiB" in said
    assert "checkpoint-3 cannot be written" in said and "; the run goes on" in said
    words = (
        "checkpoint-3 cannot be written to", "after step 3 (No space left on device): it takes 1.3 MiB, and 0.",
        f"the last whole checkpoint is {folder}/out/checkpoint-2, from which resume_from_checkpoint=True goes on",
    )  # fmt: skip
    assert all(one in str(error.value) for one in words) and "\n" not in str(error.value)
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "adapter", "checkpoint-1", "checkpoint-2", "completions", "data_preview.txt", "grpo_config.json",
        "metrics.jsonl", "report.html", "run.json",
    ]  # fmt: skip
    small_disk("9m")
    resumed, whole = go(folder, 3, save_steps=1, resume_from_checkpoint=True), go(tmp_path / "whole", 3, save_steps=1)
    assert comparable(resumed.history) == comparable(whole.history)
    ours, theirs = (load_file(f"{one.output_dir}/adapter/adapter_model.safetensors") for one in (resumed, whole))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_disk_without_room_for_the_log_to_be_read_again_is_refused_in_one_sentence(small_disk):
    """A resume writes a new log without the lines after its checkpoint."""
    folder = small_disk("6m")
    go(folder, 1)
    log, filler = folder / "out/metrics.jsonl", folder / "filler"
    log.write_text(f'{{"step": 0, "why": "{"x" * 300_000}"}}\n{log.read_text()}')
    before, free = log.read_bytes(), shutil.disk_usage(folder).free
    filler.write_bytes(bytes(free - 150_000))
    with pytest.raises(
        InputError, match=r"out cannot be written \(No space left on device\).* 0.. MiB free; make room"
    ):
        go(folder, 2, resume_from_checkpoint=True)
    assert log.read_bytes() == before
    filler.unlink()
    assert [line["step"] for line in go(folder, 2, resume_from_checkpoint=True).history] == [1, 2]


@pytest.mark.parametrize(
    ("size", "words"), [("16k", "No space left on device"), ("800k", "0.8 MiB free, and a checkpoint takes 1.3 MiB")]
)
def test_a_disk_without_room_for_a_checkpoint_is_refused_before_the_first_step(small_disk, size, words):
    with pytest.raises(InputError, match=words):
        go(small_disk(size), 2)


def test_what_a_run_can_go_on_without_is_missed_once_and_written_when_it_can_be(tmp_path, capsys):
    """A folder stands where the log is in steps 2 and 3, and a file where the tables are, and the best adapter."""
    out = tmp_path / "out"

    def callback(step, metrics, policy):
        if step == 1:
            os.rename(out / "metrics.jsonl", tmp_path / "log")
            (out / "metrics.jsonl").mkdir()
            shutil.rmtree(out / "completions")
            (out / "completions").write_text("mine")
        if step == 3:
            (out / "metrics.jsonl").rmdir()
            os.rename(tmp_path / "log", out / "metrics.jsonl")

    result = go(tmp_path, 4, callbacks=callback, eval_dataset=ROWS[-2:], eval_steps=1)
    assert [line["step"] for line in result.history] == [1, 2, 3, 4]
    assert [line["step"] for line in result.eval_history] == [0, 1, 2, 3, 4]
    said = capsys.readouterr().err
    assert said.count("metrics.jsonl cannot be written (Is a directory); the run goes on") == 1
    assert said.count("completions cannot be written (File exists); the run goes on") == 1
    assert (out / "completions").read_text() == "mine" and (out / "checkpoint-4").is_dir()


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EPIPE])
def test_a_run_outlives_a_standard_error_on_a_full_disk_or_that_nobody_reads(tmp_path, monkeypatch, reason):
    class Refuses(io.StringIO):
        def write(self, text):
            raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(sys, "stderr", Refuses())
    assert len(go(tmp_path, 1).history) == 1


def test_a_run_outlives_the_loss_of_its_folder(tmp_path, capsys):
    def callback(step, metrics, policy):
        if step == 2:
            shutil.rmtree(tmp_path / "out")

    go(tmp_path, 3, callbacks=callback)
    assert "out/metrics.jsonl cannot be written (No such file or directory); the run goes on" in capsys.readouterr().err
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-3"]
    assert (tmp_path / "out/adapter/adapter_model.safetensors").is_file()


def test_an_error_after_the_weights_have_changed_loses_no_step(tmp_path, monkeypatch):
    def write(log, line):
        if line["step"] == 2:
            raise RuntimeError("nobody expects this")

    monkeypatch.setattr(MetricsLog, "write", write)
    with pytest.raises(RuntimeError):
        go(tmp_path, 3)
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2"]


def test_an_adapter_that_cannot_be_written_is_one_sentence_of_the_command(tmp_path, capsys, monkeypatch):
    def refused(folder, write):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))

    monkeypatch.setattr("lowmem_grpo.run.run.write_folder", refused)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1+1=", "solution": "2"}) + "\n")
    status = cli.main(
        ["train", "--model", str(DEMO_MODEL), "--dataset", str(tmp_path / "rows.jsonl"), "--reward_funcs",
         "exact_match_reward", "--use_cpu", "true", "--output_dir", str(tmp_path / "out"), "--max_steps", "1",
         "--max_completion_length", "2"]
    )  # fmt: skip
    said = capsys.readouterr().err.splitlines()
    assert status == 1 and "Traceback" not in "".join(said)
    assert said[-1].startswith("lowmem-grpo train: adapter cannot be written to") and "Read-only file" in said[-1]
    assert said[-1].endswith(f"{tmp_path}/out/checkpoint-1, from which resume_from_checkpoint=True goes on")


def test_a_librarys_error_of_the_disk_is_the_disks(tmp_path):
    def write(folder):
        raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left") as error:
        write_folder(tmp_path / "adapter", write)
    assert error.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_half_a_line_or_table_is_never_left(tmp_path, small_disk):
    folder = small_disk("64k")
    log = MetricsLog(folder, 0)
    log.write({"step": 1, "loss": 0.5})
    (folder / "others").write_bytes(bytes(65536 - 2 * os.sysconf("SC_PAGE_SIZE")))
    with pytest.raises(OSError, match="No space"):
        log.write({"step": 2, "text": "x" * 50_000})
    assert log.path.read_text() == '{"step": 1, "loss": 0.5}\n' and len(log.lines()) == 2
    with pytest.raises(OSError, match="No space"):
        write_completions(folder, 2, {"completion": [os.urandom(3000).hex()] * 20})
    (folder / "others").unlink()
    log.write({"step": 3, "loss": 0.25})
    assert [line["step"] for line in map(json.loads, log.path.read_text().splitlines())] == [1, 2, 3]
    assert not list(folder.glob("completions/*"))


@pytest.mark.parametrize(
    ("limit", "free", "num_checkpoints"), [(None, 9, 5), (2, 7, 3), (2, 9, None), (None, 13, None), (9, 11, 5)]
)
def test_room_is_compared_with_what_is_kept(tmp_path, monkeypatch, limit, free, num_checkpoints):
    """100 steps, saved every 20: 5 checkpoints of 2 MiB, and two adapters of 1 MiB; with a limit one more than that."""
    config = GRPOConfig(save_steps=20, save_total_limit=limit)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=100 * MIB, free=free * MIB))
    found = look_for_room(tmp_path, config, 100, MIB, 2 * MIB)
    assert (found is None) == (num_checkpoints is None)
    assert found is None or f"({num_checkpoints} checkpoints of 2.0 MiB)" in found

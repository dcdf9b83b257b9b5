import json
import math
import os
import random
import shutil
import signal

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_train import ROWS, adapters, run, spoil_a_weight, text_reward, varied_reward
from tiny_models import DEMO_MODEL

from lowmem_grpo import cli
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.errors import InputError
from lowmem_grpo.output.folder import checkpoints, mend_folder, read_state, remove_old_checkpoints, write_folder
from lowmem_grpo.output.manifest import write_manifest
from lowmem_grpo.run.best import BestAdapter

pytestmark = pytest.mark.usefixtures("known_trials")

TIMES = ("time/", "step_time", "memory/", "tokens_per_s/")


def comparable(history):
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in history]


def noisy_reward(completions, **kwargs):
    """Draws from every generator that a checkpoint promises to keep."""
    return [random.random() + np.random.rand() + torch.rand(1).item() + v for v in text_reward(completions)]


def dull_or_noisy_reward(completions, **kwargs):
    """Says nothing of two groups in three, on average, so that groups of earlier steps are replayed."""
    lively = [random.random() < 1 / 3 for _ in completions[::4]]
    return [value if lively[place // 4] else 0.5 for place, value in enumerate(noisy_reward(completions))]


CONTROLLED = dict(
    rewards=dull_or_noisy_reward,
    kl_target=0.01, kl_horizon=20, entropy_coef=0.01, use_adaptive_entropy=True, entropy_target=2.0,
    entropy_coef_delta=0.01, sync_ref_model=True, ref_model_sync_steps=2, dynamic_sampling_rounds=1,
    replay_buffer_size=6, curriculum_skip=0.5, steps_per_generation=2, num_iterations=2, top_p=0.9, learning_rate=3e-3,
)  # fmt: skip


class Stop(Exception):
    pass


def stop_at(step):
    def callback(now, metrics, policy):
        if now == step:
            raise Stop

    return callback


@pytest.mark.parametrize(
    "changes",
    [
        CONTROLLED,
        {"fp16": True, "lora_dropout": 0.1},
    ],
)
def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path, changes):
    changes = {
        "rewards": noisy_reward,
        "max_steps": 4,
        "save_steps": 2,
        "beta": 0.1,
        "lr_scheduler_type": "cosine",
        **changes,
    }
    whole = run(tmp_path / "whole", **changes)
    with pytest.raises(Stop):
        run(tmp_path / "cut", callbacks=[stop_at(3)], **changes)
    os.rename(tmp_path / "cut/out/checkpoint-3", tmp_path / "elsewhere")  # as if the machine had died at step 3
    resumed = run(tmp_path / "cut", resume_from_checkpoint=True, **changes)
    assert comparable(resumed.history) == comparable(whole.history)
    for name, value in adapters(resumed).items():
        assert torch.equal(value, adapters(whole)[name]), name


@pytest.mark.filterwarnings("error:Detected call of .lr_scheduler.step")
def test_a_run_that_skips_steps_resumes_to_the_same_end(tmp_path, spoil):
    """Stopped after step 2, up to which nothing has been learned."""
    updates = 2
    changes: dict = {
        "max_steps": 5, "loss_type": "spoiled", "lr_scheduler_type": "cosine", "rewards": noisy_reward,
        "max_completion_length": 4, "num_iterations": updates, "fp16": True, "optim": "adamw_8bit",
    }  # fmt: skip
    spoil("gradient", lambda call: (call - 1) // updates + 1 in (1, 2, 4))
    whole = run(tmp_path / "whole", **changes)
    spoil("gradient", lambda call: True)
    with pytest.raises(Stop):
        run(tmp_path / "cut", callbacks=[stop_at(2)], **changes)
    spoil("gradient", lambda call: (call - 1) // updates + 3 in (1, 2, 4))
    resumed = run(tmp_path / "cut", resume_from_checkpoint=True, **changes)
    assert [line["skipped_steps"] for line in whole.history] == [updates, updates, 0, updates, 0]
    assert comparable(resumed.history) == comparable(whole.history)
    assert all(torch.equal(value, adapters(whole)[name]) for name, value in adapters(resumed).items())
    states = [read_state(tmp_path / f"{folder}/out/checkpoint-5") for folder in ("whole", "cut")]
    for state in states:
        del state["config"], state["identity"]["objective"]  # which counts its calls anew
    assert states[0] == states[1]


SHORT = dict(max_completion_length=2)


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """The output of a run of one step."""
    folder = tmp_path_factory.mktemp("one-step")
    run(folder, max_steps=1, **SHORT)
    return folder / "out"


@pytest.fixture
def begun(tmp_path, one_step):
    """A folder with the output of a run of one step, to go on with."""
    shutil.copytree(one_step, tmp_path / "out")
    return tmp_path


def test_a_signal_in_a_reward_loses_no_finished_step(tmp_path):
    def crashes_late(completions, trainer_state, **kwargs):
        if trainer_state.global_step == 1:
            signal.raise_signal(signal.SIGTERM)
        return text_reward(completions)

    crashes_late.__name__ = "text_reward"  # what it is once it is mended
    with pytest.raises(SystemExit, match="143"):
        run(tmp_path, rewards=crashes_late, max_steps=3, **SHORT)
    assert (tmp_path / "out/checkpoint-1").is_dir()
    resumed = run(tmp_path, rewards=text_reward, max_steps=3, resume_from_checkpoint=True, **SHORT)
    assert [line["step"] for line in resumed.history] == [1, 2, 3]


def test_a_checkpoint_holds_no_pickles_and_loads_in_peft(one_step):
    files = {path.name for path in (one_step / "checkpoint-1").iterdir()}
    assert files >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "optimizer.safetensors",
        "random_states.safetensors",
        "trainer_state.json",
    }
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    config = json.loads((one_step / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORA"


def test_a_fresh_start_does_not_mix_with_an_earlier_run(begun):
    with pytest.raises(ValueError, match="holds checkpoint-1 of an earlier run; set resume_from_checkpoint=True"):
        run(begun, max_steps=1, **SHORT)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run(tmp_path, max_steps=3, save_steps=1, save_total_limit=2, **SHORT)
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2", "checkpoint-3"]


def test_a_checkpoint_of_another_adapter_is_refused(begun):
    for other, words in (
        (LoraConfig(target_modules=["q_proj"], lora_alpha=32), "holds another adapter than this run's"),
        (LoraConfig(target_modules=["q_proj"]), "is of a run with another adapter: lora_alpha is 8, and was 32"),
    ):
        with pytest.raises(ValueError, match=words):
            run(begun, max_steps=2, resume_from_checkpoint=True, peft_config=other, **SHORT)


def test_every_kind_of_adapter_resumes(tmp_path):
    """DoRA's magnitudes, an adapter of the embedding, and a module that is trained whole: in one."""

    def go(folder, steps, **changes):
        config = LoraConfig(r=4, use_dora=True, target_modules=["embed_tokens", "q_proj"], modules_to_save=["norm"])
        return run(
            tmp_path / folder,
            rewards=varied_reward,
            max_steps=steps,
            lr_scheduler_type="constant",
            peft_config=config,
            **SHORT,
            **changes,
        )

    whole = go("whole", 2)
    go("cut", 1)
    resumed = go("cut", 2, resume_from_checkpoint=True)
    assert all(torch.equal(value, adapters(whole)[name]) for name, value in adapters(resumed).items())


@pytest.mark.parametrize(
    "changes", [{"learning_rate": 1e-2}, {"seed": 7}, {"prompts_per_step": 3}, {"load_in_4bit": False}, {"beta": 0.1}]
)
def test_a_setting_that_decides_the_result_cannot_change_on_resume(begun, changes):
    name = next(iter(changes))
    with pytest.raises(ValueError, match=f"{name} is .* and was .* in the run to resume"):
        run(begun, max_steps=2, resume_from_checkpoint=True, **SHORT, **changes)


def test_other_prompts_cannot_be_resumed_on(begun):
    with pytest.raises(ValueError, match="is of a run on other prompts"):
        run(begun, max_steps=2, resume_from_checkpoint=True, rows=ROWS[:30], **SHORT)


def test_a_longer_run_has_the_rates_of_its_own_schedule_and_a_log_without_half_lines_or_later_steps(begun):
    path = begun / "out/metrics.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + '{"step": 2, "loss": 9}\n{"step": 3, "lo')
    longer = run(begun, max_steps=3, resume_from_checkpoint=True, **SHORT)
    assert [line["step"] for line in longer.history] == [1, 2, 3] and longer.history[1]["loss"] != 9
    assert [line["learning_rate"] for line in longer.history] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])


def test_later_checkpoints_of_another_run_are_not_mixed_in(tmp_path):
    run(tmp_path, max_steps=2, save_steps=1, **SHORT)
    with pytest.raises(ValueError, match="holds checkpoint-2, which the run resumed from"):
        run(tmp_path, max_steps=2, resume_from_checkpoint=str(tmp_path / "out/checkpoint-1"), **SHORT)


def test_a_signal_in_the_first_step_leaves_the_folder_free(tmp_path):
    def fails_in_training(completions, **kwargs):
        if "<think>trial</think>" not in str(completions):  # which the made-up ones have
            signal.raise_signal(signal.SIGTERM)
        return [0.0 for _ in completions]

    with pytest.raises(SystemExit, match="143"):
        run(tmp_path, rewards=fails_in_training, max_steps=1, **SHORT)
    assert len(run(tmp_path, max_steps=1, **SHORT).history) == 1


def test_an_evaluation_that_was_cut_short_is_made_up_for(tmp_path):
    calls = []

    def dies_in_the_last_evaluation(completions, **kwargs):
        calls.append(0)
        if len(calls) == 6:  # two trials, evaluation, two steps
            signal.raise_signal(signal.SIGINT)
        return text_reward(completions)

    dies_in_the_last_evaluation.__name__ = "text_reward"  # what it is once it is mended
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, rewards=dies_in_the_last_evaluation, eval_dataset=ROWS[:2], **SHORT)
    resumed = run(tmp_path, rewards=text_reward, eval_dataset=ROWS[:2], resume_from_checkpoint=True, **SHORT)
    assert [line["step"] for line in resumed.eval_history] == [0, 2]


@pytest.mark.parametrize("name", ["trainer_state.json", "adapter_model.safetensors", "optimizer.safetensors"])
def test_a_damaged_checkpoint_is_named(begun, name):
    (begun / "out/checkpoint-1" / name).write_text("{")
    with pytest.raises(ValueError, match=f"checkpoint-1 cannot be resumed from, since its {name} is damaged"):
        run(begun, max_steps=2, resume_from_checkpoint=True, **SHORT)


def test_a_finished_run_resumes_to_nothing_more_to_do(begun):
    lines = map(json.loads, (begun / "out/metrics.jsonl").read_text(encoding="utf-8").splitlines())
    again = run(begun, max_steps=1, resume_from_checkpoint=str(begun / "out/checkpoint-1"), **SHORT)
    assert again.history == [line for line in lines if "loss" in line]


def test_a_folder_that_could_not_be_filled_leaves_the_old_one(tmp_path):
    folder = tmp_path / "adapter"
    write_folder(folder, lambda f: (f / "a").write_text("old"))

    def fails(f):
        (f / "a").write_text("new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(folder, fails)
    assert (folder / "a").read_text(encoding="utf-8") == "old"
    write_folder(folder, lambda f: (f / "b").write_text("newer"))
    assert [path.name for path in folder.iterdir()] == ["b"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output of a run with everything that a checkpoint can hold."""
    folder = tmp_path_factory.mktemp("finished")
    run(folder, rewards=text_reward, max_steps=1, beta=0.1, reference="initial", eval_dataset=ROWS[:2], **SHORT)
    return folder / "out"


def seal(folder) -> None:
    """Give a folder the manifest of what it holds now, as if it had been written so."""
    lines = (folder / "manifest.sha256").read_text().splitlines()[:-1]
    write_manifest(folder, [line.split("  ")[1] for line in lines])


def spoil_a_file(path) -> None:
    tensors = load_file(path)
    name = next(name for name, values in tensors.items() if values.is_floating_point() and values.dim() == 2)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, path)
    if (path.parent / "manifest.sha256").exists():
        seal(path.parent)


def go_on(folder):
    """Resume a copy of the finished run for another step."""
    run(
        folder, rewards=text_reward, max_steps=2, beta=0.1, reference="initial", resume_from_checkpoint=True, **SHORT
    )  # fmt: skip


@pytest.mark.parametrize("name", ["adapter_model", "optimizer", "reference"])
def test_a_checkpoint_that_is_not_finite_is_refused(tmp_path, finished, name):
    shutil.copytree(finished, tmp_path / "out")
    spoil_a_file(tmp_path / f"out/checkpoint-1/{name}.safetensors")
    words = rf"checkpoint-1 has numbers that are not finite .{name}.safetensors, .*; resume from an older checkpoint"
    with pytest.raises(ValueError, match=words):
        go_on(tmp_path)


def test_a_coefficient_that_is_not_finite_is_refused(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "out")
    path = tmp_path / "out/checkpoint-1/trainer_state.json"
    state = json.loads(path.read_text())
    state["parts"]["controllers"]["beta"] = math.nan
    path.write_text(json.dumps(state))
    seal(path.parent)
    with pytest.raises(ValueError, match="checkpoint-1 cannot .* its trainer_state.json cannot be read: it has a NaN"):
        go_on(tmp_path)


@pytest.mark.parametrize("written", [{}, {"format": 1}])
def test_a_checkpoint_of_another_format_is_refused_before_a_model_is_loaded(written, tmp_path, finished, monkeypatch):
    shutil.copytree(finished, tmp_path / "out")
    path = tmp_path / "out/checkpoint-1/trainer_state.json"
    state = json.loads(path.read_text())
    assert state.pop("format") == 2
    path.write_text(json.dumps({**state, **written}))
    (path.parent / "manifest.sha256").unlink()  # which older formats had not
    monkeypatch.setattr("lowmem_grpo.inputs.training.load_policy", None)
    words = (
        f"checkpoint-1 is a checkpoint of format {written.get('format', 0)}, and this version reads 2; resume with the"
    )
    with pytest.raises(InputError, match=words):
        go_on(tmp_path)


def test_a_best_adapter_that_is_not_finite_is_neither_kept_nor_loaded(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "out")
    best = BestAdapter(tmp_path / "out", GRPOConfig(), fresh=False)
    before = load_file(best.folder / "adapter_model.safetensors")
    policy = run(tmp_path / "next", str(finished / "adapter"), max_steps=1, **SHORT).policy
    spoil_a_weight(policy)
    with pytest.raises(FloatingPointError, match="the adapter is not saved, since .*lora_A"):
        best.keep(policy, 9, {"eval_reward": 1e9})
    after = load_file(best.folder / "adapter_model.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert best.record()["step"] < 9 and not list(best.folder.parent.glob("*.being-written"))
    spoil_a_file(best.folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="best has numbers that are not finite .*without load_best_model_at_end"):
        best.load(policy)


@pytest.mark.parametrize("command", ["train", "eval"])
def test_an_adapter_that_is_not_finite_is_refused_in_one_sentence(tmp_path, finished, capsys, command):
    shutil.copytree(finished / "adapter", tmp_path / "adapter")
    spoil_a_file(tmp_path / "adapter/adapter_model.safetensors")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1+1=", "solution": "2"}) + "\n")
    more = ["--output_dir", str(tmp_path / "out"), "--max_steps", "1"] if command == "train" else []
    status = cli.main(
        [command, "--model", str(tmp_path / "adapter"), "--dataset", str(tmp_path / "rows.jsonl"), "--reward_funcs",
         "exact_match_reward", "--use_cpu", "true", "--max_completion_length", "8", *more]
    )  # fmt: skip
    said = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and f"lowmem-grpo {command}: the adapter to continue has numbers that are not finite, in" in said


def test_a_command_that_is_no_longer_finite_says_so_in_one_sentence(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1+1=", "solution": "2"}) + "\n")
    status = cli.main(
        ["train", "--model", str(DEMO_MODEL), "--dataset", str(tmp_path / "rows.jsonl"), "--reward_funcs",
         "exact_match_reward", "--use_cpu", "true", "--output_dir", str(tmp_path / "out"), "--max_steps", "2",
         "--max_completion_length", "8", "--entropy_coef", "1e30", "--max_nonfinite_steps", "0"]
    )  # fmt: skip
    said = capsys.readouterr().err.splitlines()[-1]
    assert status == 1 and said.startswith("lowmem-grpo train: optimizer steps in a row that changed no weight: 1,")
    assert said.endswith("checkpoint-1")


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_no_part_of_it(tmp_path, monkeypatch):
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text("{}")
    with monkeypatch.context() as killed:
        killed.setattr("shutil.rmtree", lambda *given, **how: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            remove_old_checkpoints(tmp_path, 1)
    mend_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]

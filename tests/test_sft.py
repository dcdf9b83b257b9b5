"""sft(): a run from examples to an adapter, its resume, its evaluations, and the command."""

import dataclasses
import json
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import DEMO_MODEL
from transformers import AutoModelForCausalLM
from trl.trainer.sft_config import SFTConfig as TheirConfig

from lowmem_grpo import SFTConfig, cli, sft, train
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.trl import UNSUPPORTED_SFT
from lowmem_grpo.demo import task
from lowmem_grpo.doctor.doctor import Doctor
from lowmem_grpo.errors import InputError, UnhealthyRunError
from lowmem_grpo.inputs.examples import read_example_inputs
from lowmem_grpo.inputs.prompts import read_training_inputs
from lowmem_grpo.output.lock import lock_folder, releasing_locks

pytestmark = pytest.mark.usefixtures("known_trials")

TRAIN, EVAL = task.splits()


def rows(problems):
    return [
        {"prompt": [{"role": "user", "content": task.question(p)}],
         "completion": [{"role": "assistant", "content": task.worked(p)}]}
        for p in problems
    ]  # fmt: skip


def run(folder, examples=None, eval_dataset=None, **settings):
    config = SFTConfig(**{
        "output_dir": str(folder), "use_cpu": True, "max_steps": 4, "examples_per_step": 8, "learning_rate": 1e-3,
        "save_steps": 2, **settings,
    })  # fmt: skip
    return sft(str(DEMO_MODEL), rows(TRAIN[:40]) if examples is None else examples, eval_dataset, config)


def adapter(folder):
    return load_file(folder / "adapter/adapter_model.safetensors")


def comparable(lines):
    unlike = ("time/", "memory/", "tokens_per_s/", "step_time")
    return [{name: value for name, value in line.items() if not name.startswith(unlike)} for line in lines]


def test_a_run_learns_its_examples_and_peft_loads_what_it_saves(tmp_path):
    result = run(tmp_path, eval_dataset=rows(EVAL[:16]), max_steps=8, eval_steps=4, load_best_model_at_end=True)
    first, *_, last = result.eval_history
    assert [line["step"] for line in result.eval_history] == [0, 4, 8]
    assert last["eval_loss"] < first["eval_loss"] / 1.5
    assert json.loads((tmp_path / "best/best.json").read_text())["metric"] == "eval_loss"
    assert result.findings == [] and {"loss", "entropy", "epoch", "grad_norm", "num_tokens"} <= result.history[0].keys()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(DEMO_MODEL), tmp_path / "adapter")
    preview = (tmp_path / "data_preview.txt").read_text()
    assert "28 of 39 tokens are learnt\n    <|user|>59+63+15=<|assistant|>[[<think>59+63=122" in preview


def test_the_best_adapter_is_that_of_the_least_loss(tmp_path):
    ruined = run(tmp_path, eval_dataset=rows(EVAL[:8]), learning_rate=1.0, eval_steps=1, max_steps=3, doctor="off")
    losses = [line["eval_loss"] for line in ruined.eval_history]
    assert min(losses) == losses[0] and json.loads((tmp_path / "best/best.json").read_text())["step"] == 0


def test_a_stopped_run_resumes_to_the_adapter_of_the_one_that_was_not(tmp_path):
    def stop(step, metrics, policy):
        if step == 3:
            raise RuntimeError("the machine is needed elsewhere")

    whole = run(tmp_path / "whole", eval_dataset=rows(EVAL[:2]), eval_steps=2)
    config = SFTConfig(output_dir=str(tmp_path / "cut"), use_cpu=True, max_steps=4, examples_per_step=8,
                       learning_rate=1e-3, save_steps=2, eval_steps=2)  # fmt: skip
    with pytest.raises(RuntimeError, match="needed elsewhere"):
        sft(str(DEMO_MODEL), rows(TRAIN[:40]), rows(EVAL[:2]), config, callbacks=stop)
    resumed = run(tmp_path / "cut", eval_dataset=rows(EVAL[:2]), eval_steps=2, resume_from_checkpoint="auto")
    assert comparable(resumed.history) == comparable(whole.history)
    assert resumed.eval_history == whole.eval_history
    ours, theirs = adapter(tmp_path / "cut"), adapter(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_datasets_are_mixed_by_weight_and_a_stopped_run_mixes_on(tmp_path, capsys):
    def stop(step, metrics, policy):
        if step == 3:
            raise RuntimeError("the machine is needed elsewhere")

    given = [rows(TRAIN[:6]), rows(TRAIN[6:36])]
    weights = dict(dataset_weights=[3, 1], max_steps=6)
    whole = run(tmp_path / "whole", given, **weights)
    said = (
        "train_dataset 1: 6 examples, each seen 6 times in the run\ntrain_dataset 2: 30 examples, each seen 0.4 times"
    )
    assert said in (tmp_path / "whole/data_preview.txt").read_text() and said in capsys.readouterr().err
    config = SFTConfig(output_dir=str(tmp_path / "cut"), use_cpu=True, examples_per_step=8, learning_rate=1e-3,
                       save_steps=2, **weights)  # fmt: skip
    with pytest.raises(RuntimeError, match="needed elsewhere"):
        sft(str(DEMO_MODEL), given, None, config, callbacks=stop)
    with pytest.raises(InputError, match=r"dataset_weights is .*2"):
        run(tmp_path / "cut", given, **{**weights, "dataset_weights": [2, 1]}, resume_from_checkpoint=True)
    with pytest.raises(InputError, match="on other values in sizes"):
        run(tmp_path / "cut", [rows(TRAIN[:7]), rows(TRAIN[7:36])], **weights, resume_from_checkpoint=True)
    resumed = run(tmp_path / "cut", given, **weights, resume_from_checkpoint="auto")
    assert comparable(resumed.history) == comparable(whole.history)
    ours, theirs = adapter(tmp_path / "cut"), adapter(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_datasets_without_weights_are_one(tmp_path):
    run(tmp_path / "two", [rows(TRAIN[:10]), rows(TRAIN[10:40])], max_steps=2)
    run(tmp_path / "one", rows(TRAIN[:40]), max_steps=2)
    ours, theirs = adapter(tmp_path / "two"), adapter(tmp_path / "one")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_run_is_not_resumed(tmp_path):
    run(tmp_path, max_steps=2)
    with pytest.raises(InputError, match="on other values in rows"):
        run(tmp_path, examples=rows(TRAIN[1:41]), resume_from_checkpoint=True)
    with pytest.raises(InputError, match=r"loss_type is .*dft"):
        run(tmp_path, loss_type="dft", resume_from_checkpoint=True)


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    (tmp_path / "out").mkdir()
    with releasing_locks():
        lock_folder(tmp_path / "out")
        with pytest.raises(InputError, match="is in use by another run"):
            run(tmp_path / "out")
    assert not (tmp_path / "out/run.lock").exists()


def test_reinforcement_goes_on_from_the_adapter(tmp_path):
    run(tmp_path / "cold", max_steps=2)
    config = GRPOConfig(
        output_dir=str(tmp_path / "rl"), use_cpu=True, max_steps=1, max_completion_length=4, prompts_per_step=2
    )
    result = train(str(tmp_path / "cold/adapter"), task.answer_reward, task.rows(TRAIN[:8]), config=config)
    assert result.history[0]["step"] == 1
    given = (str(tmp_path / "cold/adapter"), task.answer_reward, task.rows(TRAIN[:8]), None)
    config = dataclasses.replace(config, output_dir=str(tmp_path / "with_kl"), beta=0.04)
    with pytest.warns(UserWarning, match="the KL draws the policy back to the base.*set reference='initial'"):
        read_training_inputs(*given, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        read_training_inputs(*given, dataclasses.replace(config, reference="initial"))


@pytest.mark.parametrize(
    ("settings", "examples", "words"),
    [
        ({"packing": True}, None, "SFTConfig has no packing: examples are always packed"),
        ({"num_generations": 8}, None, "SFTConfig has no field 'num_generations'"),
        ({"eval_steps": 2}, None, "there is no eval_dataset"),
        ({"token_budget": 20}, None, "the longest example has 39 tokens, more than token_budget=20"),
        ({}, [{"prompt": "1+1="}], "neither prompt and completion"),
        ({}, [], "train_dataset is empty"),
        ({}, [{"text": "a", "weight": 0}] * 2, "every row of train_dataset has the weight 0"),
        ({"dataset_weights": [3, 1]}, None, "has 2 weights for 1 dataset; give one for each"),
        ({"dataset_weights": [3]}, [rows(TRAIN[:2])] * 2, "has 1 weight for 2 datasets"),
        ({"dataset_weights": [3, 0]}, [rows(TRAIN[:2])] * 2, "dataset_weights must be greater than 0"),
        ({"dataset_weights": [1e6, 1]}, [rows(TRAIN[:2])] * 2, "leaves a dataset without an example of 4"),
        ({}, [rows(TRAIN[:2]), "no/such.jsonl"], "train_dataset 2 of 2: train_dataset 'no/such.jsonl' is not a file"),
        ({}, [rows(TRAIN[:2]), [{"text": ""}]], "row 0 of train_dataset 2"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(tmp_path, settings, examples, words):
    with pytest.raises((InputError, TypeError), match=words):
        run(tmp_path, examples=examples, **settings)


@pytest.mark.parametrize("name", ["dataloader_num_workers", "remove_unused_columns", "use_cache", "train_dataset"])
def test_a_remedy_is_about_examples_and_not_about_rewards(name):
    with pytest.raises(InputError) as caught:
        SFTConfig(**{name: 1})
    assert not any(word in str(caught.value) for word in ("prompts", "reward functions", "completions", "train()"))


def test_every_field_of_trls_config_is_a_field_or_has_a_remedy():
    theirs = {field.name for field in dataclasses.fields(TheirConfig)}
    ours = {field.name for field in dataclasses.fields(SFTConfig)}
    assert theirs - ours <= set(UNSUPPORTED_SFT)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("evaluated_on_training_examples", dict(eval_dataset=rows(TRAIN[:2]))),
        ("examples_without_an_end", dict(examples=[{"messages": [{"role": "user", "content": f"{n}+1="}]} for n in range(9)])),
        ("most_examples_dropped", dict(max_length=39, examples=[*rows(TRAIN[:1]), *({"prompt": [{"role": "user", "content": "1" * 60}], "completion": [{"role": "assistant", "content": "1"}]} for _ in range(3))])),
        ("dataset_seen_too_often", dict(examples=[rows(TRAIN[:2]), rows(TRAIN[2:30])], dataset_weights=[3, 1])),
        ("empty_texts", dict(examples=[*rows(TRAIN[:9]), {**rows(TRAIN[:1])[0], "completion": [{"role": "assistant", "content": ""}]}])),
        ("implausible_learning_rate", dict(learning_rate=1e-2)),
        ("warmup_beyond_the_end", dict(warmup_steps=4, lr_scheduler_type="linear")),
    ],
)  # fmt: skip
def test_the_doctor_looks_before_the_weights_are_read(tmp_path, monkeypatch, name, settings):
    noted = []

    def note(doctor, step, findings):
        lines = own(doctor, step, findings)
        noted.extend(line["doctor"] for line in lines)
        return lines

    own = Doctor.note
    monkeypatch.setattr(Doctor, "note", note)
    monkeypatch.setattr("lowmem_grpo.inputs.training.load_policy", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UnhealthyRunError) as caught:
        run(tmp_path, doctor="stop", **settings)
    assert "set doctor='warn'" in str(caught.value)
    assert name in noted


def test_a_column_of_the_question_that_no_prompt_shows_is_known_of_each_dataset(tmp_path):
    shown = [
        {
            "prompt": [{"role": "user", "content": "Add.\n1+1="}],
            "completion": [{"role": "assistant", "content": "2"}],
            "input": " 1+1=\n",
        }
    ] * 2
    beside = [{**row, "prompt": [{"role": "user", "content": "Add."}]} for row in shown]
    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True)
    read = [read_example_inputs(str(DEMO_MODEL), given, None, config).unseen for given in (shown, [shown, beside])]
    assert read == [[], ["input"]]


def test_the_doctor_says_that_a_loss_rises(tmp_path):
    found = run(tmp_path, learning_rate=0.5, max_steps=14, examples_per_step=2).findings
    assert {"implausible_learning_rate", "loss_rises"} <= {line["doctor"] for line in found}


def test_the_command_trains_plans_and_refuses(tmp_path, capsys):
    (tmp_path / "cold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(TRAIN[:8])))
    given = ["--model", str(DEMO_MODEL), "--use_cpu", "true"]
    more = ["--dataset", str(tmp_path / "cold.jsonl"), "--output_dir", str(tmp_path / "out"), "--max_steps", "1"]
    assert cli.main(["sft", *given, *more]) == 0
    assert capsys.readouterr().out.strip() == f"adapter: {tmp_path / 'out/adapter'}"
    assert json.loads((tmp_path / "out/sft_config.json").read_text())["examples_per_step"] == 16
    several = ["--dataset", *[str(tmp_path / "cold.jsonl")] * 2, "--dataset_weights", "3", "1", "--max_steps", "1"]
    assert cli.main(["sft", *given, *several, "--output_dir", str(tmp_path / "several")]) == 0
    assert json.loads((tmp_path / "several/sft_config.json").read_text())["dataset_weights"] == [3.0, 1.0]
    capsys.readouterr()
    assert cli.main(["plan", "sft", *given, "--max_length", "64", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["example_tokens"] == 64 and set(planned["phases"]) == {"update", "evaluation"}
    assert cli.main(["sft", *given, *more, "--num_generations", "8"]) == 2
    assert "SFTConfig has no field 'num_generations'" in capsys.readouterr().err
    assert cli.main(["plan", *given, "--max_length", "64"]) == 2

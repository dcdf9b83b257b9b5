"""train_reward_model(): a run from pairs to a reward adapter, its resume, its evaluations, and the command."""

import dataclasses
import errno
import json
import math
import re

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from test_sft import comparable
from test_sft_loss import WHOLE, say, tokenizer_with
from tiny_models import DEMO_MODEL
from transformers import AutoTokenizer
from trl.trainer.reward_config import RewardConfig as TheirConfig

from lowmem_grpo import RewardConfig, cli, sft, train_reward_model
from lowmem_grpo.checkup.pairs import findings
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.sft import SFTConfig
from lowmem_grpo.config.trl import UNSUPPORTED_REWARD
from lowmem_grpo.data.pairs import tokenize_pairs
from lowmem_grpo.demo import task
from lowmem_grpo.errors import InputError, NotSavedError, UnhealthyRunError
from lowmem_grpo.inputs.pairs import read_pair_inputs
from lowmem_grpo.model.score_head import SCORE, read_range
from lowmem_grpo.update.pair_metrics import correlation, score_metrics

pytestmark = pytest.mark.usefixtures("known_trials")

TRAIN, EVAL = task.splits()


def pair_rows(problems, chosen=task.worked, rejected=task.lazy):
    return [
        {"prompt": [say("user", task.question(p))], "chosen": [say("assistant", chosen(p))],
         "rejected": [say("assistant", rejected(p))]}
        for p in problems
    ]  # fmt: skip


def settings_of(folder, **settings):
    return RewardConfig(**{
        "output_dir": str(folder), "use_cpu": True, "max_steps": 4, "pairs_per_step": 4, "learning_rate": 1e-3,
        "save_steps": 2, **settings,
    })  # fmt: skip


def run(folder, pairs=None, eval_dataset=None, callbacks=(), **settings):
    pairs = pair_rows(TRAIN[:40]) if pairs is None else pairs
    return train_reward_model(
        str(DEMO_MODEL), pairs, eval_dataset, settings_of(folder, **settings), callbacks=callbacks
    )


def test_separable_pairs_are_told_apart_and_peft_loads_what_is_saved(tmp_path):
    result = run(
        tmp_path, eval_dataset=pair_rows(EVAL[:32]), max_steps=12, eval_steps=6, bf16=False, load_in_4bit=False
    )
    last = result.eval_history[-1]
    assert [line["step"] for line in result.eval_history] == [0, 6, 12]
    assert (
        last["eval_accuracy"] >= 0.95
        and last["eval_accuracy/ci_low"] < last["eval_accuracy"]
        and last["eval_loss"] < 0.3
    )
    assert last["eval_length_correlation"] > 0.5, "the worked answers are the longer ones"
    assert {"loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward"} <= result.history[0].keys()
    assert json.loads((tmp_path / "best/best.json").read_text())["metric"] == "eval_accuracy"
    assert (
        "both begin with 12 tokens:\n    <|user|>59+63+15=<|assistant|><think>"
        in (tmp_path / "data_preview.txt").read_text()
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=1)
    pairs, _ = tokenize_pairs(Dataset.from_list(pair_rows(EVAL[:4])), tokenizer, settings_of(tmp_path))
    with torch.no_grad():
        found = [theirs(input_ids=torch.tensor([text])).logits.item() for pair in pairs for text in pair.texts]
    assert found[0] > found[1] and found[2] > found[3]
    mean, deviation = read_range(tmp_path / "adapter") or (0.0, 0.0)
    assert 0 < deviation < 10 and -5 < mean < 5


def test_a_stopped_run_resumes_to_the_adapter_and_head_of_the_one_that_was_not(tmp_path):
    def stop(step, metrics, policy):
        if step == 3:
            raise RuntimeError("the machine is needed elsewhere")

    whole = run(tmp_path / "whole", eval_dataset=pair_rows(EVAL[:8]), eval_steps=2)
    with pytest.raises(RuntimeError, match="needed elsewhere"):
        run(tmp_path / "cut", eval_dataset=pair_rows(EVAL[:8]), eval_steps=2, callbacks=stop)
    again = run(tmp_path / "cut", eval_dataset=pair_rows(EVAL[:8]), eval_steps=2, resume_from_checkpoint="auto")
    assert comparable(again.history) == comparable(whole.history)
    assert again.eval_history == whole.eval_history
    for name in ("adapter/adapter_model.safetensors", "best/adapter_model.safetensors"):
        ours, theirs = load_file(tmp_path / "cut" / name), load_file(tmp_path / "whole" / name)
        assert SCORE in ours and all(torch.equal(ours[path], theirs[path]) for path in theirs)
    assert read_range(tmp_path / "cut/adapter") == read_range(tmp_path / "whole/adapter")


def test_a_disk_that_refuses_the_range_of_scores_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(NotSavedError, match="score_range.json cannot be .*No space left"),
    ):
        patch.setattr("lowmem_grpo.loops.reward.save_range", refuse)
        run(tmp_path, max_steps=1)
    assert SCORE in load_file(tmp_path / "adapter/adapter_model.safetensors")
    run(tmp_path, max_steps=1, resume_from_checkpoint=True)
    assert read_range(tmp_path / "adapter")


def test_another_run_is_not_resumed(tmp_path):
    run(tmp_path, max_steps=2)
    with pytest.raises(InputError, match="on other values in pairs"):
        run(tmp_path, pairs=pair_rows(TRAIN[1:41]), resume_from_checkpoint=True)
    with pytest.raises(InputError, match="center_rewards_coefficient is"):
        run(tmp_path, center_rewards_coefficient=0.01, resume_from_checkpoint=True)


def test_a_reward_adapter_starts_from_an_adapter_that_imitates(tmp_path):
    cold = SFTConfig(output_dir=str(tmp_path / "cold"), use_cpu=True, max_steps=1, examples_per_step=2)
    sft(str(DEMO_MODEL), [{"prompt": "1+1=", "completion": "2"}] * 2, config=cold)
    config = settings_of(tmp_path / "rm", max_steps=1)
    train_reward_model(str(tmp_path / "cold/adapter"), pair_rows(TRAIN[:4]), config=config)
    saved = json.loads((tmp_path / "rm/adapter/adapter_config.json").read_text())
    assert saved["task_type"] == "SEQ_CLS" and saved["modules_to_save"] == ["score"]


@pytest.mark.parametrize(
    ("settings", "pairs", "words"),
    [
        ({"num_generations": 8}, None, "RewardConfig has no field 'num_generations'"),
        ({"pad_to_multiple_of": 8}, None, "RewardConfig has no pad_to_multiple_of: pairs are packed without padding"),
        ({"eval_steps": 2}, None, "there is no eval_dataset"),
        ({"token_budget": 39}, None, "the token that is packed after it have 40 tokens, more than token_budget=39"),
        ({"max_length": 8}, None, "every pair of train_dataset has a text longer than max_length=8"),
        ({}, [{"prompt": "1+1="}], "train_dataset has no chosen and rejected, only prompt; rename its columns"),
        ({}, [{"chosen": "a", "rejected": None}], "row 0 of train_dataset lacks chosen or rejected"),
        ({}, [{"prompt": [say("user", "1")], "chosen": "a", "rejected": "b"}], "side by side"),
        ({}, [{"prompt": "1", "chosen": [say("user", "2")], "rejected": [say("user", "3")]}], "that its chats do not show"),
        ({}, [{"chosen": "a", "rejected": "b", "margin": "much"}], "has the margin 'much'; it has to be a number"),
        ({}, [{"chosen": "a", "rejected": "b", "margin": 1e39}], "has the margin 1e\\+39; it has to be a number from"),
        ({}, [{"chosen": math.nan, "rejected": 1.0}], "row 0 of train_dataset has the chosen 'nan'; it has to be a text"),
        ({}, [{"prompt": json.dumps([say("user", "1")]), "chosen": "a", "rejected": "b"}], "a chat written as a text"),
        ({}, [{"chosen": "a", "rejected": "b", "tools": [{"type": "function"}]}], "has tools, and its prompt is a text"),
        ({}, [{"chosen": [], "rejected": []}], "row 0 of train_dataset has the chosen '\\[\\]'; a chat is a list"),
        ({}, [{"chosen": [say("narrator", "a")], "rejected": [say("assistant", "b")]}], "of the role 'narrator'"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_a_sentence(tmp_path, settings, pairs, words):
    with pytest.raises((InputError, TypeError), match=words):
        run(tmp_path, pairs=pairs, **settings)


def test_every_field_of_trls_config_is_a_field_or_has_a_remedy():
    theirs = {field.name for field in dataclasses.fields(TheirConfig)}
    ours = {field.name for field in dataclasses.fields(RewardConfig)}
    assert theirs - ours <= set(UNSUPPORTED_REWARD)
    of_grpo = {field.name for field in dataclasses.fields(GRPOConfig)} - ours
    for name in {"max_seq_length", *theirs} - ours:
        assert not of_grpo & set(re.findall(r"\w+", UNSUPPORTED_REWARD[name])), name


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("evaluated_on_training_pairs", dict(eval_dataset=pair_rows(TRAIN[:2]))),
        ("pairs_of_one_text", dict(pairs=pair_rows(TRAIN[:8]) + pair_rows(TRAIN[:2], rejected=task.worked))),
        ("pairs_in_both_orders", dict(pairs=pair_rows(TRAIN[:8]) + pair_rows(TRAIN[:2], task.lazy, task.worked))),
        ("length_tells_the_better", dict(pairs=pair_rows(TRAIN[:16]))),
        ("most_pairs_dropped", dict(max_length=30, pairs=pair_rows(TRAIN[:4]) + pair_rows(TRAIN[:1], task.lazy, task.lazy))),
        ("implausible_learning_rate", dict(learning_rate=1e-2)),
        ("warmup_beyond_the_end", dict(warmup_steps=4)),
        ("question_not_in_prompt", dict(pairs=[{**row, "context": "In words."} for row in pair_rows(TRAIN[:8])])),
    ],
)  # fmt: skip
def test_the_doctor_looks_at_pairs_before_the_weights_are_read(tmp_path, name, settings):
    def found_in(folder, pairs=None, eval_dataset=None, **settings):
        config = settings_of(tmp_path / folder, **settings)
        return {
            one.name
            for one in findings(read_pair_inputs(str(DEMO_MODEL), pairs or pair_rows(TRAIN[:8]), eval_dataset, config))
        }

    assert found_in("sound") == set() and name in found_in("ill", **settings)
    with pytest.raises(UnhealthyRunError, match="set doctor='warn'"):
        run(tmp_path / "stopped", doctor="stop", **settings)


def test_what_the_scores_of_pairs_show():
    metrics = score_metrics(torch.tensor([[1.0, 0.0], [2.0, 2.0], [-1.0, 3.0], [0.5, 0.0]]))
    assert metrics == {"accuracy": 0.5, "margin": -0.625, "min_reward": -1.0, "mean_reward": 0.9375, "max_reward": 3.0}
    assert correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2, 4, 6])) == pytest.approx(1)
    assert correlation(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 4.0])) != 0


def test_pairs_are_what_a_template_or_an_end_makes_of_both_texts():
    tokenizer, config = tokenizer_with(WHOLE), RewardConfig(system_prompt="Sum up.")
    rows = [{"prompt": [say("user", "1+1=")], "chosen": [say("assistant", "2")], "rejected": [say("assistant", "3")]}]
    (pair,), dropped = tokenize_pairs(Dataset.from_list(rows), tokenizer, config)
    assert [tokenizer.decode(text) for text in pair.texts] == [
        f"<|system|>Sum up.<|user|>1+1=<|assistant|>{answer}<|end|>" for answer in (2, 3)
    ]
    assert tokenizer.decode(pair.chosen[: pair.num_shared]) == "<|system|>Sum up.<|user|>1+1=<|assistant|>"
    assert dropped == 0 and pair.margin == 0
    rows = [
        {"prompt": "1+1=", "chosen": "2", "rejected": f"3{tokenizer.eos_token}", "margin": 2},
        {"prompt": None, "chosen": "1" * 9, "rejected": "", "margin": None},
    ]
    (pair,), dropped = tokenize_pairs(Dataset.from_list(rows), tokenizer, RewardConfig(max_length=8))
    assert [tokenizer.decode(text) for text in pair.texts] == [f"1+1={n}{tokenizer.eos_token}" for n in (2, 3)]
    assert (dropped, pair.margin, pair.num_shared) == (1, 2, 4)


def test_the_command_trains_plans_and_refuses(tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(TRAIN[:8])))
    given = ["--model", str(DEMO_MODEL), "--use_cpu", "true"]
    more = ["--dataset", str(tmp_path / "pairs.jsonl"), "--output_dir", str(tmp_path / "out"), "--max_steps", "1"]
    assert cli.main(["reward", *given, *more]) == 0
    assert capsys.readouterr().out.strip() == f"adapter: {tmp_path / 'out/adapter'}"
    assert json.loads((tmp_path / "out/reward_config.json").read_text())["pairs_per_step"] == 16
    assert cli.main(["plan", "reward", *given, "--max_length", "64", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["text_tokens"] == 64 and set(planned["phases"]) == {"update", "evaluation"}
    assert planned["resident"]["score head"] == 16 * 128
    assert cli.main(["reward", *given, *more, "--num_generations", "8"]) == 2
    assert "RewardConfig has no field 'num_generations'" in capsys.readouterr().err

import dataclasses
import json
import math
import sys
import time
from functools import partial
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import DEMO_MODEL, OutOfMemory, make_model, make_policy
from transformers import AutoTokenizer

from lowmem_grpo import GRPOConfig
from lowmem_grpo.config.losses import LOSS_TYPES
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.demo import task
from lowmem_grpo.generate import engine, sample
from lowmem_grpo.generate.sample import Sampler
from lowmem_grpo.loops.grpo import train
from lowmem_grpo.objective.loss import LOSSES, register_objective
from lowmem_grpo.run.log import write_completions

pytestmark = pytest.mark.usefixtures("known_trials")

ROWS = task.rows(task.splits()[0][:40])
TRL_METRICS = {
    "loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "step_time", "reward", "reward_std",
    "frac_reward_zero_std", "entropy", "completions/mean_length", "completions/min_length", "completions/max_length",
    "completions/clipped_ratio", "completions/mean_terminated_length", "completions/min_terminated_length",
    "completions/max_terminated_length", "rewards/answer_reward/mean", "rewards/answer_reward/std",
    "clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/low_min", "clip_ratio/high_mean", "clip_ratio/high_max",
}  # fmt: skip


MEMORY_METRICS = {
    "kl", "memory/token_budget", "memory/out_of_memory",
    *(f"{what}{phase}{unit}" for phase in ("rollout", "reference", "update") for what, unit in
      (("time/", "_s"), ("memory/", "/peak_mib"), ("tokens_per_s/", ""))),
}  # fmt: skip


def settings(tmp_path, **changes) -> GRPOConfig:
    return GRPOConfig(
        **{
            "output_dir": str(tmp_path / "out"), "use_cpu": True, "max_steps": 2, "prompts_per_step": 2, "num_generations": 4,
            "max_completion_length": 8, "learning_rate": 1e-3, "gradient_checkpointing": False, **changes,
        }
    )  # fmt: skip


def run(
    tmp_path, model=str(DEMO_MODEL), rewards=task.answer_reward, rows=ROWS, *, eval_dataset=None, callbacks=(),
    peft_config=None, **changes,
):  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    config = settings(tmp_path, **changes)
    return train(model, rewards, rows, eval_dataset, config, peft_config, tokenizer, callbacks)


def adapters(result):
    return {name: p.detach().clone() for name, p in result.policy.parameters_of(result.policy.adapter).items()}


def text_reward(completions, **kwargs):
    """By a completion's characters, so that those that differ earn different rewards, however short they are."""
    return [sum(map(ord, completion[0]["content"])) % 7 / 7 for completion in completions]


def varied_reward(completions, **kwargs):
    """By place in the group, so that every step has something to learn."""
    return [float(place % 4) for place in range(len(completions))]


def test_a_run_reports_every_step_under_trls_names(tmp_path):
    seen = []
    result = run(
        tmp_path, rewards=[task.answer_reward, task.tag_format_reward], beta=0.1, eval_dataset=ROWS[:4], max_steps=3,
        eval_steps=2, callbacks=[lambda step, metrics, policy: seen.append((step, metrics["loss"], policy))],
    )  # fmt: skip
    assert [line["step"] for line in result.history] == [1, 2, 3]
    assert [line["step"] for line in result.eval_history] == [0, 2, 3]
    assert set(result.history[0]) >= TRL_METRICS | MEMORY_METRICS
    assert "eval_rewards/answer_reward/mean" in result.eval_history[0]
    assert [step for step, _, _ in seen] == [1, 2, 3]
    assert seen[0][2] is result.policy
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line for line in lines if "loss" in line] == result.history
    assert result.history[0]["learning_rate"] == 1e-3
    assert result.history[2]["learning_rate"] == pytest.approx(1e-3 / 3)
    assert result.history[-1]["epoch"] == 3 * 2 / 40


def test_on_the_same_completions_metrics_are_trls(tmp_path):
    """Two steps of a continued adapter, of which TRL's trainer gets the completions that were sampled here."""
    trl, sampled = pytest.importorskip("trl", minversion="1.16"), []

    def recorder(completion_ids, **kwargs):
        sampled.append(completion_ids)
        return [float(sum(ids) % 7) for ids in completion_ids]

    def partial_reward(completion_ids, **kwargs):
        return [None if sum(ids) % 2 else float(len(ids)) for ids in completion_ids]

    base = make_model("qwen2")
    base.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(tmp_path / "adapter")
    same = dict(
        num_generations=4, max_completion_length=8, max_steps=2, learning_rate=1e-3, gradient_checkpointing=False,
        shuffle_dataset=False, bf16=False, use_cpu=True, beta=0.1, reward_weights=[1.0, 0.5],
    )  # fmt: skip
    rewards = [recorder, partial_reward]
    ours = run(tmp_path, str(tmp_path / "adapter"), rewards, load_in_4bit=False, reference="initial", **same).history

    calls = iter([ids for ids in sampled if len(ids) == 8])

    class Trainer(trl.GRPOTrainer):
        def _generate_single_turn(self, *given, **more):
            return next(calls), None

    args = trl.GRPOConfig(
        str(tmp_path / "trl"), per_device_train_batch_size=8, logging_steps=1, save_strategy="no", disable_tqdm=True,
        report_to="none", **same,
    )  # fmt: skip
    trainer = Trainer(
        adapted, rewards, args, Dataset.from_list(ROWS), processing_class=AutoTokenizer.from_pretrained(DEMO_MODEL)
    )
    trainer.train()
    theirs = [line for line in trainer.state.log_history if "loss" in line]
    assert len(ours) == len(theirs) == 2
    for own, line in zip(ours, theirs, strict=True):
        del line["step_time"]
        assert line.keys() > TRL_METRICS - {"step_time", "rewards/answer_reward/mean", "rewards/answer_reward/std"}
        for name, value in line.items():
            ended = "terminated" in name and own["completions/clipped_ratio"] == 1  # which is 0 there
            assert ended or own[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_nothing_changes_at_a_learning_rate_of_zero(tmp_path):
    before = {}
    result = run(
        tmp_path, rewards=text_reward, learning_rate=0.0, max_steps=3,
        callbacks=[lambda step, _, policy: before.setdefault(step, {n: p.detach().clone() for n, p in policy.parameters_of(policy.adapter).items()})],
    )  # fmt: skip
    after = adapters(result)
    assert all(torch.equal(before[1][name], after[name]) for name in after)
    assert all((value == 0).all() for name, value in after.items() if "lora_B" in name)
    assert max(line["grad_norm"] for line in result.history) > 0, "there was something to learn"


def test_training_moves_the_adapters_and_only_them(tmp_path):
    result = run(tmp_path, rewards=varied_reward)
    assert any((value != 0).any() for name, value in adapters(result).items() if "lora_B" in name)
    frozen = [p for p in result.policy.model.parameters() if not p.requires_grad]
    assert frozen and all(p.grad is None for p in frozen)


@pytest.mark.parametrize(
    "changes", [{"fp16": True}, {"bf16": False}, {"load_in_4bit": False}, {"gradient_checkpointing": True}]
)
def test_every_precision_trains(tmp_path, changes):
    result = run(tmp_path, rewards=varied_reward, beta=0.1, max_steps=1, **changes)
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in result.history)
    assert any((value != 0).any() for name, value in adapters(result).items() if "lora_B" in name)


def test_every_family_trains(tmp_path, family):
    result = run(tmp_path, make_model(family), varied_reward, beta=0.1, bf16=False, max_steps=1)
    assert all(math.isfinite(line["loss"]) for line in result.history)
    assert result.history[0]["grad_norm"] > 0
    assert abs(result.history[0]["kl"]) < 1e-6, "the policy starts as its reference"


def test_several_iterations_compare_with_the_first_ones_log_probabilities(tmp_path):
    result = run(tmp_path, rewards=varied_reward, num_iterations=3, bf16=False, learning_rate=0.05)
    assert max(line["clip_ratio/region_mean"] for line in result.history) > 0, "the policy moved away from the old one"
    assert max(line["ratio/max"] for line in result.history) > 1.1
    assert "ratio/max" not in run(tmp_path / "once", max_steps=1).history[0]


def test_the_sampler_and_the_update_agree_on_every_token(tmp_path):
    """Logged at every step: rounding in fp32, and in bf16 what two orders of bf16 products differ by."""
    for settings, bound in (({"bf16": False}, 2e-5), ({}, 0.3)):
        for line in run(tmp_path / str(bound), rewards=varied_reward, learning_rate=1e-3, **settings).history:
            assert 0 < line["sampling/sampling_logp_difference/mean"] < bound / 8
            assert line["sampling/sampling_logp_difference/max"] < bound


def test_every_sampling_setting_reaches_the_engine(tmp_path, monkeypatch):
    """But rollout_paged, which a GPU alone reads: see test_generate.py."""
    given, run_engine, store_shape = [], engine.run, sample.store_shape

    def spy(request, shape):
        given.append(request)
        return run_engine(request, shape)

    def shaped(**asked):
        assert asked["budget_tokens"] == 333
        return store_shape(**asked)

    monkeypatch.setattr(engine, "run", spy)
    monkeypatch.setattr(sample, "store_shape", shaped)
    chosen = dict(temperature=0.9, top_p=0.8, top_k=7, min_p=0.01, repetition_penalty=1.1, max_completion_length=5)
    run(
        tmp_path, max_steps=1, num_generations=3, rollout_token_budget=333, token_budget=222, rollout_weights="4bit",
        rollout_kv="int8", rollout_cuda_graphs=False, use_cpu=False, stop_strings=["zz"], **chosen,
    )  # fmt: skip
    (request,) = given
    assert vars(request.params) == {**chosen, "stop_strings": ("zz",)}
    assert (request.num_generations, request.prefill_tokens, request.kv_dtype) == (3, 222, torch.int8)
    assert request.dense is False and request.captures is None


OF_THE_UPDATE = [  # but those that show in the metrics of other tests' runs
    {"weight_decay": 10.0}, {"max_grad_norm": 1e-4}, {"lora_alpha": 64}, {"reward_weights": [1.0, 0.0]},
    {"scale_rewards": "none"}, {"seed": 1}, {"shuffle_dataset": False}, {"lora_dropout": 0.5},
    {"multi_objective_aggregation": "normalize_then_sum"}, {"adv_estimator": "rloo"}, {"entropy_coef": 0.1},
    {"top_entropy_quantile": 0.3},
]  # fmt: skip
SEEN_ELSEWHERE_TOO = [  # in what other tests' runs log or save, or as arguments of the optimizer
    {"loss_type": "grpo"}, {"warmup_steps": 2}, {"lr_scheduler_type": "constant"}, {"adam_beta1": 0.5},
    {"adam_beta2": 0.5}, {"adam_epsilon": 1e-2}, {"scale_rewards": "batch"},
]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [*OF_THE_UPDATE, *(pytest.param(change, marks=pytest.mark.slow) for change in SEEN_ELSEWHERE_TOO)],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_of_the_update_changes_the_result(tmp_path, change, base_result):
    result = run_for_settings(tmp_path, **change)
    assert any(not torch.equal(value, base_result[name]) for name, value in adapters(result).items())


def letters_reward(completions, **kwargs):
    return [sum(map(ord, completion[0]["content"])) % 7 / 7 for completion in completions]


def run_for_settings(tmp_path, **changes):
    rewards = [varied_reward, letters_reward]
    return run(tmp_path, rewards=rewards, bf16=False, **changes)


@pytest.fixture(scope="module")
def base_result(tmp_path_factory):
    """The adapters of the same run with every setting at its default; two such runs are equal bit for bit."""
    first, second = (adapters(run_for_settings(tmp_path_factory.mktemp("base"))) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    return first


CONTROLLED = dict(beta=0.1, kl_target=0.1, kl_horizon=8, entropy_coef=0.01, use_adaptive_entropy=True)


@pytest.mark.parametrize(
    "changes",
    [CONTROLLED, {"fp16": True}, pytest.param({"beta": 0.1, "kl_in_reward": True}, marks=pytest.mark.slow)],
)
def test_where_nothing_was_learned_from_nothing_is_logged_as_0_and_nothing_moves(changes, tmp_path, capsys):
    """All completions are cut off, and those are left out."""
    seen = []
    result = run(
        tmp_path, rewards=text_reward, max_completion_length=2, mask_truncated_completions=True, **changes,
        callbacks=lambda step, metrics, policy: seen.append(metrics["entropy"]),
    )  # fmt: skip
    for line in result.history:
        names = ["entropy", "sampling/sampling_logp_difference/mean", "clip_ratio/low_min"]
        names += ["completions/mean_terminated_length", *(["kl"] if "beta" in changes else [])]
        assert [line[name] for name in names] == [None] * len(names)
        assert ("kl" in line) == ("beta" in changes) and line["frac_tokens_skipped"] == 1
        assert line["loss"] == line["grad_norm"] == 0.0 and line["completions/clipped_ratio"] == 1.0
        if changes == CONTROLLED:
            assert (line["beta"], line["entropy_coef"]) == (0.1, 0.01), "what nobody knows moves no coefficient"
    assert all((value == 0).all() for name, value in adapters(result).items() if "lora_B" in name)
    assert all(math.isnan(value) for value in seen)
    said = capsys.readouterr().err
    assert "  entropy -  kl -  " in said if "beta" in changes else "  entropy -  " in said
    assert "100 % cut off at max_completion_length" in said and "nan" not in said


def test_equal_rewards_leave_every_weight_where_it_was(tmp_path, capsys):
    """Eight times 0.1, whose mean is not 0.1 in fp32."""
    result = run(tmp_path, rewards=lambda completions, **_: [0.1] * len(completions), num_generations=8, max_steps=1)
    assert result.history[0]["frac_tokens_skipped"] == 1 and result.history[0]["frac_reward_zero_std"] == 1
    assert all((value == 0).all() for name, value in adapters(result).items() if "lora_B" in name)
    assert "no difference in any group" in capsys.readouterr().err


def test_completions_are_written_when_asked(tmp_path):
    def logged(completions, log_extra, **kwargs):
        log_extra("note", ["x" for _ in completions])
        return [1.0 for _ in completions]

    run(tmp_path, rewards=logged, log_completions=True, max_steps=1)
    path = tmp_path / "out/completions/completions_00001.parquet"
    table = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(table) == 8
    assert set(table.column_names) == {"step", "prompt", "completion", "logged", "advantage", "note"}


def test_rewards_that_never_apply_teach_nothing(tmp_path):
    result = run(tmp_path, rewards=lambda completions, **_: [None for _ in completions])
    assert result.history[0]["reward"] is None
    assert result.history[0]["grad_norm"] == 0.0


def test_epochs_say_the_number_of_steps(tmp_path):
    result = run(tmp_path, max_steps=-1, num_train_epochs=1.5, rows=ROWS[:3], max_completion_length=2)
    assert len(result.history) == math.ceil(1.5 * 3 / 2)


@pytest.mark.parametrize(
    ("given", "changes", "message"),
    [
        ({"model": "/no/such/folder"}, {}, "is not a folder on this machine"),
        ({"rows": [{"text": "x"}]}, {}, "has no column named prompt"),
        ({"rows": []}, {}, "train_dataset is empty"),
        ({"rewards": lambda **_: [1.0]}, {}, "returned 1 value for 4 completions"),
        ({"rewards": "no_such_reward"}, {}, "no reward function is named"),
        (
            {"rewards": [task.answer_reward, text_reward]},
            {"reward_weights": [1.0]},
            "reward_weights has 1 number for 2",
        ),
        ({}, {"output_dir": "/dev/null/out"}, "cannot be written"),
        ({}, {"token_budget": 16}, "more than token_budget=16"),
        ({}, {"rollout_token_budget": 16}, "more than rollout_token_budget=16"),
        ({}, {"max_prompt_length": 3}, "longer than max_prompt_length=3"),
        ({}, {"resume_from_checkpoint": True}, "has no whole checkpoint"),
        ({}, {"eval_steps": 5}, "there is no eval_dataset"),
        ({}, {"dataset_split": "test"}, "dataset_config and dataset_split are for hub datasets"),
        ({"model": 7}, {}, "model is a int; pass a hub id"),
        ({"callbacks": 5}, {}, "callbacks=5 is neither a function nor a list of functions"),
        (
            {"rows": [{"prompt": "\u6f22"}], "rewards": lambda completions, **_: [1.0] * len(completions)},
            {},
            "without a single token",
        ),
        ({}, {"resume_from_checkpoint": "/no/such/checkpoint"}, "since it does not exist"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch, given, changes, message):
    def no_work(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(sys.modules["lowmem_grpo.inputs.training"], "load_policy", no_work)
    with pytest.raises((ValueError, RuntimeError), match=message) as caught:
        run(tmp_path, **given, **changes)
    assert "\n" not in str(caught.value)


def test_a_reward_that_cannot_work_stops_the_run_at_its_start(tmp_path):
    def broken(completions, gold, **kwargs):
        return [1.0 for _ in completions]

    with pytest.raises(ValueError, match="reward function broken raised TypeError.*gold.*made-up completions"):
        run(tmp_path, rewards=broken)


def test_a_run_outlives_rewards_that_fail(tmp_path, caplog):
    def sometimes(completions, trainer_state, **kwargs):
        values: list = text_reward(completions)
        match trainer_state.global_step:
            case 0 if len(completions) > 4:  # which the made-up ones are
                raise OSError("the judge is gone")
            case 1:
                return values[:-1]
            case 2:
                return [float("nan"), 1e300, *values[2:]]
            case 3:
                time.sleep(60)
        return values

    result = run(tmp_path, rewards=[sometimes, text_reward], max_steps=5, reward_timeout=2.0)
    assert [line["rewards/sometimes/failures"] for line in result.history] == [8, 8, 2, 8, 0]
    assert [line["rewards/sometimes/mean"] is None for line in result.history] == [True, True, False, True, False]
    assert all(line["reward"] is not None and line["rewards/text_reward/failures"] == 0 for line in result.history)
    for said in (
        "raised OSError: the judge is gone",
        "returned 7 values for 8",
        "returned nan",
        "returned 1e+300",
        "took longer",
    ):
        assert said in caplog.text


def test_what_a_reward_logs_cannot_replace_the_trainers_own(tmp_path):
    refused = set()

    def sneaky(completions, log_metric, log_extra, **kwargs):
        for name in names:
            try:
                log_metric(name, float("inf"))
            except ValueError:
                refused.add(name)
        log_metric("mine", float("inf"))
        log_extra("advantage", ["x" for _ in completions])
        log_extra("mixed", [1, "two"] * (len(completions) // 2))
        return text_reward(completions)

    options = dict(log_completions=True, beta=0.1, kl_target=0.1, entropy_coef=0.1, dynamic_sampling_rounds=1)
    names = {"eval_reward"}
    names |= set(run(tmp_path / "first", rewards=sneaky, **options).history[0]) - {"mine"}
    result = run(tmp_path, rewards=sneaky, **options)
    assert refused == names
    assert [line["step"] for line in result.history] == [1, 2]
    assert all(math.isfinite(line["loss"]) and line["mine"] is None for line in result.history)
    path = tmp_path / "out/completions/completions_00001.parquet"
    table = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(table["advantage"][0], float)
    assert table["mixed"][:2] == ["1", "two"]


@pytest.mark.parametrize(
    ("values", "read"),
    [
        ([[1, "a"], ["b"]], ["[1, 'a']", "['b']"]),
        ([1, "two"], ["1", "two"]),
        ([10**30, 1], [str(10**30), "1"]),
        ([{1: 2}, None], ["{1: 2}", None]),
        ([{}, {}], ["{}", "{}"]),
        (["\ud800", "a"], ["\\ud800", "a"]),
        ([1j, 2j], ["1j", "2j"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ([1, 2.5], [1.0, 2.5]),
        ([None, None], [None, None]),
    ],
)
def test_a_logged_column_of_any_values_can_be_read_back_as_text_at_least(tmp_path, values, read):
    write_completions(tmp_path, 1, {"completion": ["a", "b"], "mine": values, "reward": [0.5, 1.0]})
    table = pq.read_table(tmp_path / "completions/completions_00001.parquet").to_pydict()
    assert table == {"step": [1, 1], "completion": ["a", "b"], "mine": read, "reward": [0.5, 1.0]}


def test_training_into_the_models_own_folder_leaves_the_model(tmp_path, tokenizer):
    make_model("qwen2").save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    run(tmp_path, str(tmp_path / "out"), text_reward, max_steps=1)
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "qwen2"


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    model = make_model("llama")
    model.resize_token_embeddings(20)
    with pytest.raises(ValueError, match="the tokenizer makes id .* and the model has 20"):
        run(tmp_path, model, text_reward)


def test_without_callbacks_a_run_trains(tmp_path):
    assert len(run(tmp_path, callbacks=None, max_steps=1).history) == 1


def test_a_config_of_another_kind_is_refused():
    of_trl = type("GRPOConfig", (), {"__module__": "trl.trainer"})()
    for config, name in (({"max_steps": 1}, "dict"), (of_trl, "trl.trainer.GRPOConfig")):
        with pytest.raises(ValueError, match=f"config is a {name}; pass the GRPOConfig of lowmem_grpo"):
            train(str(DEMO_MODEL), task.answer_reward, ROWS, config=config)


def test_the_output_of_a_run_is_no_model_but_its_adapter_is(tmp_path):
    run(tmp_path, max_steps=1, max_completion_length=2)
    with pytest.raises(ValueError, match="is the output of a run; its adapter is .*out/adapter"):
        run(tmp_path / "next", str(tmp_path / "out"))
    assert len(run(tmp_path / "next", str(tmp_path / "out/adapter"), max_steps=1, max_completion_length=2).history) == 1


def test_a_learning_rate_that_ruins_the_policy_shows_in_the_kl(tmp_path):
    result = run(tmp_path, rewards=text_reward, learning_rate=0.3, beta=0.01, max_steps=4, lr_scheduler_type="constant")
    assert result.history[-1]["kl"] > 1.0


def test_one_function_is_enough_and_settings_can_be_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lowmem_grpo.model.load.find_model", None)  # once, before any work, is enough
    config = dataclasses.replace(settings(tmp_path), output_dir="out", max_steps=1)
    assert train(str(DEMO_MODEL), task.answer_reward, ROWS, config=config).history[0]["step"] == 1


WITH_MEMORY = dict(rewards=text_reward, bf16=False, beta=0.1, learning_rate=1e-3, rollout_weights="4bit")


@pytest.fixture(scope="module")
def run_with_memory(tmp_path_factory):
    """(a run that never was out of memory, its matrix products)"""
    with OutOfMemory() as counted:
        return run(tmp_path_factory.mktemp("whole"), **WITH_MEMORY), counted.calls


@pytest.mark.parametrize(
    "share", [0.2, 0.55, 0.95, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.35, 0.75))]
)
def test_out_of_memory_anywhere_in_a_run_changes_nothing(tmp_path, share, run_with_memory):
    """Rollouts are begun again with fewer slots, passes of an update as they were: in fp32 the run is the same."""
    expected, calls = run_with_memory
    with OutOfMemory(nth=int(share * calls)) as interrupted:
        found = run(tmp_path, **WITH_MEMORY)
    assert interrupted.calls > calls, "something was done twice"
    for line, truth in zip(found.history, expected.history, strict=True):
        for name in set(truth) & TRL_METRICS - {"step_time"}:
            assert line[name] == pytest.approx(truth[name], rel=1e-4, abs=1e-5), name
    for name, value in adapters(found).items():
        torch.testing.assert_close(value, adapters(expected)[name], atol=4e-5, rtol=0)


def test_importance_weights_are_one_on_average_under_nucleus_sampling(tmp_path):
    """top_p 0.8, where the behaviour's own log-probabilities would make the mean weight the nucleus's mass."""
    (line,) = run(
        tmp_path, bf16=False, top_p=0.8, importance_sampling_mode="token_truncate", max_steps=1, prompts_per_step=8
    ).history
    name = "sampling/importance_sampling_ratio"
    assert line[f"{name}/mean"] == pytest.approx(1, abs=0.01) and line["ratio/min"] == line["ratio/max"] == 1
    assert 0.99 < line[f"{name}/min"] <= line[f"{name}/max"] < 1.01


def test_a_repetition_penalty_changes_the_importance_weights(tmp_path):
    lines = [
        run(
            tmp_path / str(on),
            rewards=varied_reward,
            bf16=False,
            repetition_penalty=1.5,
            max_completion_length=16,
            max_steps=1,
            importance_sampling_correction=on,
        ).history[0]
        for on in (True, False)
    ]
    name = "sampling/importance_sampling_ratio"
    assert lines[0][f"{name}/max"] > 1.2 > 0.8 > lines[0][f"{name}/min"]
    assert f"{name}/mean" not in lines[1] and lines[0]["loss"] != lines[1]["loss"]


def test_groups_without_a_difference_are_replaced_by_those_of_the_next_prompts(tmp_path):
    """Every other prompt in the stream gets one reward for all: none of them is in a step, and all are counted."""
    rows = [{**row, "good": place % 2} for place, row in enumerate(ROWS[:12])]
    seen = []

    def reward(prompts, completions, good, trainer_state, **kwargs):
        seen.extend(good[::4] if trainer_state.max_steps == 2 else [])  # of made-up completions it is 1
        return [float(place % 4) if g else 0.5 for place, g in enumerate(good)]

    settings = dict(
        rewards=reward, rows=rows, shuffle_dataset=False, log_completions=True, max_steps=2, max_completion_length=2
    )
    result = run(tmp_path, dynamic_sampling_rounds=3, **settings)
    assert seen == [row["good"] for row in rows][: len(seen)], "the stream's order"
    for line in result.history:
        assert line["dynamic_sampling/dropped_groups"] >= 1 and line["dynamic_sampling/rounds"] >= 1
        assert line["frac_tokens_skipped"] <= 0.25, "only the completion at its group's mean, if any"
    assert result.history[-1]["epoch"] == pytest.approx(len(seen) / 12)
    table = load_dataset("parquet", data_files=str(tmp_path / "out/completions/*.parquet"), split="train")
    assert len(table) == 2 * 2 * 4 and 0.5 not in table["reward"]
    plain = run(tmp_path / "plain", **settings)
    assert plain.history[0]["frac_reward_zero_std"] == 0.5


def test_a_round_that_finds_nothing_fills_the_step_with_what_it_has(tmp_path):
    (line,) = run(
        tmp_path, rewards=lambda completions, **kwargs: [1.0] * len(completions), max_steps=1, dynamic_sampling_rounds=2
    ).history
    assert line["dynamic_sampling/rounds"] == 2 and line["dynamic_sampling/dropped_groups"] == 4
    assert line["grad_norm"] == 0 and line["frac_reward_zero_std"] == 1


def reward_by_column(prompts, completions, good, **kwargs):
    """A difference within the group where `good` says so."""
    return [float(place % 4) if g else 0.5 for place, g in enumerate(good)]


def test_groups_of_earlier_steps_fill_a_step_up(tmp_path):
    """Two prompts a step: two good ones, then none, then none, then none. The buffer's one is used once."""
    rows = [{**row, "good": place < 2} for place, row in enumerate(ROWS[:8])]
    lines = run(
        tmp_path, rewards=reward_by_column, rows=rows, shuffle_dataset=False, replay_buffer_size=1, max_steps=4,
        log_completions=True, bf16=False, repetition_penalty=1.2, learning_rate=1e-2,
    ).history  # fmt: skip
    assert [line["replay/groups"] for line in lines] == [0, 1, 0, 0]
    assert lines[1]["frac_reward_zero_std"] == 1, "of what was sampled"
    assert lines[1]["grad_norm"] > 0 == lines[2]["grad_norm"]
    assert lines[1]["sampling/sampling_logp_difference/max"] is None, "of what this step's policy sampled: not computed"
    tables = [
        load_dataset(
            "parquet", data_files=str(tmp_path / f"out/completions/completions_0000{step}.parquet"), split="train"
        )
        for step in (1, 2)
    ]
    assert tables[1]["completion"][4:] == tables[0]["completion"][4:], "the newest group, after the fresh one"
    assert tables[1]["reward_by_column"][4:] == [0, 1, 2, 3]


def test_prompts_that_taught_nothing_come_up_less_often(tmp_path):
    rows = [{**row, "good": place % 2} for place, row in enumerate(ROWS[:4])]
    seen = []

    def reward(good, trainer_state, **kwargs):
        seen.extend(good[::4] if trainer_state.max_steps == 10 else [])  # of made-up completions it is 1
        return reward_by_column(good=good, **kwargs)

    run(tmp_path, rewards=reward, rows=rows, curriculum_skip=0.9, max_completion_length=1, max_steps=10)
    assert sum(seen[:4]) == 2, "each is tried once"
    assert sum(seen[4:]) >= 12, f"16 more, of which half were dull: {seen[4:]}"


def test_the_reference_is_the_base_or_the_adapter_that_training_started_from(tmp_path):
    # Hot, so that the lengths within a group differ and the first step moves the adapter.
    settings = dict(rewards=text_reward, learning_rate=1e-2, max_steps=2, temperature=2.0)
    first = run(tmp_path / "first", **settings)
    adapter = f"{first.output_dir}/adapter"
    kl = {
        reference: run(
            tmp_path / reference, model=adapter, beta=0.1, reference=reference, bf16=False, **settings
        ).history
        for reference in ("base", "initial")
    }
    assert kl["initial"][0]["kl"] == pytest.approx(0, abs=1e-9) and kl["initial"][1]["kl"] > 1e-6
    assert kl["base"][0]["kl"] > 1e-4


def test_a_reference_that_follows_the_policy_is_where_the_policy_was(tmp_path):
    """Moved all the way after every step, it is the policy that the next step starts with."""
    settings = dict(rewards=text_reward, beta=0.1, bf16=False, max_steps=3, learning_rate=1e-2)
    kl = [line["kl"] for line in run(tmp_path / "still", **settings).history]
    followed = run(
        tmp_path / "follows", sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0, **settings
    )
    assert [line["kl"] for line in followed.history] == pytest.approx([0, 0, 0], abs=1e-9) and kl[2] > 1e-5


def test_several_steps_on_one_rollout_are_measured_against_its_policy(tmp_path):
    (line,) = run(
        tmp_path, rewards=varied_reward, steps_per_generation=2, max_steps=1, learning_rate=1e-2, bf16=False
    ).history
    assert line["ratio/min"] < 1 < line["ratio/max"], "the second part's policy has moved"
    assert {"time/old_s", "memory/old/peak_mib", "tokens_per_s/old"} <= set(line)
    difference = line["sampling/sampling_logp_difference/mean"]
    assert 0 < difference < line["sampling/sampling_logp_difference/max"] < 1e-4, "measured, and of the old policy"


def test_a_kl_in_the_reward_lowers_the_reward_of_what_has_drifted(tmp_path):
    settings = dict(beta=0.5, kl_estimator="k1", learning_rate=3e-2, bf16=False, scale_rewards="none")
    for line in run(
        tmp_path, kl_in_reward=True, rewards=lambda completions, **_: [1.0] * len(completions), **settings
    ).history:
        assert line["reward"] == 1.0
    assert line["kl"] != 0 and line["grad_norm"] > 0, "the rewards are all alike; what differs is their KL"


def test_a_kl_in_the_reward_is_not_in_the_loss(tmp_path):
    """With the default estimator; other advantages than with the same beta in the loss, and a kl that is logged."""
    settings = dict(rewards=text_reward, beta=0.5, bf16=False, max_steps=3, learning_rate=1e-2)
    found = [run(tmp_path / str(on), kl_in_reward=on, **settings) for on in (True, False)]
    for line in found[0].history[1:]:
        assert line["kl"] > 0 and line["grad_norm"] > 0
    assert any(not torch.equal(value, adapters(found[1])[name]) for name, value in adapters(found[0]).items())


def test_the_kl_of_a_replayed_group_is_todays_policys(tmp_path):
    """So it takes a pass over every token before the update."""
    (line,) = run(tmp_path, rewards=text_reward, beta=0.1, kl_in_reward=True, replay_buffer_size=2, max_steps=1).history
    assert "time/old_s" in line


def test_a_step_that_is_replayed_altogether_goes_on(tmp_path):
    """Rewards vary for two steps and then no more: the buffer's four groups fill two steps, then nothing is left."""

    def reward(completions, trainer_state, **kwargs):
        return [float(place % 4) if trainer_state.global_step < 2 else 0.5 for place in range(len(completions))]

    lines = run(
        tmp_path, rewards=reward, replay_buffer_size=8, max_steps=6, max_completion_length=2, save_steps=1
    ).history
    assert [line["replay/groups"] for line in lines] == [0, 0, 2, 2, 0, 0]
    assert lines[3]["grad_norm"] > 0 == lines[4]["grad_norm"]


def test_a_resumed_run_samples_from_the_weights_that_it_had(tmp_path, monkeypatch):
    available = SimpleNamespace(available=10**12)
    monkeypatch.setattr("psutil.virtual_memory", lambda: available)
    run(tmp_path, max_steps=1, save_steps=1)
    available.available = 1000
    result = run(tmp_path, max_steps=2, resume_from_checkpoint=True)
    assert result.history[-1]["rollout/dense_weights_mib"] > 0
    assert run(tmp_path / "new", max_steps=1).history[-1]["rollout/dense_weights_mib"] == 0


def test_a_resumed_run_has_its_rewards(tmp_path):
    run(tmp_path, rewards=text_reward)
    with pytest.raises(ValueError, match="of a run with the rewards text_reward, and these are answer_reward"):
        run(tmp_path, max_steps=4, resume_from_checkpoint=True)


def test_a_reference_that_follows_a_continued_adapter_starts_from_it(tmp_path):
    first = run(tmp_path / "first", max_steps=1)
    with pytest.raises(ValueError, match="set reference='initial'"):
        run(tmp_path / "next", model=f"{first.output_dir}/adapter", beta=0.1, sync_ref_model=True)


def test_groups_that_a_batch_tells_apart_are_not_dropped(tmp_path):
    """reinforce_plus_plus: a group of ones beside a group of zeros has advantages."""

    def reward(prompts, completions, **kwargs):
        return [float(place // 4 % 2) for place in range(len(completions))]

    settings = dict(rewards=reward, dynamic_sampling_rounds=2, max_steps=1, max_completion_length=2)
    (line,) = run(tmp_path / "batch", adv_estimator="reinforce_plus_plus", **settings).history
    assert line["dynamic_sampling/rounds"] == 0 and line["grad_norm"] > 0
    (line,) = run(tmp_path / "group", **settings).history
    assert line["dynamic_sampling/rounds"] == 2


def test_coefficients_are_logged_where_something_moves_them(tmp_path):
    line, _ = run(
        tmp_path, rewards=text_reward, entropy_coef=0.1, use_adaptive_entropy=True, entropy_target=9.0, beta=0.1,
        kl_target=0.05, kl_horizon=16,
    ).history  # fmt: skip
    assert line["entropy_coef"] == pytest.approx(0.105) and line["beta"] == pytest.approx(0.1 * (1 - 0.2 * 8 / 16))


def saved(folder) -> dict[str, torch.Tensor]:
    """The adapter and the optimizer's state in a checkpoint."""
    files = ("adapter_model", "optimizer")
    return {f"{file}.{n}": v for file in files for n, v in load_file(folder / f"{file}.safetensors").items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("loss", {}),
        pytest.param("infinity", {"optim": "adamw_8bit"}, marks=pytest.mark.slow),
        ("gradient", {"bf16": False, "optim": "adamw_torch"}),
        ("norm", {"bf16": False, "weight_decay": 0.1}),
        pytest.param("loss", {"fp16": True}, marks=pytest.mark.slow),
        ("gradient", {"fp16": True, "optim": "adamw_8bit"}),
    ],
)
def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path, spoil, capsys, what, changes):
    """Spoiled in step 2 of 3: no weight, no number of the optimizer's state and not the learning rate."""
    spoil(what, lambda call: call == 2)
    result = run(
        tmp_path,
        rewards=varied_reward,
        loss_type="spoiled",
        max_steps=3,
        max_completion_length=2,
        save_steps=1,
        **changes,
    )
    first, second, third = (saved(tmp_path / f"out/checkpoint-{step}") for step in (1, 2, 3))
    assert equal(first, second) and not equal(second, third)
    assert all(value.isfinite().all() for value in third.values())
    assert [line["skipped_steps"] for line in result.history] == [0, 1, 0]
    assert [line["learning_rate"] for line in result.history] == pytest.approx([1e-3, 2e-3 / 3, 2e-3 / 3])
    said = " ".join(capsys.readouterr().err.split())
    by_the_scale = what == "gradient" and "fp16" in changes
    assert "step 2: the " in said and ("overflows float16" if by_the_scale else "loss_type='spoiled'") in said
    assert "1 of 3 optimizer steps changed no weight" in said


def test_of_several_optimizer_steps_one_is_skipped(tmp_path, spoil):
    """The second of four: the other three are taken, and the schedule goes on."""
    calls = spoil("loss", lambda call: call == 2)
    result = run(
        tmp_path, rewards=varied_reward, loss_type="spoiled", max_steps=2, max_completion_length=2, steps_per_generation=2, num_iterations=2,
        max_nonfinite_steps=1,
    )  # fmt: skip
    assert calls == [8] and [line["skipped_steps"] for line in result.history] == [1, 0]
    assert result.history[1]["learning_rate"] == pytest.approx(5e-4)
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in result.history), "of the last ones"


def test_a_run_whose_gradient_is_never_finite_ends_with_its_last_good_checkpoint(tmp_path, spoil):
    spoil("loss", lambda call: call in (2, 4, 5))
    settings = dict(
        rewards=varied_reward, loss_type="spoiled", max_nonfinite_steps=1, max_steps=7, max_completion_length=2
    )
    words = (
        "steps in a row that changed no weight: 2, where max_nonfinite_steps is 1; in step 5 the loss is "
        r"not finite \(likely cause: loss_type='spoiled', .*the last good checkpoint is .*checkpoint-5"
    )
    with pytest.raises(FloatingPointError, match=words):
        run(tmp_path, **settings)
    assert all(value.isfinite().all() for value in saved(tmp_path / "out/checkpoint-5").values())
    assert not (tmp_path / "out/adapter").exists()
    # Resumed, it has one more try each time.
    spoil("loss", lambda call: call == 1)
    with pytest.raises(FloatingPointError, match="changed no weight: 3, .* in step 6 the"):
        run(tmp_path, resume_from_checkpoint=True, **settings)
    spoil("loss", lambda call: call == 0)
    result = run(tmp_path, resume_from_checkpoint=True, **settings)
    assert [line["skipped_steps"] for line in result.history] == [0, 1, 0, 1, 1, 1, 0]


def test_none_is_tolerated_where_none_may_be(tmp_path, spoil):
    spoil("gradient", lambda call: call == 1)
    with pytest.raises(FloatingPointError, match="changed no weight: 1, .*checkpoint-1$"):
        run(tmp_path, rewards=varied_reward, loss_type="spoiled", max_nonfinite_steps=0, bf16=False)


def test_fp16_may_look_for_its_loss_scale_as_long_as_it_takes(tmp_path, capsys):
    """A loss times 1,000 overflows at first. No step may be skipped but for the scale, which is above 1."""

    @register_objective("steep")
    def losses(tokens, config):
        return -1e3 * tokens.advantages * tokens.logprobs

    try:
        result = run(
            tmp_path, rewards=varied_reward, loss_type="steep", fp16=True, max_nonfinite_steps=0, max_steps=9,
            max_completion_length=2, prompts_per_step=1,
        )  # fmt: skip
    finally:
        del LOSS_TYPES["steep"], LOSSES["steep"]
    skipped = [line["skipped_steps"] for line in result.history]
    assert skipped[:3] == [1, 1, 1] and 0 in skipped
    assert result.history[skipped.index(0)]["learning_rate"] == 1e-3, "the schedule waited"
    assert capsys.readouterr().err.count("overflows float16") == 1


def test_fp16_at_a_loss_scale_of_1_has_no_excuse_left(tmp_path, spoil):
    """17 steps in a row, at scales from 2^16 to 1, and at the last of them the scale is not to blame."""
    calls = spoil("gradient", lambda call: True)
    with pytest.raises(FloatingPointError, match="changed no weight: 1, .* in step 17 the"):
        run(
            tmp_path, rewards=varied_reward, loss_type="spoiled", fp16=True, max_nonfinite_steps=0, max_steps=30,
            max_completion_length=1, prompts_per_step=1,
        )  # fmt: skip
    assert calls == [17]


def test_weights_out_of_range_are_never_saved(tmp_path):
    """A first step of rate 0 is saved; the second takes the weights to where their squares are infinite."""
    settings = dict(
        rewards=varied_reward,
        learning_rate=1e38,
        save_steps=1,
        save_total_limit=1,
        max_steps=4,
        max_completion_length=2,
    )
    with pytest.raises(FloatingPointError, match="step 1 moved .*learning_rate=1e.38.* there is no checkpoint yet"):
        run(tmp_path / "at once", **settings)
    assert not list((tmp_path / "at once/out").glob("checkpoint-*"))
    with pytest.raises(FloatingPointError, match="step 2 moved .*; the last good checkpoint is .*checkpoint-1$"):
        run(tmp_path, lr_scheduler_type="constant_with_warmup", warmup_steps=1, **settings)
    assert all(value.isfinite().all() for value in saved(tmp_path / "out/checkpoint-1").values())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "checkpoint-1", "data_preview.txt", "grpo_config.json", "metrics.jsonl", "report.html", "run.json",
    ]  # fmt: skip


def spoil_a_weight(policy) -> None:
    next(iter(policy.parameters_of(policy.adapter).values())).data[0, 0] = torch.nan


@pytest.mark.parametrize("save_steps", [1, 20])
def test_weights_that_a_callback_spoils_are_never_saved(tmp_path, capsys, save_steps):
    def callback(step, metrics, policy):
        if step == 2:
            spoil_a_weight(policy)

    with pytest.raises(FloatingPointError) as error:
        run(
            tmp_path,
            rewards=varied_reward,
            callbacks=callback,
            save_steps=save_steps,
            save_total_limit=1,
            max_steps=4,
            max_completion_length=2,
        )
    good = sorted((tmp_path / "out").glob("checkpoint-*"))
    if save_steps == 1:
        assert [folder.name for folder in good] == ["checkpoint-1"]
        assert str(error.value).endswith(f"at step 2; the last good checkpoint is {good[0]}")
        assert all(value.isfinite().all() for value in saved(good[0]).values())
    else:
        assert not good and "no checkpoint yet" in str(error.value)
        assert "callback callback left a weight that is not finite at step 2" in str(error.value)
    assert "stopped; the adapter is not saved" in " ".join(capsys.readouterr().err.split())
    assert not list((tmp_path / "out").glob("*.being-written")) and not (tmp_path / "out/adapter").exists()


def test_a_prompt_that_the_model_overflows_on_costs_its_own_step(tmp_path):
    """One character's embedding is NaN: its step is skipped, its groups are not replayed, and the others are learned."""
    model = make_model("llama")
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("?")["input_ids"][0]] = torch.nan
    rows = [{"prompt": text} for text in ("1+1=", "2+2=", "?+1=", "3+3=", "4+4=", "5+5=")]

    result = run(
        tmp_path, model, varied_reward, rows, shuffle_dataset=False, max_steps=3, max_completion_length=1, bf16=False,
        replay_buffer_size=8,
    )  # fmt: skip
    assert [line["skipped_steps"] for line in result.history] == [0, 1, 0]
    replay = load_file(tmp_path / "out/checkpoint-3/replay.safetensors")
    assert replay["positions"].tolist() == [0, 1, 3, 4, 5] and replay["logprobs"].isfinite().all()


@pytest.mark.parametrize("engine_refusal", [None, "made up"])
def test_a_model_that_is_not_finite_is_said_to_be(tmp_path, tokenizer, engine_refusal):
    """By the engine, and by transformers' generate, whose multinomial would say it otherwise."""
    model = make_model("llama")
    model.get_decoder().norm.weight.data[3] = torch.nan
    policy = make_policy(model)
    sampler = Sampler(policy, settings(tmp_path))
    sampler.engine_refusal = engine_refusal
    prompts = [Prompt("1+1=", tokenizer("1+1=")["input_ids"], {})]
    for sampled in (partial(sampler.complete, num_generations=2), sampler.complete_greedily):
        with pytest.raises(FloatingPointError, match="cannot be sampled from, since its logits are not finite"):
            sampled(prompts)


@pytest.mark.parametrize("kl_in_reward", [False, True])
def test_a_reference_that_is_not_finite_moves_neither_weights_nor_beta(tmp_path, kl_in_reward):
    def callback(step, metrics, policy):
        next(iter(policy.reference.values()))[0, 0] = torch.nan

    def spoiled_reference():
        return run(
            tmp_path / str(kl_in_reward), rewards=varied_reward, callbacks=callback, beta=0.1, kl_target=0.01,
            kl_horizon=8, reference="initial", kl_in_reward=kl_in_reward, max_steps=3, max_completion_length=2, bf16=False,
        )  # fmt: skip

    with pytest.raises(FloatingPointError, match="checkpoint-3 is not saved, since .*lora_A.* of its reference is not"):
        spoiled_reference()
    path = tmp_path / str(kl_in_reward) / "out/metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if "doctor" not in line]  # who speaks at the second
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1]
    assert len({line["beta"] for line in lines}) == 1 and lines[1]["kl"] is None

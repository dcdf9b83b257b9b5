"""Whole runs on a GPU: they learn, and one that stops and goes on ends as one that does not."""

import math
import random
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import DEMO_MODEL

from lowmem_grpo import GRPOConfig, RewardConfig, SFTConfig, sft, train, train_reward_model
from lowmem_grpo.demo import task
from lowmem_grpo.errors import InputError

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
TRAIN, EVAL = task.splits()
REWARDS = [task.answer_reward, task.tag_format_reward]
UNLIKE = ("time/", "memory/", "tokens_per_s/", "step_time", "rollout/replayed", "rollout/cuda", "rollout/kv_mib")


def grpo(folder, callbacks=(), **settings):
    config = GRPOConfig(**{
        "output_dir": str(folder), "max_steps": 4, "save_steps": 2, "max_completion_length": 32, "learning_rate": 1e-3,
        "beta": 0.02, **settings,
    })  # fmt: skip
    return train(str(DEMO_MODEL), REWARDS, task.rows(TRAIN), task.rows(EVAL[:64]), config=config, callbacks=callbacks)


def imitate(folder, callbacks=(), **settings):
    rows = [
        {"prompt": [{"role": "user", "content": task.question(problem)}],
         "completion": [{"role": "assistant", "content": task.worked(problem)}]}
        for problem in TRAIN[:64]
    ]  # fmt: skip
    config = SFTConfig(**{
        "output_dir": str(folder), "max_steps": 4, "save_steps": 2, "examples_per_step": 8, "learning_rate": 1e-3,
        **settings,
    })  # fmt: skip
    return sft(str(DEMO_MODEL), rows, rows[:16], config, callbacks=callbacks)


def judge(folder, callbacks=(), **settings):
    """A run that learns to tell right sums from wrong ones."""
    pairs = [
        {"prompt": [{"role": "user", "content": task.question(problem)}],
         "chosen": [{"role": "assistant", "content": task.worked(problem)}],
         "rejected": [{"role": "assistant", "content": "<think></think><answer>0</answer>"}]}
        for problem in TRAIN[:64]
    ]  # fmt: skip
    config = RewardConfig(**{
        "output_dir": str(folder), "max_steps": 4, "save_steps": 2, "pairs_per_step": 8, "learning_rate": 1e-3,
        **settings,
    })  # fmt: skip
    return train_reward_model(str(DEMO_MODEL), pairs, pairs[:16], config, callbacks=callbacks)


def with_critic(folder, callbacks=(), **settings):
    method = dict(adv_estimator="gae", num_generations=1, prompts_per_step=64, critic_learning_rate=3e-3)
    return grpo(folder, callbacks, **method, **settings)


def adapter(folder):
    return load_file(folder / "adapter/adapter_model.safetensors")


def comparable(result):
    return [{key: value for key, value in line.items() if not key.startswith(UNLIKE)} for line in result.history]


def test_grpo_takes_the_demo_to_right_answers(tmp_path):
    result = grpo(tmp_path, max_steps=40, save_steps=40, bf16=True, reward_weights=[1.0, 0.2])
    before, after = (line["eval_reward"] for line in (result.eval_history[0], result.eval_history[-1]))
    assert after > before + 0.3, (before, after)
    replayed = [line["rollout/replayed_share"] for line in result.history[1:]]
    assert min(replayed) > 0.95, "from the second rollout on, steps are replays"
    differences = [line["sampling/sampling_logp_difference/mean"] for line in result.history]
    assert max(differences) < 0.05, "sampling and training agree"


def test_supervised_training_learns_its_examples(tmp_path):
    result = imitate(tmp_path, max_steps=16, save_steps=16, bf16=True)
    before, after = (line["eval_loss"] for line in (result.eval_history[0], result.eval_history[-1]))
    assert after < before / 1.5, (before, after)


def test_a_reward_model_tells_right_from_wrong(tmp_path):
    result = judge(tmp_path, max_steps=12, save_steps=12, bf16=True)
    assert result.eval_history[-1]["eval_accuracy"] == 1.0


def test_a_reward_adapter_worn_between_rollouts_leaves_their_graphs_as_they_are(tmp_path):
    judge(tmp_path / "judge", max_steps=8, save_steps=8, bf16=True)
    config = GRPOConfig(
        output_dir=str(tmp_path / "policy"), max_steps=20, save_steps=20, max_completion_length=32, learning_rate=1e-3,
        bf16=True, beta=0.02,
    )  # fmt: skip
    result = train(str(DEMO_MODEL), str(tmp_path / "judge/adapter"), task.rows(TRAIN), config=config)
    rewards = [line["reward"] for line in result.history]
    assert sum(rewards[-5:]) > sum(rewards[:5]), rewards
    assert min(line["rollout/replayed_share"] for line in result.history[1:]) > 0.95
    assert max(line["sampling/sampling_logp_difference/mean"] for line in result.history) < 0.05


def test_a_policy_learns_beside_a_critic(tmp_path):
    result = with_critic(tmp_path, max_steps=40, save_steps=40, bf16=True)
    before, after = (line["eval_reward"] for line in (result.eval_history[0], result.eval_history[-1]))
    assert after > before + 0.2, (before, after)
    assert all(math.isfinite(line["value_loss"]) for line in result.history)


def stopped_and_resumed(training, folder):
    """A training's history, stopped in its third step of four and gone on with."""

    def stop(step, *_):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training(folder, stop, bf16=True)
    return comparable(training(folder, bf16=True, resume_from_checkpoint="auto"))


@pytest.mark.parametrize("training", [grpo, with_critic, imitate, judge])
def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(training, tmp_path):
    training = partial(training, full_determinism=True)
    whole, resumed = (
        comparable(training(tmp_path / "whole", bf16=True)),
        stopped_and_resumed(training, tmp_path / "cut"),
    )
    differing = [
        (ours["step"], name, ours[name], theirs[name])
        for ours, theirs in zip(resumed, whole, strict=True)
        for name in ours
        if ours[name] != theirs.get(name)
    ]
    assert not differing, differing[:6]
    expected, found = adapter(tmp_path / "whole"), adapter(tmp_path / "cut")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_reward_that_seeds_the_gpu_changes_no_sample(tmp_path):
    def seeding(completions, **_):
        torch.cuda.manual_seed_all(0)
        torch.manual_seed(0)
        random.seed(0)
        return [float(len(text) % 3) for text in map(str, completions)]

    def quiet(completions, **_):
        return [float(len(text) % 3) for text in map(str, completions)]

    quiet.__name__ = seeding.__name__
    found = [
        train(
            str(DEMO_MODEL), reward, task.rows(TRAIN), config=GRPOConfig(
                output_dir=str(tmp_path / str(number)), max_steps=3, max_completion_length=16, bf16=True, doctor="off"
            ),
        ).history
        for number, reward in enumerate((quiet, seeding))
    ]  # fmt: skip
    assert [line["reward"] for line in found[0]] == [line["reward"] for line in found[1]]


@pytest.mark.parametrize(
    "settings",
    [
        {"activation_offloading": True, "gradient_checkpointing": True},
        {"tiled_mlp": True},
        {"use_liger_kernel": True},
        {"rollout_kv": "int8"},
        {"rollout_weights": "dense"},
        {"rollout_cuda_graphs": False},
        {"optim": "adamw_8bit"},
        {"optim": "paged_adamw_8bit"},
        {"optim": "paged_adamw_32bit"},
        {"fp16": True},
        {"bf16": False},
    ],
    ids=str,
)
def test_a_run_with_each_setting_that_is_for_a_gpu_ends_with_finite_numbers(settings, tmp_path):
    result = grpo(tmp_path, **{"max_steps": 2, **settings})
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in result.history)


def test_a_budget_of_memory_holds_for_a_whole_run(tmp_path):
    try:
        result = grpo(tmp_path, vram_budget="1.5GB", bf16=True)
    except InputError as error:
        pytest.skip(f"no plan: {error}")
    peak_mib = max(value for line in result.history for key, value in line.items() if key.endswith("/peak_mib"))
    assert peak_mib < 1.5e9 / 2**20

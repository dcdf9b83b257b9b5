"""PPO's critic: values and their gradient, the advantages that follow, and whole runs with it."""

import dataclasses
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from test_adapters import wake
from test_checkpoint import Stop, comparable, noisy_reward, stop_at
from test_score_head import named_model
from test_train import ROWS, adapters, run, text_reward
from test_update import fixed_rollout
from tiny_models import OutOfMemory, make_policy
from transformers import PreTrainedConfig

from lowmem_grpo import train
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.losses import LOSS_TYPES
from lowmem_grpo.demo import task
from lowmem_grpo.demo.run import MODEL, recipe
from lowmem_grpo.errors import InputError, NotFiniteError
from lowmem_grpo.inputs.prompts import _refuse_critic
from lowmem_grpo.model.packing import pack
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.objective.loss import LOSSES, register_objective
from lowmem_grpo.out_of_memory import TokenBudget
from lowmem_grpo.output.folder import read_state
from lowmem_grpo.rollout.rollout import Rollout
from lowmem_grpo.update.critic import CRITIC, Critic, backward, with_gae, with_values

pytestmark = pytest.mark.usefixtures("known_trials")

PPO: dict[str, Any] = dict(adv_estimator="gae", num_generations=1, prompts_per_step=4)
SHORT: dict[str, Any] = dict(**PPO, max_completion_length=6)
PLAIN = torch.amp.GradScaler("cpu", enabled=False)


def ppo_config(**settings) -> GRPOConfig:
    return GRPOConfig(**{**PPO, "bf16": False, "use_cpu": True, **settings})


def policy_with_critic(model: Any = "qwen3", **settings) -> Policy:
    policy = make_policy(model, **settings)
    Critic(policy, ppo_config(), total_steps=10)
    wake(policy, CRITIC)
    return policy


def rollout_to_value(num_generations: int = 2) -> Rollout:
    """Uneven completions, one of them masked, with rewards."""
    rollout = fixed_rollout(num_generations)
    draw = torch.Generator().manual_seed(6)
    return dataclasses.replace(rollout, rewards=torch.rand(len(rollout.completions), 1, generator=draw))


def values_by_text(policy: Policy, rollout: Rollout) -> torch.Tensor:
    """The critic's value of each token, (M,), with its gradient, a completion at a time."""
    with policy.wearing(CRITIC):
        return torch.cat(
            [
                policy.scores(batch)
                for b, completion in enumerate(rollout.completions)
                for batch in pack(
                    [rollout.prompt_of(b).ids], [completion.ids], token_budget=10**6, pad_token_id=0,
                    device=policy.device,
                )
            ]
        )  # fmt: skip


def critic_gradient(policy: Policy) -> torch.Tensor:
    """The gradient of the critic, flat; it has none afterwards, and nothing else has had one."""
    parameters = policy.parameters_of(CRITIC)
    own = {id(parameter) for parameter in parameters.values()}
    assert all(p.grad is None for p in policy.model.parameters() if id(p) not in own)
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters.values() if parameter.grad is not None])
    for parameter in parameters.values():
        parameter.grad = None
    return flat


LAYOUTS = [(False, 10_000), (False, 60), (True, 10_000), (True, 60)]


def test_values_are_those_of_each_completion_alone_in_every_layout():
    policy, rollout = policy_with_critic(), rollout_to_value(num_generations=3)
    expected = values_by_text(policy, rollout).detach()
    expected[rollout.offsets[-2] :] = 0  # the last completion is masked
    for padding_free, token_budget in LAYOUTS:
        config = ppo_config(padding_free=padding_free)
        found = with_values(policy, rollout, config, TokenBudget(token_budget)).values
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with OutOfMemory(tokens=70):
        found = with_values(policy, rollout, ppo_config(), TokenBudget(10_000)).values
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def valued(policy: Policy, rollout: Rollout) -> Rollout:
    """A rollout with values and returns, after which the critic has moved: values are clipped on both sides."""
    rollout = with_gae(with_values(policy, rollout, ppo_config(), TokenBudget(10_000)), 0.0, ppo_config(lam=0.9))
    assert rollout.values is not None
    draw = torch.Generator().manual_seed(7)
    moved = rollout.values + 0.3 * torch.randn(rollout.values.shape, generator=draw)
    return dataclasses.replace(rollout, values=moved)


def test_the_gradient_is_that_of_the_mean_value_loss_in_every_layout_and_out_of_memory():
    policy = policy_with_critic()
    rollout = valued(policy, rollout_to_value(num_generations=3))
    counted = slice(0, int(rollout.offsets[-2]))
    v, old, returns = (x[counted] for x in (values_by_text(policy, rollout), rollout.values, rollout.returns))
    clipped = old + (v - old).clamp(-0.2, 0.2)
    loss = 0.5 * torch.maximum((v - returns) ** 2, (clipped - returns) ** 2).mean()
    loss.backward()
    expected, share = critic_gradient(policy), ((clipped - returns).abs() > (v - returns).abs()).float().mean()
    assert expected.norm() > 0 and 0.1 < share < 0.9
    for layout, failing in [*((layout, {}) for layout in LAYOUTS), ((True, 10_000), {"tokens": 70})]:
        config, budget = ppo_config(padding_free=layout[0]), TokenBudget(layout[1])
        with OutOfMemory(**{"tokens": 10**6, **failing}):
            found, decided = budget.fit(partial(backward, policy, rollout, PLAIN, config), rollout.lengths)
        torch.testing.assert_close(found, loss.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(decided, share, rtol=1e-4, atol=1e-6)
        assert (critic_gradient(policy) - expected).norm() / expected.norm() < 1e-4


def test_layers_that_are_computed_again_wear_the_critic():
    gradients = []
    for gradient_checkpointing in (False, True):
        policy = policy_with_critic(gradient_checkpointing=gradient_checkpointing)
        rollout = valued(policy, rollout_to_value())
        backward(policy, rollout, PLAIN, ppo_config(), 10_000)
        gradients.append(critic_gradient(policy))
    torch.testing.assert_close(*gradients)


def test_what_the_critic_learns_leaves_the_policy_bit_for_bit():
    policy, config = make_policy("qwen3"), ppo_config(critic_learning_rate=1e-2)
    critic = Critic(policy, config, total_steps=10)
    own = {name: p.detach().clone() for name, p in policy.parameters_of(policy.adapter).items()}
    rollout = valued(policy, rollout_to_value())
    losses = []
    for _ in range(5):
        losses.append(backward(policy, rollout, critic.scaler, config, 10_000)[0].item())
        critic.learner.clip(lambda: None)
        critic.learner.step(lambda: None)
        critic.learner.release()
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, own[name]) for name, p in policy.parameters_of(policy.adapter).items())
    assert all(p.grad is None for p in policy.model.parameters()), "and the critic's are let go"


def two_completions(rewards: list[list[float]]) -> Rollout:
    """Completions of two tokens and of three, whose values are 0.5 but for the last token's, 1."""
    rollout = Rollout.bare([[5], [6]], [[7, 8], [7, 8, 9]], torch.zeros(2))
    return dataclasses.replace(
        rollout, rewards=torch.tensor(rewards), values=torch.tensor([0.5, 1.0, 0.5, 0.5, 1.0]),
        sampling_logprobs=torch.full((5,), -1.0), ref_logprobs=torch.full((5,), -1.5),
    )  # fmt: skip


def test_advantages_and_returns_of_a_rollout_are_those_computed_by_hand():
    """Rewards of 2 + 0.5 x 2 = 3 and 1: with gamma and lam of 1 the returns, less the values."""
    config = ppo_config(lam=1.0, whiten_advantages=False, reward_weights=[1.0, 0.5])
    found = with_gae(two_completions([[2.0, 2.0], [1.0, 0.0]]), 0.0, config)
    assert found.token_advantages.tolist() == [2.5, 2.0, 0.5, 0.5, 0.0]
    assert found.returns.tolist() == [3.0, 3.0, 1.0, 1.0, 1.0]
    assert found.table["advantage"] == pytest.approx([2.25, 1 / 3])
    assert found.metrics["value/mean"] == pytest.approx(0.7) and found.metrics["returns/mean"] == pytest.approx(1.8)
    white = with_gae(two_completions([[2.0, 2.0], [1.0, 0.0]]), 0.0, ppo_config(lam=1.0, reward_weights=[1.0, 0.5]))
    assert white.token_advantages.mean().item() == pytest.approx(0, abs=1e-6)
    assert white.token_advantages.var().item() == pytest.approx(1) and white.returns.tolist() == found.returns.tolist()


def test_with_a_kl_in_the_reward_each_token_pays_for_its_own():
    """k1 of every token is 0.5, which costs 0.05 at beta 0.1: a return is the reward less what is still to be paid."""
    settings = dict(beta=0.1, kl_in_reward=True, kl_estimator="k1", lam=1.0, whiten_advantages=False)
    found = with_gae(two_completions([[2.0], [1.0]]), 0.1, ppo_config(**settings))
    torch.testing.assert_close(found.returns, torch.tensor([1.9, 1.95, 0.85, 0.9, 0.95]))
    assert found.metrics["kl"] == pytest.approx(0.5)


def test_a_completion_without_a_reward_or_that_is_masked_has_no_part_in_anything():
    config = ppo_config(lam=1.0)
    alone = with_gae(two_completions([[torch.nan], [1.0]]), 0.0, config)
    masked = dataclasses.replace(two_completions([[9.0], [1.0]]), completion_mask=torch.tensor([False, True]))
    for found in (alone, with_gae(masked, 0.0, config)):
        assert found.completion_mask.tolist() == [False, True]
        assert found.token_advantages[:2].tolist() == found.returns[:2].tolist() == [0.0, 0.0]
        assert found.token_advantages[2:].var().item() == pytest.approx(1)
        assert found.metrics["returns/mean"] == 1


def test_a_run_reports_the_critics_metrics_and_its_phases(tmp_path):
    result = run(tmp_path, **SHORT, beta=0.01, kl_in_reward=True, log_completions=True)
    for line in result.history:
        assert line["value_loss"] > 0 and line["value/clip_ratio"] == 0
        assert {"value/mean", "returns/mean", "value/explained_variance"} <= {*line}
        assert {f"{what}/{phase}{unit}" for phase in ("values", "critic")
                for what, unit in (("time", "_s"), ("memory", "/peak_mib"), ("tokens_per_s", ""))} <= {*line}  # fmt: skip
    assert result.history[0]["value/mean"] != result.history[1]["value/mean"]


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_iterations=2, steps_per_generation=2, cliprange_value=None, top_entropy_quantile=0.5),
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in (
                dict(fp16=True, optim="adamw_8bit", padding_free=False, gradient_checkpointing=True),
                dict(num_generations=4, prompts_per_step=2, loss_type="cispo", epsilon_high=5.0),
                dict(loss_type="vespo", mask_truncated_completions=True, max_completion_length=16),
                dict(beta=0.1, kl_target=0.1, sync_ref_model=True, ref_model_sync_steps=1, lora_dropout=0.1),
                dict(importance_sampling_level="sequence_token", off_policy_mask_threshold=0.1, entropy_coef=0.01),
            )
        ),
    ],
    ids=str,
)
def test_a_critic_goes_with_other_settings(tmp_path, changes):
    found = run(tmp_path, **{**SHORT, **changes}, rewards=noisy_reward)
    assert all(line["value_loss"] > 0 for line in found.history)
    assert any((value != 0).any() for name, value in adapters(found).items() if "lora_B" in name)


def test_while_the_critic_warms_up_it_learns_and_the_policy_does_not(tmp_path):
    changes = {
        **SHORT,
        "rewards": text_reward,
        "critic_warmup": 2,
        "max_steps": 3,
        "save_steps": 1,
        "lr_scheduler_type": "constant",
    }
    result = run(tmp_path, **changes, beta=0.01)
    folders = [tmp_path / f"out/checkpoint-{step}" for step in (1, 2, 3)]
    policies, critics = (
        [load_file(folder / f"{name}.safetensors") for folder in folders] for name in ("adapter_model", "critic")
    )
    assert all((value == 0).all() for saved in policies[:2] for name, value in saved.items() if "lora_B" in name)
    assert any((value != 0).any() for name, value in policies[2].items() if "lora_B" in name)
    assert all(any(not torch.equal(one[name], value) for name, value in other.items())
               for one, other in ((critics[0], critics[1]), (critics[1], critics[2])))  # fmt: skip
    assert [line["loss"] is None for line in result.history] == [True, True, False]
    assert [line["frac_tokens_skipped"] for line in result.history[:2]] == [1, 1]
    assert ["tokens_per_s/update" in line for line in result.history] == [False, False, True]
    assert result.history[0]["learning_rate"] == 1e-3, "the schedule of the policy begins after the warm-up"


def test_without_values_and_with_lam_of_1_a_step_is_reinforces(tmp_path, monkeypatch):
    """Rewards of mean 0 whose deviation makes REINFORCE++ divide by 1."""

    def alternating(completions, **kwargs):
        half = (1 - 1e-4) * (7 / 8) ** 0.5
        return [half * (-1) ** i for i in range(len(completions))]

    def without_values(*arguments):
        of_critic(*arguments)
        head = arguments[0].policy.score_heads[CRITIC]
        head.load(torch.zeros_like(head.weight))

    of_critic = Critic.__init__
    monkeypatch.setattr(Critic, "__init__", without_values)
    given = dict(
        rewards=alternating, max_steps=2, prompts_per_step=8, num_generations=1, bf16=False, max_completion_length=6
    )
    ppo = run(
        tmp_path / "ppo", **given, adv_estimator="gae", lam=1.0, whiten_advantages=False, critic_learning_rate=0.0
    )
    reinforce = run(tmp_path / "reinforce", **given, adv_estimator="reinforce_plus_plus")
    for one, other in zip(ppo.history, reinforce.history, strict=True):
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5, abs=1e-7)
    for name, value in adapters(ppo).items():
        torch.testing.assert_close(value, adapters(reinforce)[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(dict(critic_warmup=2, fp16=True, lora_dropout=0.1), marks=pytest.mark.slow),
        dict(num_iterations=2, steps_per_generation=2, optim="adamw_8bit", beta=0.1, kl_in_reward=True, kl_target=0.1),
    ],
    ids=str,
)
def test_a_resumed_run_has_the_critic_that_it_had(tmp_path, monkeypatch, changes):
    # fp16's own 65,536 overflows in the policy's only step, which is then skipped; it does not from 32,768 down. Doubled
    # with each step taken, the two loss scales differ, and a resumed run has to know both.
    monkeypatch.setattr("torch.amp.GradScaler", partial(torch.amp.GradScaler, init_scale=256.0, growth_interval=1))
    given = {
        **SHORT, "rewards": noisy_reward, "max_steps": 3, "save_steps": 9, "lr_scheduler_type": "cosine",
        "critic_learning_rate": 1e-3, **changes,
    }  # fmt: skip
    whole = run(tmp_path / "whole", **given)
    with pytest.raises(Stop):
        run(tmp_path / "cut", callbacks=[stop_at(2)], **given)
    resumed = run(tmp_path / "cut", resume_from_checkpoint=True, **given)
    assert whole.history[-1]["grad_norm"] > 0, "the policy learns at last"
    assert comparable(resumed.history) == comparable(whole.history)
    for name in ("adapter_model", "critic", "optimizer"):
        files = [tmp_path / f"{folder}/out/checkpoint-3/{name}.safetensors" for folder in ("whole", "cut")]
        one, other = map(load_file, files)
        assert {*one} == {*other} and all(torch.equal(value, other[path]) for path, value in one.items()), name
    one, other = (read_state(tmp_path / f"{folder}/out/checkpoint-3")["parts"] for folder in ("whole", "cut"))
    assert one == other
    if changes.get("fp16"):
        assert (one["optimizer"]["scaler"]["scale"], one[CRITIC]["scaler"]["scale"]) == (2 * 256, 8 * 256)


@pytest.mark.parametrize("whose", ["the policy's", "the critic's"])
def test_steps_that_one_of_the_two_takes_do_not_hide_that_the_other_takes_none(tmp_path, monkeypatch, whose):
    """Each counts its own in a row, which a checkpoint keeps."""

    @register_objective("spoiled")
    def losses(tokens, config):
        return tokens.logprobs * (torch.nan if whose == "the policy's" else 1.0)

    def value_losses_of(values, *given, cliprange):
        return torch.nan * values, torch.zeros_like(values, dtype=torch.bool)

    if whose == "the critic's":
        monkeypatch.setattr("lowmem_grpo.update.critic.value_losses", value_losses_of)
    given = {
        **SHORT,
        "rewards": text_reward,
        "loss_type": "spoiled",
        "max_nonfinite_steps": 1,
        "max_steps": 6,
        "max_completion_length": 2,
    }
    rate = "learning_rate" if whose == "the policy's" else "critic_learning_rate"
    try:
        with pytest.raises(NotFiniteError, match=f"changed no weight: 2, .* in step 2 the .*; lower {rate}, or mend"):
            run(tmp_path, **given)
        with pytest.raises(NotFiniteError, match=f"changed no weight: 3, .* in step 3 the .*; lower {rate}, or mend"):
            run(tmp_path, resume_from_checkpoint=True, **given)
    finally:
        del LOSS_TYPES["spoiled"], LOSSES["spoiled"]


def saved_critic(folder: Path) -> str:
    policy = policy_with_critic(named_model())
    policy.tokenizer.save_pretrained(folder)
    policy.save(folder, CRITIC)
    return str(folder)


def test_a_critic_may_start_as_a_reward_adapter_which_a_resumed_run_does_without(tmp_path, monkeypatch):
    policy = make_policy(named_model())
    policy.add(CRITIC, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"]))
    policy.add_score_head(CRITIC, seed=3)
    wake(policy, CRITIC)
    folder = tmp_path / "reward"
    policy.save(folder, CRITIC)
    given: dict[str, Any] = dict(**SHORT, critic_learning_rate=0.0)
    monkeypatch.setenv("HOME", str(tmp_path))
    run(tmp_path, model=named_model(), **given, critic_init="~/reward", max_steps=1)
    saved = load_file(folder / "adapter_model.safetensors")
    again: dict[str, Any] = dict(**given, max_steps=2, resume_from_checkpoint=True)
    for other, sentence in (
        (saved_critic(tmp_path / "other"), "is of a run with another critic_init, of other weights; resume with that"),
        ("policy", "is of a run with another critic_init"),
        ("~/none", "critic_init='~/none' is no adapter with a score head"),
    ):
        with pytest.raises(InputError, match=sentence):
            run(tmp_path, model=named_model(), **again, critic_init=other)
    shutil.copytree(tmp_path / "out", tmp_path / "again/out")
    folder.rename(tmp_path / "moved")
    run(tmp_path / "again", model=named_model(), **again, critic_init="$HOME/moved/")
    result = run(tmp_path, model=named_model(), **again, critic_init="~/reward")
    known = [read_state(tmp_path / f"out/checkpoint-{step}")["identity"]["critic_init"] for step in (1, 2)]
    assert known[0] == known[1] != {}
    assert "base_model.model.score.weight" in result.policy.parameters_of(CRITIC) and len(result.history) == 2
    now = result.policy.adapter_state(CRITIC)
    assert {*now} == {*saved} and all(torch.equal(value, saved[name]) for name, value in now.items())
    config = result.policy.adapters.config_of(CRITIC)
    assert (config.r, config.lora_alpha, config.target_modules) == (3, 5, {"q_proj"})


def test_a_critic_that_starts_from_an_adapter_of_another_base_is_told(tmp_path):
    config = ppo_config(critic_init=saved_critic(tmp_path / "reward"))
    with pytest.warns(UserWarning, match="is an adapter of 'tiny', and is put on 'other', where its values mean"):
        _refuse_critic(PreTrainedConfig.from_dict({"_name_or_path": "other"}), config)
    with warnings.catch_warnings(action="error"):
        _refuse_critic(PreTrainedConfig.from_dict({"_name_or_path": "tiny"}), config)


def test_what_a_critic_cannot_start_from_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("lowmem_grpo.inputs.training.load_policy", lambda *_: pytest.fail("weights were read"))
    (tmp_path / "empty").mkdir()
    for folder in (str(tmp_path / "empty"), str(tmp_path / "none")):
        with pytest.raises(InputError, match="critic_init=.* is no adapter with a score head"):
            run(tmp_path, **PPO, critic_init=folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(loss_type="gmpo"), "adv_estimator='gae' gives each token .* choose loss_type='dapo'"),
        (dict(importance_sampling_level="sequence"), "choose 'token' or 'sequence_token'"),
        (dict(dynamic_sampling_rounds=1), "dynamic_sampling_rounds=1 is read only where completions are compared"),
        (dict(replay_buffer_size=1), "replay_buffer_size=1 is read only"),
        (dict(curriculum_skip=0.5), "curriculum_skip=0.5 is read only"),
        (dict(scale_rewards="none"), "scale_rewards='none' is read only with adv_estimator='grpo'"),
        (dict(critic_warmup=5, max_steps=5), "critic_warmup=5 leaves the policy none of max_steps=5"),
        (dict(teacher="larger"), "adv_estimator='gae' and a teacher each give .* leave one of them out"),
        (dict(vf_coef=0.1), "GRPOConfig has no vf_coef: .* set critic_learning_rate"),
        (dict(cliprange=0.2), "GRPOConfig has no cliprange: set epsilon"),
        (dict(kl_coef=0.1), "GRPOConfig has no kl_coef: set beta, and kl_in_reward"),
        (dict(num_ppo_epochs=4), "set num_iterations"),
        (dict(num_mini_batches=4), "set steps_per_generation"),
    ],
)
def test_what_does_not_go_with_a_critic_is_refused_with_the_remedy(settings, message):
    with pytest.raises((InputError, TypeError), match=message):
        ppo_config(**settings)


def test_one_completion_a_prompt_is_enough_for_estimators_that_look_beyond_a_group():
    assert GRPOConfig(adv_estimator="reinforce_plus_plus", num_generations=1).num_generations == 1
    with pytest.raises(InputError, match="a group needs at least 2 completions"):
        GRPOConfig(adv_estimator="rloo", num_generations=1)


def test_a_warm_up_longer_than_the_run_is_refused_where_epochs_say_how_long_it_is(tmp_path):
    with pytest.raises(InputError, match="critic_warmup=5 leaves the policy none of the run's 5 steps"):
        run(tmp_path, **PPO, critic_warmup=5, max_steps=-1, num_train_epochs=1.0, rows=ROWS[:20])


@pytest.mark.slow
def test_ppo_learns_the_demo_and_its_critic_tells_the_returns(tmp_path):
    """0.945 to 0.96 was measured on three settings of seed 0, and 0.67 explained at the end of the warm-up."""
    train_problems, eval_problems = task.splits()
    config = dataclasses.replace(
        recipe(str(tmp_path / "out"), seed=0), adv_estimator="gae", num_generations=1, prompts_per_step=64,
        critic_learning_rate=3e-3, critic_warmup=20, max_steps=40,
    )  # fmt: skip
    result = train(
        str(MODEL), [task.answer_reward, task.tag_format_reward], task.rows(train_problems), task.rows(eval_problems),
        config=config,
    )  # fmt: skip
    assert result.eval_history[-1]["eval_rewards/answer_reward/mean"] >= 0.9
    explained = [line["value/explained_variance"] for line in result.history]
    assert max(value for value in explained[10:20]) > 0.3 > min(value for value in explained[:10] if value is not None)

"""The doctor while a run goes on: each situation is provoked by a tiny run, which shows that one and no other."""

import json
import math

import pytest
from tiny_models import DEMO_MODEL

from lowmem_grpo import GRPOConfig, train
from lowmem_grpo.cli import main
from lowmem_grpo.config.losses import LOSS_TYPES
from lowmem_grpo.demo import task
from lowmem_grpo.doctor.doctor import Doctor, Finding
from lowmem_grpo.doctor.symptoms import OF_A_REWARD, SYMPTOMS
from lowmem_grpo.errors import UnhealthyRunError
from lowmem_grpo.objective.loss import LOSSES, register_objective

pytestmark = pytest.mark.usefixtures("known_trials")

ROWS = task.rows(task.splits()[0][:40])
SHORT = {"max_completion_length": 4, "max_steps": 5}  # half a second
LONG = {"max_completion_length": 32, "max_steps": 5}  # as long as the demo's answers


def by_length(completions, **kwargs):
    return [len(completion[0]["content"]) % 7 / 7 for completion in completions]


def varied(completions, **kwargs):
    return [number % 2 / 2 for number in range(len(completions))]


def zero(completions, **kwargs):
    return [0.0] * len(completions)


def never(completions, **kwargs):
    return [None] * len(completions)


def failing(completions, **kwargs):
    if "<think>trial</think>" not in str(completions):  # not on the made-up completions
        raise RuntimeError("the server is gone")
    return [0.0] * len(completions)


def worse(completions, trainer_state, **kwargs):
    return varied(completions) if trainer_state.global_step < 5 else zero(completions)


def run(folder, rewards, callbacks=(), **settings):
    config = GRPOConfig(**{
        "output_dir": str(folder / "out"), "use_cpu": True, "prompts_per_step": 1, "num_generations": 4,
        "learning_rate": 1e-3, "gradient_checkpointing": False, **settings,
    })  # fmt: skip
    return train(str(DEMO_MODEL), rewards, ROWS, config=config, callbacks=callbacks)


def names(result):
    """The situations that a run's steps showed; what its inputs showed is of step 0."""
    return {line["doctor"] for line in result.findings if line["step"]}


@pytest.fixture
def objectives():
    """Two objectives of no use: one that the weights do not move, one that is not a number."""
    register_objective("flat")(lambda tokens, config: tokens.logprobs * 0)
    register_objective("broken")(lambda tokens, config: tokens.logprobs * math.nan)
    yield
    for name in ("flat", "broken"):
        del LOSSES[name], LOSS_TYPES[name]


SITUATIONS = [
    ({"all_truncated", "no_reward"}, never, SHORT),
    (
        {"all_truncated", "reward_constant/zero", "reward_missing/never", "reward_failing/failing"},
        [varied, zero, never, failing],
        SHORT,
    ),
    ({"all_truncated", "no_difference", "never_filled"}, zero, {**SHORT, "dynamic_sampling_rounds": 1}),
    ({"all_truncated", "reward_fell"}, worse, {**SHORT, "max_steps": 10}),
    ({"all_truncated", "no_gradient"}, varied, {**SHORT, "loss_type": "flat"}),
    ({"all_truncated"}, varied, {**SHORT, "mask_truncated_completions": True}),
    ({"all_truncated", "not_finite"}, varied, {**SHORT, "loss_type": "broken"}),
    (
        {"all_truncated", "gradient_scaled_down", "tokens_clipped"},
        varied,
        {**SHORT, "max_grad_norm": 1e-4, "num_iterations": 2, "epsilon": 1e-6},
    ),
    ({"all_truncated", "weights_masked"}, varied, {**SHORT, "importance_sampling_clip_max": 0.5}),
    ({"lengths_collapsed"}, varied, {**SHORT, "stop_strings": ["<"]}),
    ({"all_truncated", "teacher_far"}, None, {**SHORT, "teacher": "base", "teacher_system_prompt": "Once upon a time"}),
]  # fmt: skip
LONGER = [  # two seconds each, and so with the numbers that they measured in RECORDED
    ({"entropy_collapse", "no_difference"}, task.answer_reward, {"temperature": 1e-3, "beta": 0.04, "bf16": False}),
    ({"entropy_explosion", "no_difference"}, task.answer_reward, {"temperature": 10.0, "beta": 0.04}),
    ({"kl_explosion", "lengths_at_limit"}, varied, {"max_steps": 7, "learning_rate": 1.0, "beta": 1e-6}),
    ({"sampling_apart"}, varied, {"max_steps": 6, "learning_rate": 0.02, "lora_dropout": 0.7}),
    (
        {"ratio_on_policy"}, varied,
        {
            "max_steps": 6, "prompts_per_step": 2, "learning_rate": 0.01, "lora_dropout": 0.7, "kl_in_reward": True,
            "beta": 1e-6, "top_entropy_quantile": 0.99,
        },
    ),
]  # fmt: skip


def by_names(situations):
    return {"argvalues": situations, "ids": ["+".join(sorted(expected)) for expected, _, _ in situations]}


@pytest.mark.parametrize("expected, rewards, settings", **by_names(SITUATIONS))
@pytest.mark.usefixtures("objectives")
def test_the_doctor_says_what_a_run_suffers_from_and_nothing_else(tmp_path, expected, rewards, settings):
    assert names(run(tmp_path, rewards, **settings)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("expected, rewards, settings", **by_names(LONGER))
def test_the_doctor_says_what_a_longer_run_suffers_from(tmp_path, expected, rewards, settings):
    assert names(run(tmp_path, rewards, **{**LONG, **settings})) == expected


def test_every_situation_is_provoked():
    known = {symptom.__name__ for symptom in (*SYMPTOMS, *OF_A_REWARD)} - {"critic_misleads"}  # tested by its numbers
    assert {name.partition("/")[0] for expected, _, _ in SITUATIONS + LONGER for name in expected} == known


def test_the_doctor_has_nothing_to_say_of_a_healthy_run(tmp_path, capsys):
    rewards = [task.answer_reward, task.tag_format_reward]
    result = run(tmp_path, rewards, **{**LONG, "max_steps": 10, "beta": 0.02})
    assert names(result) == set() and "cut off at max_completion_length" not in capsys.readouterr().err


def logged(folder):
    lines = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "doctor" in line]


def test_a_resumed_run_is_told_what_the_one_that_was_never_stopped_is_and_nothing_twice(tmp_path, capsys):
    def stops(step, metrics, policy):
        if step == 4:
            raise RuntimeError("the machine is needed elsewhere")

    settings = {**SHORT, "max_steps": 6}
    whole = run(tmp_path / "whole", zero, **settings)
    said = capsys.readouterr().err
    assert [(line["step"], line["doctor"]) for line in whole.findings] == [(3, "all_truncated"), (6, "no_difference")]
    truncated, dull = (line["text"] for line in whole.findings)
    assert said.count(f"doctor: {truncated}") == 1 and said.count(f"doctor: {dull}") == 1
    assert said.index("the doctor found") < said.index(f"step 3, all_truncated: {truncated}"), "in the summary, too"
    assert len(whole.history) == 6, "lines of the log that are no steps"

    with pytest.raises(RuntimeError, match="needed elsewhere"):
        run(tmp_path / "cut", zero, [stops], **settings)
    capsys.readouterr()
    resumed = run(tmp_path / "cut", zero, **settings, resume_from_checkpoint=True)
    said = capsys.readouterr().err
    assert f"doctor: {truncated}" not in said and said.count(f"doctor: {dull}") == 1 and "the doctor found" in said
    assert resumed.findings == whole.findings == logged(tmp_path / "whole") == logged(tmp_path / "cut")


def test_a_doctor_who_may_stops_the_run_with_a_saved_step_and_a_sentence(tmp_path, capsys):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    command = [
        "train", "--model", str(DEMO_MODEL), "--dataset", str(rows), "--reward_funcs", "get_regex_reward(pattern='!')",
        "--use_cpu", "true", "--prompts_per_step", "1", "--num_generations", "2", "--max_completion_length", "4",
        "--output_dir", str(out), "--learning_rate", "1e-3", "--max_steps", "5",
    ]  # fmt: skip
    assert main([*command, "--doctor", "stop"]) == 1
    said = capsys.readouterr().err
    assert "lowmem-grpo train: doctor='stop': every completion of the last 3 steps was cut off" in said
    assert f"stopped; {out}/checkpoint-3 has everything up to step 3" in said
    assert main([*command, "--doctor", "stop", "--resume_from_checkpoint", "true"]) == 1, "it still suffers"
    assert "checkpoint-4" in capsys.readouterr().err
    assert main([*command, "--doctor", "off", "--resume_from_checkpoint", "true"]) == 0
    said = capsys.readouterr().err
    assert "doctor:" not in said and "doctor found" not in said and [line["step"] for line in logged(tmp_path)] == [3]


def test_a_finding_before_the_first_step_is_told_before_the_weights_are_read_and_may_stop_the_run(
    tmp_path, monkeypatch, capsys
):
    def load_policy(self):
        raise RuntimeError(f"loading after: {capsys.readouterr().err}")

    found = [Finding("made_up", "all is lost\x1b; give up")]
    monkeypatch.setattr("lowmem_grpo.checkup.prompts.findings", lambda inputs: found)
    warned = run(tmp_path / "warned", varied, **{**SHORT, "max_steps": 2})
    line = {"step": 0, "doctor": "made_up", "text": found[0].text}
    assert warned.findings == [line] and logged(tmp_path / "warned") == [line]
    assert capsys.readouterr().err.count("doctor: all is lost\\x1b; give up") == 1

    found.append(Finding("more", "and more"))  # of what a resumed run is given
    resumed = run(tmp_path / "warned", varied, **{**SHORT, "max_steps": 3}, resume_from_checkpoint=True)
    assert resumed.findings[:2] == [line, {"step": 0, "doctor": "more", "text": "and more"}]
    assert logged(tmp_path / "warned") == resumed.findings
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("doctor: ")]
    assert told[0] == "doctor: and more", "and not again what was told before"

    monkeypatch.setattr("lowmem_grpo.inputs.prompts.Inputs.load_policy", load_policy)
    with pytest.raises(RuntimeError, match="loading after: (?s:.*)doctor: all is lost"):
        run(tmp_path / "loaded", varied, **SHORT)
    with pytest.raises(UnhealthyRunError, match="all is lost(?s:.*); and and more"):
        run(tmp_path / "stopped", varied, **SHORT, doctor="stop")
    assert not (tmp_path / "stopped/out/metrics.jsonl").exists() and "doctor:" not in capsys.readouterr().err


# Of step 30 of the demo's seed 0, what the doctor reads.
HEALTHY = {
    "reward": 1.1, "reward_std": 0.3, "frac_reward_zero_std": 0.5, "frac_tokens_skipped": 0.0, "entropy": 0.033,
    "kl": 0.02, "grad_norm": 0.09, "skipped_steps": 0, "completions/clipped_ratio": 0.0,
    "completions/mean_length": 26.7, "clip_ratio/region_mean": 0.0, "ratio/min": 1.0, "ratio/max": 1.0,
    "sampling/sampling_logp_difference/mean": 0.002, "sampling/importance_sampling_ratio/mean": 1.0,
    "rewards/a/mean": 0.9, "rewards/a/std": 0.3, "rewards/a/failures": 0,
    "rewards/b/mean": 0.94, "rewards/b/std": 0.2, "rewards/b/failures": 0,
}  # fmt: skip


def said_of(first, then, num_steps=15, rewards=("a", "b"), **settings):
    """The sentences on a run whose first 5 steps differ from HEALTHY by `first`, and its other ones by `then`."""
    doctor = Doctor(GRPOConfig(**settings), num_steps, list(rewards))
    for step in range(1, num_steps + 1):
        doctor.look(step, {**HEALTHY, **(first if step <= 5 else then), "step": step})
    return {line["doctor"]: line["text"] for line in doctor.found}


# What the runs in LONGER measured: of their last five steps the one that is nearest to HEALTHY.
RECORDED = {
    "entropy_collapse": {"entropy": 0.0},
    "entropy_explosion": {"entropy": 4.78},
    "kl_explosion": {"kl": 8.79},
    "lengths_at_limit": {"completions/clipped_ratio": 1.0},
    "sampling_apart": {"sampling/sampling_logp_difference/mean": 0.2, "sampling/importance_sampling_ratio/mean": 0.07},
    "ratio_on_policy": {"ratio/min": 0.24, "ratio/max": 1.19},
}


@pytest.mark.parametrize("name", RECORDED)
def test_what_a_longer_run_measured_is_told(name):
    assert set(said_of({}, RECORDED[name])) == {name}


def always(num_steps=15, rewards=("a", "b"), settings=None, **changes):
    changes = {name.replace("__", "/"): value for name, value in changes.items()}
    return said_of(changes, changes, num_steps, rewards, **(settings or {}))


def test_a_reward_that_is_always_at_its_best_or_weighs_nothing_is_no_finding():
    assert always(rewards__b__mean=1.0, rewards__b__std=0.0) == {}
    assert set(always(rewards__b__mean=0.0, rewards__b__std=0.0)) == {"reward_constant/b"}
    assert set(always(rewards__b__mean=0.5, rewards__b__std=0.0)) == {"reward_constant/b"}
    assert said_of({}, {"rewards/b/mean": 2.0, "rewards/b/std": 0.0}) == {}, "it has risen to 2"
    assert said_of({"rewards/b/mean": -0.1}, {"rewards/b/mean": 0.0, "rewards/b/std": 0.0}) == {}, "nor has a penalty"
    assert always(rewards__b__mean=0.0, rewards__b__std=0.0, settings={"reward_weights": [1.0, 0.0]}) == {}
    penalty = {"rewards/repetition_penalty_reward/mean": 0.0, "rewards/repetition_penalty_reward/std": 0.0}
    assert said_of(penalty, penalty, rewards=["a", "repetition_penalty_reward"]) == {}


def test_a_reward_that_fails_now_and_then_is_no_finding_until_it_is_a_tenth():
    assert always(rewards__b__failures=6) == {}
    assert "11% of the completions" in always(rewards__b__failures=7)["reward_failing/b"]


def test_without_a_difference_the_reward_that_all_have_is_said_with_the_likely_cause():
    same = {"frac_reward_zero_std": 1.0, "reward_std": 0.0, "reward": 0.2, "rewards/a/mean": 0.0, "rewards/a/std": 0.0}
    same |= {"rewards/b/mean": 1.0, "rewards/b/std": 0.0, "grad_norm": 0.0, "entropy": math.nan}
    told = said_of(same, same)
    assert set(told) == {"no_difference"}
    assert "had the reward 0.2 (a 0 and b 1 on average)" in told["no_difference"]
    assert "temperature=0.01 makes them alike" in said_of(same, same, temperature=0.01)["no_difference"]
    assert "temperature=10.0 makes completions noise" in said_of(same, same, temperature=10.0)["no_difference"]
    between = {**same, "reward_std": 0.5}
    assert "the completions of a prompt all had one reward" in said_of(between, between)["no_difference"]
    assert said_of(same, {}) == {}, "it found its way"


def test_a_critic_whose_values_are_noise_is_told_and_groups_are_none_of_its_business():
    ppo = dict(adv_estimator="gae", num_generations=1)
    told = said_of({}, {"value/explained_variance": -1.5}, **ppo)
    assert set(told) == {"critic_misleads"} and "explained -1.5" in told["critic_misleads"]
    assert said_of({}, {"value/explained_variance": -0.9}, **ppo) == {}
    assert said_of({}, {"value/explained_variance": math.nan}, **ppo) == {}
    apart = {"frac_reward_zero_std": 1.0}
    assert said_of(apart, apart, **ppo) == {}, "each step has one reward, and not each the same"
    assert set(said_of(apart, apart, num_generations=8)) == {"no_difference"}


def test_a_choice_of_one_token_is_the_cause_where_completions_are_alike():
    same = {"frac_reward_zero_std": 1.0}
    assert "top_k=1 makes them alike; leave it out" in said_of(same, same, top_k=1)["no_difference"]


def test_no_difference_takes_more_than_one_step_that_has_a_reward():
    none = {"frac_reward_zero_std": math.nan, "reward": math.nan, "reward_std": math.nan}
    doctor = Doctor(GRPOConfig(), 12, ["a", "b"])
    for step in range(1, 13):
        same = {"frac_reward_zero_std": 1.0, "reward": 0.0, "reward_std": 0.0}
        doctor.look(step, {**HEALTHY, **(none if step % 6 else same), "step": step})
    assert "no_difference" not in {line["doctor"] for line in doctor.found}


@pytest.mark.usefixtures("objectives")
def test_a_gradient_of_0_is_laid_at_the_door_of_a_registered_loss_and_of_no_other():
    still = {"grad_norm": 0.0}
    assert "may be the same" in said_of(still, still)["no_gradient"]
    assert "loss_type='flat' does not depend" in said_of(still, still, loss_type="flat")["no_gradient"]


def test_lengths_that_shrink_by_ten_are_a_finding_unless_the_reward_rises():
    long, short = {"completions/mean_length": 400.0}, {"completions/mean_length": 39.0}
    assert "shrunk from 400 tokens at the start to 39.0" in said_of(long, short)["lengths_collapsed"]
    assert said_of(long, {**short, "reward": 1.2}) == {}


def test_float16_may_look_for_its_loss_scale_for_as_long_as_it_takes():
    skipped = {"skipped_steps": 1, "grad_norm": math.nan}
    assert said_of(skipped, skipped, num_steps=32, fp16=True) == {}
    told = said_of(skipped, skipped, num_steps=33, fp16=True)
    assert told["not_finite"].startswith("33 optimizer steps so far have changed no weight: float16's loss scale")
    assert said_of({}, skipped, num_steps=6) == {}, "one is none"
    assert set(said_of({}, skipped, num_steps=7)) == {"not_finite"}


def test_a_reward_around_0_may_vary_by_a_part_of_its_spread():
    first = {"reward": 0.02, "reward_std": 1.0}
    assert said_of(first, {"reward": -0.4, "reward_std": 1.0}) == {}
    assert set(said_of(first, {"reward": -0.5, "reward_std": 1.0})) == {"reward_fell"}


def test_steps_in_which_no_entropy_is_known_are_passed_over():
    doctor = Doctor(GRPOConfig(), 40, ["a", "b"])
    for step in range(1, 11):
        dull = {"entropy": math.nan} if step % 2 else {"entropy": 0.001}
        doctor.look(step, {**HEALTHY, **dull, "step": step})
    assert [(line["step"], line["doctor"]) for line in doctor.found] == [(6, "entropy_collapse")]


def test_groups_that_an_older_policy_sampled_are_said_to_be_too_old():
    masked = {"sampling/importance_sampling_ratio/mean": 0.3}
    told = said_of({}, masked, replay_buffer_size=64)
    assert set(told) == {"weights_masked"} and "lower replay_buffer_size" in told["weights_masked"]


def test_a_step_that_learns_from_nothing_since_all_is_masked_says_so():
    masked = {"grad_norm": 0.0, "frac_tokens_skipped": 1.0, "entropy": math.nan, "completions/clipped_ratio": 0.8}
    told = said_of(masked, masked, mask_truncated_completions=True)
    assert set(told) == {"no_gradient"} and "raise max_completion_length" in told["no_gradient"]


def test_one_bad_step_among_good_ones_is_no_finding():
    bad = {
        "reward": 0.0, "reward_std": 0.0, "frac_reward_zero_std": 1.0, "entropy": 5.0, "kl": 9.0, "grad_norm": math.nan,
        "skipped_steps": 1, "completions/clipped_ratio": 1.0, "completions/mean_length": 1.0, "ratio/max": 50.0,
        "sampling/sampling_logp_difference/mean": 1.0, "sampling/importance_sampling_ratio/mean": 0.0,
        "rewards/b/mean": math.nan, "rewards/b/std": math.nan, "rewards/b/failures": 0,
    }  # fmt: skip
    doctor = Doctor(GRPOConfig(), 40, ["a", "b"])
    for step in range(1, 41):
        assert doctor.look(step, {**HEALTHY, **(bad if step == 20 else {}), "step": step}) == []


def test_a_loop_that_measures_none_of_this_has_no_symptoms():
    doctor = Doctor(GRPOConfig(), 12, [])
    assert [doctor.look(step, {"loss": 1.0, "step": step}) for step in range(1, 13)] == [[]] * 12


STEP = {"step": 1, "reward": None}
LINE = {"step": 1, "doctor": "all_truncated", "text": "every completion ..."}


@pytest.mark.parametrize(
    "broken",
    [
        {"found": 3}, {"found": [3]}, {"found": [{"step": 1}]}, {"found": [{**LINE, "step": -1}]}, {"first": None},
        {"first": [{"step": "1"}]}, {"last": [[]]}, {"last": [{"step": 1, "reward": True}]}, {"last": ...},
    ],
)  # fmt: skip
def test_a_state_that_no_doctor_wrote_is_refused(broken):
    state = {"found": [LINE], "first": [STEP], "last": [STEP]}
    doctor = Doctor(GRPOConfig(), 12, ["a"])
    doctor.load(state)
    assert doctor.state() == state
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        doctor.load({name: value for name, value in {**state, **broken}.items() if value is not ...})

import dataclasses
import itertools
import json
import math
import random
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import DEMO_MODEL, make_policy
from transformers import AutoTokenizer

from lowmem_grpo import GRPOConfig, evaluate
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.demo import task
from lowmem_grpo.errors import printable
from lowmem_grpo.evaluation.evaluate import Evaluation, measure
from lowmem_grpo.evaluation.show import examples, examples_as_text
from lowmem_grpo.evaluation.statistics import (
    confidence_interval,
    differences,
    majority,
    paired_interval,
    pass_at,
    shares,
)
from lowmem_grpo.generate.completion import Completion
from lowmem_grpo.generate.sample import Sampler
from lowmem_grpo.loops.grpo import train
from lowmem_grpo.rewards import RewardRunner
from lowmem_grpo.run.best import BestAdapter

pytestmark = pytest.mark.usefixtures("known_trials")

ROWS = task.rows(task.splits()[0][:12])
NAN = math.nan


def settings(folder, **changes) -> GRPOConfig:
    return GRPOConfig(
        **{
            "output_dir": str(folder), "use_cpu": True, "max_steps": 3, "prompts_per_step": 2, "num_generations": 2,
            "max_completion_length": 8, "learning_rate": 1e-2, "gradient_checkpointing": False, **changes,
        }
    )  # fmt: skip


def run(folder, rewards, *, eval_dataset=None, callbacks=(), **changes):
    return train(str(DEMO_MODEL), rewards, ROWS, eval_dataset, settings(folder, **changes), callbacks=callbacks)


def adapters(policy):
    return {name: p.detach().clone() for name, p in policy.parameters_of(policy.adapter).items()}


def noisy_reward(completions, **kwargs):
    """One that draws from Python's and torch's generators, as a judge might."""
    return [len(c[0]["content"]) % 7 / 7 + random.random() + torch.rand(()).item() for c in completions]


def at_step(values):
    """A reward of this value at each step, and on training's completions one that moves the adapters."""

    def step_reward(completions, trainer_state, solution, **kwargs):
        if len(completions) == 4:  # 2 x 2 in training, 3 in an evaluation
            return list(range(4))
        return [values[trainer_state.global_step]] * len(completions)

    return step_reward


@pytest.mark.parametrize(("n", "c"), [(n, c) for n in range(1, 7) for c in range(n + 1)])
def test_pass_at_j_is_the_share_of_draws_that_hold_a_correct_one(n, c):
    completions = [True] * c + [False] * (n - c)
    for j in range(1, n + 1):
        draws = list(itertools.combinations(completions, j))
        assert pass_at(j, n, c) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert math.isnan(pass_at(n + 1, n, c))


@pytest.mark.parametrize(
    ("votes", "share"),
    [
        ([("3", True), ("3", True), ("4", False)], 1.0),
        ([("3", True), ("4", False), ("4", False)], 0.0),
        ([("3", True), ("4", False)], 0.5),
        ([("3", True), ("4", False), ("5", False)], 1 / 3),
        ([("1,000", True), ("1000.0", True), ("7", False)], 1.0),
        ([("x", True), (" x ", True), ("y", False)], 1.0),
        ([(None, False), (None, False), ("3", True)], 1.0),
        ([(None, False)], 0.0),
        ([("3", True), ("3", False)], 0.5),
        ([("9" * 5000, False)], 0.0),
    ],
)
def test_the_majority_by_hand(votes, share):
    assert majority(votes) == pytest.approx(share)
    assert math.isnan(majority([]))


def test_shares_by_hand():
    """Three prompts of four: two of four right, none, and one whose reward applies to two."""
    rewards = torch.tensor([1.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 1.5, NAN, NAN, 0.0])
    answers = ["1", "1", "2", "2", "7", "7", "7", None, "5", "5", "5", "6"]
    found = shares(rewards, answers, 4)
    assert list(found) == ["mean@4", "pass@1", "pass@2", "pass@4", "maj@4"]
    assert found["mean@4"] == pytest.approx([0.625, 0.0, 0.75])
    assert found["pass@1"] == pytest.approx([0.5, 0.0, 0.5])
    assert found["pass@2"] == pytest.approx([5 / 6, 0.0, 1.0])
    assert found["pass@4"] == pytest.approx([1.0, 0.0, NAN], nan_ok=True)
    assert found["maj@4"] == pytest.approx([0.5, 0.0, 0.5])
    assert list(shares(torch.zeros(12), ["1"] * 12, 6)) == ["mean@6", "pass@1", "pass@2", "pass@4", "pass@6", "maj@6"]
    assert shares(torch.ones(2), ["1"] * 2, 1) == {"pass@1": [1.0, 1.0]}


def test_the_interval_of_zeros_and_ones_is_wilsons():
    assert confidence_interval([1.0] * 10 + [0.0] * 10) == pytest.approx((0.2993, 0.7007), abs=1e-4)
    assert confidence_interval([0.0] * 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert confidence_interval([1.0] * 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert all(math.isnan(bound) for bound in confidence_interval([]))


def test_none_and_all_right_are_the_ends_exactly():
    for n in range(1, 200):
        assert confidence_interval([0.0] * n)[0] == 0.0 and confidence_interval([1.0] * n)[1] == 1.0


def test_the_interval_of_any_two_values_is_wilsons_between_them():
    low, high = confidence_interval([1.0] * 10 + [0.0] * 10)
    assert confidence_interval([1.2] * 10 + [0.2] * 10) == pytest.approx((0.2 + low, 0.2 + high))
    assert confidence_interval([-1.0] * 10 + [3.0] * 10) == pytest.approx((-1 + 4 * low, -1 + 4 * high))
    assert confidence_interval([1.2] + [0.2] * 19)[1] > 0.4, "a bootstrap of 19 equal values of 20 is narrower"


@pytest.mark.parametrize("value", [1.2, 0.5, -1.0])
def test_equal_values_say_nothing_about_another_prompts(value):
    for values in ([value] * 20, [value, value * (1 + 1e-9)] * 10):
        assert all(math.isnan(bound) for bound in confidence_interval(values))


def test_the_bootstraps_interval_is_that_of_a_normal_mean_and_always_the_same():
    draw = random.Random(0)
    values = [draw.gauss(5, 2) for _ in range(400)]
    low, high = confidence_interval(values)
    mean = sum(values) / 400
    deviation = (sum((v - mean) ** 2 for v in values) / 400) ** 0.5 / 20
    assert low == pytest.approx(mean - 1.96 * deviation, abs=0.1 * deviation * 2)
    assert high == pytest.approx(mean + 1.96 * deviation, abs=0.1 * deviation * 2)
    assert confidence_interval(values) == (low, high)


def test_the_intervals_cover_as_often_as_they_say():
    """Of 400 experiments of 60 prompts at a share of 0.3: 95 % of the intervals hold it, give or take 3 deviations."""
    draw, held = random.Random(1), 0
    for _ in range(400):
        low, high = confidence_interval([float(draw.random() < 0.3) for _ in range(60)])
        held += low <= 0.3 <= high
    assert held / 400 >= 0.95 - 3 * (0.95 * 0.05 / 400) ** 0.5


def pairs_of(better, worse, right=0, wrong=0):
    return [(0.0, 1.0)] * better + [(1.0, 0.0)] * worse + [(1.0, 1.0)] * right + [(0.0, 0.0)] * wrong


@pytest.mark.parametrize(
    ("better", "worse", "n", "interval"),
    [  # Tango's intervals as Fagerland, Lydersen and Laake (2014, Statistics in Medicine 33:2850) print them
        (1, 7, 21, (-0.517, -0.026)),
        (6, 16, 161, (-0.124, -0.005)),
    ],
)
def test_the_paired_interval_of_zeros_and_ones_is_tangos(better, worse, n, interval):
    assert paired_interval(pairs_of(better, worse, wrong=n - better - worse)) == pytest.approx(interval, abs=1e-3)
    mirrored = paired_interval(pairs_of(worse, better, right=n - better - worse))
    assert mirrored == pytest.approx((-interval[1], -interval[0]), abs=1e-3)


def test_a_paired_interval_has_a_width_where_nothing_or_everything_changed():
    for n in (1, 5, 200):
        width = 1.959964**2 / (n + 1.959964**2)
        for pairs in (pairs_of(0, 0, right=n), pairs_of(0, 0, wrong=n)):
            assert paired_interval(pairs) == pytest.approx((-width, width))
    low, high = paired_interval(pairs_of(20, 0))
    assert 0.6 < low < 1 and high == 1.0
    assert paired_interval(pairs_of(0, 20)) == (-1.0, pytest.approx(-low))
    low, high = paired_interval(pairs_of(1, 0))
    assert low < 0 < high == 1.0, "one prompt says next to nothing"
    assert all(math.isnan(bound) for bound in paired_interval([]))


def test_few_changes_of_many_prompts_are_no_proof():
    """Three of 200 got better and none worse: a sign test says p = 0.25, and an interval above 0 would be wrong."""
    low, high = paired_interval(pairs_of(3, 0, wrong=197))
    assert low < 0 < 3 / 200 < high


def test_the_paired_interval_of_any_two_values_is_tangos_between_them():
    low, high = paired_interval(pairs_of(9, 2, 4, 5))
    scaled = [(0.2 + before, 0.2 + after) for before, after in pairs_of(9, 2, 4, 5)]
    assert paired_interval(scaled) == pytest.approx((low, high))
    scaled = [(-1 + 4 * before, -1 + 4 * after) for before, after in pairs_of(9, 2, 4, 5)]
    assert paired_interval(scaled) == pytest.approx((4 * low, 4 * high))


def test_other_values_are_resampled_in_pairs():
    """What prompts have in common, here a spread of 100, is no part of the interval."""
    draw = random.Random(0)
    hard = [draw.gauss(0, 100) for _ in range(400)]
    pairs = [(value, value + draw.gauss(1, 2)) for value in hard]
    low, high = paired_interval(pairs)
    mean = sum(after - before for before, after in pairs) / 400
    assert (low, high) == pytest.approx((mean - 0.196, mean + 0.196), abs=0.02)
    assert paired_interval(pairs) == (low, high), "always the same"
    same = [(0.1, 0.3), (0.5, 0.7), (0.2, 0.4)]
    assert all(math.isnan(bound) for bound in paired_interval(same)), "as for one value: nothing about another prompt's"


@pytest.mark.parametrize(("k", "experiments"), [(1, 400), (4, 30)])
def test_paired_intervals_cover_as_often_as_they_say(k, experiments):
    """60 prompts whose share rises by 0.3 of what is missing; 0.95 of the intervals, give or take 3 deviations."""
    draw, held = random.Random(2), 0
    for _ in range(experiments):
        pairs = []
        for _ in range(60):
            share = draw.betavariate(0.5, 0.5)
            before, after = share, share + 0.3 * (1 - share)
            pairs.append(tuple(sum(draw.random() < p for _ in range(k)) / k for p in (before, after)))
        low, high = paired_interval(pairs)
        held += low <= 0.15 <= high
    assert held / experiments >= 0.95 - 3 * (0.95 * 0.05 / experiments) ** 0.5


def test_a_difference_is_over_the_prompts_that_have_both_values():
    found = differences({"a": [0.0, NAN, 1.0, 0.0], "gone": [1.0]}, {"a": [1.0, 1.0, NAN, 0.0], "new": [1.0]})
    assert list(found) == ["a/difference", "a/difference/ci_low", "a/difference/ci_high"]
    assert found["a/difference"] == 0.5
    assert (found["a/difference/ci_low"], found["a/difference/ci_high"]) == paired_interval([(0.0, 1.0), (0.0, 0.0)])
    assert all(math.isnan(value) for value in differences({"a": [NAN]}, {"a": [1.0]}).values())


@pytest.fixture(scope="module")
def policy():
    return make_policy("qwen2")


def prompts_of(policy, count=4):
    return [
        Prompt(row["prompt"], policy.tokenizer(row["prompt"][0]["content"])["input_ids"], {"solution": row["solution"]})
        for row in ROWS[:count]
    ]


def length_reward(completions, **kwargs):
    return [len(c[0]["content"]) % 2 for c in completions]


@pytest.mark.parametrize("k", [None, 1, 4])
def test_an_evaluation_is_the_same_twice_and_leaves_the_generator_where_it_was(policy, k):
    config = GRPOConfig(use_cpu=True, max_completion_length=6, num_generations_eval=k)
    sampler, before = Sampler(policy, config), torch.get_rng_state()
    rewards = RewardRunner([length_reward])
    first, second = (measure(sampler, prompts_of(policy), rewards, config, 0).metrics for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    same = {name for name in first if "time/" not in name}
    assert {n: first[n] for n in same} == pytest.approx({n: second[n] for n in same}, nan_ok=True)
    assert ("eval_maj@4" in first) == (k == 4)
    assert first["eval_pass@1"] == pytest.approx(first["eval_rewards/length_reward/mean"])
    assert first["eval_reward/ci_low"] <= first["eval_reward"] <= first["eval_reward/ci_high"]


def test_a_reward_that_never_applies_is_no_value(policy):
    config = GRPOConfig(use_cpu=True, max_completion_length=2, num_generations_eval=2)
    never = RewardRunner([lambda completions, **_: [None] * len(completions)])
    found = measure(Sampler(policy, config), prompts_of(policy), never, config, 0).metrics
    assert all(math.isnan(found[name]) for name in ("eval_reward", "eval_pass@2", "eval_maj@2", "eval_reward/ci_low"))


@pytest.mark.parametrize(("k", "sizes"), [(None, [2, 2, 1]), (2, [2] * 5), (3, [3] * 5)])
def test_a_reward_is_called_with_as_many_completions_as_in_a_step(policy, k, sizes):
    seen = []

    def timed(completions, **kwargs):
        seen.append(len(completions))
        if len(seen) == 2:
            raise TimeoutError
        return [float(len(seen))] * len(completions)

    config = GRPOConfig(
        use_cpu=True, max_completion_length=2, num_generations_eval=k, prompts_per_step=1, num_generations=2
    )
    found = measure(Sampler(policy, config), prompts_of(policy, 5), RewardRunner([timed]), config, 0)
    assert seen == sizes
    given = [float("nan") if call == 2 else call for call, size in enumerate(sizes, 1) for _ in range(size)]
    assert found.rewards["timed"] == pytest.approx(given, nan_ok=True)


def test_a_run_is_the_same_however_often_it_is_evaluated(tmp_path):
    without = run(tmp_path / "without", noisy_reward, max_steps=2)
    for k in (None, 3):
        often = dict(eval_dataset=ROWS[:3], eval_steps=1, num_generations_eval=k)
        with_eval = run(tmp_path / f"with {k}", noisy_reward, max_steps=2, **often)
        assert [line["step"] for line in with_eval.eval_history] == [0, 1, 2]
        for name, value in adapters(without.policy).items():
            assert torch.equal(value, adapters(with_eval.policy)[name])
        assert [line["reward"] for line in without.history] == [line["reward"] for line in with_eval.history]


def saved(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_the_best_evaluations_adapter_is_kept_through_a_resume_and_loaded_at_the_end(tmp_path):
    """The best is step 2's of 3; the run stops after step 2 and goes on."""
    reward = at_step([0.1, 0.2, 0.9, 0.3])
    kept, folder = {}, tmp_path / "out"

    def remember(step, metrics, policy):
        kept[step] = adapters(policy)

    changes = dict(eval_dataset=ROWS[:3], eval_steps=1, callbacks=remember, lr_scheduler_type="constant")
    run(folder, reward, max_steps=2, **changes)
    assert json.loads((folder / "best/best.json").read_text())["step"] == 2
    result = run(folder, reward, max_steps=3, resume_from_checkpoint=True, load_best_model_at_end=True, **changes)
    assert json.loads((folder / "best/best.json").read_text()) == {
        "step": 2, "metric": "eval_reward", "value": pytest.approx(0.9)
    }  # fmt: skip
    assert any(not torch.equal(value, kept[3][name]) for name, value in kept[2].items())
    assert all(torch.equal(value, adapters(result.policy)[name]) for name, value in kept[2].items())
    best, final, last = saved(folder / "best"), saved(folder / "adapter"), saved(folder / "checkpoint-3")
    assert all(torch.equal(value, final[name]) for name, value in best.items())
    assert any(not torch.equal(value, last[name]) for name, value in best.items())


def test_less_can_be_better_and_the_untrained_adapter_can_be_the_best(tmp_path):
    changes = dict(eval_dataset=ROWS[:3], eval_steps=1, max_steps=1)
    reward = at_step([0.1, 0.2])
    run(tmp_path / "less", reward, metric_for_best_model="reward", greater_is_better=False, **changes)
    assert json.loads((tmp_path / "less/best/best.json").read_text())["step"] == 0
    assert all((value == 0).all() for name, value in saved(tmp_path / "less/best").items() if "lora_B" in name)


def test_a_fresh_run_forgets_the_best_of_an_earlier_one_and_another_metric_begins_anew(tmp_path, policy):
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True)
    BestAdapter(tmp_path, config, fresh=True).keep(policy, 7, {"eval_reward": 2.0, "eval_pass@1": 0.5})
    again = BestAdapter(tmp_path, config, fresh=False)
    again.keep(policy, 8, {"eval_reward": 1.0})
    again.keep(policy, 9, {"eval_reward": NAN})
    assert (again.record() or {})["step"] == 7
    other = BestAdapter(tmp_path, dataclasses.replace(config, metric_for_best_model="pass@1"), fresh=False)
    assert other.record() is None
    other.keep(policy, 9, {"eval_reward": 0.0, "eval_pass@1": 0.1})
    assert (other.record() or {})["step"] == 9
    assert BestAdapter(tmp_path, config, fresh=True).record() is None
    assert not (tmp_path / "best").exists()


def test_a_metric_that_no_evaluation_has_stops_the_run_before_its_first_step(tmp_path):
    with pytest.raises(ValueError, match="metric_for_best_model='eval_speed' is none of .* eval_reward"):
        run(tmp_path / "out", length_reward, eval_dataset=ROWS[:2], metric_for_best_model="eval_speed")


@pytest.mark.parametrize(
    "change",
    [
        {"num_generations_eval": 2}, {"load_best_model_at_end": True}, {"metric_for_best_model": "reward"},
        {"greater_is_better": False},
    ],
)  # fmt: skip
def test_a_setting_of_the_evaluation_without_an_eval_dataset_is_refused(tmp_path, change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}=.* no eval_dataset"):
        run(tmp_path / "out", length_reward, **change)


def test_an_adapter_is_evaluated_beside_its_base(tmp_path):
    """The adapter's numbers are those that training logged last, and the base's those that it logged first."""
    changes = dict(eval_dataset=ROWS[:6], num_generations_eval=2, learning_rate=0.05)
    result = run(tmp_path / "out", [task.tag_format_reward, length_reward], **changes)
    config = settings(tmp_path / "unused", num_generations_eval=2)
    rewards = [task.tag_format_reward, length_reward]
    measured = evaluate(str(tmp_path / "out/adapter"), rewards, ROWS[:6], config)
    found = {who: evaluation.metrics for who, evaluation in measured.items()}
    for who, line in (("base", result.eval_history[0]), ("adapter", result.eval_history[-1])):
        for name in ("eval_reward", "eval_pass@2", "eval_maj@2", "eval_completions/mean_length"):
            assert found[who][name] == pytest.approx(line[name])
    assert found["base"]["eval_reward"] != found["adapter"]["eval_reward"]
    name = "eval_reward/difference"
    assert found["adapter"][name] == pytest.approx(found["adapter"]["eval_reward"] - found["base"]["eval_reward"])
    assert found["adapter"][name] == pytest.approx(result.eval_history[-1][name]), "as training found"
    assert found["adapter"][f"{name}/ci_low"] < found["adapter"][name] < found["adapter"][f"{name}/ci_high"]
    assert not any("difference" in name for name in found["base"])
    assert list(evaluate(str(DEMO_MODEL), length_reward, ROWS[:2], config)) == ["model"]


def test_one_greedy_completion_is_what_training_without_sampling_measures():
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    assert tokenizer.chat_template
    config = GRPOConfig(use_cpu=True, max_completion_length=8)
    found = evaluate(str(DEMO_MODEL), task.tag_format_reward, ROWS[:4], config)["model"].metrics
    assert "eval_mean@1" not in found and "eval_maj@1" not in found
    assert found["eval_pass@1"] == found["eval_rewards/tag_format_reward/mean"]


def by_length(completions, **kwargs):
    """One that is different with every adapter."""
    return [len(c[0]["content"]) / 10 for c in completions]


@pytest.mark.parametrize("k", [None, 2])
def test_every_metric_that_is_a_mean_over_prompts_has_its_values(policy, k):
    config = GRPOConfig(use_cpu=True, max_completion_length=6, num_generations_eval=k)
    rewards = RewardRunner([by_length, length_reward])
    found = measure(Sampler(policy, config), prompts_of(policy), rewards, config, 0)
    assert {"eval_reward", "eval_pass@1", "eval_rewards/by_length/mean", "eval_completions/mean_length"} < set(
        found.values
    )
    for name, values in found.values.items():
        assert len(values) == 4 and sum(values) / 4 == pytest.approx(found.metrics[name])
    assert list(found.rewards) == ["total", "by_length", "length_reward"] and len(found.texts) == 4 * (k or 1)


def test_training_says_each_evaluation_and_what_changed(tmp_path, capsys):
    result = run(tmp_path / "out", by_length, eval_dataset=ROWS[:6], eval_steps=2, learning_rate=0.05)
    said = capsys.readouterr().err.splitlines()
    first, while_, last = result.eval_history
    lines = [line for line in said if line.startswith(("evaluation", "difference"))]
    assert [line.split(":")[0] for line in lines] == [
        "evaluation before training", "evaluation at step 2", "evaluation after 3 steps",
        "difference (after - before, 95 % intervals)",
    ]  # fmt: skip
    for line, metrics in zip(lines, (first, while_, last), strict=False):
        low, high = (metrics[f"eval_reward/ci_{end}"] for end in ("low", "high"))
        assert f": reward {metrics['eval_reward']:.3f} [{low:.3f}, {high:.3f}]  pass@1 " in line
    name = "eval_reward/difference"
    assert last[name] == pytest.approx(last["eval_reward"] - first["eval_reward"]) and last[name] != 0
    assert (
        f": reward {last[name]:+.3f} [{last[f'{name}/ci_low']:+.3f}, {last[f'{name}/ci_high']:+.3f}]  pass@1"
        in lines[-1]
    )
    assert said.index(lines[0]) < min(i for i, line in enumerate(said) if line.startswith("step ")), (
        "before the first step"
    )
    assert not any(isinstance(value, list) for line in result.eval_history for value in line.values())


def difference_line(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("difference")]


LEARNING = dict(learning_rate=0.05, lr_scheduler_type="constant")
EVALUATED = dict(LEARNING, eval_dataset=ROWS[:6], num_generations_eval=2)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The output of a run of one step, evaluated before and after."""
    folder = tmp_path_factory.mktemp("evaluated") / "out"
    run(folder, by_length, max_steps=1, **EVALUATED)
    return folder


@pytest.fixture
def begun(tmp_path, evaluated):
    """A copy of that output, to go on with."""
    return shutil.copytree(evaluated, tmp_path / "out")


def test_the_evaluation_before_training_outlives_resumes_with_and_without_any(tmp_path, capsys, begun):
    whole = run(tmp_path / "whole", by_length, max_steps=3, **EVALUATED)
    (said,) = difference_line(capsys)
    run(begun, by_length, max_steps=2, **LEARNING, resume_from_checkpoint=True)
    again = dict(EVALUATED, max_steps=3, metric_for_best_model="reward")
    last = run(begun, by_length, **again, resume_from_checkpoint=True)
    assert "eval_reward/difference" in last.eval_history[-1]
    assert last.eval_history[-1] == whole.eval_history[-1]
    assert difference_line(capsys) == [said]
    run(begun, by_length, **again, resume_from_checkpoint=True)
    assert difference_line(capsys) == [said], "and where nothing is left to train"
    (tmp_path / "elsewhere").mkdir()
    run(tmp_path / "elsewhere", by_length, **again, resume_from_checkpoint=str(begun / "checkpoint-1"))
    assert difference_line(capsys) == [said], "the checkpoint has it, not the folder"


@pytest.mark.parametrize("change", [{"eval_dataset": ROWS[1:7]}, {"num_generations_eval": 3}])
def test_evaluations_of_other_prompts_are_not_compared(change, capsys, begun):
    changes: dict[str, Any] = dict(EVALUATED, resume_from_checkpoint=True)
    result = run(begun, by_length, **{**changes, **change, "max_steps": 2})
    said = capsys.readouterr().err
    assert "eval_dataset or num_generations_eval has changed" in said and "difference (" not in said
    assert "eval_reward/difference" not in result.eval_history[-1]
    run(begun, by_length, max_steps=3, **changes)
    assert len(difference_line(capsys)) == 1, "the first one's values are kept through it all"


def test_the_metric_that_chooses_the_best_is_the_one_that_is_shown(tmp_path, capsys):
    run(
        tmp_path / "out", by_length, eval_dataset=ROWS[:6], max_steps=1, metric_for_best_model="completions/mean_length"
    )
    said = capsys.readouterr().err.splitlines()
    assert all(
        " completions/mean_length " in line and "  pass@1 " in line for line in said if line.startswith("evaluation")
    )
    run(tmp_path / "other", by_length, eval_dataset=ROWS[:6], max_steps=1, metric_for_best_model="pass@1")
    assert "reward" not in "".join(line for line in capsys.readouterr().err.splitlines() if "evaluation" in line)


def test_evaluations_without_a_reward_say_so(tmp_path, capsys):
    def never(completions, **kwargs):
        return [None] * len(completions)

    result = run(tmp_path / "out", never, eval_dataset=ROWS[:1], max_steps=1)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("evaluation", "difference"))]
    assert [line.split(": ")[1] for line in said] == ["reward -  pass@1 -"] * 3
    assert result.eval_history[-1]["eval_reward/difference"] is None


def test_a_reward_that_does_not_apply_everywhere_survives_a_checkpoint(tmp_path, capsys):
    def sometimes(completions, solution, **kwargs):
        left_out = [gold == ROWS[0]["solution"] for gold in solution]
        return [None if out else len(c[0]["content"]) for c, out in zip(completions, left_out, strict=True)]

    changes = dict(eval_dataset=ROWS[:3], learning_rate=0.05)
    run(tmp_path / "out", sometimes, max_steps=1, **changes)
    result = run(tmp_path / "out", sometimes, max_steps=2, resume_from_checkpoint=True, **changes)
    assert len(difference_line(capsys)) == 2 and result.eval_history[-1]["eval_reward/difference"] is not None


def evaluation_of(texts, prompts, k=1, **rewards) -> Evaluation:
    completions = [Completion([1], None, None, "length" if "cut" in text else "eos") for text in texts]
    return Evaluation({}, {}, prompts, completions, texts, rewards)


def test_what_is_shown_are_the_first_completions_of_as_many_prompts_as_there_are():
    prompts = [Prompt(f"p{i}", [1], {"answer": i} if i else {}) for i in range(3)]
    base = evaluation_of(["a0", "b0", "a1", "b1", "a2", "b2 cut"], prompts, accuracy=[0.0, 1.0, NAN, 1.0, 0.0, 1.0])
    adapter = evaluation_of(["A0", "B0", "A1", "B1", "A2", "B2"], prompts, accuracy=[1.0] * 6)
    found = {"base": base, "adapter": adapter}
    assert [one["base"]["completion"] for one in examples(found, 2)] == ["a0", "a1"]
    assert [one["base"]["completion"] for one in examples(found, 4)] == ["a0", "b0", "a1", "a2"]
    assert [one["prompt"] for one in examples(found, 4)] == ["p0", "p0", "p1", "p2"]
    assert len(examples(found, 99)) == 6 and examples(found, 0) == []
    assert [one["gold"] for one in examples(found, 3)] == [None, 1, 2]
    text = examples_as_text(examples(found, 2))
    assert text.splitlines() == [
        "1 of 2", "  prompt", "    p0", "  base: accuracy 0.000", "    a0", "  adapter: accuracy 1.000", "    A0", "",
        "2 of 2", "  prompt", "    p1", "  gold answer", "    1", "  base: accuracy -", "    a1",
        "  adapter: accuracy 1.000", "    A1",
    ]  # fmt: skip
    assert "base: accuracy 1.000, cut off\n    b2 cut" in examples_as_text(examples(found, 6))


def test_nothing_that_a_model_writes_moves_the_cursor_or_passes_for_ours():
    bad = "\x1b[2J\x1b]0;title\x07\r\x9b31m[red]x[/red]\n2 of 2\n  base: accuracy 1.000\u2028\x0b\u202e\ud800"
    chat = [{"role": "user\x1b[0m", "content": bad}]
    found = {"model": evaluation_of([bad], [Prompt(chat, [1], {"solution": bad})], **{"r\x1b": [0.0]})}
    text = examples_as_text(examples(found, 1))
    assert all(c.isprintable() or c in "\n\t" for c in text)
    assert "[red]x[/red]" in text and "\\x1b[2J" in text
    ours = [line for line in text.splitlines() if not line.startswith("    ")]
    assert ours == ["1 of 1", "  prompt", "  gold answer", "  model: r\\x1b 0.000"]


def test_texts_of_all_languages_stay_as_they_are():
    for text in ("naïve \u00a0 x", "数学\u3000は", "if x:\n\ty", "🙂 ½ ∑"):
        assert "\n".join(map(printable, text.split("\n"))) == text


def test_a_model_is_measured_with_what_it_wrote_on_the_rows_that_are_asked_for():
    config = GRPOConfig(use_cpu=True, max_completion_length=8, dataset_take=4)
    found = evaluate(str(DEMO_MODEL), task.tag_format_reward, ROWS[:6], config)
    shown, *others = examples(found, 6)
    assert len(others) == 3
    assert shown["prompt"] == ROWS[0]["prompt"] and shown["gold"] == ROWS[0]["solution"]
    assert shown["model"]["completion"] and shown["model"]["rewards"]["tag_format_reward"] in (0.0, 1.0)

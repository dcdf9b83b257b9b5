"""A step by collect and by refill, with a tiny policy on the CPU."""

import dataclasses
from typing import Any

import torch
from tiny_models import make_policy

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.generate.sample import Sampler
from lowmem_grpo.rewards import RewardRunner
from lowmem_grpo.rollout.collect import collect
from lowmem_grpo.rollout.refill import needs_refill, refill
from lowmem_grpo.rollout.replay import ReplayBuffer
from lowmem_grpo.rollout.stream import Stream

PROMPTS = [Prompt(str(i), [5 + i, 9, 20], {}) for i in range(5)]
SETTINGS: dict[str, Any] = dict(prompts_per_step=2, num_generations=3, max_completion_length=6, bf16=False)


def number_of_even_ids(completion_ids, **_):
    return [float(sum(token % 2 == 0 for token in ids)) for ids in completion_ids]


def comparable(metrics):
    """Without times; in text, since NaN, such as the mean of nothing, is not equal to itself."""
    return {name: repr(float(value)) for name, value in metrics.items() if not name.startswith("time/")}


def step_of(how, policy, config, position=0):
    """The same draws for each, from a stream of its own."""
    torch.manual_seed(3)
    stream = Stream(ReplayBuffer(config.replay_buffer_size), position)
    return how(Sampler(policy, config), PROMPTS, stream, RewardRunner([number_of_even_ids], None), config, 1), stream


def test_with_nothing_to_refill_a_step_is_collects():
    """Every tensor, metric and row of the table, also past the end of an epoch."""
    policy, config = make_policy("qwen3"), GRPOConfig(**SETTINGS)
    (collected, one), (refilled, other) = (step_of(how, policy, config, position=4) for how in (collect, refill))
    assert collected[1:] == refilled[1:] and one.position == other.position == 6
    assert collected.num_tokens == collected.num_new_tokens + 6 * 3
    for field in dataclasses.fields(collected.rollout):
        one, other = (getattr(found.rollout, field.name) for found in (collected, refilled))
        if field.name == "metrics":
            one, other = map(comparable, (one, other))
        if field.name == "completions":
            one, other = ([completion.ids for completion in completions] for completions in (one, other))
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            assert torch.equal(one, other), field.name
        else:
            assert one == other, field.name
    assert collected.rollout.advantages.any()


def test_a_step_is_refilled_where_a_setting_asks_for_it_and_nowhere_else():
    assert not needs_refill(GRPOConfig())
    assert needs_refill(GRPOConfig(dynamic_sampling_rounds=1))
    assert needs_refill(GRPOConfig(replay_buffer_size=4))
    assert needs_refill(GRPOConfig(curriculum_skip=0.5))


def test_a_metric_of_rounds_is_the_mean_over_all_their_completions():
    def all_but_prompt_2(prompts, completion_ids, log_metric, **_):
        log_metric("asked", sum(map(int, prompts)) / len(prompts))
        even = number_of_even_ids(completion_ids)
        return [1.0 if prompt == "2" else value for prompt, value in zip(prompts, even, strict=True)]

    settings = {**SETTINGS, "prompts_per_step": 3, "dynamic_sampling_rounds": 1, "shuffle_dataset": False}
    config = GRPOConfig(**settings)
    torch.manual_seed(3)
    sampler, rewards = Sampler(make_policy("qwen3"), config), RewardRunner([all_but_prompt_2], None)
    metrics = refill(sampler, PROMPTS, Stream(ReplayBuffer(0)), rewards, config, 1).rollout.metrics
    assert metrics["dynamic_sampling/rounds"] == 1 and metrics["dynamic_sampling/dropped_groups"] == 1
    assert metrics["asked"] == (0 + 1 + 2 + 3) / 4, "three prompts, and then one"


def test_what_differs_is_kept_for_replay_and_what_is_dull_is_remembered():
    def only_prompt_0(prompts, completion_ids, **_):
        even = number_of_even_ids(completion_ids)
        return [value if prompt == "0" else 1.0 for prompt, value in zip(prompts, even, strict=True)]

    config = GRPOConfig(**SETTINGS, replay_buffer_size=4, curriculum_skip=0.5, shuffle_dataset=False)
    torch.manual_seed(3)
    stream = Stream(ReplayBuffer(4))
    sampler = Sampler(make_policy("qwen3"), config)
    found = refill(sampler, PROMPTS, stream, RewardRunner([only_prompt_0], None), config, 1)
    assert stream.dull_prompts == {1}
    assert [group.position for group in stream.replay.groups] == [0]
    assert len(found.rollout.prompts) == 2 and found.rollout.num_replayed_tokens == 0
    torch.manual_seed(4)
    dull = RewardRunner([lambda completions, **_: [1.0] * len(completions)], None)
    again = refill(Sampler(make_policy("qwen3"), config), PROMPTS, stream, dull, config, 2)
    assert [prompt.text for prompt in again.rollout.prompts] == ["2", "0"], "of two dull groups one makes room"
    assert again.rollout.num_replayed_tokens == sum(len(c.ids) for c in again.rollout.completions[3:]) > 0
    assert again.rollout.advantages[:3].eq(0).all() and again.rollout.advantages[3:].any()

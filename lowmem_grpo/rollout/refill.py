"""One step's rollout, with groups without a difference replaced by further prompts or earlier groups."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.sections import SamplingFields
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.generate import as_text
from lowmem_grpo.generate.sample import Sampler
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.objective.advantages import nanstd, weighted_rewards
from lowmem_grpo.rewards import RewardRunner
from lowmem_grpo.rollout.collect import (
    Collected,
    Scored,
    as_rollout,
    compare_rewards,
    sample_and_score,
    scored_metrics,
)
from lowmem_grpo.rollout.replay import Group
from lowmem_grpo.rollout.scoring import joined_metrics
from lowmem_grpo.rollout.stream import Stream, index_at, next_positions, prompts_at


def needs_refill(config: SamplingFields) -> bool:
    """True where dynamic sampling, the replay buffer or the curriculum is on, so that collect() is not enough."""
    return bool(config.dynamic_sampling_rounds or config.replay_buffer_size or config.curriculum_skip)


def refill(
    sampler: Sampler, prompts: list[Prompt], stream: Stream, rewards: RewardRunner, config: GRPOConfig, step: int
) -> Collected:
    """A step as `collect` makes it, with groups without a difference replaced where that can be done.

    With dynamic_sampling_rounds, groups of the next prompts replace them (DAPO, https://arxiv.org/abs/2503.14476); then
    groups of earlier steps do, from the replay buffer. Where both are not enough, groups without a difference stay: a
    step always has prompts_per_step groups. Metrics are over everything that was sampled.

    The stream moves on to where the next step draws from, and knows the dull prompts: those of groups without a
    difference.
    """
    rounds = _sample_rounds(sampler, prompts, stream, rewards, config, step)
    missing = _missing(rounds, config)
    replayed = stream.replay.take(missing)
    # The rest are groups of the last round without a difference: it sampled as many as were missing before it.
    last = rounds[-1]
    others = [group for group in range(len(last.scored.prompts)) if group not in last.chosen]
    last.chosen = sorted(last.chosen + others[: missing - len(replayed)])
    fresh = _joined([_chosen(each.scored, each.chosen, config) for each in rounds])
    stream.replay.add(_to_replay(fresh, config))
    parts = [(each.scored.metrics, len(each.scored.completions)) for each in rounds]
    every = replace(_joined([each.scored for each in rounds]), metrics=joined_metrics(parts, time_of=sum))
    metrics = scored_metrics(every, compare_rewards(every.rewards, config), rewards.names)
    if config.dynamic_sampling_rounds:
        metrics["dynamic_sampling/rounds"] = len(rounds) - 1
        metrics["dynamic_sampling/dropped_groups"] = len(every.prompts) - len(fresh.prompts)
    if config.replay_buffer_size:
        metrics["replay/groups"] = len(replayed)
    learned = _joined([fresh, _replayed(sampler.policy, prompts, replayed, config)])
    compared = compare_rewards(learned.rewards, config)
    rollout = as_rollout(learned, compared, metrics, rewards.names, sampler.policy.device, config)
    num_new_tokens = sum(completion.num_sampled for completion in every.completions)
    num_tokens = sum(len(completion.ids) for completion in every.completions)
    num_tokens += config.num_generations * sum(len(prompt.ids) for prompt in every.prompts)
    num_replayed_tokens = sum(len(completion.ids) for group in replayed for completion in group.completions)
    return Collected(
        replace(rollout, num_replayed_tokens=num_replayed_tokens),
        num_tokens=num_tokens,
        num_new_tokens=num_new_tokens,
    )


@dataclass
class _Round:
    scored: Scored
    chosen: list[int]  # the groups that the step learns from


def _missing(rounds: list[_Round], config: SamplingFields) -> int:
    return config.prompts_per_step - sum(len(each.chosen) for each in rounds)


def _sample_rounds(
    sampler: Sampler, prompts: list[Prompt], stream: Stream, rewards: RewardRunner, config: GRPOConfig, step: int
) -> list[_Round]:
    """Sample until no group is missing or no round is left; the stream learns which prompts are dull."""
    rounds: list[_Round] = []
    while len(rounds) <= config.dynamic_sampling_rounds and _missing(rounds, config):
        positions = next_positions(stream.position, _missing(rounds, config), stream.dull_prompts, len(prompts), config)
        stream.position = positions[-1] + 1
        scored = sample_and_score(sampler, prompts, positions, rewards, config, step)
        differs = _differs(scored.rewards, config)
        for position, is_dull in zip(positions, (~differs).tolist(), strict=True):
            index = index_at(position, len(prompts), config)
            if is_dull and config.curriculum_skip:
                stream.dull_prompts.add(index)
            else:
                stream.dull_prompts.discard(index)
        rounds.append(_Round(scored, differs.nonzero().flatten().tolist()))
    return rounds


def _differs(rewards: Tensor, config: GRPOConfig) -> Tensor:
    """A truth value for each group, (B / num_generations,) bool: its completions were told apart.

    Where a reward is compared with the whole batch (reinforce_plus_plus), all groups are told apart, or none.
    """
    if config.adv_estimator == "reinforce_plus_plus":
        advantages = compare_rewards(rewards, config).advantages
        return (advantages != 0).any().expand(len(rewards) // config.num_generations)
    columns = rewards
    if config.multi_objective_aggregation == "sum_then_normalize":
        columns = weighted_rewards(rewards, config.reward_weights)[:, None]
    return (nanstd(columns.unflatten(0, (-1, config.num_generations)), dim=1) > 0).any(dim=1)


def _to_replay(scored: Scored, config: GRPOConfig) -> list[Group]:
    """The groups that a later step may replay: those with a difference and the sampler's log-probabilities.

    A group with a log-probability that is not finite is left out, since it would spoil another step.
    """
    known = scored.completions and scored.completions[0].proposal_logprobs is not None
    if not config.replay_buffer_size or not known:
        return []
    completions = [
        scored.completions[b : b + config.num_generations]
        for b in range(0, len(scored.completions), config.num_generations)
    ]
    rewards = scored.rewards.unflatten(0, (-1, config.num_generations))
    groups = map(Group, scored.positions, completions, rewards)
    return [
        group
        for group, differs in zip(groups, _differs(scored.rewards, config), strict=True)
        if differs and all(completion.is_finite for completion in group.completions)
    ]


def _replayed(policy: Policy, prompts: list[Prompt], groups: list[Group], config: GRPOConfig) -> Scored:
    """Groups out of the replay buffer, with the rewards that they had."""
    positions = [group.position for group in groups]
    drawn = prompts_at(prompts, positions, config)
    completions = [completion for group in groups for completion in group.completions]
    asked = [prompt for prompt in drawn for _ in range(config.num_generations)]
    texts = [as_text(policy, prompt, completion) for prompt, completion in zip(asked, completions, strict=True)]
    table = {"prompt": [prompt.text for prompt in asked], "completion": texts}
    rewards = torch.cat([group.rewards for group in groups]) if groups else torch.zeros(0, 1)
    return Scored(positions, drawn, completions, rewards, {}, table)


def _chosen(scored: Scored, groups: list[int], config: SamplingFields) -> Scored:
    """The chosen groups of scored completions."""
    size = config.num_generations
    rows = [b for group in groups for b in range(group * size, (group + 1) * size)]
    return Scored(
        positions=[scored.positions[group] for group in groups],
        prompts=[scored.prompts[group] for group in groups],
        completions=[scored.completions[b] for b in rows],
        rewards=scored.rewards[rows],
        metrics={},
        table={name: [values[b] for b in rows] for name, values in scored.table.items()},
    )


def _joined(parts: list[Scored]) -> Scored:
    """Several Scored as one, without metrics; its table has the columns that all of them have."""
    parts = [part for part in parts if part.prompts] or parts[:1]
    names = [name for name in parts[0].table if all(name in part.table for part in parts)]
    return Scored(
        positions=[position for part in parts for position in part.positions],
        prompts=[prompt for part in parts for prompt in part.prompts],
        completions=[completion for part in parts for completion in part.completions],
        rewards=torch.cat([part.rewards for part in parts]),
        metrics={},
        table={name: [value for part in parts for value in part.table[name]] for name in names},
    )

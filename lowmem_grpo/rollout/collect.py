"""One step's rollout: completions sampled, scored, and compared with each other."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.generate import as_text, complete
from lowmem_grpo.generate.completion import Completion
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.objective.advantages import Advantages, compare, nanstd, weighted_rewards
from lowmem_grpo.objective.formulas import kl_estimate
from lowmem_grpo.rewards import RewardRunner
from lowmem_grpo.rollout.metrics import length_metrics, reward_metrics
from lowmem_grpo.rollout.replay import Group
from lowmem_grpo.rollout.rollout import Rollout
from lowmem_grpo.rollout.stream import Stream, index_at, next_positions, prompts_at


@dataclass
class _Scored:
    """Completions of some prompts, group after group, with their rewards."""

    prompts: list[Prompt]
    completions: list[Completion]
    rewards: Tensor  # (B, R)
    metrics: dict[str, float]
    table: dict[str, list]
    positions: list[int] = field(default_factory=list)  # of the prompts in the stream


@dataclass(frozen=True)
class Collected:
    rollout: Rollout
    stream: Stream
    tokens: int  # of every completion sampled, those of dropped groups included, with its prompt
    new_tokens: int  # of the completions alone


def collect_rollout(
    policy: Policy, prompts: list[Prompt], stream: Stream, rewards: RewardRunner, config: GRPOConfig, step: int
) -> Collected:
    """Sample num_generations completions of each of the stream's next prompts, score them, and compare them.

    With dynamic_sampling_rounds, groups without a difference are dropped for those of the prompts that come next
    (DAPO, https://arxiv.org/abs/2503.14476), and then for those in the replay buffer; what is without one after all
    that stays, and the step has as many groups as ever. Metrics are over everything that was sampled.

    `stream` is where the prompts are drawn from; it is not changed, and Collected has it as it is afterwards.
    """
    rounds, chosen, wanted = [], [], config.prompts_per_step
    stream = Stream(stream.position, set(stream.dull), stream.replay.copy())
    for _ in range(1 + config.dynamic_sampling_rounds):
        positions = next_positions(stream.position, wanted, stream.dull, len(prompts), config)
        stream.position = positions[-1] + 1
        scored = _sample_and_score(policy, prompts_at(prompts, positions, config), rewards, config, step)
        differs = _differs(scored.rewards, config)
        for position, dull in zip(positions, (~differs).tolist(), strict=True):
            index = index_at(position, len(prompts), config)
            stream.dull = stream.dull | {index} if dull and config.curriculum_skip else stream.dull - {index}
        scored.positions = positions
        rounds.append(scored)
        chosen.append(differs.nonzero().flatten().tolist())
        wanted = config.prompts_per_step - sum(map(len, chosen))
        if not wanted:
            break
    replayed = stream.replay.take(wanted)
    # What is still missing are groups of the last round as they are: it asked for no more than were missing then.
    dull = [group for group in range(len(rounds[-1].prompts)) if group not in chosen[-1]]
    chosen[-1] = sorted(chosen[-1] + dull[: wanted - len(replayed)])
    fresh = _joined(list(zip(rounds, chosen, strict=True)), config)
    stream.replay.add(_to_replay(fresh, config))
    every = _joined([(scored, range(len(scored.prompts))) for scored in rounds], config)
    metrics = {
        **every.metrics,
        **length_metrics(every.completions),
        **reward_metrics(rewards.names, every.rewards, _compared(every.rewards, config)),
    }
    if config.dynamic_sampling_rounds:
        metrics["dynamic_sampling/rounds"] = len(rounds) - 1
        metrics["dynamic_sampling/dropped_groups"] = len(every.prompts) - len(fresh.prompts)
    step_scored = fresh
    if config.replay_buffer_size:
        metrics["replay/groups"] = len(replayed)
        old = _replayed(policy, prompts, replayed, config)
        step_scored = _joined([(fresh, range(len(fresh.prompts))), (old, range(len(replayed)))], config)
    rollout = _rollout(step_scored, metrics, rewards.names, policy, config)
    new = sum(len(completion.ids) for completion in every.completions)
    return Collected(
        rollout=replace(rollout, num_replayed_tokens=sum(len(c.ids) for group in replayed for c in group.completions)),
        stream=stream,
        tokens=new + config.num_generations * sum(len(prompt.ids) for prompt in every.prompts),
        new_tokens=new,
    )


def _differs(rewards: Tensor, config: GRPOConfig) -> Tensor:
    """Whether the completions of each group were told apart, (B / num_generations,) bool.

    Where the batch is what a reward is compared with (reinforce_plus_plus), every group is, if anything is.
    """
    if config.adv_estimator == "reinforce_plus_plus":
        advantages = _compared(rewards, config).advantages
        return (advantages != 0).any().expand(len(rewards) // config.num_generations)
    columns = rewards
    if config.multi_objective_aggregation == "sum_then_normalize":
        columns = weighted_rewards(rewards, config.reward_weights)[:, None]
    return (nanstd(columns.unflatten(0, (-1, config.num_generations)), dim=1) > 0).any(dim=1)


def _to_replay(scored: _Scored, config: GRPOConfig) -> list[Group]:
    """The groups that a later step may take: those with a difference, whose sampler said what it drew them with.

    Not where that was not finite, which would spoil another step.
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


def _replayed(policy: Policy, prompts: list[Prompt], groups: list[Group], config: GRPOConfig) -> _Scored:
    asked = prompts_at(prompts, [group.position for group in groups], config)
    completions = [completion for group in groups for completion in group.completions]
    owners = [prompt for prompt in asked for _ in range(config.num_generations)]
    texts = [as_text(policy, prompt, completion) for prompt, completion in zip(owners, completions, strict=True)]
    table = {"prompt": [prompt.text for prompt in owners], "completion": texts}
    rewards = torch.cat([group.rewards for group in groups]) if groups else torch.zeros(0, 1)
    return _Scored(asked, completions, rewards, {}, table, [group.position for group in groups])


def with_kl_in_reward(rollout: Rollout, beta: float, config: GRPOConfig) -> Rollout:
    """The same, its advantages anew from rewards less beta times each completion's KL to the reference."""
    assert rollout.ref_logprobs is not None
    own = rollout.sampling_logprobs if rollout.old_logprobs is None else rollout.old_logprobs
    assert own is not None
    estimates = kl_estimate(own, rollout.ref_logprobs, estimator=config.kl_estimator).cpu()
    lengths = rollout.offsets.diff()
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    kl = torch.zeros(len(lengths)).index_add_(0, owner, estimates) * rollout.completion_mask
    compared = _compared(rollout.rewards, config, beta * kl)
    counted = int((lengths * rollout.completion_mask).sum())
    return replace(
        rollout,
        advantages=compared.advantages,
        metrics={**rollout.metrics, "kl": (kl.sum() / counted).item()},  # NaN where none counts
        table={**rollout.table, "advantage": compared.advantages.tolist()},
    )


def _compared(rewards: Tensor, config: GRPOConfig, penalty: Tensor | None = None) -> Advantages:
    return compare(
        rewards, num_generations=config.num_generations, reward_weights=config.reward_weights,
        adv_estimator=config.adv_estimator, scale_rewards=config.scale_rewards,
        multi_objective_aggregation=config.multi_objective_aggregation, penalty=penalty,
    )  # fmt: skip


def _sample_and_score(
    policy: Policy, prompts: list[Prompt], rewards: RewardRunner, config: GRPOConfig, step: int
) -> _Scored:
    sampled = complete(policy, prompts, config.num_generations, config)
    completions = sampled.completions
    asked = [prompt for prompt in prompts for _ in range(config.num_generations)]
    texts = [as_text(policy, prompt, completion) for prompt, completion in zip(asked, completions, strict=True)]
    columns = {key: [prompt.columns[key] for prompt in asked] for key in asked[0].columns}
    scores = rewards([p.text for p in asked], texts, [c.ids for c in completions], columns, step)
    table = {**scores.extra_columns, "prompt": [p.text for p in asked], "completion": texts}
    return _Scored(prompts, completions, scores.rewards, {**sampled.metrics, **scores.metrics}, table)


def _joined(parts: list, config: GRPOConfig) -> _Scored:
    """The chosen groups of several rounds as one; metrics are means over the rounds."""
    prompts, completions, rewards, tables, positions = [], [], [], [], []
    parts = [(scored, groups) for scored, groups in parts if len(groups)] or parts[:1]
    for scored, groups in parts:
        positions += [scored.positions[g] for g in groups]
        rows = [b for g in groups for b in range(g * config.num_generations, (g + 1) * config.num_generations)]
        prompts += [scored.prompts[g] for g in groups]
        completions += [scored.completions[b] for b in rows]
        rewards.append(scored.rewards[rows])
        tables.append({name: [values[b] for b in rows] for name, values in scored.table.items()})
    names = set.intersection(*(set(table) for table in tables))
    logged: dict[str, list[float]] = {}
    for scored, _ in parts:
        for name, value in scored.metrics.items():
            logged.setdefault(name, []).append(value)
    return _Scored(
        prompts, completions, torch.cat(rewards), {name: _of_rounds(name, v) for name, v in logged.items()},
        {name: [value for table in tables for value in table[name]] for name in tables[0] if name in names}, positions,
    )  # fmt: skip


def _of_rounds(name: str, values: list[float]) -> float:
    """A metric of several rounds: times and failures add up, everything else is a mean."""
    return sum(values) if name.startswith("time/") or name.endswith("/failures") else sum(values) / len(values)


def _rollout(
    scored: _Scored, metrics: dict[str, float], names: list[str], policy: Policy, config: GRPOConfig
) -> Rollout:
    compared = _compared(scored.rewards, config)
    finished = torch.tensor([completion.finish != "length" for completion in scored.completions])
    return Rollout(
        prompts=scored.prompts,
        completions=scored.completions,
        offsets=torch.tensor([0] + [len(completion.ids) for completion in scored.completions]).cumsum(0),
        sampling_logprobs=_flat([completion.logprobs for completion in scored.completions], policy),
        proposal_logprobs=_flat([completion.proposal_logprobs for completion in scored.completions], policy),
        rewards=scored.rewards,
        advantages=compared.advantages,
        completion_mask=finished if config.mask_truncated_completions else torch.ones_like(finished),
        metrics=metrics,
        table={
            **scored.table,
            **dict(zip(names, scored.rewards.T.tolist(), strict=True)),
            "advantage": compared.advantages.tolist(),
        },
    )


def _flat(values: list[Tensor | None], policy: Policy) -> Tensor | None:
    known = [value for value in values if value is not None]
    return torch.cat(known).to(policy.device) if known else None

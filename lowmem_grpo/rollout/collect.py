"""One step's rollout: completions sampled, scored, and compared with each other."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.sections import ObjectiveFields
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.generate.completion import Completion
from lowmem_grpo.generate.sample import Sampler
from lowmem_grpo.objective.advantages import Advantages, compare
from lowmem_grpo.objective.formulas import kl_estimate
from lowmem_grpo.rewards import RewardRunner
from lowmem_grpo.rollout.metrics import length_metrics, reward_metrics, tool_metrics
from lowmem_grpo.rollout.rollout import Rollout
from lowmem_grpo.rollout.scoring import complete_and_score
from lowmem_grpo.rollout.stream import Stream, prompts_at


class Collected(NamedTuple):
    rollout: Rollout
    num_tokens: int  # of every completion sampled, whether or not the rollout has it, with its prompt
    num_new_tokens: int  # of these completions alone


def collect(
    sampler: Sampler, prompts: list[Prompt], stream: Stream, rewards: RewardRunner, config: GRPOConfig, step: int
) -> Collected:
    """Sample num_generations completions of each of the stream's next prompts, score them, and compare them.

    The stream moves on to where the next step draws from.
    """
    positions = range(stream.position, stream.position + config.prompts_per_step)
    scored = sample_and_score(sampler, prompts, positions, rewards, config, step)
    compared = compare_rewards(scored.rewards, config)
    metrics = scored_metrics(scored, compared, rewards.names)
    rollout = as_rollout(scored, compared, metrics, rewards.names, sampler.policy.device, config)
    stream.position = positions.stop
    return Collected(rollout, sum(rollout.lengths), int(rollout.num_sampled.sum()))


@dataclass(frozen=True)
class Scored:
    """Completions of some prompts, group after group, with their rewards."""

    positions: list[int]  # of the prompts in the stream
    prompts: list[Prompt]
    completions: list[Completion]  # B
    rewards: Tensor  # (B, R)
    metrics: dict[str, float]  # of sampling and scoring
    table: dict[str, list]  # a row a completion: prompt, completion, and what the reward functions logged


def sample_and_score(
    sampler: Sampler,
    prompts: list[Prompt],
    positions: Sequence[int],
    rewards: RewardRunner,
    config: GRPOConfig,
    step: int,
) -> Scored:
    """Completions of the prompts at these positions of the stream, and the rewards' verdicts on them."""
    drawn = prompts_at(prompts, positions, config)
    sample = partial(sampler.complete, drawn, config.num_generations)
    judged = complete_and_score(sampler.policy, drawn, sample, rewards, global_step=step - 1)
    asked = [prompt.text for prompt in drawn for _ in range(config.num_generations)]
    table = {**judged.scores.extra_columns, "prompt": asked, "completion": judged.texts}
    return Scored([*positions], drawn, judged.completions, judged.scores.rewards, judged.metrics, table)


def compare_rewards(rewards: Tensor, config: GRPOConfig, penalty: Tensor | float = 0.0) -> Advantages:
    """Advantages of rewards (B, R) as configured, after the penalty (B,) is taken from each sum."""
    return compare(
        rewards, num_generations=config.num_generations, reward_weights=config.reward_weights,
        adv_estimator=config.adv_estimator, scale_rewards=config.scale_rewards,
        multi_objective_aggregation=config.multi_objective_aggregation, penalty=penalty,
    )  # fmt: skip


def scored_metrics(scored: Scored, compared: Advantages, names: list[str]) -> dict[str, float]:
    """Metrics of sampling, of the completions' lengths and of the rewards, whose functions have these names."""
    return {
        **scored.metrics,
        **length_metrics(scored.completions),
        **tool_metrics(scored.completions),
        **reward_metrics(names, scored.rewards, compared),
    }


def as_rollout(
    scored: Scored,
    compared: Advantages,
    metrics: dict[str, float],
    names: list[str],  # of the reward functions
    device: torch.device,
    config: GRPOConfig,
) -> Rollout:
    """The rollout of scored and compared completions, its log-probabilities on the device."""
    finished = torch.tensor([completion.finish != "length" for completion in scored.completions])
    columns = dict(zip(names, scored.rewards.T.tolist(), strict=True))
    return Rollout(
        prompts=scored.prompts,
        completions=scored.completions,
        offsets=torch.tensor([0] + [len(completion.ids) for completion in scored.completions]).cumsum(0),
        sampling_logprobs=_flat([completion.logprobs for completion in scored.completions], device),
        proposal_logprobs=_flat([completion.proposal_logprobs for completion in scored.completions], device),
        rewards=scored.rewards,
        advantages=compared.advantages,
        completion_mask=finished if config.mask_truncated_completions else torch.ones_like(finished),
        metrics=metrics,
        table={**scored.table, **columns, "advantage": compared.advantages.tolist()},
        sampled=_flat([c.conversation and c.conversation.sampled for c in scored.completions], device),
    )


def _flat(values: list[Tensor | None], device: torch.device) -> Tensor | None:
    known = [value for value in values if value is not None]
    return torch.cat(known).to(device) if known else None


def token_kl(rollout: Rollout, config: ObjectiveFields) -> Tensor:
    """The estimate of each token's KL to the reference before the update, (M,) on the CPU."""
    assert rollout.ref_logprobs is not None
    return kl_estimate(rollout.own_logprobs, rollout.ref_logprobs, estimator=config.kl_estimator).cpu()


def with_kl_in_reward(rollout: Rollout, beta: float, config: GRPOConfig) -> Rollout:
    """The rollout with advantages of its rewards less beta times each completion's KL to the reference."""
    kl = rollout.by_completion(token_kl(rollout, config)) * rollout.completion_mask
    compared = compare_rewards(rollout.rewards, config, beta * kl)
    return replace(
        rollout,
        advantages=compared.advantages,
        metrics={**rollout.metrics, "kl": (kl.sum() / rollout.num_counted_tokens).item()},  # NaN where none counts
        table={**rollout.table, "advantage": compared.advantages.tolist()},
    )

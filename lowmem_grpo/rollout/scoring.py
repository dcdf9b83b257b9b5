"""Completions of prompts, sampled and scored: each rank its share of the prompts, and all of them by every rank."""

import pickle
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.distributed import each, in_order, share, world_size
from lowmem_grpo.errors import shown
from lowmem_grpo.generate import as_text
from lowmem_grpo.generate.completion import Completion
from lowmem_grpo.generate.sample import Sampled
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.rewards.runner import RewardRunner, Scores


class Judged(NamedTuple):
    """The B completions of some prompts, group after group, and what the reward functions say of them."""

    completions: list[Completion]  # B
    texts: list  # B, as reward functions get them
    scores: Scores
    metrics: dict[str, float]  # of sampling and scoring


def complete_and_score(
    policy: Policy, prompts: list[Prompt], sample: Callable[[range], Sampled], rewards: RewardRunner, global_step: int,
    per_call: int | None = None,
) -> Judged:  # fmt: skip
    """Completions of all prompts, where sample(share) returns those of a share of them, and the rewards' verdicts.

    global_step is how many steps the policy has taken so far. A reward is called with all completions at once, or with
    those of per_call prompts.

    Reward functions see the completions of this rank's share alone, which has whole groups.
    """
    own = share([1] * len(prompts))

    def work() -> Judged:
        judged = _judged(policy, prompts[own.start : own.stop], sample(own), rewards, global_step, per_call)
        return judged if world_size() == 1 else _as_sent(judged)

    return _joined(each(work))


def _judged(
    policy: Policy, prompts: list[Prompt], sampled: Sampled, rewards: RewardRunner, global_step: int,
    per_call: int | None,
) -> Judged:  # fmt: skip
    completions = sampled.completions
    if not prompts:
        return Judged([], [], Scores(torch.zeros(0, len(rewards.names)), {}, {}), {})
    num_generations = len(completions) // len(prompts)
    asked = [prompt for prompt in prompts for _ in range(num_generations)]
    texts = [as_text(policy, prompt, completion) for prompt, completion in zip(asked, completions, strict=True)]
    # A completion whose environment could not be reset is not scored.
    environments = sampled.environments
    scored = [at for at in range(len(asked)) if environments is None or environments[at] is not None]
    columns = {key: [asked[at].columns.get(key) for at in scored] for key in asked[0].columns}
    scores = Scores(torch.zeros(0, len(rewards.names)), {}, {})
    if scored:
        scores = rewards(
            [asked[at].text for at in scored], [texts[at] for at in scored],
            [completions[at].sampled_ids for at in scored], columns, global_step, [asked[at].ids for at in scored],
            None if environments is None else [environments[at] for at in scored],
            None if per_call is None else per_call * num_generations,
        )  # fmt: skip
    if len(scored) < len(asked):
        scores = _spread(scores, scored, len(asked))
    return Judged(completions, texts, scores, {**sampled.metrics, **scores.metrics})


def _spread(scores: Scores, places: list[int], count: int) -> Scores:
    """The scores in their places among `count` completions, of which the others have none."""
    rewards = torch.full((count, scores.rewards.shape[1]), torch.nan)
    rewards[places] = scores.rewards
    columns: dict[str, list] = {name: [None] * count for name in scores.extra_columns}
    for name, values in scores.extra_columns.items():
        for place, value in zip(places, values, strict=True):
            columns[name][place] = value
    return scores._replace(rewards=rewards, extra_columns=columns)


def _as_sent(judged: Judged) -> Judged:
    """Completions and verdicts that pickle can have: a column that it cannot, since a function may log all, is text."""
    columns = judged.scores.extra_columns
    known = {name: values if _has_pickle(values) else [*map(shown, values)] for name, values in columns.items()}
    return judged._replace(scores=judged.scores._replace(extra_columns=known))


def _has_pickle(values: list) -> bool:
    try:
        pickle.loads(pickle.dumps(values))
    except Exception:
        return False
    return True


def _joined(parts: list[Judged]) -> Judged:
    """The ranks' completions as those of one."""
    if len(parts) == 1:
        return parts[0]
    parts = [part for part in parts if part.completions]
    columns = dict.fromkeys(name for part in parts for name in part.scores.extra_columns)
    scores = Scores(
        torch.cat([part.scores.rewards for part in parts]),
        joined_metrics([(part.scores.metrics, len(part.completions)) for part in parts], time_of=max),
        {name: in_order([_column(part, name) for part in parts]) for name in columns},
    )
    return Judged(
        in_order([part.completions for part in parts]),
        in_order([part.texts for part in parts]),
        scores,
        joined_metrics([(part.metrics, len(part.completions)) for part in parts], time_of=max),
    )


def _column(part: Judged, name: str) -> list:
    """A column that a rank's reward functions logged; Nones where they failed, which logs nothing."""
    return part.scores.extra_columns.get(name, [None] * len(part.completions))


def joined_metrics(
    parts: list[tuple[dict[str, float], int]], time_of: Callable[[Iterable[float]], float]
) -> dict[str, float]:
    """Metrics of several samplings as one, each given with its number of completions.

    Times are joined by time_of: max of ranks, which work at once, and sum of rounds. Failures add up, and of everything
    else it is the mean over completions.
    """
    joined = {}
    for name in dict.fromkeys(name for metrics, _ in parts for name in metrics):
        values, counts = zip(*((metrics[name], count) for metrics, count in parts if name in metrics), strict=True)
        if name.startswith("time/"):
            joined[name] = time_of(values)
        elif name.endswith("/failures"):
            joined[name] = sum(values)
        else:
            joined[name] = sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)
    return joined

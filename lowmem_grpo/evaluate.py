"""Evaluation on held-out prompts: one greedy completion each, or k sampled ones; with 95 % intervals.

A completion is *correct* when its first reward function says at least 1. Over prompts, each of which counts once:

    mean@k   mean of the first reward function over the k completions
    pass@j   chance that one of j completions is correct, 1 - C(n - c, j) / C(n, j) for c correct ones of n
             (https://arxiv.org/abs/2107.03374)
    maj@k    how often the most common answer is correct; answers that are equally common share the vote
"""

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from lowmem_grpo.advantages import weighted_rewards
from lowmem_grpo.answering import answer, answer_greedily, as_text
from lowmem_grpo.config import GRPOConfig
from lowmem_grpo.data import check_budgets, load_rows, tokenize_prompts
from lowmem_grpo.metrics import length_metrics
from lowmem_grpo.policy import Policy, find_model, is_adapter, load_policy, load_tokenizer
from lowmem_grpo.rewards import BUILT_IN, BUILT_IN_FACTORIES, RewardRunner, resolve_reward_funcs
from lowmem_grpo.rewards.accuracy import extract_answer
from lowmem_grpo.rewards.math_pool import as_number
from lowmem_grpo.rewards.text import completion_text
from lowmem_grpo.rollout import Completion, Prompt
from lowmem_grpo.tasks import find_task, held_out, with_tasks

log = logging.getLogger(__name__)
CORRECT = 1.0
RESAMPLES = 2000
Z_95 = 1.959963984540054  # standard normal quantile of 0.975


def evaluate(
    policy: Policy, prompts: list[Prompt], rewards: RewardRunner, config: GRPOConfig, step: int
) -> dict[str, float]:
    """Rewards and lengths under the training metrics' names with `eval_` before them, pass@j, and with k > 1 the rest.

    The same seed in every evaluation, so that two of them differ by the policy alone; torch's generator stays where it
    was.
    """
    k = config.num_generations_eval or 1
    completions = _completions(policy, prompts, config)
    asked = [prompt for prompt in prompts for _ in range(k)]
    texts = [as_text(policy, p, c) for p, c in zip(asked, completions, strict=True)]
    columns = {key: [p.columns.get(key) for p in asked] for key in prompts[0].columns}
    scores = rewards([p.text for p in asked], texts, [c.ids for c in completions], columns, step)
    total = weighted_rewards(scores.rewards, config.reward_weights)
    answers = [extract_answer(completion_text(text)) for text in texts]
    values = {"reward": total.view(-1, k).nanmean(dim=1).tolist(), **shares(scores.rewards[:, 0], answers, k)}
    metrics = {}
    for name, of_prompts in values.items():
        known = [value for value in of_prompts if not math.isnan(value)]
        low, high = confidence_interval(known)
        mean = sum(known) / len(known) if known else math.nan
        metrics |= {name: mean, f"{name}/ci_low": low, f"{name}/ci_high": high}
    metrics["reward"] = total.nanmean().item()  # over completions, as in training; the interval is over prompts
    means = dict(zip(rewards.names, scores.rewards.nanmean(dim=0).tolist(), strict=True))
    metrics |= {f"rewards/{name}/mean": mean for name, mean in means.items()} | length_metrics(completions)
    return {f"eval_{name}": value for name, value in metrics.items()}


def shares(
    first_rewards: Tensor,  # (P k,) fp32, group after group; NaN where the first reward function does not apply
    answers: Sequence[str | None],  # P k
    k: int,
) -> dict[str, list[float]]:
    """pass@j for j = 1, 2, 4, ... and k, and for k > 1 mean@k and maj@k: P values each, NaN where nothing applies."""
    groups = first_rewards.view(-1, k).tolist()
    correct = [[value >= CORRECT for value in group if not math.isnan(value)] for group in groups]
    counts = [(len(group), sum(group)) for group in correct]
    values = {f"pass@{j}": [pass_at(j, n, c) for n, c in counts] for j in _up_to(k)}
    if k == 1:
        return values
    votes = [
        [(answers[p * k + i], value >= CORRECT) for i, value in enumerate(group) if not math.isnan(value)]
        for p, group in enumerate(groups)
    ]
    return {
        f"mean@{k}": first_rewards.view(-1, k).nanmean(dim=1).tolist(),
        **values,
        f"maj@{k}": [majority(group) for group in votes],
    }


def _up_to(k: int) -> list[int]:
    return sorted({k, *(2**i for i in range(k.bit_length()) if 2**i <= k)})


def pass_at(j: int, n: int, c: int) -> float:
    """The unbiased estimate of pass@j from c correct ones of n completions; NaN where there are fewer than j."""
    return math.nan if n < j else 1 - math.comb(n - c, j) / math.comb(n, j)


def majority(votes: Sequence[tuple[str | None, bool]]) -> float:
    """How far the most common answer is correct: a tie is split evenly, and a completion without an answer has no vote.

    Plain numbers are the same answer however they are written (1,000 and 1000.0); other texts, if they are equal.
    """
    if not votes:
        return math.nan
    verdicts = defaultdict(list)
    for text, correct in votes:
        if text is not None:
            number = as_number(text) if len(text) <= 1000 else None
            verdicts[text.strip() if number is None else number].append(correct)
    most = max(map(len, verdicts.values()), default=0)
    winners = [sum(group) / most for group in verdicts.values() if len(group) == most]
    return sum(winners) / len(winners) if winners else 0.0


def confidence_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % for the mean of one value a prompt: Wilson's interval where each is 0 or 1, or one of two values, else the
    bootstrap's, percentiles of resamples of one seed.

    The bootstrap would give no width where all are right or all wrong. NaN where all values are equal, and neither 0
    nor 1: they do not say how far another prompt's may lie from them.
    """
    n = len(values)
    if n == 0:
        return math.nan, math.nan
    low, high = min(values), max(values)
    if low in (0.0, 1.0) and high in (0.0, 1.0):
        low, high = 0.0, 1.0
    if high - low <= 1e-6 * abs(high):  # equal but for the rounding of their means
        return math.nan, math.nan
    if all(value in (low, high) for value in values):
        bounds = _wilson(sum(value == high for value in values), n)
        return low + (high - low) * bounds[0], low + (high - low) * bounds[1]
    given, draw = np.asarray(values), np.random.default_rng(0)
    means = [given[draw.integers(n, size=n)].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _wilson(successes: int, n: int) -> tuple[float, float]:
    share, z = successes / n, Z_95
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return 0.0 if successes == 0 else middle - half, 1.0 if successes == n else middle + half


def _completions(policy: Policy, prompts: list[Prompt], config: GRPOConfig) -> list[Completion]:
    """num_generations_eval completions a prompt, drawn as training draws them; one greedy one where it is None."""
    if config.num_generations_eval is None:
        return answer_greedily(policy, prompts, config)
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed)
        return answer(policy, prompts, config.num_generations_eval, config).completions


def check_vocabulary(prompts: list[Prompt], policy: Policy) -> None:
    largest, size = max(max(prompt.ids) for prompt in prompts), policy.head.weight.shape[0]
    if largest >= size:
        raise ValueError(f"the tokenizer makes id {largest}, and the model has {size}; pass the tokenizer of the model")


def evaluate_model(model: str, reward_funcs: Any, dataset: Any, config: GRPOConfig) -> dict[str, dict[str, float]]:
    """The evaluation of a model: {"model": metrics}, or of an adapter folder {"base": metrics, "adapter": metrics}.

    The base is the same model with the adapter switched off. A task's held-out rows are what it is measured on, and a
    hub dataset's `test` split.

    Raises:
        ValueError: bad input, in one sentence with the remedy, before any weights are read.
    """
    if config.vram_budget is not None:
        raise ValueError("vram_budget plans a training run; leave it out, and set rollout_token_budget if need be")
    task = find_task(dataset)
    _, _, reward_funcs, config = with_tasks(dataset, None, reward_funcs, config)
    rows = load_rows(dataset if task is None else held_out(task), config, name="eval_dataset", split="test")
    rewards = RewardRunner(resolve_reward_funcs(reward_funcs, BUILT_IN, BUILT_IN_FACTORIES), config.reward_timeout)
    find_model(model, config)
    trial = rows[:2]
    rewards.try_out(trial["prompt"], {key: values for key, values in trial.items() if key != "prompt"})
    tokenizer = load_tokenizer(model, config)
    prompts, dropped = tokenize_prompts(rows, tokenizer, config, name="eval_dataset")
    if dropped:
        log.warning(
            f"{dropped} of {len(rows)} prompts have more than {config.max_prompt_length} tokens and are left out"
        )
    check_budgets(prompts, config)
    torch.manual_seed(config.seed)
    policy = load_policy(model, tokenizer, config)
    check_vocabulary(prompts, policy)
    rewards.bind(policy)
    if not is_adapter(model):
        return {"model": evaluate(policy, prompts, rewards, config, step=0)}
    with policy.as_reference():
        base = evaluate(policy, prompts, rewards, config, step=0)
    return {"base": base, "adapter": evaluate(policy, prompts, rewards, config, step=0)}


def as_table(found: dict[str, dict[str, float]]) -> Table:
    """A row a metric and a column a model, with the interval beside the value."""
    table = Table(title="evaluation; in brackets 95 % intervals over prompts")
    table.add_column("", overflow="fold")
    for who in found:
        table.add_column(who, justify="right")
    for name in next(iter(found.values())):
        if not name.endswith(("/ci_low", "/ci_high")):
            table.add_row(name, *(_with_interval(metrics, name) for metrics in found.values()))
    return table


def _with_interval(metrics: dict[str, float], name: str) -> str:
    value = f"{metrics[name]:.3f}"
    if f"{name}/ci_low" not in metrics:
        return value
    return rf"{value} \[{metrics[f'{name}/ci_low']:.3f}, {metrics[f'{name}/ci_high']:.3f}]"

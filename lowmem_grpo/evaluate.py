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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unicodedata import category

import numpy as np
import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lowmem_grpo.advantages import weighted_rewards
from lowmem_grpo.answering import answer, answer_greedily, as_text
from lowmem_grpo.config import GRPOConfig
from lowmem_grpo.data import check_budgets, load_rows, tokenize_prompts
from lowmem_grpo.metrics import in_words, length_metrics
from lowmem_grpo.policy import Policy, find_model, is_adapter, load_policy, load_tokenizer
from lowmem_grpo.progress_bars import without_progress_bars
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


@dataclass(frozen=True)
class Evaluation:
    """What P prompts with k completions each, group after group, came to."""

    metrics: dict[str, float]
    values: dict[str, list[float]]  # of the metrics that are means over prompts, P each; NaN where nothing applies
    prompts: list[Prompt]  # P
    completions: list[Completion]  # P k
    texts: list  # P k, as reward functions get them
    rewards: dict[str, list[float]]  # P k each, by reward function; and of several the `total`, weighted


def evaluate(
    policy: Policy, prompts: list[Prompt], rewards: RewardRunner, config: GRPOConfig, step: int
) -> dict[str, float]:
    """The metrics of measure()."""
    return measure(policy, prompts, rewards, config, step).metrics


def measure(policy: Policy, prompts: list[Prompt], rewards: RewardRunner, config: GRPOConfig, step: int) -> Evaluation:
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
    of_rewards = dict(zip(rewards.names, scores.rewards.T, strict=True))
    of_completions = {
        **{f"rewards/{name}/mean": of for name, of in of_rewards.items()},
        "completions/mean_length": torch.tensor([float(len(c.ids)) for c in completions]),
        "completions/clipped_ratio": torch.tensor([float(c.finish == "length") for c in completions]),
    }
    values |= {name: of.view(-1, k).nanmean(dim=1).tolist() for name, of in of_completions.items()}
    if len(of_rewards) > 1 or config.reward_weights is not None:
        of_rewards = {"total": total, **of_rewards}
    return Evaluation(
        metrics={f"eval_{name}": value for name, value in metrics.items()},
        values={f"eval_{name}": of_prompts for name, of_prompts in values.items()},
        prompts=prompts, completions=completions, texts=texts,
        rewards={name: of.tolist() for name, of in of_rewards.items()},
    )  # fmt: skip


def differences(before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """After minus before of two evaluations' values on the same prompts, as `{metric}/difference` with its interval.

    Over the prompts that have both values, so that a difference may be another one than that of the two means.
    """
    found = {}
    for name in [name for name in after if name in before]:
        both = zip(before[name], after[name], strict=True)
        pairs = [(b, a) for b, a in both if not (math.isnan(b) or math.isnan(a))]
        low, high = paired_interval(pairs)
        mean = sum(a - b for b, a in pairs) / len(pairs) if pairs else math.nan
        difference = f"{name}/difference"
        found |= {difference: mean, f"{difference}/ci_low": low, f"{difference}/ci_high": high}
    return found


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
    if not values:
        return math.nan, math.nan
    low, high = _ends(values)
    if _equal(low, high):
        return math.nan, math.nan
    if all(value in (low, high) for value in values):
        bounds = _wilson(sum(value == high for value in values), len(values))
        return low + (high - low) * bounds[0], low + (high - low) * bounds[1]
    return _bootstrap(values)


def paired_interval(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """95 % for the mean of after minus before, of one pair (before, after) a prompt.

    Tango's score interval where each value is 0 or 1, or one of two; it has a width where no prompt has changed, too.
    Else the bootstrap's over prompts. NaN where all prompts changed by the same, and in confidence_interval's cases.
    """
    if not pairs:
        return math.nan, math.nan
    low, high = _ends([value for pair in pairs for value in pair])
    if _equal(low, high):
        return math.nan, math.nan
    if all(value in (low, high) for pair in pairs for value in pair):
        better, worse = (sum(pair == changed for pair in pairs) for changed in ((low, high), (high, low)))
        bounds = _tango(better, worse, len(pairs))
        return (high - low) * bounds[0], (high - low) * bounds[1]
    changes = [after - before for before, after in pairs]
    if max(changes) - min(changes) <= 1e-6 * (high - low):
        return math.nan, math.nan
    return _bootstrap(changes)


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """The least and the greatest value; 0 and 1 where all are 0, or all 1."""
    low, high = min(values), max(values)
    return (0.0, 1.0) if low in (0.0, 1.0) and high in (0.0, 1.0) else (low, high)


def _equal(low: float, high: float) -> bool:
    """But for the rounding of means."""
    return high - low <= 1e-6 * abs(high)


def _bootstrap(values: Sequence[float]) -> tuple[float, float]:
    given, draw = np.asarray(values), np.random.default_rng(0)
    means = [given[draw.integers(len(given), size=len(given))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _tango(better: int, worse: int, n: int) -> tuple[float, float]:
    """95 % for (better - worse) / n, the change of a share in n pairs (Tango 1998, Statistics in Medicine 17:891).

    The differences d that the data lie within Z_95 standard deviations of, with the standard deviation that is
    likeliest if d is true.
    """

    def deviations(d: float) -> float:
        linear = (2 * n - better + worse) * d - better - worse
        root = math.sqrt(max(0.0, linear * linear + 8 * n * worse * d * (1 - d)))
        worsened = (root - linear) / (4 * n)  # the likeliest chance that a prompt gets worse
        variance, distance = n * (2 * worsened + d * (1 - d)), better - worse - n * d
        return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)

    def where(wanted: float, low: float, high: float) -> float:
        for _ in range(60):  # deviations() falls with d
            middle = (low + high) / 2
            low, high = (middle, high) if deviations(middle) > wanted else (low, middle)
        return (low + high) / 2

    found = (better - worse) / n
    low = -1.0 if worse == n else where(Z_95, -1.0, found)
    return low, 1.0 if better == n else where(-Z_95, found, 1.0)


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
    """The metrics of measure_model()."""
    return {who: found.metrics for who, found in measure_model(model, reward_funcs, dataset, config).items()}


@without_progress_bars
def measure_model(model: str, reward_funcs: Any, dataset: Any, config: GRPOConfig) -> dict[str, Evaluation]:
    """The evaluation of a model, {"model": ...}, or of an adapter folder, {"base": ..., "adapter": ...}.

    The base is the same model with the adapter switched off; the adapter's metrics have their differences from it. A
    task's held-out rows are what it is measured on, and a hub dataset's `test` split.

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
        return {"model": measure(policy, prompts, rewards, config, step=0)}
    with policy.as_reference():
        base = measure(policy, prompts, rewards, config, step=0)
    adapter = measure(policy, prompts, rewards, config, step=0)
    return {
        "base": base,
        "adapter": replace(adapter, metrics=adapter.metrics | differences(base.values, adapter.values)),
    }


def as_table(found: dict[str, dict[str, float]]) -> Table:
    """A row a metric and a column a model, with the interval beside the value."""
    return _table("evaluation; in brackets 95 % intervals over prompts", found, ".3f")


def as_difference_table(metrics: dict[str, float]) -> Table:
    """A row for each of an adapter's metrics that have a difference from the base's."""
    changed = {name.replace("/difference", ""): value for name, value in metrics.items() if "/difference" in name}
    return _table("adapter minus base, on the same prompts", {"difference": changed}, "+.3f")


def _table(title: str, found: dict[str, dict[str, float]], form: str) -> Table:
    table = Table(title=title)
    table.add_column("", overflow="fold")
    for who in found:
        table.add_column(who, justify="right")
    for name in next(iter(found.values())):
        if not name.endswith(("/ci_low", "/ci_high")):
            cells = [with_interval(metrics, name, form) for metrics in found.values()]
            table.add_row(*map(Text, [name, *cells]))  # never markup, whatever a reward function is named
    return table


def as_line(metrics: Mapping[str, float | None], names: Sequence[str], form: str = ".3f") -> str:
    """Some metrics with their intervals, as `reward 0.310 [0.250, 0.377]`."""
    short = [name.removeprefix("eval_").removesuffix("/difference") for name in names]
    return "  ".join(f"{word} {with_interval(metrics, name, form)}" for word, name in zip(short, names, strict=True))


def with_interval(metrics: Mapping[str, float | None], name: str, form: str) -> str:
    """A metric and, where it has one, its interval."""
    value, low, high = (in_words(metrics.get(key), form) for key in (name, f"{name}/ci_low", f"{name}/ci_high"))
    return value if "-" in (low, high) else f"{value} [{low}, {high}]"


def examples(found: dict[str, Evaluation], count: int) -> list[dict[str, Any]]:
    """The first completions of the first prompts, then the second ones, count in all; each evaluation's beside it."""
    first = next(iter(found.values()))
    k = len(first.completions) // len(first.prompts)
    chosen = sorted(sorted(range(len(first.completions)), key=lambda place: place % k)[:count])
    return [
        {
            "prompt": first.prompts[place // k].text,
            "gold": _gold(first.prompts[place // k]),
            **{
                who: {
                    "completion": completion_text(one.texts[place]),
                    "cut_off": one.completions[place].finish == "length",
                    "rewards": {name: values[place] for name, values in one.rewards.items()},
                }
                for who, one in found.items()
            },
        }
        for place in chosen
    ]


def _gold(prompt: Prompt) -> Any:
    """The gold answer that a prompt's row has, in the columns that the built-in rewards read; None without one."""
    return next((prompt.columns[name] for name in ("solution", "answer") if prompt.columns.get(name) is not None), None)


def examples_as_text(shown: list[dict[str, Any]]) -> str:
    """For a terminal. What is not ours is indented, and nothing in it can move the cursor or pass for our own lines."""
    lines = []
    for number, example in enumerate(shown, 1):
        prompt = example["prompt"]
        chat = [f"{m['role']}: {m['content']}" for m in prompt] if isinstance(prompt, list) else [prompt]
        lines += [f"{number} of {len(shown)}", "  prompt", *_indented("\n".join(chat))]
        if example["gold"] is not None:
            lines += ["  gold answer", *_indented(str(example["gold"]))]
        for who in [key for key in example if key not in ("prompt", "gold")]:
            of = example[who]
            facts = [f"{printable(name)} {in_words(value, '.3f')}" for name, value in of["rewards"].items()]
            facts += ["cut off"] if of["cut_off"] else []
            lines += [f"  {who}: {', '.join(facts)}", *_indented(of["completion"])]
        lines.append("")
    return "\n".join(lines)


def _indented(text: str) -> list[str]:
    return [f"    {printable(line)}" for line in text.split("\n")]


def printable(line: str) -> str:
    """A line with what a terminal would obey (escapes, carriage returns, changes of direction) written as `\\x1b`."""
    return "".join(
        c if c.isprintable() or c == "\t" or category(c) == "Zs" else c.encode("unicode_escape").decode() for c in line
    )

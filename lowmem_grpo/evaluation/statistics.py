"""Statistics of an evaluation: pass@j, maj@k, and 95 % intervals over prompts. Pure."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from lowmem_grpo.rewards.number import as_number

CORRECT = 1.0
RESAMPLES = 2000
Z_95 = 1.959963984540054  # standard normal quantile of 0.975


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
    """pass@j for j = 1, 2, 4, ... and k, and for k > 1 mean@k and maj@k: P values each."""
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
    """The share of correct completions among those with the most common answer; ties are split evenly.

    A completion without an answer has no vote. Plain numbers are one answer however they are written (1,000 and
    1000.0); other texts, if they are equal.
    """
    if not votes:
        return math.nan
    verdicts = defaultdict(list)
    for text, correct in votes:
        if text is not None:
            number = as_number(text)
            verdicts[text.strip() if number is None else number].append(correct)
    most = max(map(len, verdicts.values()), default=0)
    winners = [sum(group) / most for group in verdicts.values() if len(group) == most]
    return sum(winners) / len(winners) if winners else 0.0


def confidence_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of the mean of one value a prompt.

    Wilson's where each value is 0 or 1, or one of two values, since the bootstrap would give no width where all are
    right or all wrong. Else the bootstrap's: percentiles of resamples of one seed. NaN where all values are equal, and
    neither 0 nor 1: they do not say how far another prompt's may lie from them.
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
    """95 % confidence interval of the mean of after minus before, from one pair a prompt.

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
    """Least and greatest value; 0 and 1 where all are 0, or all 1."""
    low, high = min(values), max(values)
    return (0.0, 1.0) if low in (0.0, 1.0) and high in (0.0, 1.0) else (low, high)


def _equal(low: float, high: float) -> bool:
    """True for two numbers that differ by no more than the rounding of means."""
    return high - low <= 1e-6 * abs(high)


def _bootstrap(values: Sequence[float]) -> tuple[float, float]:
    given, draw = np.asarray(values), np.random.default_rng(0)
    means = [given[draw.integers(len(given), size=len(given))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _tango(better: int, worse: int, n: int) -> tuple[float, float]:
    """95 % confidence interval of (better - worse) / n, the change of a share in n pairs.

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

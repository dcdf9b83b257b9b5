"""Metrics of the scores of pairs: accuracy, margin, and whether long texts are scored higher. Pure."""

import math

import torch
from torch import Tensor


def score_metrics(scores: Tensor) -> dict[str, float]:
    """TRL's metrics of scores (P, 2), of each pair's better and worse text.

    A pair is right where the better text is scored higher; an equal score is not.
    """
    chosen, rejected = scores[:, 0], scores[:, 1]
    values = torch.stack([
        (chosen > rejected).float().mean(), (chosen - rejected).mean(), scores.min(), scores.mean(), scores.max()
    ])  # fmt: skip
    return dict(zip(("accuracy", "margin", "min_reward", "mean_reward", "max_reward"), values.tolist(), strict=True))


def correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's correlation of two lists (K,); NaN where either has one value alone."""
    both = torch.stack([one, other]).double()
    both = both - both.mean(dim=1, keepdim=True)
    norms = both.norm(dim=1)
    return (both[0] @ both[1] / (norms[0] * norms[1])).item() if norms.all() else math.nan

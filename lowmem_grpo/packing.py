"""Sequences to micro-batches under a token budget."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Widths are rounded up to this, so that a CPU's matrix library meets few shapes: it caches a kernel for each, which
# grows resident memory by hundreds of MiB otherwise.
WIDTH_MULTIPLE = 8


@dataclass(frozen=True)
class MicroBatch:
    """R rows of T tokens, and the N completion tokens in them."""

    input_ids: Tensor  # (R, T) int64: prompt, completion, then padding, which a causal model never looks at
    predictors: Tensor  # (N,) int64: index into the R * T positions, of the one that predicts each token
    labels: Tensor  # (N,) int64
    tokens: Tensor  # (N,) int64: index of each token among the rollout's M
    sequences: Tensor  # (N,) int64: the completion that each token belongs to


def pack(
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    *,
    token_budget: int,
    pad_token_id: int,
    device: torch.device,
    keep: Sequence[bool] | None = None,
) -> Iterator[MicroBatch]:
    """Micro-batches of at most token_budget tokens, padding included, longest rows first; rows not kept are left out.

    prompts[b] and completions[b] are sequence b's ids. Tokens are numbered completion after completion, kept or not. A
    row longer than the budget still makes a micro-batch of its own.
    """
    offsets = [0]
    for completion in completions:
        offsets.append(offsets[-1] + len(completion))
    rows = [b for b in range(len(completions)) if completions[b] and (keep is None or keep[b])]
    rows.sort(key=lambda b: len(prompts[b]) + len(completions[b]), reverse=True)
    while rows:
        longest = len(prompts[rows[0]]) + len(completions[rows[0]])
        width = _round_up(longest) if _round_up(longest) <= token_budget else longest
        count = max(1, token_budget // width)
        yield _micro_batch(rows[:count], prompts, completions, offsets, width, pad_token_id, device)
        rows = rows[count:]


def _micro_batch(rows, prompts, completions, offsets, width, pad_token_id, device) -> MicroBatch:
    ids, predictors, labels, tokens, sequences = [], [], [], [], []
    for row, b in enumerate(rows):
        prompt, completion = prompts[b], completions[b]
        ids.append(prompt + completion + [pad_token_id] * (width - len(prompt) - len(completion)))
        first = row * width + len(prompt) - 1  # the prompt's last token predicts the completion's first
        predictors += range(first, first + len(completion))
        labels += completion
        tokens += range(offsets[b], offsets[b + 1])
        sequences += [b] * len(completion)
    return MicroBatch(*(torch.tensor(x, device=device) for x in (ids, predictors, labels, tokens, sequences)))


def _round_up(width: int) -> int:
    return -(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE

"""The passes of a reward model's training: the scores of pairs, and the gradient of their loss.

    loss = mean over a step's pairs of -log sigmoid(chosen - rejected - margin) + center (chosen + rejected)^2

A text's score is that of its last token's hidden state. What both texts of a pair begin with is computed once for both.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from lowmem_grpo.config.reward import RewardConfig
from lowmem_grpo.config.sections import PairFields, UpdateFields
from lowmem_grpo.data.pairs import Pair
from lowmem_grpo.distributed import gathered, share, world_size
from lowmem_grpo.model.packing import SHARE_FROM, MicroBatch, pack
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.objective.formulas import pair_losses
from lowmem_grpo.out_of_memory import TokenBudget
from lowmem_grpo.update.passes import at_work, first_not_finite, on_trial, zero_gradients


def backward(
    policy: Policy,
    pairs: list[Pair],  # of the whole step
    mine: Sequence[int],  # the indices of those that this rank computes
    scaler: torch.amp.GradScaler,
    config: RewardConfig,
    token_budget: int,
) -> tuple[Tensor, Tensor]:
    """Set the parameters' gradient to that of the pairs' loss; returns the loss, a scalar, and the scores (P, 2).

    Each is this rank's part of a sum over ranks: scores are 0, and the loss lacks a part, where another computes.
    """
    total, scores = torch.zeros((), device=policy.device), torch.zeros(len(pairs), 2, device=policy.device)
    zero_gradients(policy)
    packed = config.padding_free and policy.packs
    for chosen in whole_pairs([pairs[index] for index in mine], token_budget, packed=packed):
        places = [mine[index] for index in chosen]
        part = [pairs[place] for place in places]
        batches = [*micro_batches(policy, part, config, token_budget)]
        if len(batches) == 1:
            with at_work(batches[0]):
                found = _in_order(policy.scores(batches[0]), batches[0], len(part))
                loss = mean_loss(found, part, config) * (len(part) / len(pairs))
                scaler.scale(loss).backward()
        else:  # the loss of a pair needs both of its scores before either has a gradient
            with policy.fork_rng():  # one lora_dropout
                found = _scores(policy, batches, len(part)).requires_grad_()
            loss = mean_loss(found, part, config) * (len(part) / len(pairs))
            (pull,) = torch.autograd.grad(loss, found)
            for batch in batches:
                with at_work(batch):
                    scaler.scale((policy.scores(batch) * pull.flatten()[batch.sequences]).sum()).backward()
        total += loss.detach()
        scores[places] = found.detach()
    return total, scores


def mean_loss(scores: Tensor, pairs: list[Pair], config: PairFields) -> Tensor:
    """The mean loss of pairs by their scores (P, 2), a scalar."""
    margins = torch.tensor([pair.margin for pair in pairs], device=scores.device)
    center = config.center_rewards_coefficient or 0.0
    return pair_losses(scores[:, 0], scores[:, 1], margins, center=center).mean()


def scores_of_all(policy: Policy, pairs: list[Pair], budget: TokenBudget, config: UpdateFields) -> Tensor:
    """The scores of the better and the worse text of each pair, (P, 2) fp32; each rank computes its share."""
    own = [pairs[index] for index in share([sum(map(len, pair.texts)) for pair in pairs])]
    lengths = [len(text) + 1 for pair in own for text in pair.texts]
    scores = budget.fit(partial(scores_of, policy, own, config), lengths)
    return torch.cat([part.to(policy.device) for part in gathered(scores.cpu())]) if world_size() > 1 else scores


def scores_of(policy: Policy, pairs: list[Pair], config: UpdateFields, token_budget: int) -> Tensor:
    """The scores of the better and the worse text of each pair, (P, 2) fp32, without a gradient."""
    with policy.inference():
        return _scores(policy, micro_batches(policy, pairs, config, token_budget), len(pairs))


def _scores(policy: Policy, batches: Iterator[MicroBatch] | list[MicroBatch], count: int) -> Tensor:
    scores = torch.zeros(2 * count, device=policy.device)
    with torch.no_grad():
        for batch in batches:
            with at_work(batch):
                scores[batch.sequences] = policy.scores(batch)
    return scores.view(-1, 2)


def _in_order(scores: Tensor, batch: MicroBatch, count: int) -> Tensor:
    """A micro-batch's scores by pair, (P, 2)."""
    return torch.zeros(2 * count, device=scores.device).index_copy(0, batch.sequences, scores).view(-1, 2)


def micro_batches(policy: Policy, pairs: list[Pair], config: UpdateFields, token_budget: int) -> Iterator[MicroBatch]:
    """Pairs packed under token_budget, each text's last token alone as one that counts.

    The texts of pair p are the sequences 2 p and 2 p + 1.
    """
    for shares in (True, False):  # a text that shares no beginning has its first token for a prompt of its own
        chosen = [(pair.num_shared > 0) is shares for pair in pairs for _ in pair.texts]
        starts = [pair.num_shared if shares else 1 for pair in pairs]
        texts = [(text, start) for pair, start in zip(pairs, starts, strict=True) for text in pair.texts]
        yield from pack(
            [text[:start] for text, start in (texts[::2] if shares else texts)],
            [[*text[start:], policy.pad_token_id] for text, start in texts],
            token_budget=token_budget, pad_token_id=policy.pad_token_id, device=policy.device, chosen=chosen,
            num_generations=2 if shares else 1, padding_free=config.padding_free and policy.packs, last_only=True,
        )  # fmt: skip


def whole_pairs(pairs: list[Pair], token_budget: int, *, packed: bool) -> list[list[int]]:
    """The pairs' places in parts of which each makes one micro-batch within the budget, or is one pair; longest first.

    The loss of a pair is one of both texts together, so that a pair in two micro-batches has to be computed twice.
    """
    parts: list[list[int]] = []
    before: Pair | None = None
    for place in sorted(range(len(pairs)), key=lambda place: (pairs[place].num_shared > 0, -_width(pairs[place]))):
        pair = pairs[place]
        alike = before is not None and (before.num_shared > 0) is (pair.num_shared > 0)
        if alike and _num_tokens([*(pairs[one] for one in parts[-1]), pair], packed=packed) <= token_budget:
            parts[-1].append(place)
        else:
            parts.append([place])
        before = pair
    return parts


def _num_tokens(pairs: list[Pair], *, packed: bool) -> int:
    """Number of tokens of pairs in one micro-batch, with what is shared once where pack() does so."""
    if not packed:
        return 2 * len(pairs) * _width(pairs[0])
    apart = [sum(map(len, pair.texts)) for pair in pairs]
    together = [size - pair.num_shared for size, pair in zip(apart, pairs, strict=True)]
    return sum(b if a >= SHARE_FROM * b else a for a, b in zip(apart, together, strict=True))


def _width(pair: Pair) -> int:
    """The width of the longer text's padded row."""
    return -(-(max(map(len, pair.texts)) + 1) // 8) * 8


def why_not_finite(config: RewardConfig, scores: Tensor, loss: float, overflowed: bool) -> str:
    """The likely cause of a loss or gradient that is not finite."""
    cause = f"learning_rate is too high, or activations overflow {config.compute_dtype}"
    found = [("the pairs' scores are", values, cause) for values in (scores, torch.tensor(loss))]
    return first_not_finite(found, "the gradient", cause, overflowed)


def try_largest_update(
    policy: Policy, pairs: list[Pair], budget: TokenBudget, config: RewardConfig, reserved: int = 0
) -> None:
    """Try the gradient of as many of the longest pair as fill a micro-batch; budget shrinks if it must.

    Otherwise a run dies when such a step comes. `reserved` bytes are for what comes later.
    """
    size = partial(_num_tokens, packed=config.padding_free and policy.packs)
    longest = max(pairs, key=lambda pair: size([pair]))
    lengths = [len(text) + 1 for text in longest.texts]
    count = min(config.pairs_per_step, max(1, budget.num_tokens // size([longest])))
    with on_trial(policy, reserved) as scaler:
        budget.fit(partial(backward, policy, [longest] * count, range(count), scaler, config), lengths * count)

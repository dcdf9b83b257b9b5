"""The passes of supervised training: the loss of examples, with and without its gradient.

    loss = sum_t w_t l_t / sum_t w_t        l_t = -log p_t, or for dft -p_t log p_t with p_t held fixed

over the tokens that are learnt of all a step's examples, however they are packed; w_t is the example's weight.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lowmem_grpo.config.sections import UpdateFields
from lowmem_grpo.config.sft import SFTConfig
from lowmem_grpo.data.examples import Example
from lowmem_grpo.model.packing import MicroBatch, filling_lengths, pack
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.out_of_memory import TokenBudget
from lowmem_grpo.update.passes import at_work, first_not_finite, on_trial, zero_gradients


class Means(NamedTuple):
    """Means over the learnt tokens of a step, scalars."""

    entropy: Tensor  # by weight, as the loss
    accuracy: Tensor  # the share that was the likeliest, whatever its weight


def backward(
    policy: Policy,
    examples: list[Example],  # of the whole step
    mine: Sequence[int],  # the indices of those that this rank computes
    scaler: torch.amp.GradScaler,
    config: SFTConfig,
    token_budget: int,
) -> tuple[Tensor, Means]:
    """Set the parameters' gradient to that of the examples' loss; returns the loss, a scalar, and other means.

    Each is this rank's part of a sum over ranks: what its own examples give, divided by all examples' tokens.
    """
    total, entropy, correct = torch.zeros(3, device=policy.device)
    num_tokens = num_learnt(examples)
    zero_gradients(policy)
    for batch, weights in micro_batches(policy, [examples[index] for index in mine], config, token_budget):
        with at_work(batch):
            logprobs, entropies, top = policy.logprobs_entropy_and_top(batch)
            losses = -logprobs * logprobs.detach().exp() if config.loss_type == "dft" else -logprobs
            loss = (weights * losses).sum() / num_tokens
            scaler.scale(loss).backward()
            total += loss.detach()
            entropy += (weights * entropies).sum() / num_tokens
            correct += top.sum()
    return total, Means(entropy, correct / num_counted(examples))


def nll_and_accuracy(
    policy: Policy, examples: list[Example], mine: Sequence[int], config: UpdateFields, token_budget: int
) -> tuple[Tensor, Tensor]:
    """The examples' mean negative log-likelihood and mean token accuracy, scalars without a gradient.

    Each is this rank's part of a sum over ranks, from the examples with the indices `mine`.
    """
    nll, correct = torch.zeros(2, device=policy.device)
    with policy.inference():
        for batch, weights in micro_batches(policy, [examples[index] for index in mine], config, token_budget):
            with at_work(batch):
                logprobs, top = policy.logprobs_and_top(batch)
                nll -= (weights * logprobs).sum()
                correct += top.sum()
    return nll / num_learnt(examples), correct / num_counted(examples)


def num_counted(examples: list[Example]) -> int:
    """The number of tokens that are learnt, whatever their weight."""
    return sum(sum(one.counted) for one in examples)


def num_learnt(examples: list[Example]) -> float:
    """The number of tokens that are learnt, each times its example's weight; 1 where all weights are 0."""
    return sum(sum(one.counted) * one.weight for one in examples) or 1.0


def micro_batches(
    policy: Policy, examples: list[Example], config: UpdateFields, token_budget: int
) -> Iterator[tuple[MicroBatch, Tensor]]:
    """Examples packed under token_budget, the tokens that are learnt alone, and the weight of each, (N,) fp32."""
    completions = [one.ids[one.start :] for one in examples]
    counted = torch.tensor([value for one in examples for value in one.counted[one.start :]], device=policy.device)
    weights = torch.tensor([one.weight for one in examples], device=policy.device)
    for batch in pack(
        [one.ids[: one.start] for one in examples], completions, token_budget=token_budget,
        pad_token_id=policy.pad_token_id, device=policy.device, padding_free=config.padding_free and policy.packs,
    ):  # fmt: skip
        chosen = batch.only(counted[batch.token_index])
        yield chosen, weights[chosen.sequences]


def why_not_finite(config: SFTConfig, means: Means, loss: float, overflowed: bool) -> str:
    """The likely cause of a loss or gradient that is not finite."""
    cause = f"learning_rate is too high, or activations overflow {config.compute_dtype}"
    values = torch.tensor([loss, means.entropy])
    return first_not_finite([("the examples' log-probabilities are", values, cause)], "the gradient", cause, overflowed)


def try_largest_update(
    policy: Policy, examples: list[Example], budget: TokenBudget, config: SFTConfig, reserved: int = 0
) -> None:
    """Try the gradient of a full micro-batch of the longest example, the last one cut; budget shrinks if it must.

    Otherwise a run dies when such a step comes. `reserved` bytes are for what comes later.
    """
    ids = max((one.ids for one in examples), key=len)
    lengths = filling_lengths(len(ids), config.examples_per_step, budget.num_tokens)
    tried = [Example(ids[:length], [False] + [True] * (length - 1)) for length in lengths]
    with on_trial(policy, reserved) as scaler:
        budget.fit(partial(backward, policy, tried, range(len(tried)), scaler, config), lengths)

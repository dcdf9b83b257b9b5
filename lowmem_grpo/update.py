"""One update: what the reference and the policy say of a rollout's tokens, micro-batch by micro-batch."""

import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from lowmem_grpo.config import GRPOConfig
from lowmem_grpo.metrics import TokenMeter
from lowmem_grpo.objective import policy_loss, token_weights
from lowmem_grpo.packing import MicroBatch, pack
from lowmem_grpo.policy import Policy
from lowmem_grpo.rollout import Rollout

T = TypeVar("T")


class TokenBudget:
    """The most tokens of a micro-batch: what the configuration says, until that ran out of memory."""

    def __init__(self, tokens: int):
        self.tokens = tokens
        self.out_of_memory = 0  # how often

    def fit(self, work: Callable[[int], T], lengths: list[int]) -> T:
        """work(tokens), which begins anew when called again, for sequences of these lengths.

        Out of memory, what can be let go is, and the same is tried again; then with half of the tokens, as often as
        need be, and from then on for good. Random numbers are drawn as if nothing had happened.

        Raises:
            torch.OutOfMemoryError: one sequence alone does not fit; a note has the remedy.
        """
        seen = self.out_of_memory
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        drawn = torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None
        while True:
            try:
                return work(self.tokens)
            except torch.OutOfMemoryError as error:
                self.out_of_memory += 1
                if self.out_of_memory > seen + 1:
                    self._halve(error, lengths)
            gc.collect()
            torch.set_rng_state(drawn[0])
            if drawn[1] is not None:
                torch.cuda.set_rng_state(drawn[1])
                torch.cuda.empty_cache()

    def _halve(self, error: torch.OutOfMemoryError, lengths: list[int]) -> None:
        tokens, longest = min(self.tokens, sum(lengths)), max(lengths, default=0)
        if tokens <= longest:
            error.add_note(
                f"A micro-batch of one sequence, of {longest} tokens, does not fit. Lower max_completion_length "
                "or max_prompt_length, or choose a smaller model."
            )
            raise error
        self.tokens = max(tokens // 2, longest)

    def metrics(self) -> dict[str, float]:
        return {"memory/token_budget": self.tokens, "memory/out_of_memory": self.out_of_memory}


def kept(rollout: Rollout, config: GRPOConfig) -> list[bool]:
    """Which completions have a gradient.

    Without a KL, an advantage of 0 (every completion of a group got the same reward) makes a gradient of 0.
    """
    learns = rollout.advantages != 0 if config.beta == 0 else torch.ones_like(rollout.completion_mask)
    return (rollout.completion_mask & learns).tolist()


def kept_lengths(rollout: Rollout, config: GRPOConfig) -> list[int]:
    """Tokens of each completion that is computed, with its prompt."""
    return [length for length, counts in zip(rollout.lengths, kept(rollout, config), strict=True) if counts]


def micro_batches(policy: Policy, rollout: Rollout, config: GRPOConfig, token_budget: int) -> Iterator[MicroBatch]:
    """The completions whose loss has a gradient, packed under token_budget; the divisor counts the others too."""
    return pack(
        [prompt.ids for prompt in rollout.prompts],
        [completion.ids for completion in rollout.completions],
        token_budget=token_budget,
        pad_token_id=policy.pad_token_id,
        device=policy.device,
        keep=kept(rollout, config),
        num_generations=rollout.num_generations,
        padding_free=config.padding_free and policy.packs,
    )


def reference_logprobs(policy: Policy, rollout: Rollout, config: GRPOConfig, token_budget: int) -> Tensor | None:
    """Log-probabilities (M,) of the rollout's tokens under the reference, or None where beta is 0."""
    if config.beta == 0:
        return None
    logprobs = torch.zeros(int(rollout.offsets[-1]), device=policy.device)
    with policy.as_reference():
        for batch in micro_batches(policy, rollout, config, token_budget):
            logprobs[batch.tokens] = policy.logprobs(batch, config.temperature)
    return logprobs


def backward(
    policy: Policy,
    rollout: Rollout,
    old_logprobs: Tensor | None,  # (M,), None: those of the policy as it is, whose ratio is 1
    ref_logprobs: Tensor | None,  # (M,)
    tokens: TokenMeter,
    scaler: torch.amp.GradScaler,
    config: GRPOConfig,
    token_budget: int,
) -> tuple[Tensor, Tensor]:
    """Set the parameters' gradient to that of the step's loss, micro-batch by micro-batch.

    Returns the loss, a scalar, and the log-probabilities (M,) of the tokens that count.
    """
    weights = token_weights(
        rollout.offsets.diff(), rollout.completion_mask,
        loss_type=config.loss_type, max_completion_length=config.max_completion_length,
    ).to(policy.device)  # fmt: skip
    advantages = rollout.advantages.to(policy.device)
    # From zero, whatever an attempt that ran out of memory left; and where nothing is left to learn from, the gradient
    # is 0 and not missing: the optimizer takes its step as always.
    for parameter in policy.trainable_parameters().values():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
    total = scaler.scale(torch.zeros((), device=policy.device)) * 0
    computed = torch.zeros(int(rollout.offsets[-1]), device=policy.device)
    for batch in micro_batches(policy, rollout, config, token_budget):
        logprobs, entropy = policy.logprobs_and_entropy(batch, config.temperature)  # (N,) each
        loss, stats = policy_loss(
            logprobs,
            None if old_logprobs is None else old_logprobs[batch.tokens],
            None if ref_logprobs is None else ref_logprobs[batch.tokens],
            advantages[batch.sequences],
            weights[batch.sequences],
            epsilon_low=config.epsilon,
            epsilon_high=config.upper_epsilon,
            delta=config.delta,
            beta=config.beta,
            use_bias_correction_kl=config.use_bias_correction_kl,
        )
        scaler.scale(loss).backward()
        total += loss.detach()
        computed[batch.tokens] = logprobs.detach()
        tokens.add(batch, computed[batch.tokens], entropy, stats, first=old_logprobs is None)
    return total, computed


def try_largest_update(policy: Policy, prompt: list[int], budget: TokenBudget, config: GRPOConfig) -> None:
    """Gradients of a micro-batch of the longest sequences and of a full one, thrown away: budget shrinks if it must.

    Otherwise a run dies when its completions have grown long. The weights and the random numbers stay as they are.
    """
    count = max(1, budget.tokens // (len(prompt) + config.max_completion_length))
    _try(policy, prompt, count, config.max_completion_length, budget, config)
    filling = budget.tokens // (count + 1) - len(prompt)  # one sequence more, each shorter, leave no room
    if filling > 0:
        _try(policy, prompt, count + 1, filling, budget, config)


def _try(policy: Policy, prompt: list[int], count: int, length: int, budget: TokenBudget, config: GRPOConfig) -> None:
    # Each prompt a group of its own, so that none is shared.
    rollout = Rollout.bare([prompt] * count, [prompt[-1:] * length] * count, torch.ones(count))
    scaler, tokens = torch.amp.GradScaler(policy.device.type, enabled=False), TokenMeter(rollout, policy.device)
    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        budget.fit(partial(backward, policy, rollout, None, None, tokens, scaler, config), rollout.lengths)
    for parameter in policy.trainable_parameters().values():
        parameter.grad = None

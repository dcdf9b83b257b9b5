"""One update: what the reference and the policy say of a rollout's tokens, micro-batch by micro-batch."""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from lowmem_grpo.config.grpo import BUILT_IN, GRPOConfig
from lowmem_grpo.model.packing import MicroBatch, pack
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.objective.coefficients import Coefficients
from lowmem_grpo.objective.loss import Tokens, correction, micro_batch_loss, step_weights
from lowmem_grpo.out_of_memory import TokenBudget, as_torch_says_it
from lowmem_grpo.rollout.rollout import Rollout
from lowmem_grpo.update.token_metrics import TokenMeter


@contextlib.contextmanager
def at_work(batch: MicroBatch) -> Iterator[None]:
    """An out-of-memory inside carries, as `micro_batch`, the micro-batch's tokens and whether it cannot be split."""
    try:
        with as_torch_says_it():
            yield
    except torch.OutOfMemoryError as error:
        tokens, sequences = batch.input_ids.numel(), set(batch.sequences.tolist())
        error.micro_batch = tokens, len(sequences) == 1 or tokens == 1  # type: ignore[attr-defined]
        raise


def kept(rollout: Rollout, config: GRPOConfig) -> list[bool]:
    """Which completions have a gradient.

    Without a KL or an entropy bonus in the loss, an advantage of 0 (every completion of a group got the same reward)
    makes a gradient of 0.
    """
    by_advantage = (
        (config.beta == 0 or config.kl_in_reward)
        and not config.has_entropy_bonus
        and config.loss_type in BUILT_IN  # what a registered one makes of an advantage of 0, nobody knows
    )
    learns = rollout.advantages != 0 if by_advantage else torch.ones_like(rollout.completion_mask)
    return (rollout.completion_mask & learns).tolist()


def kept_lengths(rollout: Rollout, config: GRPOConfig) -> list[int]:
    """Tokens of each completion that is computed, with its prompt."""
    return [length for length, counts in zip(rollout.lengths, kept(rollout, config), strict=True) if counts]


def micro_batches(
    policy: Policy, rollout: Rollout, config: GRPOConfig, token_budget: int, keep: list[bool]
) -> Iterator[MicroBatch]:
    """The completions to keep, packed under token_budget."""
    return pack(
        [prompt.ids for prompt in rollout.prompts],
        [completion.ids for completion in rollout.completions],
        token_budget=token_budget,
        pad_token_id=policy.pad_token_id,
        device=policy.device,
        keep=keep,
        num_generations=rollout.num_generations,
        padding_free=config.padding_free and policy.packs,
    )


def reference_logprobs(policy: Policy, rollout: Rollout, config: GRPOConfig, token_budget: int) -> Tensor | None:
    """Log-probabilities (M,) of the rollout's tokens under the reference, or None where beta is 0."""
    if config.beta == 0:
        return None
    logprobs = torch.zeros(int(rollout.offsets[-1]), device=policy.device)
    keep = rollout.completion_mask.tolist() if config.kl_in_reward else kept(rollout, config)
    with policy.as_reference():
        for batch in micro_batches(policy, rollout, config, token_budget, keep):
            with at_work(batch):
                logprobs[batch.tokens] = policy.logprobs(batch, config.temperature)
    return logprobs


def old_logprobs_and_entropy(
    policy: Policy, rollout: Rollout, config: GRPOConfig, token_budget: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (M,) of the rollout's tokens under the policy as it is, without a gradient."""
    logprobs, entropies = torch.zeros(2, int(rollout.offsets[-1]), device=policy.device)
    with policy.inference():
        for batch in micro_batches(policy, rollout, config, token_budget, rollout.completion_mask.tolist()):
            with at_work(batch):
                logprobs[batch.tokens], entropies[batch.tokens] = policy.logprobs_and_entropy(batch, config.temperature)
    return logprobs, entropies


def needs_old_pass(rollout: Rollout, config: GRPOConfig) -> bool:
    """Whether something must be known of every token before the first gradient."""
    return config.has_old_pass or (config.kl_in_reward and rollout.sampling_logprobs is None)


def high_entropy(entropies: Tensor, rollout: Rollout, quantile: float) -> Tensor:
    """The share `quantile` of the tokens that count, (M,) bool, where entropy is highest (arXiv:2506.01939)."""
    counted = rollout.completion_mask.to(entropies.device).repeat_interleave(
        rollout.offsets.diff().to(entropies.device)
    )
    if not counted.any():
        return counted
    return counted & (entropies >= torch.quantile(entropies[counted], 1 - quantile))


def backward(
    policy: Policy,
    rollout: Rollout,
    tokens: TokenMeter,
    coefficients: Coefficients,
    scaler: torch.amp.GradScaler,
    config: GRPOConfig,
    token_budget: int,
) -> tuple[Tensor, Tensor]:
    """Set the parameters' gradient to that of the step's loss, micro-batch by micro-batch.

    The ratio is 1 where rollout.old_logprobs is None. Returns the loss, a scalar, and the log-probabilities (M,) of
    the tokens that count.
    """
    lengths, completions = rollout.offsets.diff(), len(rollout.completions)
    weights = step_weights(lengths, rollout.completion_mask, config).to(policy.device)
    advantages = rollout.advantages.to(policy.device)
    counted = (lengths * rollout.completion_mask).sum() if rollout.keep is None else rollout.keep.sum()
    entropy_weight = 1 / max(1, int(counted))
    # From zero, whatever an attempt that ran out of memory left; and where nothing is left to learn from, the gradient
    # is 0 and not missing: the optimizer takes its step as always.
    for parameter in policy.trainable_parameters().values():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
    total = scaler.scale(torch.zeros((), device=policy.device)) * 0
    computed = torch.zeros(int(rollout.offsets[-1]), device=policy.device)
    for batch in micro_batches(policy, rollout, config, token_budget, kept(rollout, config)):
        with at_work(batch):
            logprobs, entropy = policy.logprobs_and_entropy(  # (N,) each
                batch, config.temperature, entropy_grad=coefficients.entropy_coef != 0
            )
            old = _at(batch.tokens, rollout.old_logprobs)
            sampled = _at(batch.tokens, rollout.sampling_logprobs)
            old_logprobs = logprobs.detach() if old is None else old
            weighed = correction(
                old_logprobs, _at(batch.tokens, rollout.proposal_logprobs), batch.sequences, completions, config
            )
            loss, happened = micro_batch_loss(
                Tokens(
                    logprobs=logprobs,
                    old_logprobs=old_logprobs,
                    ref_logprobs=None if config.kl_in_reward else _at(batch.tokens, rollout.ref_logprobs),
                    entropy=entropy,
                    advantages=advantages[batch.sequences],
                    weights=weights[batch.sequences],
                    sequences=batch.sequences,
                    completions=completions,
                    keep=_at(batch.tokens, rollout.keep),
                    correction=weighed,
                    sampling_logprobs=sampled,
                ),
                on_policy=old is None,
                entropy_weight=entropy_weight,
                coefficients=coefficients,
                config=config,
            )
            scaler.scale(loss).backward()
            total += loss.detach()
            computed[batch.tokens] = logprobs.detach()
            if weighed is not None:
                happened["correction"] = weighed
            if sampled is not None:
                difference = (old_logprobs - sampled).abs()  # both of the policy that sampled
                fresh = rollout.fresh_tokens is None or batch.tokens + rollout.first_token < rollout.fresh_tokens
                happened["difference"] = difference * fresh
            tokens.add(batch.tokens + rollout.first_token, entropy=entropy, **happened)
    return total, computed


def why_not_finite(
    rollout: Rollout,  # what an optimizer step was computed from
    config: GRPOConfig,
    logprobs: Tensor,  # (M,) the policy's, as backward returns them
    loss: float,
    overflowed: bool,  # whether fp16's loss scale may be all that was wrong
) -> str:
    """Which of an optimizer step's numbers are the first that are not finite, with the likely cause."""
    if overflowed:
        return "the gradient overflows float16, and its loss scale is halved, as at the start of most fp16 runs"
    overflow = f"activations overflow {config.compute_dtype}"
    found = [
        ("the advantages are", rollout.advantages, "a reward, its weight or its KL is too large"),
        ("the reference's log-probabilities are", rollout.ref_logprobs, overflow),
        ("the policy's log-probabilities are", rollout.old_logprobs, f"learning_rate is too high, or {overflow}"),
        ("the policy's log-probabilities are", logprobs, f"learning_rate is too high, or {overflow}"),
        ("the loss is", torch.tensor(loss), f"loss_type={config.loss_type!r}, or too large a beta or entropy_coef"),
    ]
    for what, values, cause in found:
        if values is not None and not values.isfinite().all():
            return f"{what} not finite (likely cause: {cause})"
    return f"the gradient is not finite, though the loss is (likely cause: {cause})"


def _at(tokens: Tensor, values: Tensor | None) -> Tensor | None:
    return None if values is None else values[tokens]


def try_largest_update(
    policy: Policy, prompt: list[int], budget: TokenBudget, config: GRPOConfig, reserved: int = 0
) -> None:
    """Gradients of a micro-batch of the longest sequences and of a full one, thrown away: budget shrinks if it must.

    Otherwise a run dies when its completions have grown long. So many bytes are reserved meanwhile, for what comes
    later. The weights and the random numbers stay as they are.
    """
    held = torch.empty(reserved, dtype=torch.uint8, device=policy.device)
    count = max(1, budget.tokens // (len(prompt) + config.max_completion_length))
    _try(policy, prompt, count, config.max_completion_length, budget, config)
    filling = budget.tokens // (count + 1) - len(prompt)  # one sequence more, each shorter, leave no room
    if filling > 0:
        _try(policy, prompt, count + 1, filling, budget, config)
    del held


def _try(policy: Policy, prompt: list[int], count: int, length: int, budget: TokenBudget, config: GRPOConfig) -> None:
    # Each prompt a group of its own, so that none is shared.
    rollout = Rollout.bare([prompt] * count, [prompt[-1:] * length] * count, torch.ones(count))
    scaler, tokens = torch.amp.GradScaler(policy.device.type, enabled=False), TokenMeter(rollout, policy.device)
    coefficients = Coefficients(0.0, config.entropy_coef_max if config.has_entropy_bonus else 0.0)
    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        budget.fit(partial(backward, policy, rollout, tokens, coefficients, scaler, config), rollout.lengths)
    for parameter in policy.trainable_parameters().values():
        parameter.grad = None

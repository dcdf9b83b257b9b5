"""The passes of an update: log-probabilities of reference and policy, and the loss's gradient."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.sections import ObjectiveFields, UpdateFields
from lowmem_grpo.distributed import alone, share, summed
from lowmem_grpo.model.packing import MicroBatch, pack
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.objective.coefficients import Coefficients
from lowmem_grpo.objective.loss import LOSSES, Tokens, importance_weights, loss_weights, micro_batch_loss
from lowmem_grpo.out_of_memory import TokenBudget, as_torch_says_it
from lowmem_grpo.rollout.rollout import Rollout
from lowmem_grpo.update.token_metrics import TokenMeter


@contextlib.contextmanager
def at_work(batch: MicroBatch) -> Iterator[None]:
    """Give an out-of-memory its `micro_batch`: the number of tokens, and whether that is one sequence."""
    try:
        with as_torch_says_it():
            yield
    except torch.OutOfMemoryError as error:
        num_tokens, sequences = batch.input_ids.numel(), set(batch.sequences.tolist())
        error.micro_batch = num_tokens, len(sequences) == 1 or num_tokens == 1  # type: ignore[attr-defined] # ours
        raise


def micro_batches(
    policy: Policy, rollout: Rollout, config: UpdateFields, token_budget: int, chosen: list[bool]
) -> Iterator[MicroBatch]:
    """This rank's share of the rollout's chosen completions, packed under token_budget; sampled tokens alone count."""
    own = share([length if is_chosen else 0 for length, is_chosen in zip(rollout.lengths, chosen, strict=True)])
    batches = pack(
        [prompt.ids for prompt in rollout.prompts],
        [completion.ids for completion in rollout.completions],
        token_budget=token_budget,
        pad_token_id=policy.pad_token_id,
        device=policy.device,
        chosen=[is_chosen and b in own for b, is_chosen in enumerate(chosen)],
        num_generations=rollout.num_generations,
        padding_free=config.padding_free and policy.packs,
    )
    if rollout.sampled is None:
        return batches
    sampled = rollout.sampled.to(policy.device)
    return (batch.only(sampled[batch.token_index]) for batch in batches)


def with_reference(policy: Policy, rollout: Rollout, config: GRPOConfig, budget: TokenBudget) -> Rollout:
    """The rollout with its tokens' log-probabilities under the reference; as it is where beta is 0."""
    if config.beta == 0:
        return rollout
    with policy.as_reference():
        return replace(rollout, ref_logprobs=logprobs_of(policy, rollout, config, budget))


def logprobs_of(policy: Policy, rollout: Rollout, config: GRPOConfig, budget: TokenBudget) -> Tensor:
    """The policy's log-probability of each token, (M,) fp32, as it computes now; 0 where none counts."""
    (logprobs,) = of_each_token(
        policy, rollout, config, budget, lambda batch: [policy.logprobs(batch, config.temperature)]
    )
    return logprobs


def of_each_token(
    policy: Policy,
    rollout: Rollout,
    config: UpdateFields,
    budget: TokenBudget,
    compute: Callable[[MicroBatch], Sequence[Tensor]],  # (N,) each
    count: int = 1,  # of what it returns
) -> Tensor:
    """The results of compute() at each of the rollout's tokens, (count, M) fp32; 0 where none counts."""

    def attempt(token_budget: int) -> Tensor:
        found = torch.zeros(count, rollout.num_tokens, device=policy.device)
        for batch in micro_batches(policy, rollout, config, token_budget, rollout.completion_mask.tolist()):
            with at_work(batch):
                for known, values in zip(found, compute(batch), strict=True):
                    known[batch.token_index] = values
        return found

    return summed(budget.fit(attempt, rollout.counted_lengths))


def needs_old_pass(rollout: Rollout, config: GRPOConfig) -> bool:
    """True where every token needs a forward before the first gradient."""
    return config.has_old_pass or (config.reads_own_logprobs and rollout.sampling_logprobs is None)


def with_old_logprobs(policy: Policy, rollout: Rollout, config: GRPOConfig, budget: TokenBudget) -> Rollout:
    """The rollout with old_logprobs and learn_mask, from a pass of the policy without a gradient.

    Call where needs_old_pass(): each is set only if the update could not make it as it goes.
    """
    with policy.inference():
        old_logprobs, entropies = of_each_token(
            policy, rollout, config, budget, lambda batch: policy.logprobs_and_entropy(batch, config.temperature), 2
        )
    if config.top_entropy_quantile < 1:
        rollout = replace(rollout, learn_mask=high_entropy(entropies, rollout, config.top_entropy_quantile))
    if config.steps_per_generation > 1 or config.reads_own_logprobs:
        rollout = replace(rollout, old_logprobs=old_logprobs)
    return rollout


def high_entropy(entropies: Tensor, rollout: Rollout, quantile: float) -> Tensor:
    """The share `quantile` of the tokens that count, (M,) bool, where entropy is highest (arXiv:2506.01939)."""
    counted = rollout.counted.to(entropies.device)
    if not counted.any():
        return counted
    return counted & (entropies >= torch.quantile(entropies[counted], 1 - quantile))


def completions_with_gradient(rollout: Rollout, config: ObjectiveFields) -> list[bool]:
    """A truth value for each completion: its tokens have a gradient.

    Without a KL or an entropy bonus in the loss, an advantage of 0 (every completion of a group got the same reward)
    makes a gradient of 0.
    """
    has_kl_in_loss = config.beta != 0 and not config.kl_in_reward
    if has_kl_in_loss or config.has_entropy_bonus or not LOSSES[config.loss_type].zero_advantage_has_no_gradient:
        return rollout.completion_mask.tolist()
    return (rollout.completion_mask & rollout.has_advantage).tolist()


def lengths_with_gradient(rollout: Rollout, config: ObjectiveFields) -> list[int]:
    """Number of tokens of each completion that has a gradient, with its prompt."""
    return rollout.lengths_of(completions_with_gradient(rollout, config))


def backward(
    policy: Policy,
    rollout: Rollout,
    token_meter: TokenMeter,
    coefficients: Coefficients,
    scaler: torch.amp.GradScaler,
    config: GRPOConfig,
    token_budget: int,
) -> tuple[Tensor, Tensor]:
    """Set the parameters' gradient to that of the step's loss, micro-batch by micro-batch.

    The ratio is 1 where rollout.old_logprobs is None. Returns the loss, a scalar, and the log-probabilities (M,) of
    the tokens that have a gradient, 0 elsewhere. With several ranks, loss, log-probabilities and gradient are of this
    rank's share, and the step's are their sums.
    """
    completion_weights = loss_weights(rollout.num_sampled, rollout.completion_mask, config).to(policy.device)
    advantages = rollout.advantages.to(policy.device)
    entropy_weight = 1 / max(1, rollout.num_learning_tokens)
    zero_gradients(policy)
    total = scaler.scale(torch.zeros((), device=policy.device)) * 0
    computed = torch.zeros(rollout.num_tokens, device=policy.device)
    chosen = completions_with_gradient(rollout, config)
    for batch in micro_batches(policy, rollout, config, token_budget, chosen):
        with at_work(batch):
            logprobs, entropy = policy.logprobs_and_entropy(  # (N,) each
                batch, config.temperature, entropy_grad=coefficients.entropy_coef != 0
            )
            loss, recorded = micro_batch_loss(
                _tokens(batch, rollout, logprobs, entropy, completion_weights, advantages, config),
                entropy_weight, coefficients, config,
            )  # fmt: skip
            scaler.scale(loss).backward()
            total += loss.detach()
            computed[batch.token_index] = logprobs.detach()
            token_meter.add(batch.token_index + rollout.first_token_index, **recorded)
    return total, computed


def zero_gradients(policy: Policy, name: str | None = None) -> None:
    """Make every gradient of an adapter, by default the policy's, 0, whatever an attempt without memory left of it.

    Where nothing is left to learn from, it is 0 and not missing: the optimizer takes its step as always.
    """
    for parameter in policy.parameters_of(name or policy.adapter).values():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()


def _tokens(
    batch: MicroBatch,
    rollout: Rollout,
    logprobs: Tensor,  # (N,)
    entropy: Tensor,  # (N,)
    completion_weights: Tensor,  # (B,) of each completion's tokens in the loss
    advantages: Tensor,  # (B,)
    config: GRPOConfig,
) -> Tokens:
    """The Tokens of a micro-batch, for the objective."""

    def at(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[batch.token_index]

    known, num_completions = at(rollout.old_logprobs), len(rollout.completions)
    old_logprobs = logprobs.detach() if known is None else known
    by_token = at(rollout.token_advantages)
    return Tokens(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        ref_logprobs=None if config.kl_in_reward else at(rollout.ref_logprobs),
        entropy=entropy,
        advantages=advantages[batch.sequences] if by_token is None else by_token,
        loss_weights=completion_weights[batch.sequences],
        sequences=batch.sequences,
        num_completions=num_completions,
        on_policy=known is None,
        learn_mask=at(rollout.learn_mask),
        importance_weights=importance_weights(
            old_logprobs, at(rollout.proposal_logprobs), batch.sequences, num_completions, config
        ),
        sampling_logprobs=at(rollout.sampling_logprobs),
    )


def why_not_finite(
    rollout: Rollout,  # what an optimizer step was computed from
    config: GRPOConfig,
    logprobs: Tensor,  # (M,) the policy's, as backward returns them
    loss: float,
    overflowed: bool,  # whether fp16's loss scale may be all that was wrong
) -> str:
    """The first of an optimizer step's numbers that is not finite, with the likely cause."""
    overflow = f"activations overflow {config.compute_dtype}"
    objective = f"loss_type={config.loss_type!r}, or too large a beta or entropy_coef"
    found = [
        ("the advantages are", rollout.advantages, "a reward, its weight or its KL is too large"),
        ("the tokens' advantages are", rollout.token_advantages, "a reward, its weight or its KL is too large"),
        ("the reference's log-probabilities are", rollout.ref_logprobs, overflow),
        ("the policy's log-probabilities are", rollout.old_logprobs, f"learning_rate is too high, or {overflow}"),
        ("the policy's log-probabilities are", logprobs, f"learning_rate is too high, or {overflow}"),
        ("the loss is", torch.tensor(loss), objective),
    ]
    return first_not_finite(found, "the gradient", objective, overflowed)


def first_not_finite(
    found: Sequence[tuple[str, Tensor | None, str]],  # "the loss is", its values, and the likely cause
    gradient: str,  # "the gradient", as a sentence calls it
    cause: str,  # of a gradient that is not finite, where all of these are
    overflowed: bool,
) -> str:
    """The first of an optimizer step's numbers that is not finite, or else its gradient, in a sentence."""
    if overflowed:
        return f"{gradient} overflows float16, and its loss scale is halved, as at the start of most fp16 runs"
    broken = (one for one in found if one[1] is not None and not one[1].isfinite().all())
    what, _, why = next(broken, (f"{gradient}, though not the loss, is", None, cause))
    return f"{what} not finite (likely cause: {why})"


@contextlib.contextmanager
def on_trial(policy: Policy, reserved: int) -> Iterator[torch.amp.GradScaler]:
    """Undo a trial's gradients and random numbers after the `with`, which gets a loss scale that is off.

    Meanwhile `reserved` bytes are held, for what comes later.
    """
    held = torch.empty(reserved, dtype=torch.uint8, device=policy.device)
    with policy.fork_rng():
        yield torch.amp.GradScaler(policy.device.type, enabled=False)
    for parameter in policy.parameters_of(policy.adapter).values():
        parameter.grad = None
    del held


def try_largest_update(
    policy: Policy, prompt: list[int], budget: TokenBudget, config: GRPOConfig, reserved: int = 0
) -> None:
    """Try the gradient of the longest sequences and of a full micro-batch; budget shrinks if it must.

    Otherwise a run dies when its completions have grown long. `reserved` bytes are for what comes later.
    """
    count = max(1, budget.num_tokens // (len(prompt) + config.max_completion_length))
    coefficients = Coefficients(0.0, config.entropy_coef_max if config.has_entropy_bonus else 0.0)

    def fit(count: int, length: int) -> None:
        # Each prompt a group of its own, so that none is shared.
        rollout = Rollout.bare([prompt] * count, [prompt[-1:] * length] * count, torch.ones(count))
        token_meter = TokenMeter(rollout, policy.device)
        budget.fit(partial(backward, policy, rollout, token_meter, coefficients, scaler, config), rollout.lengths)

    with on_trial(policy, reserved) as scaler, alone():
        fit(count, config.max_completion_length)
        filling = budget.num_tokens // (count + 1) - len(prompt)  # one sequence more, each shorter, leave no room
        if filling > 0:
            fit(count + 1, filling)

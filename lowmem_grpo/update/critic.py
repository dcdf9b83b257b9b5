"""PPO's critic: what it expects at each token, the advantages that follow, and the gradient of its own loss.

The critic is an adapter beside the policy's on the one frozen base, with a score head. So its gradient moves no weight
of the policy, and no second model is in memory.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.objective.advantages import weighted_rewards
from lowmem_grpo.objective.gae import gae, token_rewards, whiten
from lowmem_grpo.objective.value import explained_variance, value_losses
from lowmem_grpo.out_of_memory import TokenBudget
from lowmem_grpo.output.folder import read_state
from lowmem_grpo.paths import expanded
from lowmem_grpo.rollout.collect import token_kl
from lowmem_grpo.rollout.rollout import Rollout
from lowmem_grpo.update.optimizer import Learner
from lowmem_grpo.update.passes import at_work, first_not_finite, micro_batches, of_each_token, zero_gradients

CRITIC = "critic"  # the name of its adapter, and of its part of a checkpoint
CONFIG = "adapter_config"  # the name of the adapter's configuration in that part


class Critic:
    """The critic's adapter on a policy's base, and the optimizer that trains it. A part of a checkpoint."""

    def __init__(self, policy: Policy, config: GRPOConfig, total_steps: int, saved: Any = None):
        """Put a critic on the base: a reward adapter, or the policy's with a new score head.

        `saved` is the saved_config() of the checkpoint to resume, whose values load() gives it.

        Raises:
            InputError: the policy's adapter has the critic's name, or critic_init is no adapter of this base.
        """
        with policy.fork_rng():  # a new adapter draws
            if saved is not None:
                policy.add(CRITIC, saved)
                policy.add_score_head(CRITIC, config.seed)
            elif config.critic_init == "policy":
                policy.add(CRITIC, copy_of=policy.adapter)
                policy.add_score_head(CRITIC, config.seed)
                # Values of 0, with which the first advantages are REINFORCE's. Random ones would be noise in them.
                policy.score_heads[CRITIC].load(torch.zeros_like(policy.score_heads[CRITIC].weight))
            else:
                policy.add_from(CRITIC, expanded(config.critic_init))
        self.policy = policy
        self.scaler = torch.amp.GradScaler(policy.device.type, enabled=config.fp16)
        self.learner = Learner(
            policy.parameters_of(CRITIC).values(), replace(config, learning_rate=config.critic_learning_rate),
            self.scaler, total_steps, keep_gradients=False,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """The critic's weights as they are now, its optimizer, and its adapter's configuration as JSON has it."""
        config = json.loads(json.dumps(self.policy.adapters.config_of(CRITIC).to_dict(), default=sorted))  # of sets
        return {**self.policy.adapter_state(CRITIC), **self.learner.state(), CONFIG: config}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what state() returned. Raise ValueError for the weights of another critic."""
        own = {name: values.shape for name, values in self.policy.adapter_state(CRITIC).items()}
        weights = {name: state[name] for name in own}
        if {name: values.shape for name, values in weights.items()} != own:
            raise ValueError("its weights have other shapes than this run's")
        self.policy.load_adapter_state(CRITIC, weights)
        self.learner.load({name: value for name, value in state.items() if name not in own})


def saved_config(resume: Path | None) -> PeftConfig | None:
    """The configuration of the critic in a checkpoint; None where it has none, as an older version's."""
    saved = None if resume is None else read_state(resume)["parts"].get(CRITIC, {}).get(CONFIG)
    return PeftConfig.from_peft_type(**saved) if isinstance(saved, dict) else None


def with_values(policy: Policy, rollout: Rollout, config: GRPOConfig, budget: TokenBudget) -> Rollout:
    """The rollout with the critic's values, each of what it expects before the token is drawn."""
    with policy.inference(), policy.wearing(CRITIC):
        (values,) = of_each_token(policy, rollout, config, budget, lambda batch: [policy.scores(batch)])
    return replace(rollout, values=values)


def with_gae(rollout: Rollout, beta: float, config: GRPOConfig) -> Rollout:
    """The rollout with the advantage and the return of each token, from its values and its completions' rewards.

    With kl_in_reward each token pays beta times its own KL. A completion without a reward does not count.
    """
    assert rollout.values is not None
    device, lengths = rollout.values.device, rollout.num_sampled
    # One sampled token follows another, whatever tools said between them.
    own = torch.ones(rollout.num_tokens, dtype=torch.bool) if rollout.sampled is None else rollout.sampled.cpu()
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    scores = weighted_rewards(rollout.rewards, config.reward_weights)
    mask = rollout.completion_mask & ~scores.isnan()
    penalty = token_kl(rollout, config)[own] if config.kl_in_reward else None
    rewards = token_rewards(scores, offsets, None if penalty is None else beta * penalty)
    values = rollout.values.cpu()[own]
    advantages, returns = gae(rewards, values, offsets, gamma=config.gamma, lam=config.lam)
    counted = mask.repeat_interleave(lengths)
    if config.whiten_advantages:
        advantages = whiten(advantages, counted)
    advantages, returns = torch.where(counted, advantages, 0), torch.where(counted, returns, 0)
    means = [part.mean().item() for part in advantages.split(lengths.tolist())]
    metrics = {
        "value/mean": values[counted].mean().item(),
        "returns/mean": returns[counted].mean().item(),
        "value/explained_variance": explained_variance(values[counted], returns[counted]),
    }
    if penalty is not None:
        metrics["kl"] = penalty[counted].mean().item()
    return replace(
        rollout,
        token_advantages=advantages.new_zeros(len(own)).masked_scatter(own, advantages).to(device),
        returns=returns.new_zeros(len(own)).masked_scatter(own, returns).to(device),
        completion_mask=mask,
        metrics={**rollout.metrics, **metrics},
        table={**rollout.table, "advantage": means},
    )


def backward(
    policy: Policy, rollout: Rollout, scaler: torch.amp.GradScaler, config: GRPOConfig, token_budget: int
) -> tuple[Tensor, Tensor]:
    """Set the critic's gradient to that of the value loss, the mean over the rollout's tokens that count.

    Returns the loss and the share of tokens whose clipped value decided it, scalars. With several ranks, each is this
    rank's part of the step's, which is their sum, and so is the gradient.
    """
    assert rollout.values is not None and rollout.returns is not None
    num_tokens = max(1, rollout.num_counted_tokens)
    zero_gradients(policy, CRITIC)
    clipped = torch.zeros((), device=policy.device)
    total = scaler.scale(torch.zeros_like(clipped)) * 0
    with policy.wearing(CRITIC):
        for batch in micro_batches(policy, rollout, config, token_budget, rollout.completion_mask.tolist()):
            with at_work(batch):
                losses, decided = value_losses(
                    policy.scores(batch), rollout.values[batch.token_index], rollout.returns[batch.token_index],
                    cliprange=config.cliprange_value,
                )  # fmt: skip
                loss = losses.sum() / num_tokens
                scaler.scale(loss).backward()
                total += loss.detach()
                clipped += decided.sum() / num_tokens
    return total, clipped


def why_not_finite(rollout: Rollout, config: GRPOConfig, clipped: Tensor, loss: float, overflowed: bool) -> str:
    """The likely cause of a value loss, or its gradient, that is not finite."""
    overflow = f"activations overflow {config.compute_dtype}"
    found = [
        ("the returns are", rollout.returns, "a reward, its weight or its KL is too large"),
        ("the critic's values are", rollout.values, f"critic_learning_rate is too high, or {overflow}"),
        ("the value loss is", torch.tensor(loss), f"critic_learning_rate is too high, or {overflow}"),
    ]
    return first_not_finite(found, "the critic's gradient", overflow, overflowed)

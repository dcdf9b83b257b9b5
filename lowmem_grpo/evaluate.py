"""Greedy accuracy on held-out prompts."""

from lowmem_grpo.advantages import weighted_rewards
from lowmem_grpo.config import GRPOConfig
from lowmem_grpo.generate import SamplingParams, sample
from lowmem_grpo.metrics import length_metrics
from lowmem_grpo.policy import Policy
from lowmem_grpo.rewards.runner import RewardRunner
from lowmem_grpo.rollout import Completion, Prompt


def evaluate(
    policy: Policy, prompts: list[Prompt], rewards: RewardRunner, config: GRPOConfig, step: int
) -> dict[str, float]:
    """Mean rewards of one greedy completion a prompt, under the training metrics' names with `eval_` before them."""
    completions = sample_greedily(policy, prompts, config)
    texts = [as_text(policy, p, c) for p, c in zip(prompts, completions, strict=True)]
    columns = {key: [p.columns.get(key) for p in prompts] for key in prompts[0].columns}
    scores = rewards([p.text for p in prompts], texts, [c.ids for c in completions], columns, step)
    total = weighted_rewards(scores.rewards, config.reward_weights).nanmean().item()
    means = dict(zip(rewards.names, scores.rewards.nanmean(dim=0).tolist(), strict=True))
    return {
        "eval_reward": total,
        **{f"eval_rewards/{name}/mean": mean for name, mean in means.items()},
        **{f"eval_{name}": value for name, value in length_metrics(completions).items()},
    }


def sample_greedily(policy: Policy, prompts: list[Prompt], config: GRPOConfig) -> list[Completion]:
    params = SamplingParams(
        max_completion_length=config.max_completion_length, temperature=0, stop_strings=tuple(config.stop_strings or ())
    )
    return sample(
        policy, [p.ids for p in prompts], 1, params,
        rollout_token_budget=config.rollout_token_budget, token_budget=config.token_budget,
        weights=config.rollout_weights, kv=config.rollout_kv,
    ).completions  # fmt: skip


def as_text(policy: Policy, prompt: Prompt, completion: Completion) -> str | list[dict]:
    """A completion as reward functions get it: a string, or one chat message where the prompt is a chat."""
    text = policy.tokenizer.decode(completion.ids, skip_special_tokens=True)
    return text if isinstance(prompt.text, str) else [{"role": "assistant", "content": text}]

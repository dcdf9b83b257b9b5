"""On-policy distillation: what the policy samples is pulled towards a teacher, token by token.

    A_t = advantage of the completion + teacher_coef (log teacher_t - log policy_t)

of a token that the policy sampled. Its policy gradient is that of minus the reverse KL, KL(policy || teacher), of the
next token after each prefix: the sum over y of p(y) log(p(y) / q(y)) has the gradient of the mean of
log p(y) (log p(y) - log q(y)) with the brackets held fixed. Later tokens' KL is not added to earlier ones'
(https://thinkingmachines.ai/blog/on-policy-distillation).
"""

from dataclasses import replace

import torch

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.model.teacher import Teacher
from lowmem_grpo.out_of_memory import TokenBudget
from lowmem_grpo.rollout.rollout import Rollout
from lowmem_grpo.update.passes import logprobs_of


def with_teacher(teacher: Teacher, rollout: Rollout, config: GRPOConfig, budget: TokenBudget) -> Rollout:
    """The rollout with advantages by token, to which the teacher's are added, and the metric teacher_kl.

    teacher_kl is the mean of log policy - log teacher over the tokens that count: an estimate of the reverse KL.
    """
    with teacher.at_work():
        logprobs = logprobs_of(teacher.policy, as_asked(rollout), config, budget)
    own = rollout.own_logprobs
    counts = rollout.counted.to(own.device)
    distance = torch.where(counts, own - logprobs, 0.0)
    of_completions = rollout.token_advantages
    if of_completions is None:
        of_completions = rollout.by_token(rollout.advantages).to(own.device)
    by_completion = rollout.by_completion(distance) / rollout.num_sampled
    return replace(
        rollout,
        token_advantages=of_completions - config.teacher_coef * distance,
        metrics={**rollout.metrics, "teacher_kl": (distance.sum() / counts.sum()).item()},  # NaN where none counts
        table={**rollout.table, "teacher_kl": by_completion.tolist()},
    )


def as_asked(rollout: Rollout) -> Rollout:
    """The rollout with the prompts that the teacher reads in place of the policy's."""
    return replace(rollout, prompts=[prompt.for_teacher for prompt in rollout.prompts])

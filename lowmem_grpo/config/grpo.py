"""GRPOConfig, made of the fields in sections.py, with TRL's names and defaults wherever TRL has one.

The fields and their help stand there; here are the checks of what only GRPO has, and of one section against another.
Standard library only. docs/coming-from-trl.md lists each deliberate difference from TRL.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from lowmem_grpo.config.losses import LOSS_TYPES, METHODS, OWN_LOSS
from lowmem_grpo.config.sections import (
    AdapterFields,
    CompletionSavingFields,
    CriticFields,
    DataFields,
    DistillationFields,
    ModelFields,
    ObjectiveFields,
    OptimizerFields,
    ReportingFields,
    RewardFields,
    RunFields,
    SampledEvaluationFields,
    SamplingFields,
    ToolFields,
    UpdateFields,
)
from lowmem_grpo.errors import InputError, did_you_mean, shown

# The fields that an evaluation reads: a test watches one read its configuration.
EVAL_FIELDS = {
    "seed", "use_cpu", "model_init_kwargs", "trust_remote_code", "load_in_4bit", "load_head_in_8bit", "bf16", "fp16",
    "tiled_mlp", "offload_embedding", "use_liger_kernel", "dataset_config", "dataset_streaming", "dataset_take",
    "system_prompt", "chat_template_kwargs", "max_prompt_length", "max_completion_length", "temperature", "top_p",
    "top_k", "min_p", "repetition_penalty", "stop_strings", "rollout_token_budget", "rollout_weights", "rollout_kv",
    "rollout_paged", "rollout_cuda_graphs", "rollout_graphs_last", "reward_weights", "reward_timeout", "token_budget",
    "num_generations_eval", "max_tool_calling_iterations", "tool_timeout",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(  # from the last to the first: the fields of the last base come first
    ReportingFields,
    CompletionSavingFields,
    SampledEvaluationFields,
    OptimizerFields,
    UpdateFields,
    ObjectiveFields,
    DistillationFields,
    CriticFields,
    RewardFields,
    ToolFields,
    SamplingFields,
    DataFields,
    AdapterFields,
    ModelFields,
    RunFields,
):
    """Settings of one training run, in the order in which the loop meets them.

    Raises:
        UnknownNameError: a field of TRL's that is not supported here, with the remedy, or a misspelt one.
        InputError: a value out of its range, or one that contradicts another.
    """

    kind: ClassVar[str] = "grpo"
    samples: ClassVar[bool] = True  # completions, as supervised training does not
    learns: ClassVar[bool] = True  # from them, as what samples into a file does not
    measured: ClassVar[tuple[str, ...]] = ("eval_reward", "eval_pass@1")  # by an evaluation, foremost first

    def check(self) -> None:
        """Refuse an option that nothing reads, and settings that contradict each other."""
        if self.loss_type not in LOSS_TYPES:
            all_of_them = f"the objectives are {', '.join(LOSS_TYPES)}"
            hint = METHODS.get(self.loss_type.lower()) or did_you_mean(self.loss_type, LOSS_TYPES, all_of_them)
            raise InputError(
                f"loss_type={shown(self.loss_type)} is not known; {hint} (register_objective adds your own)"
            )
        loss = LOSS_TYPES[self.loss_type]
        for name, highest in (("epsilon", loss.highest_epsilon), ("epsilon_high", loss.highest_epsilon_high)):
            value = getattr(self, name)
            if value is not None and value > highest:
                raise InputError(f"{name}={value} must be at most {highest:g} with loss_type={self.loss_type!r}")
        for name, (is_read, words) in READ_ONLY.items():
            value, default = getattr(self, name), getattr(GRPOConfig, name)
            if value != default and not is_read(self):
                raise InputError(f"{name}={shown(value)} is read only {words}, or leave {name} out")
        if self.has_critic:
            refuse_by_sequence(self, "adv_estimator='gae'")
        elif self.compares and self.num_generations < 2 and self.adv_estimator != "reinforce_plus_plus":
            raise InputError(
                f"num_generations={self.num_generations}: a group needs at least 2 completions, since an advantage "
                "compares a completion with the others of its prompt, but for adv_estimator='reinforce_plus_plus' "
                "and 'gae'"
            )
        elif self.compares and self.prompts_per_step * self.num_generations < 2:
            raise InputError(
                f"adv_estimator={self.adv_estimator!r} compares the completions of a step, and prompts_per_step=1 with "
                "num_generations=1 makes one; raise either"
            )
        if 0 < self.max_steps <= self.critic_warmup:
            raise InputError(
                f"critic_warmup={self.critic_warmup} leaves the policy none of max_steps={self.max_steps} to learn "
                "in; lower critic_warmup"
            )
        if loss.needs_epsilon_high and self.epsilon_high is None:
            raise InputError(
                f"loss_type={self.loss_type!r} bounds the ratio itself by epsilon_high; set it, for example to 5.0"
            )
        if self.kl_target is not None and self.kl_estimator == "k1":
            raise InputError("kl_target needs an estimate that is never negative; set kl_estimator to k2, k3 or abs")
        if self.multi_objective_aggregation == "normalize_then_sum" and self.scale_rewards != "group":
            raise InputError(
                "multi_objective_aggregation='normalize_then_sum' scales by group, then by batch; "
                "leave out scale_rewards"
            )
        low, high = self.importance_sampling_clip_min, self.importance_sampling_clip_max
        if low is not None and high is not None and low > high:
            raise InputError(f"importance_sampling_clip_min={low} is above importance_sampling_clip_max={high}")
        if self.replay_buffer_size and not self.importance_sampling_correction:
            raise InputError(
                "replay_buffer_size needs importance_sampling_correction, since an older policy sampled them"
            )
        if self.entropy_coef_min > self.entropy_coef_max:
            raise InputError("entropy_coef_min is above entropy_coef_max")
        if self.prompts_per_step % self.steps_per_generation:
            raise InputError(
                f"prompts_per_step={self.prompts_per_step} is not a multiple of steps_per_generation="
                f"{self.steps_per_generation}; change one"
            )
        if self.teacher is not None:
            refuse_by_sequence(self, "a teacher")
            if self.has_critic:
                raise InputError(
                    "adv_estimator='gae' and a teacher each give the tokens their advantages; leave one of them out"
                )
        if self.delta is not None and self.delta <= 1 + self.upper_epsilon:
            raise InputError(f"delta={self.delta} must be above 1 + epsilon_high = {1 + self.upper_epsilon}")

    @property
    def compares(self) -> bool:
        """True where there is nothing to learn from but a completion's distance from others."""
        return self.learns and self.teacher is None

    @property
    def has_critic(self) -> bool:
        """True where a critic learns beside the policy, as PPO's does."""
        return self.adv_estimator == "gae"

    @property
    def has_old_pass(self) -> bool:
        """True where every token is computed once before the update, whatever the sampler says of it."""
        # The KL of a replayed group is today's policy's, and not that of the one which sampled it.
        replayed_kl = self.reads_own_logprobs and self.replay_buffer_size > 0
        return self.steps_per_generation > 1 or self.top_entropy_quantile < 1 or replayed_kl

    @property
    def reads_own_logprobs(self) -> bool:
        """True where the policy's log-probabilities are compared with another model's before the update."""
        return self.kl_in_reward or self.teacher is not None

    @property
    def has_cuda_graphs(self) -> bool:
        """True where decoding steps may be captured: on a GPU, and none waits for an embedding from the CPU."""
        return self.rollout_cuda_graphs and not self.offload_embedding and not self.use_cpu

    @property
    def has_lasting_graphs(self) -> bool:
        """True where captured steps are kept for later rollouts, as those that read a copy of the weights are not."""
        return self.has_cuda_graphs and self.rollout_graphs_last and self.rollout_weights != "dense"


def refuse_by_sequence(config: ObjectiveFields, what: str) -> None:
    """Raise InputError where the loss cannot tell a completion's tokens apart, which `what` needs.

    With one ratio for a completion, the gradient of each token is that of their mean advantage.
    """
    if not LOSS_TYPES[config.loss_type].by_token:
        raise InputError(
            f"{what} gives each token an advantage of its own, and loss_type={config.loss_type!r} has one for a "
            "completion; choose loss_type='dapo'"
        )
    if config.importance_sampling_level == "sequence":
        raise InputError(
            f"{what} gives each token an advantage of its own, and importance_sampling_level='sequence' has one ratio "
            "for a completion; choose 'token' or 'sequence_token'"
        )


Condition = Callable[[GRPOConfig], bool]


def _by_losses(name: str) -> tuple[Condition, str]:
    """A setting's condition, for one that only some losses read, and the losses to choose from."""
    *others, last = (loss_type for loss_type, loss in LOSS_TYPES.items() if name in loss.reads)
    return (
        lambda config: name in LOSS_TYPES[config.loss_type].reads,
        f"by {' and '.join(filter(None, [', '.join(others), last]))}; choose such a loss_type",
    )


# The options that are not read under every configuration: when they are, and what to do where one is set in vain.
_READ_ONLY: dict[str, tuple[Condition, str]] = {
    "activation_offloading": (
        lambda config: config.gradient_checkpointing,
        "with gradient_checkpointing, whose checkpoints it moves; set that",
    ),
    "multi_objective_aggregation scale_rewards": (
        lambda config: config.adv_estimator == "grpo",
        "with adv_estimator='grpo', and others have their own; choose that",
    ),
    "gamma lam whiten_advantages cliprange_value critic_learning_rate critic_warmup critic_init": (
        lambda config: config.has_critic,
        "with adv_estimator='gae'; choose that",
    ),
    "dynamic_sampling_rounds replay_buffer_size curriculum_skip": (
        lambda config: not config.has_critic,
        "where completions are compared with each other, and not by adv_estimator='gae'; choose another",
    ),
    "kl_estimator kl_in_reward kl_target reference sync_ref_model": (
        lambda config: config.beta > 0,
        "where there is a KL; set beta, for example to 0.04",
    ),
    "use_bias_correction_kl": (
        lambda config: config.beta > 0 and not config.kl_in_reward,
        "where there is a KL in the loss; set beta, for example to 0.04, and not kl_in_reward",
    ),
    "kl_horizon": (lambda config: config.kl_target is not None, "with kl_target; set that"),
    "teacher_coef teacher_system_prompt": (lambda config: config.teacher is not None, "with a teacher; name one"),
    "ref_model_mixup_alpha ref_model_sync_steps": (
        lambda config: config.sync_ref_model,
        "with sync_ref_model; set that",
    ),
    **{name: _by_losses(name) for name in OWN_LOSS.reads},
    "importance_sampling_mode importance_sampling_clip_max importance_sampling_clip_min": (
        lambda config: config.importance_sampling_correction,
        "with importance_sampling_correction; set that",
    ),
    "entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target": (
        lambda config: config.use_adaptive_entropy,
        "with use_adaptive_entropy; set that",
    ),
    "warmup_steps": (
        lambda config: config.lr_scheduler_type != "constant",
        "by a schedule with a warmup; choose lr_scheduler_type='constant_with_warmup'",
    ),
}
READ_ONLY = {name: row for names, row in _READ_ONLY.items() for name in names.split()}

"""GRPOConfig: every setting of a run, with TRL's names and defaults wherever TRL has one.

Standard library only. The README lists each deliberate difference from TRL.
"""

import dataclasses
import math
import re
import reprlib
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from lowmem_grpo.config.fields import LARGEST, SMALLEST, _fits, describe, field_types, option
from lowmem_grpo.config.trl import UNSUPPORTED
from lowmem_grpo.errors import InputError, UnknownNameError, did_you_mean


@dataclass(frozen=True)
class LossSettings:
    """The settings that a loss_type reads, of those that not every one reads, and what it asks of them."""

    reads: tuple[str, ...]
    highest_epsilon: float = 1.0  # a ratio is never below 0
    needs_epsilon_high: bool = False


_CLIPPED = LossSettings(("epsilon", "epsilon_high", "delta", "importance_sampling_level"))
# A row for each loss_type; the functions are in objective/loss.py, where register_objective adds rows of both.
LOSS_TYPES = {
    **dict.fromkeys(("dapo", "grpo", "bnpo", "dr_grpo", "luspo"), _CLIPPED),
    "cispo": LossSettings(("epsilon_high", "importance_sampling_level"), needs_epsilon_high=True),
    "sapo": LossSettings(("importance_sampling_level", "sapo_temperature_pos", "sapo_temperature_neg")),
    "vespo": LossSettings(("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")),
    "gmpo": LossSettings(("epsilon", "epsilon_high"), highest_epsilon=math.inf),  # its bounds are of log-ratios
}
# The row of a registered loss, which may read all of them.
OWN_LOSS = LossSettings(tuple(dict.fromkeys(name for loss in LOSS_TYPES.values() for name in loss.reads)))


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """Settings of one training run, in the order in which the loop meets them.

    Raises:
        UnknownNameError: a field of TRL's that is not supported here, with the remedy, or a misspelt one.
        InputError: a value out of its range, or one that contradicts another.
    """

    output_dir: str = option("grpo-output", "folder for checkpoints, the adapter and metrics.jsonl")
    resume_from_checkpoint: str | bool | None = option(
        None, "a checkpoint folder, or true for the newest in output_dir"
    )
    seed: int = option(42, "seed of the adapter's initial values, the data order and the sampling")
    use_cpu: bool = option(False, "train on the CPU even where there is a GPU")

    model_init_kwargs: dict[str, Any] | None = option(None, "keyword arguments for from_pretrained, as JSON on the CLI")
    trust_remote_code: bool = option(False, "run modelling code that comes with the model")
    vram_budget: str | None = option(None, "GPU memory to stay within, such as 8GB; settings are chosen to fit it")
    load_in_4bit: bool = option(True, "hold the frozen base in NF4 with double quantization")
    bf16: bool | None = option(None, "compute in bfloat16; by default on, unless fp16 is")
    fp16: bool = option(False, "compute in float16 with loss scaling, for GPUs without bfloat16")
    gradient_checkpointing: bool = option(True, "recompute activations in the backward pass instead of keeping them")
    activation_offloading: bool = option(False, "keep the checkpoints of gradient_checkpointing in CPU memory")
    tiled_mlp: bool = option(False, "compute each MLP a tile of tokens at a time")
    offload_embedding: bool = option(False, "keep the input embedding in CPU memory, where it is not the head too")
    use_liger_kernel: bool = option(False, "liger-kernel's norms, rotary embedding and gated MLPs, on a GPU")

    lora_r: int = option(16, "rank of the LoRA adapters")
    lora_alpha: int = option(32, "LoRA scale, divided by lora_r")
    lora_dropout: float = option(0.0, "dropout on the adapters' input")
    lora_target_modules: str | list[str] = option("all-linear", "modules that get an adapter")

    dataset_config: str | None = option(None, "configuration name of a hub dataset")
    dataset_split: str = option("train", "split of train_dataset to train on")
    dataset_streaming: bool = option(False, "read hub datasets and files only as far as dataset_take")
    dataset_take: int | None = option(None, "train on the first so many rows; a streaming dataset needs it")
    system_prompt: str | None = option(None, "system message for chat prompts that have none")
    chat_template_kwargs: dict[str, Any] | None = option(None, "keyword arguments for the chat template, as JSON")
    max_prompt_length: int | None = option(512, "prompts of more tokens are dropped and counted")
    shuffle_dataset: bool = option(True, "draw the prompts of an epoch in random order")
    num_train_epochs: float = option(3.0, "passes over the data, if max_steps does not say")
    max_steps: int = option(-1, "number of steps; -1 lets num_train_epochs say")

    prompts_per_step: int = option(8, "prompts in a step; each is answered num_generations times")
    num_generations: int = option(8, "completions sampled for each prompt (its group)")
    max_completion_length: int = option(512, "tokens after which a completion is cut off")
    temperature: float = option(1.0, "sampling temperature")
    top_p: float = option(1.0, "nucleus sampling; 1 is off")
    top_k: int = option(0, "sample from the k likeliest tokens; 0 is off")
    min_p: float | None = option(None, "least probability relative to the likeliest token")
    repetition_penalty: float = option(1.0, "penalty on tokens already in the text; 1 is off")
    stop_strings: list[str] | None = option(None, "texts that end a completion, which keeps them")
    rollout_token_budget: int = option(65536, "most tokens whose keys and values are in memory at once while sampling")
    rollout_weights: Literal["auto", "4bit", "dense"] = option(
        "auto", "sample from the 4-bit weights, or from a dense copy; auto: dense on a CPU with memory to spare"
    )
    rollout_kv: Literal["full", "int8"] = option(
        "full",
        "keys and values while sampling: in the compute dtype, or rounded to int8, in half the memory of 16 bits",
    )
    rollout_paged: bool = option(
        True, "keys and values in pages on a GPU, so that more completions are sampled at once than fit at full length"
    )
    rollout_cuda_graphs: bool = option(
        True, "capture steps of decoding on a GPU, and replay them; without offload_embedding"
    )

    dynamic_sampling_rounds: int = option(
        0, "times that groups whose completions got one reward are replaced by those of the next prompts"
    )

    replay_buffer_size: int = option(
        0, "groups of earlier steps kept to fill up a step that has too few with a difference"
    )
    curriculum_skip: float = option(
        0.0, "chance that a prompt whose last group had no difference is passed over when it comes up again"
    )

    reward_weights: list[float] | None = option(None, "one weight a reward function; 1 each by default")
    reward_timeout: float | None = option(
        300.0, "seconds after which a call of a reward function is stopped; none: never"
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = option(
        "sum_then_normalize", "several rewards: summed before they are compared, or each compared by itself (GDPO)"
    )
    adv_estimator: Literal["grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"] = option(
        "grpo", "what a reward is compared with: its group's mean, the others' mean, the batch, or group and batch"
    )
    scale_rewards: Literal["group", "batch", "none"] = option(
        "group", "what the advantages' standard deviation is over"
    )
    mask_truncated_completions: bool = option(False, "leave completions that were cut off out of the loss")

    beta: float = option(0.0, "weight of the KL to the reference; 0 skips the reference pass")
    kl_estimator: Literal["k3", "k1", "k2", "abs"] = option("k3", "estimate of the KL from a token's log-probabilities")
    use_bias_correction_kl: bool = option(True, "multiply the KL by the ratio, which makes its gradient unbiased")
    kl_in_reward: bool = option(False, "subtract beta times a completion's KL from its reward, instead of in the loss")
    kl_target: float | None = option(None, "KL a token that beta is moved towards, step by step")
    kl_horizon: int = option(10000, "completions over which beta follows kl_target")
    reference: Literal["base", "initial"] = option(
        "base", "what beta holds the policy to: the base without adapters, or the adapter that training started from"
    )
    sync_ref_model: bool = option(False, "move the reference towards the policy every ref_model_sync_steps")
    ref_model_mixup_alpha: float = option(0.6, "share of the policy's adapter in the new reference")
    ref_model_sync_steps: int = option(512, "steps between two such moves")

    steps_per_generation: int = option(1, "optimizer steps that a rollout's prompts are split over")
    num_iterations: int = option(1, "times that a rollout is gone through, one optimizer step each")
    epsilon: float = option(0.2, "the ratio is clipped below 1 - epsilon")
    epsilon_high: float | None = option(None, "the ratio is clipped above 1 + epsilon_high; epsilon by default")
    delta: float | None = option(None, "upper bound of the unclipped ratio (two-sided clipping)")
    loss_type: str = option("dapo", f"the objective: {', '.join(LOSS_TYPES)}, or one that you registered")
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] = option(
        "token", "whose ratio of new to old policy: the token's, or its completion's (GSPO, and GSPO-token)"
    )
    sapo_temperature_pos: float = option(1.0, "sapo's temperature where the advantage is positive")
    sapo_temperature_neg: float = option(1.05, "sapo's temperature elsewhere")
    vespo_k_pos: float = option(2.0, "vespo's power of the ratio where the advantage is not negative")
    vespo_lambda_pos: float = option(3.0, "vespo's decay there")
    vespo_k_neg: float = option(3.0, "vespo's power elsewhere")
    vespo_lambda_neg: float = option(2.0, "vespo's decay elsewhere")
    importance_sampling_correction: bool = option(
        True, "weigh tokens by training's probability over the one that they were sampled with"
    )
    importance_sampling_mode: Literal["sequence_mask", "sequence_truncate", "token_mask", "token_truncate"] = option(
        "sequence_mask", "of the token or its completion; outside of the bounds set to 0, or to the bound"
    )
    importance_sampling_clip_max: float | None = option(3.0, "upper bound of that weight")
    importance_sampling_clip_min: float | None = option(None, "lower bound of it")
    off_policy_mask_threshold: float | None = option(
        None, "leave out completions of negative advantage whose mean log(old / new) is above it"
    )
    top_entropy_quantile: float = option(1.0, "share of the step's tokens, those of highest entropy, that learn")
    entropy_coef: float = option(0.0, "weight of the entropy bonus")
    use_adaptive_entropy: bool = option(False, "raise entropy_coef while the entropy is at most entropy_target")
    entropy_coef_min: float = option(0.0, "its lower bound")
    entropy_coef_max: float = option(1.0, "its upper bound")
    entropy_coef_delta: float = option(0.005, "its change a step")
    entropy_target: float = option(0.2, "entropy a token, in nats, above which there is no bonus")
    token_budget: int = option(16384, "most tokens, padding included, in a micro-batch of an update")
    padding_free: bool = option(True, "micro-batches without padding, a prompt once for its group where that pays")

    optim: Literal["adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = option(
        "adamw_torch_fused", "AdamW by torch, or by bitsandbytes with its state in 8 bits or paged to CPU memory"
    )
    learning_rate: float = option(1e-5, "peak learning rate")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = option(
        "linear", "its schedule"
    )
    warmup_steps: int = option(0, "steps over which the learning rate rises from 0")
    weight_decay: float = option(0.0, "AdamW's weight decay")
    adam_beta1: float = option(0.9, "AdamW's first decay rate")
    adam_beta2: float = option(0.999, "AdamW's second decay rate")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon")
    max_grad_norm: float = option(1.0, "gradient norm above which the gradient is scaled down")
    max_nonfinite_steps: int = option(
        5, "optimizer steps in a row that may be skipped because loss or gradient is not finite; one more ends the run"
    )

    eval_steps: int | None = option(None, "evaluate every so many steps, besides before and after training")
    num_generations_eval: int | None = option(
        None, "completions sampled for each evaluation prompt, as in training; by default one greedy completion"
    )
    metric_for_best_model: str | None = option(
        None, "the evaluation's metric whose best adapter is kept in output_dir/best; eval_reward by default"
    )
    greater_is_better: bool | None = option(None, "whether more of metric_for_best_model is better; by default it is")
    load_best_model_at_end: bool = option(False, "make the best evaluation's adapter the result, not the last step's")
    log_completions: bool = option(False, "write each step's completions to output_dir/completions/")
    save_steps: int = option(20, "write a checkpoint every so many steps, besides at the end")
    save_total_limit: int | None = option(None, "keep only the newest checkpoints")

    def __new__(cls, **given: Any):
        refuse_unknown_fields(given)
        return object.__new__(cls)

    def __post_init__(self):
        for name, annotation in field_types(type(self)).items():
            if not _fits(getattr(self, name), annotation):
                raise InputError(f"{name}={getattr(self, name)!r} is not {describe(annotation)}")
        for name, value in vars(self).items():
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, (int, float)) and number and not SMALLEST <= abs(number) <= LARGEST:
                    raise InputError(
                        f"{name}={reprlib.repr(number)} is out of reach of fp32, in which a step is computed: what is "
                        f"not 0 must be between {SMALLEST:.2g} and {LARGEST:.2g}"
                    )
        for name in _POSITIVE:
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise InputError(f"{name} must be greater than 0, not {getattr(self, name)}")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.seed >= 2**32:
            raise InputError(f"seed={self.seed} must be below 2**32, NumPy's limit")
        if self.num_generations < 2:
            raise InputError(
                f"num_generations={self.num_generations}: a group needs at least 2 completions, "
                "since an advantage compares a completion with the others of its prompt"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], not {self.top_p}; 1 switches it off")
        if self.stop_strings and "" in self.stop_strings:
            raise InputError("stop_strings has an empty text, which would end every completion; remove it")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise InputError(f"min_p must be in [0, 1], not {self.min_p}; None switches it off")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"lora_dropout must be in [0, 1), not {self.lora_dropout}")
        if not (0 <= self.adam_beta1 < 1 and 0 <= self.adam_beta2 < 1):
            raise InputError(f"adam_beta1={self.adam_beta1} and adam_beta2={self.adam_beta2} must be in [0, 1)")
        if self.learning_rate * self.weight_decay > 1:
            raise InputError(
                f"weight_decay={self.weight_decay} times learning_rate={self.learning_rate} must be at most 1: "
                "a step takes that share off every weight"
            )
        if self.vram_budget is not None:
            _bytes(self.vram_budget)
        if self.bf16 and self.fp16:
            raise InputError("bf16 and fp16 are both set; choose one")
        if self.max_steps == 0 or self.max_steps < -1:
            raise InputError(f"max_steps={self.max_steps} must be positive, or -1 to let num_train_epochs say")
        _check_objective(self)
        if self.delta is not None and self.delta <= 1 + self.upper_epsilon:
            raise InputError(f"delta={self.delta} must be above 1 + epsilon_high = {1 + self.upper_epsilon}")

    @property
    def upper_epsilon(self) -> float:
        """epsilon_high, or epsilon where that is not given."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def has_entropy_bonus(self) -> bool:
        return self.entropy_coef > 0 or self.use_adaptive_entropy

    @property
    def has_old_pass(self) -> bool:
        """Whether every token is computed once before the update, whatever the sampler says of it."""
        # The KL of a replayed group is today's policy's, and not that of the one which sampled it.
        replayed_kl = self.kl_in_reward and self.replay_buffer_size > 0
        return self.steps_per_generation > 1 or self.top_entropy_quantile < 1 or replayed_kl

    @property
    def has_cuda_graphs(self) -> bool:
        """Whether steps of decoding may be captured: on a GPU, while none waits for an embedding from the CPU."""
        return self.rollout_cuda_graphs and not self.offload_embedding and not self.use_cpu

    @property
    def vram_budget_bytes(self) -> int | None:
        """8GB is 8 * 10^9 bytes, and 8GiB is 8 * 2^30."""
        return None if self.vram_budget is None else _bytes(self.vram_budget)

    @property
    def compute_dtype(self) -> str:
        """Name of torch's dtype for everything but the fp32 adapters: bfloat16, float16 or float32."""
        if self.fp16:
            return "float16"
        return "float32" if self.bf16 is False else "bfloat16"


def _check_objective(config: GRPOConfig) -> None:
    """Refuse an option that nothing reads, and settings of the objective that contradict."""
    if config.loss_type not in LOSS_TYPES:
        hint = did_you_mean(config.loss_type, LOSS_TYPES, f"the objectives are {', '.join(LOSS_TYPES)}")
        raise InputError(f"loss_type={config.loss_type!r} is not known; {hint} (register_objective adds your own)")
    loss = LOSS_TYPES[config.loss_type]
    if config.epsilon > loss.highest_epsilon:
        raise InputError(f"epsilon={config.epsilon} must be at most 1, since a ratio is never below 0")
    for field in dataclasses.fields(config):
        value, (is_read, words) = getattr(config, field.name), READ_ONLY.get(field.name, _ALWAYS)
        if value != field.default and not is_read(config):
            raise InputError(f"{field.name}={value!r} is read only {words}, or leave {field.name} out")
    if loss.needs_epsilon_high and config.epsilon_high is None:
        raise InputError(
            f"loss_type={config.loss_type!r} bounds the ratio itself by epsilon_high; set it, for example to 5.0"
        )
    if config.kl_target is not None and config.kl_estimator == "k1":
        raise InputError("kl_target needs an estimate that is never negative; set kl_estimator to k2, k3 or abs")
    if config.multi_objective_aggregation == "normalize_then_sum" and config.scale_rewards != "group":
        raise InputError(
            "multi_objective_aggregation='normalize_then_sum' scales by group, then by batch; leave out scale_rewards"
        )
    low, high = config.importance_sampling_clip_min, config.importance_sampling_clip_max
    if low is not None and high is not None and low > high:
        raise InputError(f"importance_sampling_clip_min={low} is above importance_sampling_clip_max={high}")
    if not 0 < config.top_entropy_quantile <= 1:
        raise InputError(
            f"top_entropy_quantile must be in (0, 1], not {config.top_entropy_quantile}; 1 switches it off"
        )
    if not 0 <= config.curriculum_skip < 1:
        raise InputError(f"curriculum_skip must be in [0, 1), not {config.curriculum_skip}; 0 switches it off")
    if config.replay_buffer_size and not config.importance_sampling_correction:
        raise InputError("replay_buffer_size needs importance_sampling_correction, since an older policy sampled them")
    if config.entropy_coef_min > config.entropy_coef_max:
        raise InputError("entropy_coef_min is above entropy_coef_max")
    if not 0 <= config.ref_model_mixup_alpha <= 1:
        raise InputError(f"ref_model_mixup_alpha must be in [0, 1], not {config.ref_model_mixup_alpha}")
    if config.prompts_per_step % config.steps_per_generation:
        raise InputError(
            f"prompts_per_step={config.prompts_per_step} is not a multiple of steps_per_generation="
            f"{config.steps_per_generation}; change one"
        )


Condition = Callable[[GRPOConfig], bool]


def _by_losses(name: str) -> tuple[Condition, str]:
    """When a setting that some losses alone read is read, and the losses to choose from."""
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
    "kl_estimator kl_in_reward kl_target reference sync_ref_model": (
        lambda config: config.beta > 0,
        "where there is a KL; set beta, for example to 0.04",
    ),
    "use_bias_correction_kl": (
        lambda config: config.beta > 0 and not config.kl_in_reward,
        "where there is a KL in the loss; set beta, for example to 0.04, and not kl_in_reward",
    ),
    "kl_horizon": (lambda config: config.kl_target is not None, "with kl_target; set that"),
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
_ALWAYS: tuple[Condition, str] = (lambda _: True, "")


def _bytes(text: str) -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG])(I?)B\s*", text.upper())
    if found is None or float(found[1]) == 0:
        raise InputError(f"vram_budget={text!r} is not a size; write it as 8GB or 7.5GiB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** (1 + "KMG".index(found[2])))


# Where `--help` starts a new section: the first field of each.
SECTIONS = {
    "output_dir": "the run", "model_init_kwargs": "model", "lora_r": "adapters", "dataset_config": "data",
    "prompts_per_step": "rollout", "reward_weights": "rewards and advantages", "beta": "objective",
    "steps_per_generation": "updates", "optim": "optimizer", "eval_steps": "evaluation, logs and checkpoints",
}  # fmt: skip

_POSITIVE = (
    "lora_r", "lora_alpha", "num_train_epochs", "prompts_per_step", "max_completion_length", "max_prompt_length",
    "temperature", "repetition_penalty", "rollout_token_budget", "num_iterations", "token_budget", "adam_epsilon",
    "max_grad_norm", "eval_steps", "save_steps", "save_total_limit", "kl_target", "kl_horizon", "steps_per_generation",
    "ref_model_sync_steps", "sapo_temperature_pos", "sapo_temperature_neg", "importance_sampling_clip_max",
    "reward_timeout", "num_generations_eval", "dataset_take",
)  # fmt: skip
_NOT_NEGATIVE = (
    "top_k", "beta", "epsilon", "epsilon_high", "learning_rate", "warmup_steps", "weight_decay", "seed",
    "dynamic_sampling_rounds", "replay_buffer_size", "entropy_coef", "entropy_coef_min", "entropy_coef_delta",
    "importance_sampling_clip_min", "off_policy_mask_threshold", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg",
    "vespo_lambda_neg", "max_nonfinite_steps",
)  # fmt: skip


def refuse_unknown_fields(given: typing.Iterable[str]) -> None:
    """Raise UnknownNameError for the first name that is no field: with the remedy for TRL's, else the nearest name."""
    known = [field.name for field in dataclasses.fields(GRPOConfig)]
    for name in given:
        if name in UNSUPPORTED:
            raise UnknownNameError(f"GRPOConfig has no {name}: {UNSUPPORTED[name]}")
        if name not in known:
            hint = did_you_mean(name, known, "see `lowmem-grpo train --help` for the fields")
            raise UnknownNameError(f"GRPOConfig has no field {name!r}; {hint}")


# What a resumed run may change: where and how long it runs, what it reports, and how it fits into memory.
MAY_CHANGE_ON_RESUME = {
    "output_dir", "resume_from_checkpoint", "use_cpu", "num_train_epochs", "max_steps", "eval_steps",
    "num_generations_eval", "metric_for_best_model", "greater_is_better", "load_best_model_at_end",
    "log_completions", "save_steps", "save_total_limit", "token_budget", "rollout_token_budget",
    "gradient_checkpointing", "padding_free", "activation_offloading", "tiled_mlp", "offload_embedding",
    "use_liger_kernel", "reward_timeout", "max_nonfinite_steps",
}  # fmt: skip


def refuse_changes(config: GRPOConfig, saved: dict[str, Any]) -> None:
    """Raise InputError if a setting that decides the result differs from the one the checkpoint's run had."""
    for name, value in dataclasses.asdict(config).items():
        if name not in MAY_CHANGE_ON_RESUME and name in saved and saved[name] != value:
            raise InputError(
                f"{name} is {value!r}, and was {saved[name]!r} in the run to resume; set it back, "
                "or start a new run from the adapter"
            )

"""The sections of --help: each a dataclass of fields, of which the configuration of a training inherits what it needs.

A function takes the section that it reads, and gets a whole configuration, which is one. Standard library only.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal

from lowmem_grpo.config.fields import check_value, field_types, option
from lowmem_grpo.config.losses import LOSS_TYPES
from lowmem_grpo.config.trl import known_fields
from lowmem_grpo.errors import InputError, shown

LONGEST_NAME = 255  # bytes, of a file or folder
MOST_COMPLETIONS = 2**14  # of a step: DAPO has 8,192


class _Settings(type):
    """A class of settings, which is told of those that it has not, and may leave some of them out."""

    def __call__(cls, *unnamed: Any, **given: Any):  # __init__ refuses those without a name
        return super().__call__(*unnamed, **known_fields(given, cls))


@dataclass(frozen=True, kw_only=True)
class Checked(metaclass=_Settings):
    """A dataclass whose values are checked as it is made: each by itself, then by every class's own `check`.

    Raises:
        UnknownNameError: a field that it has not; of a field of TRL's with the remedy.
        InputError: a value out of its range, or one that contradicts another.
    """

    def __post_init__(self) -> None:
        types = field_types(type(self))
        for field in dataclasses.fields(self):
            check_value(field, types[field.name], getattr(self, field.name))
        for kind in reversed(type(self).__mro__):
            if "check" in vars(kind):
                vars(kind)["check"](self)


@dataclass(frozen=True, kw_only=True)
class MachineFields(Checked):
    """The seed and the device of whatever is computed."""

    seed: int = option(
        42,
        "seed of the adapter's initial values, the data order and the sampling",
        common=True,
        at_least=0,
        at_most=2**32 - 1,
    )
    use_cpu: bool = option(False, "train on the CPU, even of a machine with a GPU", common=True, may_change=True)


@dataclass(frozen=True, kw_only=True)
class OutputFields(MachineFields):
    """The file that completions are sampled into, the seed, and the device."""

    output: str = option(
        "sampled.jsonl", "JSONL file, a line a completion; one that was begun is gone on with", common=True,
        may_change=True,
    )  # fmt: skip

    def check(self) -> None:
        _refuse_long_names("output", self.output, beside=".run.being-written")


@dataclass(frozen=True, kw_only=True)
class RunFields(MachineFields):
    """The folder that a run writes, the checkpoint that it continues, and its device."""

    output_dir: str = option(
        "grpo-output", "folder for checkpoints, the adapter and metrics.jsonl", common=True, may_change=True
    )
    resume_from_checkpoint: str | bool | None = option(
        None,
        "checkpoint folder to go on from, true for the newest in output_dir, or auto for that or else a new run",
        common=True, may_change=True,
    )  # fmt: skip
    doctor: Literal["warn", "stop", "off"] = option(
        "warn", "say once what keeps a run from learning, stop the run then, or say nothing", may_change=True
    )

    def check(self) -> None:
        for name in ("output_dir", "resume_from_checkpoint"):
            _refuse_long_names(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class LoadFields(Checked):
    """How the frozen base is loaded, in which precision it computes, and in how much memory."""

    vram_budget: str | None = option(
        None, "GPU memory to stay within, like 8GB or 7.5GiB; settings are chosen to fit", common=True
    )
    model_init_kwargs: dict[str, Any] | None = option(
        None, "keyword arguments for from_pretrained, as JSON on the command line"
    )
    trust_remote_code: bool = option(False, "run modelling code that comes with the model")
    load_in_4bit: bool = option(True, "hold the frozen base in NF4 with double quantization, experts included")
    load_head_in_8bit: bool = option(
        False, "hold the head in int8 with a scale for each of its rows, where it is not the embedding too"
    )
    bf16: bool | None = option(None, "compute in bfloat16; on by default, unless fp16 is on")
    fp16: bool = option(False, "compute in float16 with loss scaling, for GPUs without bfloat16")
    tiled_mlp: bool = option(False, "compute each MLP a tile of tokens at a time, in less memory", may_change=True)
    offload_embedding: bool = option(
        False,
        "keep embeddings of token ids in CPU memory: the input's unless it is the head too, and a per-layer one",
        may_change=True,
    )
    use_liger_kernel: bool = option(
        False, "use liger-kernel's norms, rotary embedding and gated MLPs, on a GPU", may_change=True
    )

    def check(self) -> None:
        if self.vram_budget is not None:
            _bytes(self.vram_budget)
        if self.bf16 and self.fp16:
            raise InputError("bf16 and fp16 are both set; choose one")

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


@dataclass(frozen=True, kw_only=True)
class ModelFields(LoadFields):
    """How the frozen base is loaded, and how its training fits into memory."""

    gradient_checkpointing: bool = option(
        True, "recompute activations in the backward pass instead of saving them", may_change=True
    )
    activation_offloading: bool = option(
        False, "move the activations that gradient_checkpointing saves to CPU memory", may_change=True
    )


@dataclass(frozen=True, kw_only=True)
class AdapterFields(Checked):
    """The LoRA adapter that is trained, where the model has none of its own."""

    lora_r: int = option(16, "rank of the LoRA adapters", common=True, above=0, at_most=65536)
    lora_alpha: int = option(
        32, "scale of the LoRA adapters, which is divided by lora_r", common=True, above=0, at_most=10**6
    )
    lora_dropout: float = option(0.0, "dropout on the adapters' input", at_least=0, below=1)
    lora_target_modules: str | list[str] = option(
        "all-linear", "modules that get an adapter: all-linear, their names, or a regular expression"
    )


@dataclass(frozen=True, kw_only=True)
class ReadFields(Checked):
    """Which rows are read, and what their chats are shown with."""

    dataset_config: str | None = option(None, "configuration name of a hub dataset")
    dataset_split: str = option("train", "split of a hub dataset to train on")
    dataset_streaming: bool = option(False, "read hub datasets and files only as far as dataset_take")
    dataset_take: int | None = option(
        None, "train (in eval: measure) on the first so many rows; a streaming dataset needs this", above=0
    )
    system_prompt: str | None = option(
        None, "system message for chat prompts that have none", common=True, may_be_empty=True
    )
    chat_template_kwargs: dict[str, Any] | None = option(
        None, "keyword arguments for the chat template, as JSON on the command line"
    )


@dataclass(frozen=True, kw_only=True)
class RowFields(ReadFields):
    """Which rows are read, in which order, and for how many steps."""

    shuffle_dataset: bool = option(True, "draw the rows of each epoch in random order")
    num_train_epochs: float = option(
        3.0, "passes over the data, where max_steps is -1", common=True, may_change=True, above=0, at_most=10**6
    )
    max_steps: int = option(-1, "number of steps; -1 lets num_train_epochs say", common=True, may_change=True)

    def check(self) -> None:
        if self.max_steps == 0 or self.max_steps < -1:
            raise InputError(f"max_steps={self.max_steps} must be positive, or -1 to let num_train_epochs say")


@dataclass(frozen=True, kw_only=True)
class PromptFields(ReadFields):
    """Rows, and how they become prompts."""

    max_prompt_length: int | None = option(
        512, "most tokens of a prompt; longer prompts are dropped and counted", common=True, above=0, at_most=2**18
    )


@dataclass(frozen=True, kw_only=True)
class DataFields(PromptFields, RowFields):
    """Rows, how they become prompts, and in which order they are trained on."""


@dataclass(frozen=True, kw_only=True)
class ExampleFields(RowFields):
    """Rows, how they become examples, and which of an example's tokens are learnt."""

    max_length: int | None = option(
        1024,
        "most tokens of an example; longer examples are dropped and counted",
        common=True,
        above=1,
        at_most=2**18,
    )
    examples_per_step: int = option(16, "examples of a step", common=True, above=0, at_most=2**14)
    dataset_weights: list[float] | None = option(
        None, "of several datasets, how many examples come from each, as 3 1; by default all are one", above=0
    )
    completion_only_loss: bool | None = option(
        None, "learn completions alone, not their prompts; on by default for rows with both"
    )
    assistant_only_loss: bool = option(False, "learn what the assistant says in a chat, and no other turn", common=True)
    loss_type: Literal["nll", "dft"] = option(
        "nll", "negative log-likelihood, or that times each token's probability (DFT, arXiv:2508.05629)"
    )


@dataclass(frozen=True, kw_only=True)
class PairFields(RowFields):
    """Rows, how they become pairs of a better and a worse text, and the loss of their scores."""

    max_length: int | None = option(
        1024,
        "most tokens of either text of a pair; pairs with a longer one are dropped and counted",
        common=True,
        above=1,
        at_most=2**18,
    )
    pairs_per_step: int = option(16, "pairs of a step", common=True, above=0, at_most=2**13)
    center_rewards_coefficient: float | None = option(
        None, "weight of the squared sum of a pair's scores, which draws them towards 0; 0.01 is usual", at_least=0
    )


@dataclass(frozen=True, kw_only=True)
class CompletionFields(Checked):
    """How many prompts and completions are sampled at a time, and how a token is chosen."""

    prompts_per_step: int = option(
        8, "prompts of a step; num_generations completions are sampled for each", common=True, above=0
    )
    num_generations: int = option(8, "completions sampled for each prompt: the size of a group", common=True, above=0)
    max_completion_length: int = option(
        512, "tokens after which a completion is cut off", common=True, above=0, at_most=2**18
    )
    temperature: float = option(1.0, "sampling temperature", common=True, at_least=1e-6, at_most=1e6)
    top_p: float = option(
        1.0, "sample from the likeliest tokens whose probabilities add up to top_p; 1 is off", above=0, at_most=1
    )
    top_k: int = option(0, "sample from the top_k likeliest tokens; 0 is off", at_least=0)
    min_p: float | None = option(
        None, "least probability of a token, as a share of the likeliest token's; none is off", at_least=0, at_most=1
    )
    repetition_penalty: float = option(
        1.0, "penalty on tokens that are already in the text; 1 is off", at_least=0.01, at_most=100
    )
    stop_strings: list[str] | None = option(None, "texts at which a completion ends; the completion keeps them")
    rollout_token_budget: int = option(
        65536, "most tokens whose keys and values are in memory at once while sampling", may_change=True, above=0
    )
    rollout_weights: Literal["auto", "4bit", "dense"] = option(
        "auto", "sample from the 4-bit weights or a dense copy; auto is dense on a CPU with memory to spare"
    )
    rollout_kv: Literal["full", "int8"] = option(
        "full", "keys and values while sampling: in the compute dtype, or rounded to int8 in half of 16 bits' memory"
    )
    rollout_paged: bool = option(
        True, "hold keys and values in pages on a GPU, for more completions at once than fit at full length"
    )
    rollout_cuda_graphs: bool = option(
        True, "capture decoding steps on a GPU and replay them; not with offload_embedding"
    )
    rollout_graphs_last: bool = option(
        True, "keep captured steps for later rollouts, in a pool of memory; false captures them again in each"
    )

    def check(self) -> None:
        num_completions = self.prompts_per_step * self.num_generations
        if num_completions > MOST_COMPLETIONS:
            raise InputError(
                f"prompts_per_step={self.prompts_per_step} times num_generations={self.num_generations} makes "
                f"{num_completions} completions a step, more than {MOST_COMPLETIONS}, which are in memory at once; "
                "lower one"
            )


@dataclass(frozen=True, kw_only=True)
class EndpointFields(Checked):
    """A model that is asked over HTTP."""

    base_url: str | None = option(
        None, "OpenAI-compatible endpoint to ask, like http://localhost:8000/v1; model is then a name that it lists",
        common=True, may_change=True,
    )  # fmt: skip
    max_concurrent: int = option(16, "most requests to an endpoint at once", may_change=True, above=0, at_most=4096)
    timeout: float = option(600.0, "seconds for one reply of an endpoint", may_change=True, above=0, at_most=10**6)
    max_retries: int = option(
        5, "times that a request is sent again to an endpoint that is busy, fails, or does not answer",
        may_change=True, at_least=0, at_most=100,
    )  # fmt: skip
    api_key_variable: str | None = option(
        None,
        "name of the environment variable that holds an endpoint's key, which is never saved",
        may_change=True,
    )
    extra_body: dict[str, Any] | None = option(
        None, "further fields of each request to an endpoint, as JSON on the command line; null leaves a field out"
    )


@dataclass(frozen=True, kw_only=True)
class SamplingFields(CompletionFields):
    """How a step of training samples, and which groups it learns from."""

    dynamic_sampling_rounds: int = option(
        0,
        "times that groups whose completions all got one reward are replaced by the next prompts'",
        at_least=0,
        at_most=1000,
    )
    replay_buffer_size: int = option(
        0, "groups of earlier steps kept for steps in which too few groups have rewards that differ", at_least=0
    )
    curriculum_skip: float = option(
        0.0, "chance that a prompt is passed over whose last completions all got one reward", at_least=0, at_most=0.999
    )


CALLED = ("tools", "environment_factory")  # inputs of what the policy calls while it writes, where it writes here


@dataclass(frozen=True, kw_only=True)
class ToolFields(Checked):
    """How often a completion may call tools, and how long one may take."""

    max_tool_calling_iterations: int | None = option(
        None, "turns of a completion after which calls of tools are no longer answered; none is never", at_least=0
    )
    tool_timeout: float | None = option(
        60.0, "seconds after which a call of a tool is stopped; none is never", may_change=True, above=0, at_most=10**8
    )


@dataclass(frozen=True, kw_only=True)
class ScoreFields(Checked):
    """How rewards are weighed, and how long their functions may take."""

    reward_weights: list[float] | None = option(
        None, "weights of the reward functions, one each; 1 by default", common=True, at_least=-(10**6), at_most=10**6
    )
    reward_timeout: float | None = option(
        300.0,
        "seconds after which a call of a reward function is stopped; none is never",
        may_change=True,
        above=0,
        at_most=10**8,
    )

    def check(self) -> None:
        # With a teacher, rewards may be there to be measured alone.
        learns_otherwise = getattr(self, "teacher", None) is not None
        if self.reward_weights is not None and not any(self.reward_weights) and not learns_otherwise:
            raise InputError("reward_weights has no weight but 0, so that nothing would be learned; give one another")


@dataclass(frozen=True, kw_only=True)
class RewardFields(ScoreFields):
    """How rewards are weighed, and how they become advantages."""

    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = option(
        "sum_then_normalize", "several rewards: summed before they are compared, or each compared by itself (GDPO)"
    )
    adv_estimator: Literal["grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "gae"] = option(
        "grpo", "what a reward is compared with: its group, the group's others, batch, both; gae: a critic, as in PPO"
    )
    scale_rewards: Literal["group", "batch", "none"] = option(
        "group", "which rewards' standard deviation divides the advantages: the group's, the batch's, or none"
    )
    mask_truncated_completions: bool = option(False, "leave completions that were cut off out of the loss")


@dataclass(frozen=True, kw_only=True)
class CriticFields(Checked):
    """PPO's critic, and how its values and the rewards become an advantage of each token."""

    gamma: float = option(1.0, "discount of what comes a token later", at_least=0, at_most=1)
    lam: float = option(
        1.0, "GAE's lambda: 1 takes a reward whole for each token before it, 0 trusts the critic alone",
        at_least=0, at_most=1,
    )  # fmt: skip
    whiten_advantages: bool = option(True, "scale the tokens' advantages to mean 0 and variance 1 over a step")
    cliprange_value: float | None = option(
        0.2, "a value's loss is clipped where it moves further than this from before the update; none is off", above=0
    )
    critic_learning_rate: float = option(1e-4, "peak learning rate of the critic", at_least=0)
    critic_warmup: int = option(0, "first steps, in which the critic learns and the policy does not", at_least=0)
    critic_init: str = option(
        "policy", "what the critic's adapter starts from: policy, or the folder of a reward adapter", by_content=True
    )


OWN_BASE = "base"  # as a teacher's name: the policy's own base


@dataclass(frozen=True, kw_only=True)
class DistillationFields(Checked):
    """A teacher that the policy is pulled towards, token by token of what it samples."""

    teacher: str | None = option(
        None, "model of the same vocabulary, adapter of the same base (at no memory), or base, to learn from by token",
        common=True, by_content=True,
    )  # fmt: skip
    teacher_coef: float = option(1.0, "weight of the teacher's advantages beside those of the rewards", above=0)
    teacher_system_prompt: str | None = option(
        None, "system message that the teacher reads in place of the policy's, which learns to do without it"
    )


@dataclass(frozen=True, kw_only=True)
class ObjectiveFields(Checked):
    """The loss of a rollout's tokens: KL, clipping, importance weights, entropy, and the number of passes."""

    beta: float = option(
        0.0, "weight of the KL between policy and reference; 0 skips the reference pass", common=True, at_least=0
    )
    kl_estimator: Literal["k3", "k1", "k2", "abs"] = option(
        "k3", "estimate of the KL from a token's log-probabilities under policy and reference"
    )
    use_bias_correction_kl: bool = option(
        True,
        "multiply the KL by the ratio of new to old policy, which makes k3's and k1's gradient unbiased; not for k2",
    )
    kl_in_reward: bool = option(
        False, "subtract beta times a completion's KL from its reward, instead of adding it to the loss"
    )
    kl_target: float | None = option(
        None, "mean KL of a token that beta is moved towards, step by step; none leaves beta as it is", above=0
    )
    kl_horizon: int = option(10000, "completions over which beta is moved to reach kl_target", above=0)
    reference: Literal["base", "initial"] = option(
        "base", "what the KL compares the policy with: the base without adapters, or the adapter at the start"
    )
    sync_ref_model: bool = option(False, "move the reference towards the policy every ref_model_sync_steps")
    ref_model_mixup_alpha: float = option(
        0.6, "share of the policy's adapter in the reference after sync_ref_model moves it", at_least=0, at_most=1
    )
    ref_model_sync_steps: int = option(
        512, "steps from one move of the reference by sync_ref_model to the next", above=0
    )

    steps_per_generation: int = option(1, "optimizer steps that a rollout's prompts are split over", above=0)
    num_iterations: int = option(1, "times that an update goes through a rollout", above=0, at_most=1000)
    epsilon: float = option(0.2, "the ratio of new to old policy is clipped below 1 - epsilon", at_least=0)
    epsilon_high: float | None = option(
        None, "the ratio of new to old policy is clipped above 1 + epsilon_high; epsilon by default", at_least=0
    )
    delta: float | None = option(
        None, "upper bound of the ratio of new to old policy where it is not clipped (two-sided clipping)"
    )
    loss_type: str = option("dapo", f"objective: {', '.join(LOSS_TYPES)}, or one that you registered", common=True)
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] = option(
        "token", "ratio of new to old policy: of the token, or of its completion (GSPO, and GSPO-token)"
    )
    sapo_temperature_pos: float = option(1.0, "temperature of sapo for tokens of positive advantage", above=0)
    sapo_temperature_neg: float = option(1.05, "temperature of sapo for tokens of advantage 0 or less", above=0)
    vespo_k_pos: float = option(2.0, "power of the ratio in vespo where the advantage is not negative", at_least=0)
    vespo_lambda_pos: float = option(
        3.0, "decay with the ratio in vespo where the advantage is not negative", at_least=0
    )
    vespo_k_neg: float = option(3.0, "power of the ratio in vespo where the advantage is negative", at_least=0)
    vespo_lambda_neg: float = option(2.0, "decay with the ratio in vespo where the advantage is negative", at_least=0)
    importance_sampling_correction: bool = option(
        True, "multiply a token's loss by its importance weight, the ratio of old to sampling probability"
    )
    importance_sampling_mode: Literal["sequence_mask", "sequence_truncate", "token_mask", "token_truncate"] = option(
        "sequence_mask", "importance weight of token or completion; outside its bounds it becomes 0, or the bound"
    )
    importance_sampling_clip_max: float | None = option(3.0, "upper bound of an importance weight", above=0)
    importance_sampling_clip_min: float | None = option(None, "lower bound of an importance weight", at_least=0)
    off_policy_mask_threshold: float | None = option(
        None, "leave out completions of negative advantage whose mean log(sampling / new) is above this", at_least=0
    )
    top_entropy_quantile: float = option(
        1.0, "share of a step's tokens, those of highest entropy, that learn; 1 is all", above=0, at_most=1
    )
    entropy_coef: float = option(0.0, "weight of the entropy bonus, with use_adaptive_entropy at the start", at_least=0)
    use_adaptive_entropy: bool = option(
        False, "raise entropy_coef while the entropy is at most entropy_target, and lower it above"
    )
    entropy_coef_min: float = option(0.0, "least entropy_coef under use_adaptive_entropy", at_least=0)
    entropy_coef_max: float = option(1.0, "largest entropy_coef under use_adaptive_entropy")
    entropy_coef_delta: float = option(
        0.005, "change of entropy_coef an optimizer step under use_adaptive_entropy", at_least=0
    )
    entropy_target: float = option(
        0.2, "mean entropy of a token, in nats, above which use_adaptive_entropy gives no bonus"
    )

    @property
    def upper_epsilon(self) -> float:
        """epsilon_high, or epsilon where that is not given."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def has_entropy_bonus(self) -> bool:
        """True where the loss has an entropy bonus, or may get one."""
        return self.entropy_coef > 0 or self.use_adaptive_entropy


@dataclass(frozen=True, kw_only=True)
class BudgetFields(Checked):
    """How many tokens go through the model at once."""

    token_budget: int = option(
        16384, "most tokens, padding included, in a micro-batch of an update", common=True, may_change=True, above=0
    )


@dataclass(frozen=True, kw_only=True)
class UpdateFields(BudgetFields):
    """How an update packs its sequences into micro-batches."""

    padding_free: bool = option(
        True, "micro-batches without padding, a prompt once for its group where that pays", may_change=True
    )
    full_determinism: bool = option(
        False, "have a GPU sum gradients in one order, so that two runs are equal to the last bit; slower",
        may_change=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OptimizerFields(Checked):
    """The optimizer, the schedule of the learning rate, and which steps are not taken."""

    optim: Literal["adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = option(
        "adamw_torch_fused", "AdamW by torch, or by bitsandbytes with its state in 8 bits or paged to CPU memory"
    )
    learning_rate: float = option(1e-5, "peak learning rate", common=True, at_least=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = option(
        "linear", "schedule of the learning rate", common=True
    )
    warmup_steps: int = option(0, "steps over which the learning rate rises from 0", at_least=0)
    weight_decay: float = option(0.0, "AdamW's weight decay", at_least=0)
    adam_beta1: float = option(0.9, "AdamW's decay rate of the mean gradient", at_least=0, below=1)
    adam_beta2: float = option(0.999, "AdamW's decay rate of the mean squared gradient", at_least=0, below=1)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon, which keeps its denominator from 0", above=0)
    max_grad_norm: float = option(1.0, "gradient norm above which the gradient is scaled down", above=0)
    max_nonfinite_steps: int = option(
        5, "optimizer steps in a row that may be skipped for numbers that are not finite; one more ends the run",
        may_change=True, at_least=0,
    )  # fmt: skip

    def check(self) -> None:
        if self.learning_rate * self.weight_decay > 1:
            raise InputError(
                f"weight_decay={self.weight_decay} times learning_rate={self.learning_rate} must be at most 1: "
                "a step takes that share off every weight"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationFields(Checked):
    """When a run evaluates, and which adapter is the best."""

    eval_steps: int | None = option(
        None, "evaluate every so many steps, besides before and after training", common=True, may_change=True, above=0
    )
    metric_for_best_model: str | None = option(
        None, "metric of an evaluation whose best adapter is kept in output_dir/best; by default reward or loss",
        may_change=True,
    )  # fmt: skip
    greater_is_better: bool | None = option(
        None, "whether more of metric_for_best_model is better; by default true, but not for a loss", may_change=True
    )
    load_best_model_at_end: bool = option(
        False, "make the best evaluation's adapter the result, not the last step's", may_change=True
    )


@dataclass(frozen=True, kw_only=True)
class SampledEvaluationFields(EvaluationFields):
    """When a run evaluates, on how many completions, and which adapter is the best."""

    num_generations_eval: int | None = option(
        None, "completions sampled for each evaluation prompt; by default one greedy completion",
        common=True, may_change=True, above=0, at_most=2**14,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SavingFields(Checked):
    """How often a run writes a checkpoint, and how many it keeps."""

    save_steps: int = option(
        20, "write a checkpoint every so many steps, besides at the end", common=True, may_change=True, above=0
    )
    save_total_limit: int | None = option(
        None, "number of newest checkpoints to keep; none keeps all", may_change=True, above=0
    )


@dataclass(frozen=True, kw_only=True)
class CompletionSavingFields(SavingFields):
    """The files that a run writes besides its metrics, and how often."""

    log_completions: bool = option(
        False, "write each step's completions to output_dir/completions/", common=True, may_change=True
    )


@dataclass(frozen=True, kw_only=True)
class ReportingFields(Checked):
    """The trackers that get a run's numbers, and the repository that gets its adapter at the end."""

    report_to: str | list[str] = option(
        "none", "trackers that get the run's numbers: tensorboard, wandb, trackio and others; all those here, or none",
        common=True, may_change=True,
    )  # fmt: skip
    run_name: str | None = option(
        None, "name of the run in its trackers; by default the last two folders of output_dir", may_change=True
    )
    project: str = option("huggingface", "name of the trackers' project or experiment", may_change=True)
    trackio_space_id: str | None = option(
        None, "space of the hub in which trackio shows the run; by default it stays on this machine", may_change=True
    )
    push_to_hub: bool = option(
        False, "upload the adapter to the hub after training, with its card and report.html", may_change=True
    )
    hub_model_id: str | None = option(
        None, "repository of push_to_hub, as user/name; by default of output_dir's name, among your own",
        may_change=True,
    )  # fmt: skip
    hub_private_repo: bool | None = option(
        None, "make a new repository private; by default as your organization has it",
        may_change=True,
    )  # fmt: skip
    hub_revision: str | None = option(None, "branch of the repository to upload to; by default main", may_change=True)

    def check(self) -> None:
        of_trackers, of_the_hub = bool(self.trackers), self.push_to_hub
        read = {
            "run_name": (of_trackers, "report_to"), "project": (of_trackers, "report_to"),
            "trackio_space_id": ({"trackio", "all"} & {*self.trackers}, "report_to='trackio'"),
            **dict.fromkeys(("hub_model_id", "hub_private_repo", "hub_revision"), (of_the_hub, "push_to_hub")),
        }  # fmt: skip
        for name, (is_read, switch) in read.items():
            value = getattr(self, name)
            if value != getattr(ReportingFields, name) and not is_read:
                raise InputError(f"{name}={shown(value)} is read only with {switch}; set that, or leave {name} out")

    @property
    def trackers(self) -> list[str]:
        """The trackers that report_to names, or "all"."""
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        return [] if names == ["none"] else [*dict.fromkeys(names)]


def _refuse_long_names(field: str, path: Any, beside: str = "") -> None:
    """Raise InputError for a path with a name that, with `beside` at its end, no disk takes."""
    most = LONGEST_NAME - len(beside)
    if isinstance(path, str) and any(len(part.encode()) > most for part in path.split("/")):
        raise InputError(f"{field}={shown(path)} has a name longer than {most} bytes; shorten it")


def _bytes(text: str) -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG])(I?)B\s*", text.upper())
    size = float(found[1]) * (1024 if found[3] else 1000) ** (1 + "KMG".index(found[2])) if found else 0
    if not 1 <= size < 2**63:
        raise InputError(f"vram_budget={shown(text)} is not a size; write it as 8GB or 7.5GiB")
    return int(size)


TITLES: dict[type, str] = {
    OutputFields: "run", RunFields: "run", LoadFields: "model", ModelFields: "model", AdapterFields: "adapters",
    PromptFields: "data", DataFields: "data", ExampleFields: "data", PairFields: "data",
    EndpointFields: "endpoint",
    CompletionFields: "sampling", SamplingFields: "sampling", ToolFields: "tools",
    ScoreFields: "rewards and advantages", RewardFields: "rewards and advantages", CriticFields: "critic",
    DistillationFields: "distillation", ObjectiveFields: "objective", BudgetFields: "update", UpdateFields: "update",
    OptimizerFields: "optimizer", EvaluationFields: "evaluation", SampledEvaluationFields: "evaluation",
    SavingFields: "saving", CompletionSavingFields: "saving",
    ReportingFields: "reporting",
}  # fmt: skip


def sections(config: type) -> list[tuple[str, list[dataclasses.Field]]]:
    """Title and fields of every section of a configuration, in the order of its fields."""
    own = {field.name: field for field in dataclasses.fields(config)}  # a configuration may have defaults of its own
    kinds = {TITLES[kind]: kind for kind in reversed(config.__mro__) if kind in TITLES}  # the widest of a title
    return [(title, [own[field.name] for field in dataclasses.fields(kind)]) for title, kind in kinds.items()]

"""TRL's fields that this package does not have, each with what to do instead. Standard library only."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from lowmem_grpo.errors import UnknownNameError, did_you_mean, shown

_STEP = "a step holds prompts_per_step x num_generations completions and token_budget bounds a micro-batch; use those"
_ONE_GPU = "each process has the whole model on one GPU, and torchrun starts several; remove it"
_RESIDENT = "completions are sampled from the resident weights, so there is no second engine to set up; remove it"
_CALLBACK = "metrics.jsonl has every step; pass a function in callbacks to compute more of it"
TO_TRAIN = "it is no setting but an argument of train(), or a flag of the command; pass it there"
_LATER = "it is not supported yet; remove it"

# TRL 1.16's fields that this package does not have, by remedy; those of the TrainingArguments that it inherits too, in
# transformers 5.0 to 5.24, and those of the ModelConfig, ScriptArguments and DatasetMixtureConfig of its commands. A
# test compares the list with TRL's own classes.
_TRL_FIELDS = {
    _STEP: "per_device_train_batch_size gradient_accumulation_steps generation_batch_size "
    "auto_find_batch_size per_device_eval_batch_size eval_accumulation_steps",
    _ONE_GPU: "average_tokens_across_devices log_on_each_node log_level_replica save_on_each_node "
    "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp "
    "fsdp_config deepspeed local_rank parallelism_config accelerator_config ds3_gather_for_generation "
    "ignore_bias_buffers",
    _RESIDENT: "use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex "
    "vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port "
    "vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size "
    "use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged "
    "cache_implementation use_cache",
    _CALLBACK: "include_for_metrics batch_eval_metrics",
    "set log_completions, and upload output_dir/completions with `hf upload`": "log_completions_hub_repo",
    "TensorBoard's files are in output_dir/runs; remove it": "logging_dir",
    "set trackio_space_id, after which trackio names it; remove it": "trackio_bucket_id",
    "call trackio.sync(project, sdk='static') after training; remove it": "trackio_static_space_id",
    "settings are written to files, where a token is not safe; run `hf auth login`, or set the environment variable "
    "HF_TOKEN": "hub_token",
    "the adapter is uploaded once, after training; remove it": "hub_strategy hub_always_push",
    "every step is logged, so there is no interval to set; remove it": "logging_strategy logging_steps "
    "logging_first_step logging_nan_inf_filter log_level disable_tqdm include_num_input_tokens_seen "
    "skip_memory_metrics log_multimodal num_completions_to_print log_unique_prompts",
    "evaluation runs before and after training whenever there is an eval_dataset; use eval_steps": "eval_strategy "
    "eval_delay eval_on_start do_train do_eval do_predict",
    "set save_steps, which writes everything that a resume needs": "save_strategy save_only_model ignore_data_skip "
    "restore_callback_states_from_checkpoint enable_jit_checkpoint",
    "the head is always computed in fp32 tiles; remove it": "cast_lm_head_to_fp32",
    "the base's dropout is always off, and the adapters' is lora_dropout; set that": "disable_dropout",
    "every dataset column reaches the reward functions; remove it": "remove_unused_columns label_names",
    "sampling settings have fields of their own (temperature, top_p, ...); use those": "generation_kwargs",
    "the data order follows seed; set that": "data_seed train_sampling_strategy length_column_name group_by_length",
    "prompts are tokenized once, in this process; remove it": "dataloader_drop_last dataloader_num_workers "
    "dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataloader_in_order "
    "dataloader_multiprocessing_context",
    "the field is named without vllm_ here, since there is no vLLM; use that": "vllm_importance_sampling_correction "
    "vllm_importance_sampling_mode vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min",
    "set importance_sampling_clip_max": "vllm_importance_sampling_cap",
    "set warmup_steps": "warmup_ratio",
    TO_TRAIN: "model_name_or_path dataset_name model dataset train_dataset eval_dataset reward_funcs peft_config "
    "tokenizer processing_class callbacks",
    "LoRA adapters are always what is trained; remove it": "use_peft lora_task_type",
    "the base is held in 4-bit, or with load_in_4bit=False in the compute dtype; remove it": "load_in_8bit",
    "4-bit is NF4 with double quantization; remove it, or give a 4-bit checkpoint": "bnb_4bit_quant_type "
    "use_bnb_nested_quant bnb_4bit_quant_storage",
    "the compute dtype is bfloat16 by default; set fp16=True, or bf16=False for float32": "dtype torch_dtype",
    "set model_init_kwargs={'attn_implementation': ...}": "attn_implementation",
    "set model_init_kwargs={'revision': ...}": "model_revision",
    "pass a LoraConfig that has it, as peft_config": "use_rslora use_dora lora_modules_to_save lora_target_parameters",
    "set dataset_split": "dataset_train_split",
    "make one of them, by datasets' concatenate_datasets, and give that": "datasets",
    "set dataset_streaming and dataset_take": "streaming",
    "give the held-out rows as eval_dataset": "test_split_size",
    "set variables of the environment where the command is started; remove it": "env",
    "of an eval_dataset on the hub the test split is read; pass another one as a loaded Dataset": "dataset_test_split",
    "name it among the reward_funcs": "reward_model_name_or_path",
    "checkpointing is never reentrant here; remove it": "gradient_checkpointing_use_reentrant",
    _LATER: "lr_scheduler_kwargs optim_args optim_target_modules label_smoothing_factor bf16_full_eval "
    "fp16_full_eval tf32 activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing_kwargs "
    "torch_compile torch_compile_backend torch_compile_mode liger_kernel_config neftune_noise_alpha "
    "torch_empty_cache_steps prediction_loss_only eval_do_concat_batches eval_use_gather_object full_determinism debug "
    "router_aux_loss_coef pad_to_multiple_of max_tool_calling_iterations",
}
# Of PPO's configurations: TRL's, which 1.16 no longer has, and verl's and OpenRLHF's in flat names.
_PPO_FIELDS = {
    "the critic has an optimizer of its own, to which a factor of its loss is nothing; set critic_learning_rate":
        "vf_coef value_loss_coef",
    "set critic_learning_rate": "critic_lr",
    "set epsilon": "cliprange clip_range clip_ratio eps_clip",
    "set cliprange_value": "cliprange_v value_clip",
    "set beta, and kl_in_reward=True for a KL in the reward": "kl_coef init_kl_coef kl_loss_coef use_kl_loss",
    "set kl_target": "target_kl kl_target_value",
    "set kl_horizon": "horizon",
    "set num_iterations": "num_ppo_epochs ppo_epochs max_epochs",
    "set steps_per_generation": "num_mini_batches ppo_mini_batch_size",
    "set lam": "lambd gae_lambda",
    "set gamma": "discount discount_factor",
    "advantages are whitened, not rewards; set whiten_advantages": "whiten_rewards",
    "set max_completion_length": "response_length generate_max_len",
    "the critic is an adapter on the policy's base; set critic_init for what it starts from":
        "value_model critic_pretrain critic_model critic_model_path",
    "the critic's adapter is like the policy's; set lora_r": "critic_lora_r",
    "set stop_strings, or leave it: a completion ends with the model's own tokens": "stop_token stop_token_id",
    "set optim and the other optimizer fields, which the critic shares": "critic_optim critic_weight_decay",
}  # fmt: skip
# Of TRL's configurations of distillation.
_DISTILLATION_FIELDS = {
    "set teacher": "teacher_model_name_or_path teacher_model teacher_name_or_path",
    "a teacher is loaded as the policy's base is, in 4 bits by default; remove it": "teacher_model_init_kwargs",
    "download that revision with `hf download --revision`, and give its folder as teacher": "teacher_model_revision",
    "teacher and policy have one temperature; set that": "teacher_temperature",
    "the policy learns from what it samples itself, which TRL calls lmbda=1; remove it, or let the teacher write "
    "examples for `lowmem-grpo sft`": "lmbda seq_kd",
}
# Of SFTConfig alone.
_PACKED = "examples are always packed, and none is cut or mixed with another; remove it"
_SFT_FIELDS = {
    _PACKED: "packing packing_strategy eval_packing",
    "an example that is longer than max_length is dropped, since without its end it teaches to ramble; remove it":
        "truncation_mode",
    "the column is text; rename yours": "dataset_text_field",
    "set tokenizer.eos_token or tokenizer.pad_token, and pass that tokenizer": "eos_token pad_token",
    "pass a tokenizer that has it": "chat_template_path",
    "make the rows before, with datasets' map": "dataset_kwargs formatting_func",
    "rows are tokenized once, in this process; remove it": "dataset_num_proc dataloader_drop_last "
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_in_order dataloader_multiprocessing_context",
    "a step holds examples_per_step examples and token_budget bounds a micro-batch; use those":
        "per_device_train_batch_size gradient_accumulation_steps auto_find_batch_size per_device_eval_batch_size "
        "eval_accumulation_steps",
    "of a row the columns in docs/sft.md are read, and no others; remove it": "remove_unused_columns label_names",
    "nothing is sampled, so that there is no cache; remove it": "use_cache cache_implementation",
    "examples are packed without padding; remove it": "pad_to_multiple_of",
    "an example is imitated, without rewards; remove it, or see `lowmem-grpo train`": "reward_funcs reward_weights",
    "name it in dataset, as one of several, and its share in dataset_weights": "datasets dataset_mixture",
    "it is no setting but an argument of sft(), or a flag of the command; pass it there": "model_name_or_path "
        "dataset_name model dataset train_dataset eval_dataset peft_config tokenizer processing_class callbacks",
    "set max_length": "max_seq_length max_prompt_length max_completion_length",
}  # fmt: skip
# Of RewardConfig alone.
_REWARD_FIELDS = {
    "pairs are packed without padding; remove it": "pad_to_multiple_of",
    "set tokenizer.eos_token or tokenizer.pad_token, and pass that tokenizer": "eos_token pad_token",
    "pass a tokenizer that has it": "chat_template_path",
    "rows are tokenized once, in this process; remove it": "dataset_num_proc",
    "a step holds pairs_per_step pairs and token_budget bounds a micro-batch; use those":
        "per_device_train_batch_size gradient_accumulation_steps",
    "set max_length": "max_prompt_length max_completion_length",
}  # fmt: skip


def _by_name(fields: dict[str, str]) -> dict[str, str]:
    return {name: remedy for remedy, names in fields.items() for name in names.split()}


UNSUPPORTED = _by_name(_TRL_FIELDS)
UNSUPPORTED_GRPO = UNSUPPORTED | _by_name(_PPO_FIELDS) | _by_name(_DISTILLATION_FIELDS)
UNSUPPORTED_SFT = UNSUPPORTED | _by_name(_SFT_FIELDS)
UNSUPPORTED_REWARD = UNSUPPORTED | _by_name(_REWARD_FIELDS)
# By the name of a configuration: what it lacks, and the command that it is of.
_OF_CONFIG = {
    "SFTConfig": (UNSUPPORTED_SFT, "sft"), "RewardConfig": (UNSUPPORTED_REWARD, "reward"),
    "SampleConfig": (UNSUPPORTED_GRPO, "sample"), "SelectConfig": ({}, "select"),
    "PairsConfig": ({}, "pairs"),
}  # fmt: skip


def refuse_unknown_fields(given: Iterable[str], config: Any) -> None:
    """Raise UnknownNameError for the first name that is no field: with the remedy for TRL's, else the nearest name."""
    known, kind = [field.name for field in dataclasses.fields(config)], config.__name__
    remedies, command = _OF_CONFIG.get(kind, (UNSUPPORTED_GRPO, "train"))
    for name in given:
        if name not in known and name in remedies:
            raise UnknownNameError(f"{kind} has no {name}: {remedies[name]}")
        if name not in known:
            hint = did_you_mean(name, known, f"see `lowmem-grpo {command} --help_all` for the fields")
            raise UnknownNameError(f"{kind} has no field {shown(name)}; {hint}")

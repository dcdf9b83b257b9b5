"""Fields of TRL and of other trainers that this package does not have, each with what to do instead.

Standard library only.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from lowmem_grpo.errors import UnknownNameError, did_you_mean, printable, shown

_STEP = "a step holds prompts_per_step x num_generations completions and token_budget bounds a micro-batch; use those"
_ONE_GPU = "each process has the whole model on one GPU, and torchrun starts several; remove it"
_RESIDENT = "completions are sampled from the resident weights, so there is no second engine to set up; remove it"
_CALLBACK = "metrics.jsonl has every step; pass a function in callbacks to compute more of it"
_OF_SAMPLING = (
    "sampling has temperature, top_p, top_k, min_p, repetition_penalty and stop_strings, each a field of its own, and "
    "nothing else"
)
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
    "skip_memory_metrics log_multimodal",
    "log_completions writes all of them, and `lowmem-grpo watch` shows them; remove it": "num_completions_to_print "
    "log_unique_prompts",
    "evaluation runs before and after training whenever there is an eval_dataset; leave that out for none, or set "
    "eval_steps for more": "eval_strategy eval_delay eval_on_start do_train do_eval do_predict",
    "set save_steps, which writes everything that a resume needs": "save_strategy save_only_model ignore_data_skip "
    "restore_callback_states_from_checkpoint enable_jit_checkpoint",
    "the head is always computed in fp32 tiles; remove it": "cast_lm_head_to_fp32",
    "the base's dropout is always off, and the adapters' is lora_dropout; set that": "disable_dropout",
    "every dataset column reaches the reward functions; remove it": "remove_unused_columns label_names",
    f"{_OF_SAMPLING}; use those": "generation_kwargs",
    "the data order follows seed; set that": "data_seed train_sampling_strategy length_column_name group_by_length",
    "prompts are tokenized once, in this process; remove it": "dataloader_drop_last dataloader_num_workers "
    "dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataloader_in_order "
    "dataloader_multiprocessing_context",
    "the field is named without vllm_ here, since there is no vLLM; use that": "vllm_importance_sampling_correction "
    "vllm_importance_sampling_mode vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min",
    "set importance_sampling_clip_max": "vllm_importance_sampling_cap",
    "set warmup_steps": "warmup_ratio",
    TO_TRAIN: "model_name_or_path dataset_name model dataset train_dataset eval_dataset reward_funcs peft_config "
    "tokenizer processing_class callbacks tools environment_factory",
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
    "torch_empty_cache_steps prediction_loss_only eval_do_concat_batches eval_use_gather_object debug "
    "router_aux_loss_coef pad_to_multiple_of",
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
    "set stop_strings, or leave it: a completion ends with the model's own tokens": "stop stop_token stop_token_id",
    f"{_OF_SAMPLING}; remove it": "vllm_sampling_params sampling_params no_repeat_ngram_size presence_penalty "
        "frequency_penalty min_new_tokens min_tokens num_beams length_penalty",
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
# Of TRL's and of transformers' in earlier versions, of open-r1's scripts, and of Unsloth's models and their LoRA.
_SCRIPT_FIELDS = {
    "a fresh run needs a folder without checkpoints, and set resume_from_checkpoint=True to go on in one; remove it":
        "overwrite_output_dir",
    "set tokenizer.chat_template, and pass that tokenizer": "chat_template",
    "rename the column to prompt": "dataset_prompt_column",
    "make one of them, by datasets' concatenate_datasets, and give that": "dataset_mixture",
    "set report_to, project and run_name, and for the rest W&B's variables of the environment, as WANDB_ENTITY":
        "wandb_entity wandb_project wandb_run_group wandb_log_unique_prompts",
    "set hub_revision": "hub_model_revision",
    "set push_to_hub and hub_revision": "push_to_hub_revision overwrite_hub_revision",
    "run `lowmem-grpo eval` after training; remove it": "benchmarks",
    "set max_prompt_length and max_completion_length": "max_seq_length",
    "set lora_r": "max_lora_rank lora_rank r",
    "set lora_target_modules": "target_modules",
    "set gradient_checkpointing": "use_gradient_checkpointing",
    "set seed": "random_state",
    "LoRA adapters are always what is trained; remove it": "full_finetuning",
    _RESIDENT: "fast_inference gpu_memory_utilization",
}  # fmt: skip
# verl's, by the last of its names alone where that is enough, and OpenRLHF's and others' habits.
_VERL_FIELDS = {
    "settings have no sections here; write each by its own name, as num_generations":
        "actor_rollout_ref actor rollout ref critic data algorithm trainer custom_reward_function",
    TO_TRAIN: "train_files model.path",
    "set critic_init": "critic.model.path",
    "set num_generations_eval": "val_kwargs.n",
    "give the held-out rows as eval_dataset": "val_files",
    "rename the column to prompt": "prompt_key input_key",
    "every reward function gets the column data_source; get_routed_reward asks one for the rows of a kind alone":
        "reward_fn_key",
    "name it among the reward_funcs, as module.function": "custom_reward_function.path custom_reward_function.name",
    "name it among the reward_funcs":
        "reward_model reward_model.path reward_model.model.path reward_pretrain reward_manager",
    "the reference is the policy without its adapters; remove it": "ref_model ref_model_path",
    "set num_generations": "n n_samples_per_prompt rollout_n group_size num_return_sequences num_samples",
    "set prompts_per_step": "train_batch_size gen_batch_size rollout_batch_size",
    "set steps_per_generation, into how many optimizer steps a rollout is split": "mini_batch_size",
    _STEP: "batch_size micro_batch_size ppo_micro_batch_size ppo_micro_batch_size_per_gpu micro_train_batch_size "
        "micro_rollout_batch_size log_prob_micro_batch_size log_prob_micro_batch_size_per_gpu val_batch_size",
    "set token_budget": "ppo_max_token_len_per_gpu log_prob_max_token_len_per_gpu",
    "micro-batches are always made by their tokens; remove it": "use_dynamic_bsz",
    "set padding_free, which is on by default": "use_remove_padding packing_samples",
    "set max_prompt_length; longer prompts are dropped and counted":
        "prompt_max_len filter_overlong_prompts truncation",
    "the base is frozen and in 4 bits, and vram_budget chooses what else is offloaded; remove it":
        "param_offload optimizer_offload adam_offload",
    "set max_completion_length": "max_response_length max_new_tokens max_tokens",
    "training samples and an evaluation is greedy, unless num_generations_eval is set; remove it": "do_sample",
    "with num_generations_eval an evaluation samples as training does, else greedily; remove it":
        "val_kwargs.temperature val_kwargs.top_p val_kwargs.top_k",
    "set adv_estimator": "advantage_estimator",
    "set scale_rewards": "norm_adv_by_std_in_grpo",
    "set loss_type: dapo for token-mean, grpo for seq-mean-token-mean, dr_grpo for seq-mean-token-sum-norm":
        "loss_agg_mode",
    "set loss_type, and for GSPO importance_sampling_level='sequence'": "loss_mode policy_loss",
    "set epsilon": "clip_ratio_low epsilon_low eps_clip_low",
    "set epsilon_high": "clip_ratio_high eps_clip_high",
    "set delta": "clip_ratio_c",
    "set beta": "kl_coeff kl_beta",
    "set beta, and kl_estimator: k3 for low_var_kl, k1 for kl, k2 for mse": "kl_loss_type kl_penalty",
    "set beta, and kl_in_reward=True": "use_kl_in_reward",
    "set dynamic_sampling_rounds": "filter_groups filter_groups.enable filter_groups.metric "
        "filter_groups.max_num_gen_batches dynamic_filtering",
    "name get_soft_overlong_punishment(...) among the reward_funcs": "overlong_buffer overlong_buffer_cfg "
        "overlong_buffer.enable overlong_buffer.len overlong_buffer.penalty_factor",
    "set learning_rate": "lr actor_learning_rate",
    "set critic_learning_rate": "critic.optim.lr",
    "set gradient_checkpointing": "enable_gradient_checkpointing",
    "set project": "project_name",
    "set run_name": "experiment_name",
    "set warmup_steps": "lr_warmup_steps lr_warmup_steps_ratio lr_warmup_ratio",
    "set max_grad_norm": "grad_clip gradient_clipping max_norm",
    "set num_train_epochs": "epochs num_epochs total_epochs num_episodes",
    "set max_steps": "steps total_training_steps",
    "set save_steps": "save_freq",
    "evaluation runs before and after training whenever there is an eval_dataset; set eval_steps for more":
        "test_freq val_before_train eval_every evaluation_strategy",
    _ONE_GPU: "n_gpus_per_node nnodes tensor_model_parallel_size",
    _RESIDENT: "enable_chunked_prefill enforce_eager free_cache_engine rollout.name",
    "set report_to": "logger use_wandb",
    "set output_dir": "default_local_dir save_path",
    "set resume_from_checkpoint": "resume_mode",
    "the GPU is used where torch sees one; set use_cpu to do without": "device",
}  # fmt: skip
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
        "per_device_train_batch_size gradient_accumulation_steps auto_find_batch_size per_device_eval_batch_size "
        "eval_accumulation_steps",
    "set max_length": "max_seq_length max_prompt_length max_completion_length",
}  # fmt: skip


def _by_name(fields: dict[str, str]) -> dict[str, str]:
    return {name: remedy for remedy, names in fields.items() for name in names.split()}


UNSUPPORTED = _by_name(_TRL_FIELDS)
_OF_OTHERS = _by_name(_PPO_FIELDS) | _by_name(_DISTILLATION_FIELDS) | _by_name(_VERL_FIELDS) | _by_name(_SCRIPT_FIELDS)
UNSUPPORTED_GRPO = _OF_OTHERS | UNSUPPORTED
UNSUPPORTED_SFT = _by_name(_SCRIPT_FIELDS) | UNSUPPORTED | _by_name(_SFT_FIELDS)
UNSUPPORTED_REWARD = _by_name(_SCRIPT_FIELDS) | UNSUPPORTED | _by_name(_REWARD_FIELDS)
# By the name of a configuration: what it lacks, and the command that it is of.
_OF_CONFIG = {
    "SFTConfig": (UNSUPPORTED_SFT, "sft"), "RewardConfig": (UNSUPPORTED_REWARD, "reward"),
    "SampleConfig": (UNSUPPORTED_GRPO, "sample"), "SelectConfig": ({}, "select"),
    "PairsConfig": ({}, "pairs"),
}  # fmt: skip


# Of a trainer's arguments in TRL, what stands in their place here.
_ARGUMENTS = _by_name({
    "name it config": "args",
    "name it tokenizer": "processing_class",
    "give get_model_reward(model=..., tokenizer=...) among the reward_funcs": "reward_processing_classes",
    "set load_in_4bit in config": "quantization_config",
    "make the rows before, with datasets' map": "formatting_func data_collator",
    "there is none; leave it out": "optimizers optimizer_cls_and_kwargs compute_metrics compute_loss_func "
        "preprocess_logits_for_metrics environment_factory rollout_func model_init",
})  # fmt: skip
MOST_NAMES = 50  # that are said at once
# Values that say what is done anyway, of settings that configurations of these trainers often have.
_AS_DONE = {
    "use_vllm load_in_8bit remove_unused_columns use_dora use_rslora group_by_length save_only_model torch_compile "
    "ddp_find_unused_parameters gradient_checkpointing_use_reentrant overwrite_output_dir": [False],
    "use_peft logging_first_step": [True],
    "logging_steps": [1],
    "logging_strategy save_strategy": ["steps"],
    "lora_task_type": ["CAUSAL_LM"],
    "gradient_checkpointing_kwargs": [{}, {"use_reentrant": False}],
}
AS_DONE = {name: values for names, values in _AS_DONE.items() for name in names.split()}


def known_fields(given: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The settings that a configuration has, without those of others that ask for what is done anyway.

    That is a value of AS_DONE, or None, of a name that has a remedy.

    Raises:
        UnknownNameError: as refuse_unknown_fields does.
    """
    remedies, _ = _of_config(config)
    left = {
        name: value
        for name, value in given.items()
        if name not in remedies or not (value is None or value in AS_DONE.get(name, ()))
    }
    refuse_unknown_fields(left, config)
    return left


def refuse_unknown_fields(given: Iterable[str], config: Any) -> None:
    """Raise UnknownNameError for names that are no fields: with the remedy of each, else the nearest name.

    Several are said at once, those of one remedy in a line. Of a name with dots, as verl's
    `actor_rollout_ref.rollout.n`, the longest end that is known counts.
    """
    fields, kind = [field.name for field in dataclasses.fields(config)], config.__name__
    remedies, command = _of_config(config)
    unknown: dict[str, list[str]] = {}  # by their remedy
    lines = []
    for name in islice((name for name in given if name not in fields), MOST_NAMES):
        parts = name.split(".")
        ends = [".".join(parts[place:]) for place in range(len(parts))]
        remedy = next((remedies.get(end) or f"write {end} alone" for end in ends if end in {*remedies, *fields}), None)
        if remedy is None and parts[-1].startswith("vllm_"):
            remedy = _RESIDENT
        if remedy:
            unknown.setdefault(remedy, []).append(printable(name))
        else:
            hint = did_you_mean(parts[-1], fields, f"see `lowmem-grpo {command} --help_all` for the fields")
            lines.append(f"{kind} has no field {shown(name)}; {hint}")
    lines = [f"{kind} has no {', '.join(names)}: {remedy}" for remedy, names in unknown.items()] + lines
    if lines:
        raise UnknownNameError("\n".join(lines))


def refuse_unknown_arguments(given: Iterable[str], known: Iterable[str], function: str) -> None:
    """Raise UnknownNameError for an argument that a training does not take, with what takes its place."""
    known = [*known]
    for name in given:
        if name not in known:
            remedy = _ARGUMENTS.get(name) or did_you_mean(name, known, "settings are given in config")
            raise UnknownNameError(f"{function}() has no argument {shown(name)}; {remedy}")


def _of_config(config: Any) -> tuple[Mapping[str, str], str]:
    """The remedies for what a configuration lacks, by name, and the command that it is of."""
    return _OF_CONFIG.get(config.__name__, (UNSUPPORTED_GRPO, "train"))

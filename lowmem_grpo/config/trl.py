"""TRL's fields that this package does not have, each with what to do instead. Standard library only."""

_STEP = "a step holds prompts_per_step x num_generations completions and token_budget bounds a micro-batch; use those"
_ONE_GPU = "one process trains on one GPU; remove it"
_RESIDENT = "completions are sampled from the resident weights, so there is no second engine to set up; remove it"
_CALLBACK = "metrics.jsonl has every step; pass a function in callbacks to send them elsewhere"
_AFTER = "upload output_dir/adapter after training, with `hf upload`"
_LATER = "it is not supported yet; remove it"

# TRL 1.16's fields that this package does not have, by remedy; those of the TrainingArguments that it inherits too, in
# transformers 5.0 to 5.23. A test compares the list with TRL's own class.
_TRL_FIELDS = {
    _STEP: "per_device_train_batch_size gradient_accumulation_steps generation_batch_size "
    "auto_find_batch_size per_device_eval_batch_size eval_accumulation_steps",
    _ONE_GPU: "average_tokens_across_devices log_on_each_node log_level_replica save_on_each_node "
    "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp "
    "fsdp_config deepspeed local_rank parallelism_config accelerator_config ds3_gather_for_generation",
    _RESIDENT: "use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex "
    "vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port "
    "vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size "
    "use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged "
    "cache_implementation use_cache",
    _CALLBACK: "report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id "
    "log_completions_hub_repo include_for_metrics batch_eval_metrics logging_dir",
    _AFTER: "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
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
    _LATER: "lr_scheduler_kwargs optim_args optim_target_modules label_smoothing_factor bf16_full_eval "
    "fp16_full_eval tf32 activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing_kwargs "
    "torch_compile torch_compile_backend torch_compile_mode liger_kernel_config neftune_noise_alpha "
    "torch_empty_cache_steps prediction_loss_only eval_do_concat_batches eval_use_gather_object full_determinism debug "
    "router_aux_loss_coef pad_to_multiple_of max_tool_calling_iterations",
}
UNSUPPORTED = {name: remedy for remedy, names in _TRL_FIELDS.items() for name in names.split()}

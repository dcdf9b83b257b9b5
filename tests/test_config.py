import dataclasses
import pickle
import re
from pathlib import Path

import pytest

import lowmem_grpo
from lowmem_grpo.config.fields import field_types, from_text
from lowmem_grpo.config.grpo import READ_ONLY, GRPOConfig
from lowmem_grpo.config.losses import LOSS_TYPES, METHODS, OWN_LOSS
from lowmem_grpo.config.sample import SampleConfig
from lowmem_grpo.config.sections import ModelFields, OptimizerFields, RunFields, SavingFields, sections
from lowmem_grpo.config.trl import AS_DONE, TO_TRAIN, UNSUPPORTED, UNSUPPORTED_GRPO
from lowmem_grpo.errors import InputError

FIELDS = {field.name: field for field in dataclasses.fields(GRPOConfig)}
# Fields of TRL's whose default differs on purpose; docs/coming-from-trl.md says why.
DIFFERENT = {"output_dir", "learning_rate", "save_steps", "steps_per_generation"}
# Fields that TRL's GRPOConfig does not have; lora_* are TRL's ModelConfig's.
OURS = {
    "load_in_4bit", "load_head_in_8bit", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "dataset_config", "dataset_split",
    "system_prompt", "max_prompt_length", "prompts_per_step", "stop_strings", "rollout_token_budget", "rollout_weights",
    "rollout_kv", "rollout_paged", "rollout_cuda_graphs", "rollout_graphs_last", "dynamic_sampling_rounds", "replay_buffer_size", "curriculum_skip", "adv_estimator", "kl_estimator", "kl_in_reward", "kl_target", "kl_horizon", "reference",
    "importance_sampling_correction", "importance_sampling_mode", "importance_sampling_clip_max",
    "importance_sampling_clip_min", "token_budget", "padding_free", "tiled_mlp", "offload_embedding", "activation_offloading", "vram_budget",
    "reward_timeout", "tool_timeout", "max_nonfinite_steps", "doctor",
    "gamma", "lam", "whiten_advantages", "cliprange_value", "critic_learning_rate", "critic_warmup", "critic_init",
    "teacher", "teacher_coef", "teacher_system_prompt",
    "dataset_streaming", "dataset_take",
}  # fmt: skip
TEXTS = {  # a text as it is typed, and what it means, for every field
    "output_dir": ("out", "out"), "resume_from_checkpoint": ("true", True), "seed": ("7", 7), "use_cpu": ("true", True), "doctor": ("stop", "stop"),
    "model_init_kwargs": ('{"attn_implementation": "eager"}', {"attn_implementation": "eager"}),
    "trust_remote_code": ("true", True), "load_in_4bit": ("false", False), "load_head_in_8bit": ("true", True), "vram_budget": ("8GB", "8GB"), "bf16": ("none", None), "fp16": ("True", True),
    "gradient_checkpointing": ("false", False), "activation_offloading": ("true", True), "tiled_mlp": ("true", True),
    "offload_embedding": ("true", True), "use_liger_kernel": ("true", True), "optim": ("adamw_8bit", "adamw_8bit"), "lora_r": ("8", 8), "lora_alpha": ("16", 16),
    "lora_dropout": ("0.1", 0.1), "lora_target_modules": (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
    "dataset_config": ("main", "main"), "dataset_split": ("test", "test"), "system_prompt": ("Be brief.", "Be brief."),
    "chat_template_kwargs": ('{"enable_thinking": false}', {"enable_thinking": False}), "max_prompt_length": ("none", None),
    "shuffle_dataset": ("false", False), "num_train_epochs": ("1.5", 1.5), "max_steps": ("10", 10),
    "prompts_per_step": ("4", 4), "num_generations": ("16", 16), "max_completion_length": ("64", 64),
    "temperature": ("0.9", 0.9), "top_p": ("0.95", 0.95), "top_k": ("20", 20), "min_p": ("0.1", 0.1),
    "repetition_penalty": ("1.1", 1.1), "rollout_token_budget": ("4096", 4096), "rollout_weights": ("4bit", "4bit"), "rollout_kv": ("int8", "int8"), "rollout_paged": ("false", False), "rollout_cuda_graphs": ("false", False), "rollout_graphs_last": ("false", False), "stop_strings": (["</answer>"], ["</answer>"]),
    "reward_weights": (["1", "0.2"], [1.0, 0.2]), "reward_timeout": ("30", 30.0),
    "max_tool_calling_iterations": ("3", 3), "tool_timeout": ("30", 30.0),
    "scale_rewards": ("batch", "batch"), "mask_truncated_completions": ("true", True), "beta": ("0.04", 0.04),
    "use_bias_correction_kl": ("false", False), "num_iterations": ("2", 2), "epsilon": ("0.1", 0.1),
    "epsilon_high": ("0.28", 0.28), "delta": ("4", 4.0), "loss_type": ("dr_grpo", "dr_grpo"),
    "dynamic_sampling_rounds": ("2", 2), "replay_buffer_size": ("16", 16), "curriculum_skip": ("0.5", 0.5), "multi_objective_aggregation": ("normalize_then_sum", "normalize_then_sum"),
    "gamma": ("0.9", 0.9), "lam": ("0.95", 0.95), "whiten_advantages": ("false", False), "cliprange_value": ("none", None),
    "critic_learning_rate": ("1e-5", 1e-5), "critic_warmup": ("3", 3), "critic_init": ("reward/adapter", "reward/adapter"),
    "teacher": ("org/larger", "org/larger"), "teacher_coef": ("0.5", 0.5), "teacher_system_prompt": ("Sum up.", "Sum up."),
    "adv_estimator": ("rloo", "rloo"), "kl_estimator": ("k1", "k1"), "kl_in_reward": ("true", True),
    "kl_target": ("0.01", 0.01), "kl_horizon": ("500", 500), "reference": ("initial", "initial"),
    "sync_ref_model": ("true", True), "ref_model_mixup_alpha": ("0.5", 0.5), "ref_model_sync_steps": ("64", 64),
    "steps_per_generation": ("2", 2), "importance_sampling_level": ("sequence", "sequence"),
    "sapo_temperature_pos": ("2", 2.0), "sapo_temperature_neg": ("2", 2.0), "vespo_k_pos": ("1", 1.0),
    "vespo_lambda_pos": ("1", 1.0), "vespo_k_neg": ("1", 1.0), "vespo_lambda_neg": ("1", 1.0),
    "importance_sampling_correction": ("false", False), "importance_sampling_mode": ("token_mask", "token_mask"),
    "importance_sampling_clip_max": ("2", 2.0), "importance_sampling_clip_min": ("0.5", 0.5),
    "off_policy_mask_threshold": ("0.5", 0.5), "top_entropy_quantile": ("0.2", 0.2), "entropy_coef": ("0.01", 0.01),
    "use_adaptive_entropy": ("true", True), "entropy_coef_min": ("0.1", 0.1), "entropy_coef_max": ("0.5", 0.5),
    "entropy_coef_delta": ("0.01", 0.01), "entropy_target": ("0.5", 0.5),
    "token_budget": ("2048", 2048), "padding_free": ("false", False), "full_determinism": ("true", True), "learning_rate": ("1e-4", 1e-4), "lr_scheduler_type": ("cosine", "cosine"),
    "warmup_steps": ("3", 3), "weight_decay": ("0.1", 0.1), "adam_beta1": ("0.8", 0.8), "adam_beta2": ("0.99", 0.99),
    "adam_epsilon": ("1e-6", 1e-6), "max_grad_norm": ("0.1", 0.1), "max_nonfinite_steps": ("0", 0), "eval_steps": ("5", 5),
    "dataset_streaming": ("true", True), "dataset_take": ("500", 500), "num_generations_eval": ("8", 8),
    "metric_for_best_model": ("eval_pass@1", "eval_pass@1"), "greater_is_better": ("false", False),
    "load_best_model_at_end": ("true", True),
    "log_completions": ("true", True), "save_steps": ("5", 5), "save_total_limit": ("2", 2),
    "report_to": (["wandb"], ["wandb"]), "run_name": ("first", "first"), "project": ("sums", "sums"), "trackio_space_id": ("me/runs", "me/runs"),
    "push_to_hub": ("true", True), "hub_model_id": ("me/sums", "me/sums"), "hub_private_repo": ("true", True), "hub_revision": ("trial", "trial"),
}  # fmt: skip

# For each field that is not read everywhere: settings under which it is, under which it is not, and the remedy then.
READ = {
    **dict.fromkeys(
        ("kl_estimator", "kl_in_reward", "kl_target", "reference", "sync_ref_model"),
        ({"beta": 0.04}, {"beta": 0.0}, "set beta, for example to 0.04"),
    ),
    "use_bias_correction_kl": (
        {"beta": 0.04},
        {"beta": 0.04, "kl_in_reward": True},
        "set beta, .* and not kl_in_reward",
    ),
    "kl_horizon": ({"beta": 0.04, "kl_target": 0.01}, {"beta": 0.04}, "with kl_target; set that"),
    **dict.fromkeys(
        ("ref_model_mixup_alpha", "ref_model_sync_steps"),
        ({"beta": 0.04, "sync_ref_model": True}, {"beta": 0.04}, "with sync_ref_model; set that"),
    ),
    "epsilon": (
        {"loss_type": "gmpo"},
        {"loss_type": "cispo", "epsilon_high": 5.0},
        "luspo and gmpo; choose such a loss",
    ),
    "epsilon_high": ({"loss_type": "gmpo"}, {"loss_type": "sapo"}, "cispo and gmpo; choose such a loss_type"),
    "delta": ({"loss_type": "luspo"}, {"loss_type": "gmpo"}, "dapo, grpo, bnpo, dr_grpo and luspo; choose such a loss"),
    "importance_sampling_level": ({"loss_type": "sapo"}, {"loss_type": "vespo"}, "cispo and sapo; choose such a loss"),
    **dict.fromkeys(
        ("sapo_temperature_pos", "sapo_temperature_neg"),
        ({"loss_type": "sapo"}, {}, "by sapo; choose such a loss_type"),
    ),
    **dict.fromkeys(
        ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
        ({"loss_type": "vespo"}, {"loss_type": "sapo"}, "by vespo; choose such a loss_type"),
    ),
    **dict.fromkeys(
        ("importance_sampling_mode", "importance_sampling_clip_max", "importance_sampling_clip_min"),
        ({}, {"importance_sampling_correction": False}, "with importance_sampling_correction; set that"),
    ),
    **dict.fromkeys(
        ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
        ({"use_adaptive_entropy": True}, {"entropy_coef": 0.1}, "with use_adaptive_entropy; set that"),
    ),
    **dict.fromkeys(
        ("scale_rewards", "multi_objective_aggregation"),
        ({}, {"adv_estimator": "rloo"}, "with adv_estimator='grpo', and others have their own; choose that"),
    ),
    **dict.fromkeys(
        (
            "gamma",
            "lam",
            "whiten_advantages",
            "cliprange_value",
            "critic_learning_rate",
            "critic_warmup",
            "critic_init",
        ),
        ({"adv_estimator": "gae"}, {"adv_estimator": "rloo"}, "with adv_estimator='gae'; choose that"),
    ),
    **dict.fromkeys(
        ("dynamic_sampling_rounds", "replay_buffer_size", "curriculum_skip"),
        ({}, {"adv_estimator": "gae"}, "and not by adv_estimator='gae'; choose another"),
    ),
    **dict.fromkeys(
        ("teacher_coef", "teacher_system_prompt"), ({"teacher": "t"}, {"beta": 0.1}, "with a teacher; name one")
    ),
    "activation_offloading": ({}, {"gradient_checkpointing": False}, "with gradient_checkpointing, .*; set that"),
    "warmup_steps": ({}, {"lr_scheduler_type": "constant"}, "choose lr_scheduler_type='constant_with_warmup'"),
}
# The same of what every training has.
REPORTING = {
    **dict.fromkeys(("run_name", "project"), ({"report_to": ["wandb"]}, {}, "with report_to; set that")),
    "trackio_space_id": ({"report_to": "trackio"}, {"report_to": "wandb"}, "with report_to='trackio'; set that"),
    **dict.fromkeys(
        ("hub_model_id", "hub_private_repo", "hub_revision"), ({"push_to_hub": True}, {}, "with push_to_hub; set that")
    ),
}


def trl_script_fields():
    """The fields of the other configurations that TRL's command for GRPO reads."""
    trl = pytest.importorskip("trl")
    from trl.scripts.grpo import GRPOScriptArguments

    kinds = (trl.ModelConfig, GRPOScriptArguments, trl.DatasetMixtureConfig)
    return {field.name for kind in kinds for field in dataclasses.fields(kind)}


def trl_defaults():
    trl = pytest.importorskip("trl")
    values = {}
    for field in dataclasses.fields(trl.GRPOConfig):
        given = field.default_factory() if field.default is dataclasses.MISSING else field.default  # type: ignore[misc] # else it has a factory
        values[field.name] = getattr(given, "value", given)
    return values


def test_every_field_is_trls_or_known_to_be_ours():
    theirs = trl_defaults()
    assert set(FIELDS) - set(theirs) == OURS
    assert set(theirs) - set(FIELDS) <= set(UNSUPPORTED)
    arguments = [name for name, remedy in UNSUPPORTED.items() if remedy == TO_TRAIN]
    others = {"torch_dtype", "gradient_checkpointing_use_reentrant", "env", *arguments}
    assert len(set(UNSUPPORTED) - set(theirs) - trl_script_fields() - others) < 15, (
        "of other transformers versions alone"
    )


def test_every_field_of_trls_models_and_scripts_is_known():
    assert trl_script_fields() - set(FIELDS) <= set(UNSUPPORTED)
    assert not set(FIELDS) & set(UNSUPPORTED)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("use_peft", "remove it"), ("load_in_8bit", "4-bit"), ("torch_dtype", "set fp16=True"), ("dtype", "set fp16=True"),
        ("attn_implementation", "set model_init_kwargs"), ("model_revision", "set model_init_kwargs"), ("streaming", "dataset_take"), ("env", "remove it"), ("use_dora", "peft_config"),
        ("dataset_train_split", "set dataset_split"), ("bnb_4bit_quant_type", "NF4"), ("model_name_or_path", "argument of train"),
        ("reward_funcs", "argument of train"), ("reward_model_name_or_path", "reward_funcs"),
        ("teacher_model_name_or_path", "set teacher"), ("teacher_model_revision", "hf download --revision"),
        ("lmbda", "lowmem-grpo sft"), ("discount", "set gamma"), ("max_seq_length", "set max_prompt_length and"),
        ("random_state", "set seed"), ("fast_inference", "no second engine"), ("n_samples_per_prompt", "num_generations"),
        ("actor_learning_rate", "set learning_rate"), ("loss_agg_mode", "dapo for token-mean"), ("trainer", "sections"),
        ("vllm_sampling_params", "nothing else; remove it"), ("vllm_dtype", "no second engine"), ("overwrite_output_dir", "folder without checkpoints"),
        ("chat_template", "tokenizer.chat_template"), ("dataset_prompt_column", "rename the column"), ("dataset_mixture", "concatenate"),
        ("stop", "set stop_strings"), ("num_completions_to_print", "writes all of them"), ("generation_kwargs", "nothing else; use those"),
        ("presence_penalty", "nothing else; remove it"), ("wandb_entity", "WANDB_ENTITY"), ("hub_model_revision", "set hub_revision"),
        ("actor_rollout_ref.rollout.n", "set num_generations"), ("actor_rollout_ref.actor.optim.lr", "set learning_rate"),
        ("critic.optim.lr", "set critic_learning_rate"), ("critic.model.path", "set critic_init"),
        ("actor_rollout_ref.rollout.val_kwargs.n", "set num_generations_eval"), ("rollout.val_kwargs.top_p", "samples as training does"),
        ("reward_model.overlong_buffer.len", "get_soft_overlong_punishment"), ("filter_groups.metric", "dynamic_sampling_rounds"), ("reward_model.model.path", "reward_funcs"), ("algorithm.adv_estimator", "write adv_estimator alone"),
    ],
)  # fmt: skip
def test_a_name_of_another_trainers_settings_gets_a_remedy_and_no_guess(name, remedy):
    with pytest.raises(TypeError, match=f"^GRPOConfig has no {name}: .*{re.escape(remedy)}") as caught:
        GRPOConfig(**{name: "x"})
    assert "did you mean" not in str(caught.value)


def test_what_a_remedy_says_to_set_is_a_setting_and_what_it_is_said_of_is_none():
    assert not set(FIELDS) & set(UNSUPPORTED_GRPO)
    said = {
        name for remedy in UNSUPPORTED_GRPO.values() for name in re.findall(r"\bset (?:\w+, and )?(\w+_\w+)", remedy)
    }
    assert len(said) > 30 and said <= set(FIELDS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_is_no_loss_type_is_named_by_settings_that_make_one(name):
    with pytest.raises(InputError, match=f"loss_type={name!r} is not known; set ") as caught:
        GRPOConfig(loss_type=name)
    eval(f"GRPOConfig({', '.join(re.findall('[a-z_]+=.[a-z_]+.', str(caught.value))[1:])})")


def test_a_name_of_trls_or_unsloths_that_is_imported_says_what_to_call():
    with pytest.raises(ImportError, match="^lowmem_grpo has no GRPOTrainer: call train"):
        from lowmem_grpo import GRPOTrainer  # type: ignore[attr-defined]  # noqa: F401
    assert not hasattr(lowmem_grpo, "GRPOTrainer")


@pytest.mark.parametrize(
    ("function", "name", "remedy"),
    [
        ("train", "args", "name it config"), ("train", "processing_class", "name it tokenizer"), ("sft", "formatting_func", "make the rows"),
        ("train", "num_generations", "settings are given in config"), ("train_reward_model", "train_datasets", "did you mean train_dataset?"),
    ],
)  # fmt: skip
def test_an_argument_of_a_trainers_is_named_as_it_is_here(function, name, remedy):
    with pytest.raises(TypeError, match=rf"^{function}\(\) has no argument '{name}'; {re.escape(remedy)}"):
        getattr(lowmem_grpo, function)("model", **{name: None})


def test_a_public_name_is_listed_before_it_is_loaded():
    assert set(lowmem_grpo.__all__) <= set(dir(lowmem_grpo))


def test_defaults_are_trls_but_for_the_stated_ones():
    theirs = trl_defaults()
    different = {n for n, field in FIELDS.items() if n in theirs and theirs[n] != field.default}
    assert different == DIFFERENT


def test_the_documents_name_every_difference():
    text = (Path(__file__).parents[1] / "docs/coming-from-trl.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", text))
    assert named >= (DIFFERENT - {"output_dir"}) | (
        OURS - {"dataset_config", "dataset_split", "system_prompt", "dataset_streaming"}
    )


def test_texts_cover_every_field():
    assert set(TEXTS) == set(FIELDS)


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_a_field_survives_the_way_from_text(name):
    text, value = TEXTS[name]
    read = from_text(GRPOConfig, name, text)
    assert read == value
    assert type(read) is type(value)
    assert value != FIELDS[name].default or name in {"bf16"}
    assert getattr(GRPOConfig(**(READ | REPORTING).get(name, ({},))[0], **{name: value}), name) == value


@pytest.mark.parametrize("name", sorted(READ | REPORTING))
def test_an_option_that_nothing_would_read_is_refused_with_the_remedy(name):
    (where, elsewhere, remedy), value = (READ | REPORTING)[name], TEXTS[name][1]
    assert getattr(GRPOConfig(**{**where, name: value}), name) == value
    with pytest.raises(ValueError, match=rf"^{name}=.* is read only .*{remedy}.*, or leave {name} out$"):
        GRPOConfig(**{**elsewhere, name: value})
    assert getattr(GRPOConfig(**{**elsewhere, name: FIELDS[name].default}), name) == FIELDS[name].default
    with pytest.raises(ValueError, match=f"^{name}=.* is read only"):
        dataclasses.replace(GRPOConfig(**elsewhere), **{name: value})


def test_every_row_of_options_that_are_not_read_everywhere_is_tested():
    assert set(READ) == set(READ_ONLY)


def test_a_loss_of_ones_own_may_read_what_it_likes():
    LOSS_TYPES["own"] = OWN_LOSS
    try:
        assert GRPOConfig(loss_type="own", delta=4.0, sapo_temperature_pos=2.0, vespo_k_pos=1.0).delta == 4.0
    finally:
        del LOSS_TYPES["own"]


def test_a_union_of_text_and_list_takes_both():
    assert from_text(GRPOConfig, "lora_target_modules", ["q_proj"]) == ["q_proj"]
    assert (
        from_text(GRPOConfig, "lora_target_modules", "all-linear")
        == from_text(GRPOConfig, "lora_target_modules", ["all-linear"])
        == "all-linear"
    )
    assert from_text(GRPOConfig, "lora_target_modules", [r".*\.q_proj"]) == r".*\.q_proj"
    assert from_text(GRPOConfig, "resume_from_checkpoint", "out/checkpoint-20") == "out/checkpoint-20"


@pytest.mark.parametrize(
    ("name", "text"),
    [("learning_rate", "fast"), ("seed", "1.5"), ("use_cpu", "maybe"), ("kl_estimator", "k4"), ("reward_weights", ["a"]),
     ("chat_template_kwargs", "{"), ("max_steps", ""), ("learning_rate", "nan")],
)  # fmt: skip
def test_a_text_that_does_not_fit_says_what_would(name, text):
    with pytest.raises(ValueError, match=rf"^{name}: .* is not "):
        from_text(GRPOConfig, name, text)


def test_a_field_of_trls_that_is_not_supported_is_refused_with_the_remedy():
    with pytest.raises(
        TypeError, match="GRPOConfig has no per_device_train_batch_size: a step holds prompts_per_step x"
    ):
        GRPOConfig(per_device_train_batch_size=8)  # pyright: ignore[reportCallIssue]: no such field
    with pytest.raises(
        TypeError, match="GRPOConfig has no use_vllm: completions are sampled from the resident weights"
    ):
        GRPOConfig(use_vllm=True)  # pyright: ignore[reportCallIssue]: no such field


def test_all_that_is_not_supported_is_said_at_once_and_what_is_done_anyway_is_taken():
    said = """GRPOConfig has no use_vllm, vllm_mode: completions are sampled from the resident weights, so there is no second engine to set up; remove it
GRPOConfig has no logging_steps: every step is logged, so there is no interval to set; remove it
GRPOConfig has no field 'learning_rat'; did you mean learning_rate?"""
    given = {"use_vllm": True, "logging_steps": 5, "learning_rat": 1, "vllm_mode": "colocate", "use_peft": True}
    with pytest.raises(TypeError, match=f"^{re.escape(said)}$"):
        GRPOConfig(**given)
    assert set(AS_DONE) <= set(UNSUPPORTED_GRPO)
    for name, values in AS_DONE.items():
        for value in (*values, None):
            assert GRPOConfig(**{name: value}) == GRPOConfig()
    with pytest.raises(TypeError, match="no use_peft: LoRA adapters are always"):
        GRPOConfig(use_peft=False)  # pyright: ignore[reportCallIssue]: no such field


def test_a_misspelt_field_is_refused_with_the_nearest():
    with pytest.raises(TypeError, match="no field 'learning_rat'; did you mean learning_rate"):
        GRPOConfig(learning_rat=1e-5)  # pyright: ignore[reportCallIssue]: no such field
    with pytest.raises(TypeError, match="see `lowmem-grpo train --help_all`"):
        GRPOConfig(xyzzy=1)  # pyright: ignore[reportCallIssue]: no such field
    with pytest.raises(TypeError, match=r"GRPOConfig.__init__\(\) takes 1 positional"):  # Python's words, of this class
        GRPOConfig("out")  # pyright: ignore[reportCallIssue]: none has a place


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_generations": 1}, "a group needs at least 2 completions"),
        (
            {"adv_estimator": "reinforce_plus_plus", "num_generations": 1, "prompts_per_step": 1},
            "compares the completions of a step, and .* makes one; raise either",
        ),
        ({"learning_rate": "1e-5"}, "learning_rate='1e-5' is not a number"),
        ({"learning_rate": -1.0}, "learning_rate must be at least 0, not -1.0; the default is 1e-05"),
        ({"seed": 2**32}, "seed must be at most 4294967295, not 4294967296"),
        ({"learning_rate": float("inf")}, "is not a number"),
        ({"seed": True}, "seed=True is not a whole number"),
        ({"loss_type": "reinforce"}, "loss_type='reinforce' is not known; the objectives are dapo, grpo"),
        ({"loss_type": "DAPO"}, "loss_type='DAPO' is not known; did you mean dapo"),
        ({"loss_type": "gspo"}, "set loss_type='grpo' and importance_sampling_level='sequence'"),
        ({"temperature": 0.0}, "temperature must be at least 1e-06, not 0.0"),
        ({"top_p": 0.0}, "top_p must be greater than 0"),
        ({"top_p": 1.1}, "top_p must be at most 1, not 1.1; the default is 1.0"),
        ({"min_p": 1.5}, "min_p must be at most 1, not 1.5; the default is None"),
        ({"epsilon": 1.5}, "epsilon=1.5 must be at most 1"),
        ({"delta": 1.1}, "delta=1.1 must be above 1"),
        ({"bf16": True, "fp16": True}, "choose one"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, "'constant_with_warmup'"),
        ({"max_steps": 0}, "max_steps=0 must be positive"),
        ({"save_steps": 0}, "save_steps must be greater than 0"),
        ({"adam_beta1": 1.0}, "adam_beta1 must be below 1"),
        ({"lora_dropout": 1.0}, "lora_dropout must be below 1"),
        ({"learning_rate": float("nan")}, "is not a number"),
        ({"max_nonfinite_steps": -1}, "max_nonfinite_steps must be at least 0"),
        ({"learning_rate": 0.1, "weight_decay": 11.0}, "times learning_rate=0.1 must be at most 1"),
    ],
)
def test_values_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**change)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 1e308), ("learning_rate", 10**400), ("adam_epsilon", 1e-320), ("weight_decay", 1e300),
        ("beta", 1e300), ("entropy_coef", 1e300), ("epsilon_high", 1e300), ("temperature", 1e-300),
        ("max_grad_norm", 1e-40), ("reward_weights", [1.0, 1e308]), ("max_steps", 10**400),
    ],
)  # fmt: skip
def test_a_number_that_fp32_has_not_is_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}=.* is out of reach of fp32.* between 1.2e-38 and 3.4e.38$"):
        GRPOConfig(**{name: value})


def test_the_least_and_the_most_of_fp32_are_taken():
    config = GRPOConfig(adam_epsilon=1.2e-38, beta=3.4e38, reward_weights=[0.0, -1.2e-38])
    assert (config.adam_epsilon, config.beta) == (1.2e-38, 3.4e38)


def test_the_compute_dtype_follows_bf16_and_fp16():
    assert GRPOConfig().compute_dtype == "bfloat16"
    assert GRPOConfig(fp16=True).compute_dtype == "float16"
    assert GRPOConfig(bf16=False).compute_dtype == "float32"


def test_a_config_is_frozen_and_can_be_replaced():
    config = GRPOConfig(beta=0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.beta = 0.2  # type: ignore[misc] # it is frozen
    assert dataclasses.replace(config, seed=3) == GRPOConfig(beta=0.1, seed=3)


def test_every_field_has_a_type_and_a_short_help_text():
    assert all(0 < len(field.metadata["help"]) <= 110 for field in FIELDS.values())
    assert set(field_types(GRPOConfig)) >= set(FIELDS)


def test_sections_hold_every_field_once_in_the_order_of_the_config():
    found = [field.name for _, fields in sections(GRPOConfig) for field in fields]
    assert found == list(FIELDS) == list(dataclasses.asdict(GRPOConfig()))
    titles = [title for title, _ in sections(GRPOConfig)]
    assert titles[:2] == ["run", "model"] and titles[-2:] == ["saving", "reporting"]


def test_another_training_can_be_made_of_the_same_sections():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Other(SavingFields, ModelFields, RunFields):
        def check(self):
            if self.save_steps == 7:
                raise InputError("not 7")

    assert [title for title, _ in sections(Other)] == ["run", "model", "saving"]
    assert Other(vram_budget="8GB").vram_budget_bytes == 8 * 10**9
    for given, message in [
        ({"vram_budget": "8"}, "is not a size"),
        ({"seed": -1}, "at least 0"),
        ({"save_steps": 7}, "not 7"),
    ]:
        with pytest.raises(InputError, match=message):
            Other(**given)


def test_a_section_by_itself_checks_its_own_fields():
    assert OptimizerFields(learning_rate=0.1) == OptimizerFields(learning_rate=0.1) != OptimizerFields()
    with pytest.raises(InputError, match="times learning_rate=0.1 must be at most 1"):
        OptimizerFields(learning_rate=0.1, weight_decay=11.0)
    with pytest.raises(InputError, match="optim='sgd' is not one of"):
        OptimizerFields(optim="sgd")


def test_a_config_survives_pickle():
    config = GRPOConfig(beta=0.1, stop_strings=["</answer>"])
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_subclass_has_fields_of_its_own():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(GRPOConfig):
        extra: int = 3
        beta: float = 0.3

    assert (Mine().extra, Mine(extra=4).extra, Mine().beta) == (3, 4, 0.3)
    with pytest.raises(InputError, match="extra='x' is not a whole number"):
        Mine(extra="x")
    with pytest.raises(TypeError, match="no field 'extr'; did you mean extra"):
        Mine(**{"extr": 4})


def test_a_sampled_files_name_leaves_room_for_that_of_its_settings():
    SampleConfig(output="x" * 237)  # and .run.being-written
    with pytest.raises(InputError, match="output=.* has a name longer than 237 bytes; shorten it"):
        SampleConfig(output="a/" + "x" * 238)

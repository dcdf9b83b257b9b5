"""Hostile values of every setting: each is taken with a meaning, or refused in one sentence."""

import dataclasses
import json
import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import text_reward
from tiny_models import DEMO_MODEL

from lowmem_grpo.config.fields import MOST, from_text
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.demo import task
from lowmem_grpo.errors import InputError, NotFiniteError
from lowmem_grpo.inputs.prompts import read_training_inputs
from lowmem_grpo.loops.grpo import train


class Odd:
    """An object whose every answer is an error."""

    __hash__ = None  # type: ignore[assignment] # as of a list

    def __repr__(self):
        raise RuntimeError("no words")

    def __eq__(self, other):
        raise RuntimeError("no comparison")


def nested(depth, kind):
    value = kind()
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


OWN_TAIL: list = []
OWN_TAIL.append(OWN_TAIL)
TIMES_TEN: list = []
for _ in range(15):  # 10**15 entries, as anchors of YAML make them
    TIMES_TEN = [TIMES_TEN] * 10
HOSTILE = [
    10**400, -(10**400), 10**5000, -1, 0, 1, 2**31, 2**64, 1e300, -1e300, 1e-300, -0.0, 1.5, math.nan, math.inf, -math.inf,
    "", " ", "\0", "\ud800", "x" * 10**6, "true", "none", "1", "1_000", "1e5", "0x10", "nan", "-inf", "\x1b[2J", "[bold]", "{", "[" * 5000,
    '{"a": NaN}', '{"a": 1, "a": 2}', '{"a":' * 5000, "9" * 5000, "9" * 5000 + "GB", b"x",
    [], [[]], [""], ["\ud800"], ["\0"], ["x", 1], [0], [0.0, 0.0], [1e308], [math.nan], [True], [None], OWN_TAIL, nested(3000, list),
    {}, {1: 2}, {None: 1}, {"a": Odd()}, {"a": math.nan}, {"a": 10**5000}, {"\ud800": 1}, {"a": "\ud800"}, {"a": {1}}, {"a": b"x"},
    {"a": OWN_TAIL}, {"a": TIMES_TEN}, nested(3000, dict), (), (1, 2), set(), frozenset(), range(3), None, True, False, object(), Odd(), len, int, 1j, ...,
    Decimal(1), Fraction(1, 2), Path("x"), np.float32(1), np.float64("nan"), np.int64(3), np.bool_(True), np.array([1, 2]), np.array(1.0),
    torch.tensor(1.0), torch.tensor([1, 2]),
]  # fmt: skip


def refusal(field, value, as_typed):
    """The sentence that refuses a value, or None where it is taken."""
    try:
        config = GRPOConfig(**{field: from_text(GRPOConfig, field, value) if as_typed else value})
    except InputError as error:
        return str(error)
    saved = json.dumps(dataclasses.asdict(config), allow_nan=False, ensure_ascii=False).encode()
    assert json.loads(saved) == dataclasses.asdict(config)
    return None


@pytest.mark.parametrize("as_typed", [False, True], ids=["in Python", "from a command or file"])
def test_every_value_of_every_field_is_taken_or_refused_in_one_sentence(as_typed):
    pairs = [(field.name, value) for field in dataclasses.fields(GRPOConfig) for value in enumerate(HOSTILE)]
    assert len(pairs) > 3500
    for field, (place, value) in pairs:
        try:
            words = refusal(field, value, as_typed)
        except Exception as error:
            pytest.fail(f"{field}, HOSTILE[{place}]: {type(error).__name__}: {error}")
        fits = words is None or (field in words and words.isprintable() and len(words) < 500)
        assert fits, f"{field}, HOSTILE[{place}]: {words!s:.500}"


COUNTS = {
    field.name: field
    for field in dataclasses.fields(GRPOConfig)
    if type(field.default) is int or field.type in ("int | None", int | None)
}


@pytest.mark.parametrize("field", COUNTS)
def test_no_count_is_endless(field):
    assert len(COUNTS) > 20
    with pytest.raises(InputError, match=f"^{field} must be at most [0-9]+, not [0-9]+; the default is "):
        GRPOConfig(**{field: max(MOST, 2**32) + 1})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompts_per_step": 10**6}, "makes 8000000 completions a step, more than 16384, .*; lower one$"),
        ({"prompts_per_step": 2**10, "num_generations": 2**7}, "makes 131072 completions"),
        ({"num_train_epochs": 1e7}, "num_train_epochs must be at most 1000000, not 10000000.0"),
        ({"curriculum_skip": 1 - 2**-53}, "curriculum_skip must be at most 0.999"),
        ({"reward_timeout": 1e300}, "reward_timeout=1e.300 is out of reach"),
        ({"reward_timeout": 1e9}, "reward_timeout must be at most 100000000"),
        ({"temperature": 1e-30}, "temperature must be at least 1e-06"),
        ({"reward_weights": [0.0, 0.0]}, "reward_weights has no weight but 0, so that nothing would be learned"),
        ({"reward_weights": []}, "reward_weights has no weight but 0"),
        ({"reward_weights": [1.0, 1e30]}, "reward_weights must be at most 1000000"),
        ({"vram_budget": "9" * 400 + "GB"}, "is not a size"),
        ({"output_dir": ""}, "output_dir has an empty text; remove it"),
        ({"output_dir": "a\0b"}, r"output_dir='a\\x00b' has a null character"),
        ({"stop_strings": ["a", "\ud800"]}, r"stop_strings has half a character, in '\\ud800', which a file of JSON cannot"),
        ({"model_init_kwargs": {1: 2}}, "model_init_kwargs has the name 1, which is no text"),
        ({"model_init_kwargs": {"a": TIMES_TEN}}, "model_init_kwargs has more than 10000 values"),
    ],
)  # fmt: skip
def test_what_would_run_for_ever_or_cannot_be_saved_is_refused(given, words):
    with pytest.raises(InputError, match=words):
        GRPOConfig(**given)


ROWS = task.rows(task.splits()[0][:2])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"output_dir": "x" * 300}, "output_dir=.* has a name longer than 255 bytes"),
        ({"resume_from_checkpoint": "a/" + "é" * 200}, "resume_from_checkpoint=.* has a name longer than 255 bytes"),
        ({"lora_r": 65536}, "lora_r=65536 is above 384, the model's largest dimension"),
        ({"lora_target_modules": "["}, "no adapter could be added: unterminated character set .*; name linear layers"),
        ({"lora_target_modules": ".*"}, "no adapter could be added: Target module Qwen2Model; name linear layers"),
        ({"lora_target_modules": ["q_proj", "q_prj"]}, "lora_target_modules has 'q_prj', and no module .*; did you mean q_proj"),
        ({"lora_target_modules": []}, "no adapter could be added: .*; name linear layers"),
        ({"model_init_kwargs": {"foo": 1}}, "model_init_kwargs has 'foo', which neither from_pretrained nor a qwen2 configuration"),
        ({"model_init_kwargs": {"hidden_sise": 128}}, "has 'hidden_sise', .*; did you mean hidden_size"),
        *(({"model_init_kwargs": {name: True}}, f"model_init_kwargs has '{name}', which neither") for name in (
            "return_unused_kwargs", "output_loading_info", "_from_auto", "config", "state_dict", "max_memory", "to_dict", "", "a b",
        )),
        ({"model_init_kwargs": {"attention_dropout": 0.5}}, "model_init_kwargs has attention_dropout, and the base's dropout is always off"),
        ({"model_init_kwargs": {"attn_implementation": "nope"}}, 'attn_implementation="nope"` is not supported'),
        ({"model_init_kwargs": {"attn_implementation": 1}}, "cannot be made"),
        ({"model_init_kwargs": {"attn_implementation": "flex_attention"}}, "use sdpa or eager"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "has 'enable_thinking', which the chat template does not read; leave it out"),
        ({"chat_template_kwargs": {"mess": 1}}, "has 'mess', which the chat template does not read"),
        ({"chat_template_kwargs": {"": 1}}, "has '', which the chat template does not read"),
        ({"chat_template_kwargs": {"chat_template": "{{ mode }}{% for"}}, "the chat template cannot render row 0"),
        *(({"chat_template_kwargs": {name: True}}, f"chat_template_kwargs has '{name}', which is set here") for name in (
            "tokenize", "add_generation_prompt", "continue_final_message", "messages", "conversation",
        )),
    ],
)  # fmt: skip
def test_what_the_libraries_would_refuse_or_ignore_is_refused_before_weights_are_read(given, words, tmp_path):
    config = {"output_dir": str(tmp_path / "out"), "use_cpu": True, **given}
    with pytest.raises(InputError, match=words) as caught:
        read_training_inputs(str(DEMO_MODEL), task.answer_reward, ROWS, None, GRPOConfig(**config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"loss_type": "gmpo", "epsilon": 100.0}, "epsilon=100.0 must be at most 80 with loss_type='gmpo'"),
        ({"loss_type": "gmpo", "epsilon_high": 3e38}, "epsilon_high=3e.38 must be at most 80 with loss_type='gmpo'"),
    ],
)  # fmt: skip
def test_the_exponential_of_a_bound_is_in_fp32(given, words):
    with pytest.raises(InputError, match=words):
        GRPOConfig(**given)


@pytest.mark.parametrize("name", ["", " ", "\0", "a\0b", "\ud800", "x" * 300, "x" * 5000, "/x" * 3000, "~nobodyatall/x", "~nobodyatall", "/dev/null", "a//b", "\x1b[2J"])  # fmt: skip
def test_a_name_that_no_model_and_no_tokenizer_has_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = GRPOConfig(output_dir="out", use_cpu=True)
    refused = "(is neither|is not a folder|is a file|cannot be looked for|is no name)"
    with pytest.raises(InputError, match=f"^model .*{refused}"):
        read_training_inputs(name, task.answer_reward, ROWS, None, config)
    if name.strip():
        with pytest.raises(InputError, match=f"^tokenizer .*{refused}"):
            read_training_inputs(str(DEMO_MODEL), task.answer_reward, ROWS, None, config, tokenizer=name)


@pytest.mark.parametrize("tokenizer", [5, b"x", [], object()])
def test_a_tokenizer_of_another_kind_is_refused(tokenizer, tmp_path):
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(InputError, match="^tokenizer is a .*; pass one that transformers loads"):
        read_training_inputs(str(DEMO_MODEL), task.answer_reward, ROWS, None, config, tokenizer=tokenizer)


def test_what_the_libraries_read_is_taken(tmp_path):
    template = "{% if mode == 'short' %}Briefly. {% endif %}{{ messages[0].content }}"
    given = {
        "model_init_kwargs": {"attn_implementation": "eager", "local_files_only": True, "rms_norm_eps": 1e-5},
        "chat_template_kwargs": {"chat_template": template, "mode": "short"}, "lora_target_modules": ["q_proj", "mlp.up_proj"],
    }  # fmt: skip
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **given)
    inputs = read_training_inputs(str(DEMO_MODEL), task.answer_reward, ROWS, None, config)
    assert inputs.tokenizer.decode(inputs.prompts[0].ids).startswith("Briefly. ")


def test_what_a_large_run_has_is_taken():
    config = GRPOConfig(
        prompts_per_step=512, num_generations=32, num_iterations=16, steps_per_generation=32, lora_r=1024, lora_alpha=4096,
        max_completion_length=2**17, max_prompt_length=2**17, token_budget=10**9, rollout_token_budget=10**9, max_steps=10**7,
        dynamic_sampling_rounds=100, replay_buffer_size=10**5, num_generations_eval=1024, dataset_take=10**9, temperature=1e-5,
    )  # fmt: skip
    assert config.prompts_per_step * config.num_generations == 2**14


EXTREME = [
    {"temperature": 1e-6}, {"beta": 3e38}, {"learning_rate": 3e38}, {"learning_rate": 0}, {"temperature": 1e6}, {"top_k": 10**9},
    {"top_p": 1.2e-38}, {"min_p": 1.0}, {"repetition_penalty": 100}, {"repetition_penalty": 0.01}, {"curriculum_skip": 0.999},
    {"dynamic_sampling_rounds": 3}, {"replay_buffer_size": 10**9}, {"reward_weights": [1e6]}, {"reward_weights": [-1.2e-38]}, {"reward_timeout": 1e8},
    {"epsilon": 1.0, "epsilon_high": 3e38}, {"epsilon": 0.0, "epsilon_high": 0.0}, {"delta": 3e38}, {"importance_sampling_clip_max": 1.2e-38},
    {"importance_sampling_clip_max": 3e38, "importance_sampling_clip_min": 2.9e38}, {"off_policy_mask_threshold": 0.0}, {"top_entropy_quantile": 1.2e-38},
    {"entropy_coef": 3e38}, {"weight_decay": 1000.0}, {"adam_beta1": 1 - 2**-53}, {"adam_beta2": 0.0}, {"adam_epsilon": 3e38}, {"max_grad_norm": 1.2e-38},
    {"max_grad_norm": 3e38}, {"warmup_steps": 10**9}, {"num_iterations": 30}, {"lora_r": 384}, {"lora_alpha": 10**6}, {"lora_dropout": 1 - 2**-53},
    {"seed": 2**32 - 1}, {"num_train_epochs": 1.2e-38, "max_steps": -1}, {"loss_type": "vespo", "vespo_k_pos": 3e38, "vespo_lambda_neg": 3e38},
    {"loss_type": "sapo", "sapo_temperature_pos": 1.2e-38, "sapo_temperature_neg": 3e38}, {"loss_type": "gmpo", "epsilon": 80.0},
    {"loss_type": "cispo", "epsilon_high": 3e38}, {"beta": 0.1, "kl_target": 1.2e-38, "kl_horizon": 1}, {"beta": 0.1, "kl_target": 3e38, "kl_horizon": 10**9},
    {"beta": 1e6, "kl_in_reward": True}, {"use_adaptive_entropy": True, "entropy_coef_max": 3e38, "entropy_coef_delta": 3e38, "entropy_target": 3e38},
    {"stop_strings": ["x" * 10**5, "\x1b"]}, {"system_prompt": "\x1b[2J"}, {"output_dir": "a\n\x1b[2J"},
    {"scale_rewards": "none", "reward_weights": [1e6]}, {"loss_type": "vespo", "vespo_lambda_pos": 3e38, "vespo_k_neg": 3e38},
    {"teacher": str(DEMO_MODEL), "teacher_coef": 3e38}, *({"adv_estimator": "gae", **of_ppo} for of_ppo in (
        {"critic_learning_rate": 3e38}, {"cliprange_value": 1.2e-38}, {"cliprange_value": 3e38}, {"gamma": 0.0, "lam": 0.0},
        {"reward_weights": [1e6]}, {"beta": 3e38}, {"lora_alpha": 10**6}, {"max_grad_norm": 1.2e-38},
    )),
]  # fmt: skip


def run_extreme(given, tmp_path):
    """Two steps of the demo end with a finite adapter, or in a sentence; returns their metrics, or None."""
    rows = task.rows(task.splits()[0][:4])
    settings = {
        "use_cpu": True, "bf16": False, "load_in_4bit": False, "gradient_checkpointing": False, "max_completion_length": 4, "prompts_per_step": 2,
        "num_generations": 2, "num_iterations": 2, "max_steps": 2, "learning_rate": 1e-3, **given, "output_dir": str(tmp_path / given.get("output_dir", "out")),
    }  # fmt: skip
    try:
        result = train(str(DEMO_MODEL), text_reward, rows, config=GRPOConfig(**settings))
    except (InputError, NotFiniteError) as error:
        assert "\n" not in str(error) and len(str(error)) < 500
        return None
    policy = result.policy
    assert all(parameter.isfinite().all() for parameter in policy.parameters_of(policy.adapter).values())
    return result.history


def test_the_run_that_extreme_settings_are_tried_in_learns_and_reaches_the_bounds_of_ratios(tmp_path):
    lines = run_extreme({"epsilon": 0.0, "epsilon_high": 0.0}, tmp_path)
    assert all(line["grad_norm"] > 0 and line["clip_ratio/region_mean"] > 0 for line in lines) and len(lines) == 2


@pytest.mark.parametrize("given", EXTREME[:3], ids=str)
def test_a_run_with_an_extreme_setting_stays_finite_or_ends_in_a_sentence(given, tmp_path):
    run_extreme(given, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("given", EXTREME[3:], ids=lambda given: f"{given!s:.60}")
def test_a_run_with_any_extreme_setting_stays_finite_or_ends_in_a_sentence(given, tmp_path):
    run_extreme(given, tmp_path)

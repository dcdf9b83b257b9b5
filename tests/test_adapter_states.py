"""Adapters as people have them: each is trained for a step, saved and loaded back equal, or refused in one sentence."""

import warnings
from functools import cache
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
)
from peft.tuners.lora import LoraLayer
from test_train import run, text_reward, varied_reward
from tiny_models import DEMO_MODEL
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.errors import InputError
from lowmem_grpo.generate.sample import Sampler
from lowmem_grpo.model.adapter_folder import warn_of_another_base
from lowmem_grpo.model.load import load_policy
from lowmem_grpo.model.packing import pack

pytestmark = pytest.mark.usefixtures("known_trials")

IN_FP32 = {"bf16": False, "load_in_4bit": False}


def base(**settings) -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32, **settings)


def adapted(config=None, on=None, **settings) -> Any:
    """The demo's model with an adapter: LoRA with these settings, on q_proj unless they say otherwise."""
    torch.manual_seed(0)
    if config is None:
        config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **settings})
    return get_peft_model(base() if on is None else on, config)


def awake(model) -> Any:
    """The model with adapters that are not zero."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.05)
    return model


def beside(active, config=None, **settings) -> Any:
    """The demo's model with the adapters "default" and "other", of which one is active."""
    model = adapted()
    model.add_adapter("other", config or LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **settings}))
    model.set_adapter(active)
    return awake(model)


def changed(model, change) -> Any:
    change(model)
    return model


def loaded(tmp_path, **settings) -> Any:
    awake(adapted()).save_pretrained(tmp_path / "mine")
    return PeftModel.from_pretrained(base(), str(tmp_path / "mine"), **settings)


def to_16_bits(model) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()


def scaled(model, *scales) -> None:
    for scale in scales:
        for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
            layer.set_scale("default", scale)


def scaled_in_one_layer(model) -> None:
    model.base_model.model.model.layers[1].self_attn.q_proj.scale_layer(3.0)


def named(name) -> Any:
    return awake(get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj"]), adapter_name=name))


TRAINED = {
    "as get_peft_model makes it": lambda _: adapted(),
    "of no task": lambda _: awake(adapted(task_type=None)),
    "of another task": lambda _: awake(adapted(task_type="FEATURE_EXTRACTION")),
    "prepared for training in 4-bit": lambda _: awake(adapted(on=prepare_model_for_kbit_training(base()))),
    "of another name": lambda _: named("mine"),
    "named like a part of a module's name": lambda _: named("proj"),
    "the first of two": lambda _: beside("default"),
    "the second of two": lambda _: beside("other"),
    "the second of two, activated past the PeftModel": lambda _: changed(
        beside("default"), lambda model: model.base_model.set_adapter("other")
    ),
    "beside one that was deleted": lambda _: changed(beside("other"), lambda model: model.delete_adapter("default")),
    "left when the active one was deleted": lambda _: changed(
        beside("other"), lambda model: model.delete_adapter("other")
    ),
    "loaded to be used": lambda tmp_path: loaded(tmp_path),
    "loaded to be trained": lambda tmp_path: loaded(tmp_path, is_trainable=True),
    "loaded under another name": lambda tmp_path: loaded(tmp_path, adapter_name="mine"),
    "of inference_mode": lambda _: awake(adapted(inference_mode=True)),
    "frozen": lambda _: changed(awake(adapted()), lambda model: model.requires_grad_(False)),
    "with every weight trainable": lambda _: changed(awake(adapted()), lambda model: model.requires_grad_(True)),
    "switched off": lambda _: changed(awake(adapted()), lambda model: model.base_model.disable_adapter_layers()),
    "in eval mode": lambda _: awake(adapted()).eval(),
    "in 16 bits": lambda _: changed(awake(adapted()), to_16_bits),
    "merged and unmerged": lambda _: changed(
        awake(adapted()), lambda model: (model.merge_adapter(), model.unmerge_adapter())
    ),
    "on a model that another was merged into": lambda _: awake(adapted(on=awake(adapted()).merge_and_unload())),
    "on a model that another was taken off": lambda _: awake(adapted(on=awake(adapted()).unload())),
    "of many ranks": lambda _: awake(
        adapted(target_modules="all-linear", rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 3})
    ),
    "of one layer": lambda _: awake(adapted(layers_to_transform=[1])),
    "of all but some modules": lambda _: awake(adapted(target_modules="all-linear", exclude_modules=["down_proj"])),
    "rslora": lambda _: awake(adapted(use_rslora=True)),
    "rslora of many ranks": lambda _: awake(
        adapted(target_modules="all-linear", use_rslora=True, rank_pattern={r"layers\.0\..*q_proj": 2}, alpha_pattern={"q_proj": 3})
    ),
    "scaled and scaled back": lambda _: changed(awake(adapted()), lambda model: scaled(model, 3.0, 1.0)),
    "of two that were added up": lambda _: changed(
        beside("default"),
        lambda model: (model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum", "cat"), model.set_adapter("sum")),
    ),
    "dora": lambda _: awake(adapted(use_dora=True)),
    "with a dropout": lambda _: awake(adapted(lora_dropout=0.3)),
    "with biases of its own": lambda _: awake(adapted(lora_bias=True)),
    "with modules trained whole": lambda _: awake(adapted(modules_to_save=["norm", "input_layernorm"])),
    "on the embedding": lambda _: awake(adapted(target_modules=["embed_tokens", "q_proj"])),
    "on a parameter": lambda _: awake(adapted(target_modules=[], target_parameters=["q_proj.weight"])),
    "that started with EVA": lambda _: awake(adapted(init_lora_weights="eva")),
    "that started gaussian": lambda _: adapted(init_lora_weights="gaussian"),
    "that started orthogonal": lambda _: adapted(init_lora_weights="orthogonal"),
    "that started with an effect": lambda _: adapted(init_lora_weights=False),
}  # fmt: skip


def logprobs(policy) -> torch.Tensor:
    batches = pack([[5] * 20], [[7, 8, 9] * 10], token_budget=1000, pad_token_id=0, device=policy.device)
    with policy.inference():
        return torch.cat([policy.logprobs(batch, 1.0) for batch in batches])


def load_in_fp32(model):
    return load_policy(model, tokenizer(), GRPOConfig(use_cpu=True, gradient_checkpointing=False, **IN_FP32))


def logprobs_of(model) -> torch.Tensor:
    """Of a model without adapters; load_policy adds one that starts without an effect."""
    return logprobs(load_in_fp32(model))


@cache
def logprobs_of_the_base() -> torch.Tensor:
    return logprobs_of(base())


CONTAINED = [  # in others, of the same branches: of many ranks, of two, in 16 bits, loaded
    "of another task", "prepared for training in 4-bit", "of another name", "the first of two",
    "left when the active one was deleted", "loaded to be trained", "frozen", "with every weight trainable",
    "in eval mode", "on a model that another was taken off", "of many ranks", "of one layer", "rslora",
    "with a dropout", "that started gaussian", "that started orthogonal", "that started with EVA",
]  # fmt: skip


@pytest.mark.parametrize(
    "state", [pytest.param(state, marks=pytest.mark.slow if state in CONTAINED else ()) for state in TRAINED]
)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_is_trained_from_its_base_and_what_is_saved_is_the_policy(state, tmp_path):
    model = TRAINED[state](tmp_path)
    expected = logprobs_of(awake(adapted()).merge_and_unload()) if "merged into" in state else logprobs_of_the_base()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    policy = run(
        tmp_path, model, varied_reward, max_steps=1, beta=0.1, max_completion_length=2, doctor="off", **IN_FP32
    ).policy
    after = dict(model.named_parameters())
    moved = {name for name in after if not torch.equal(after[name], before[name].float())}
    assert moved and moved <= {*policy.parameters_of(policy.adapter)}
    with policy.as_reference():
        torch.testing.assert_close(logprobs(policy), expected, atol=2e-5, rtol=0)
    trained = logprobs(policy)
    assert (trained - expected).abs().max() > 1e-4
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        saved = (tmp_path / "out" / folder / name for folder in ("adapter", "checkpoint-1"))
        assert len({path.read_bytes() for path in saved}) == 1
    if "merged into" in state:  # whose base is in no folder
        return
    again = load_in_fp32(str(tmp_path / "out/adapter"))
    torch.testing.assert_close(logprobs(again), trained, atol=2e-5, rtol=0)
    for name, values in policy.parameters_of(policy.adapter).items():
        assert torch.equal(again.parameters_of("default")[renamed(name, policy.adapter)], values), name


def merged() -> Any:
    return awake(adapted()).merge_and_unload()


ANOTHER_BASE = {
    "one that was merged": (lambda _: merged(), True),
    "one that was merged, in 16 bits": (lambda _: merged().bfloat16(), True),
    "an adapter on one that was merged": (lambda _: adapted(on=merged()), True),
    "one that was merged and saved": (lambda tmp_path: saved_and_loaded(merged(), tmp_path), False),
    "one with a longer vocabulary": (lambda _: changed(base(), lambda model: model.resize_token_embeddings(140)), True),
    "as it was loaded": (lambda _: base(), False),
    "in 16 bits": (lambda _: base().half(), False),
    "in 16 bits and back": (lambda _: base().half().float(), False),
    "prepared for training in 4-bit": (lambda _: prepare_model_for_kbit_training(base()), False),
    "with an adapter": (lambda _: awake(adapted()), False),
    "made anew": (lambda _: AutoModelForCausalLM.from_config(base().config), True),
    "of no name": (lambda _: changed(base(), lambda model: setattr(model.config, "_name_or_path", "")), False),
    "of a name that nobody has": (lambda _: changed(base(), lambda model: setattr(model, "name_or_path", "a/b//c")), False),
}  # fmt: skip


def saved_and_loaded(model, tmp_path) -> Any:
    model.save_pretrained(tmp_path / "merged")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)


@pytest.mark.parametrize("which", ANOTHER_BASE)
def test_a_model_that_is_no_longer_what_its_name_says_is_warned_of(which, tmp_path):
    make, is_another = ANOTHER_BASE[which]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make(tmp_path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warn_of_another_base(model.get_base_model() if isinstance(model, PeftModel) else model)
    assert [str(one.message).partition("; ")[2] for one in told] == is_another * [
        "save it with save_pretrained(), and train what is saved"
    ]


def to_zero(model) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.zero_()


def injected(tmp_path) -> Any:
    return inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj"]), base())


def of_layers_that_differ(_) -> Any:
    model = beside("default")
    model.base_model.model.model.layers[0].self_attn.q_proj.set_adapter("other")
    return model


def scored(_) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(DEMO_MODEL, num_labels=1, dtype=torch.float32)


REFUSED = {
    "two that are active": (
        lambda _: changed(beside("default"), lambda model: model.base_model.set_adapter(["default", "other"])),
        "default, other active at once; activate the one to train",
    ),
    "layers that differ": (of_layers_that_differ, "active at once; activate the one to train"),
    "merged": (
        lambda _: changed(awake(adapted()), lambda model: model.merge_adapter()),
        "'default' is merged into the base; load the base anew",
    ),
    "scaled": (
        lambda _: changed(awake(adapted()), lambda model: scaled(model, 9.0)),
        "q_proj scales the adapter 'default' by 18, and its configuration by 2, .*without set_scale",
    ),
    "scaled in one layer": (
        lambda _: changed(awake(adapted()), scaled_in_one_layer), "layers.1.self_attn.q_proj scales the adapter 'default' by 6,",
    ),
    "another one scaled": (
        lambda _: changed(beside("other"), lambda model: scaled(model, 0.5)), "scales the adapter 'default' by 1, and",
    ),
    "with another alpha in its configuration": (
        lambda _: changed(awake(adapted()), lambda model: setattr(model.peft_config["default"], "lora_alpha", 32)),
        "by 2, and its configuration by 8,",
    ),
    "another one merged": (
        lambda _: changed(beside("default"), lambda model: model.merge_adapter(["other"])), "'other' is merged into",
    ),
    "the active one deleted": (
        lambda _: changed(adapted(), lambda model: model.delete_adapter("default")), "no adapter of the PeftModel is active",
    ),
    "in the layers of no PeftModel": (injected, "no PeftModel; load its base anew"),
    "left in a model by an earlier one": (
        lambda _: changed(base(), lambda model: adapted(on=model)), "no PeftModel; load its base anew",
    ),
    "a PeftModel in a PeftModel": (lambda _: adapted(on=adapted()), "the base of the PeftModel is a PeftModelForCausalLM"),
    "LoRA around IA3": (
        lambda _: adapted(on=changed(base(), lambda model: adapted(IA3Config(task_type="CAUSAL_LM"), on=model))),
        "has a peft.tuners.ia3.* beside LoRA; load its base anew",
    ),
    "IA3": (lambda _: adapted(IA3Config(task_type="CAUSAL_LM")), "is a IA3Config; only LoraConfig"),
    "LoHa": (
        lambda _: adapted(LoHaConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")), "is a LoHaConfig; only LoraConfig",
    ),
    "VeRA": (
        lambda _: adapted(VeraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")), "is a VeraConfig; only LoraConfig",
    ),
    "AdaLoRA": (
        lambda _: adapted(AdaLoraConfig(total_step=9, target_modules=["q_proj"], task_type="CAUSAL_LM")),
        "is a AdaLoraConfig; only LoraConfig",
    ),
    "prompt tuning": (
        lambda _: adapted(PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
        "is a PromptTuningConfig; only LoraConfig",
    ),
    "biases": (lambda _: adapted(bias="lora_only"), "the model's adapter trains biases"),
    "biases of one that is not active": (lambda _: beside("default", bias="all"), "the model's adapter 'other' trains biases"),
    "PiSSA": (lambda _: adapted(init_lora_weights="pissa"), "'pissa', which takes from the base, .*; convert it to plain LoRA"),
    "fast PiSSA": (lambda _: adapted(init_lora_weights="pissa_niter_4"), "'pissa_niter_4', which takes from the base"),
    "OLoRA": (lambda _: adapted(init_lora_weights="olora"), "'olora', which takes from the base"),
    "OLoRA of one that is not active": (
        lambda _: beside("default", init_lora_weights="olora"), "'other' has init_lora_weights='olora', which takes",
    ),
    "MiCA": (lambda _: adapted(init_lora_weights="mica"), "'mica', which takes from the base"),
    "on the head": (lambda _: adapted(target_modules=["lm_head"]), "leave lm_head and the embeddings out"),
    "the head trained whole": (lambda _: adapted(modules_to_save=["lm_head"]), "leave lm_head and the embeddings out"),
    "some tokens": (lambda _: adapted(trainable_token_indices=[3]), "sets trainable_token_indices"),
    "after a token alone": (lambda _: adapted(alora_invocation_tokens=[3]), "sets alora_invocation_tokens"),
    "of layers that are repeated": (lambda _: adapted(layer_replication=[[0, 2], [1, 3]]), "sets layer_replication"),
    "without effect": (lambda _: adapted(lora_alpha=0), "no weight of the adapter 'default' gets a gradient"),
    "all zero": (lambda _: changed(adapted(), to_zero), "no weight of the adapter 'default' gets a gradient"),
    "without memory": (lambda _: adapted().to("meta"), "no values for base_model.*; load the whole model"),
    "a model with a score": (scored, "has no output embedding; a causal language model is needed|has an adapter"),
}  # fmt: skip


@pytest.mark.parametrize("state", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_cannot_be_trained_as_it_is_is_refused_in_one_sentence(state, tmp_path):
    make, words = REFUSED[state]
    with pytest.raises(InputError, match=words) as caught:
        run(tmp_path, make(tmp_path), text_reward, max_steps=1, **IN_FP32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "mica", "loftq", "eva"])
@pytest.mark.filterwarnings("ignore")
def test_a_new_adapter_that_would_start_from_something_else_than_itself_is_refused(start, tmp_path):
    config = LoraConfig(target_modules=["q_proj"])
    config.init_lora_weights = start  # LoraConfig itself asks for scipy before it takes "loftq"
    source = "data" if start == "eva" else "the base, which is the reference"
    with pytest.raises(
        InputError, match=f"has init_lora_weights='{start}', which takes from {source}; leave it at True"
    ):
        run(tmp_path, rewards=text_reward, peft_config=config)


def renamed(name: str, adapter: str) -> str:
    return ".".join("default" if part == adapter else part for part in name.split("."))


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.mark.parametrize("module", ["norm", "embed_tokens"])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_a_module_trained_whole_is_sampled_from_by_the_engine_in_16_bits(module, tmp_path):
    awake(adapted(modules_to_save=[module])).save_pretrained(tmp_path / "mine")
    config = GRPOConfig(use_cpu=True, max_completion_length=4)
    policy = load_policy(str(tmp_path / "mine"), tokenizer(), config)
    assert any(module in name and p.dtype == torch.float32 for name, p in policy.model.named_parameters())
    sampler, ids = Sampler(policy, config), [1, 2, 3, 4]
    with policy.as_reference():
        assert sampler.engine_refusal is None
    (completion,) = sampler.complete([Prompt("x", ids, {})], 1).completions
    (batch,) = pack([ids], [completion.ids], token_budget=100, pad_token_id=0, device=policy.device)
    with policy.inference():
        torch.testing.assert_close(completion.logprobs, policy.logprobs(batch, 1.0), atol=0.1, rtol=0)
    assert sampler.engine_refusal is None

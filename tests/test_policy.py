import copy
import shutil
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from tiny_models import DEMO_MODEL, make_model, make_policy, wake_adapters
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPT2Config, Qwen3MoeConfig

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.model.head import Head, probe_head, probed_head, read_head
from lowmem_grpo.model.load import (
    _placed,
    find_model,
    load_policy,
    load_tokenizer,
    quantize_linears,
    refuse_4bit_elsewhere,
)
from lowmem_grpo.model.packing import pack

PROMPTS = [[10, 11, 12], [20, 21, 22, 23, 24, 25]]
COMPLETIONS = [[30, 31, 32, 33, 1], [40, 41]]


def batches(policy, token_budget=1000, prompts=PROMPTS, completions=COMPLETIONS):
    return list(pack(prompts, completions, token_budget=token_budget, pad_token_id=0, device=policy.device))


def own_logprobs(policy, temperature=1.0):
    """From the model's own logits, one sequence at a time, in the order of COMPLETIONS."""
    scores = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        with torch.no_grad(), policy.autocast():
            logits = policy.model(input_ids=torch.tensor([prompt + completion])).logits[0].float() / temperature
        predicting = logits[len(prompt) - 1 : -1].log_softmax(-1)
        scores.append(predicting.gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(scores)


def flat_logprobs(policy, token_budget=1000, temperature=1.0):
    flat = torch.zeros(7)
    for batch in batches(policy, token_budget):
        flat[batch.token_index] = policy.logprobs(batch, temperature).detach()
    return flat


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_models_own(family, temperature):
    policy = make_policy(family)
    torch.testing.assert_close(
        flat_logprobs(policy, temperature=temperature), own_logprobs(policy, temperature), atol=8e-6, rtol=0
    )


def test_logprobs_do_not_depend_on_micro_batches(family):
    policy = make_policy(family)
    torch.testing.assert_close(flat_logprobs(policy, token_budget=1), flat_logprobs(policy), atol=4e-6, rtol=0)


def test_the_reference_is_the_base_without_adapters():
    policy = make_policy("llama", load_in_4bit=False)
    with policy.as_reference():
        reference = flat_logprobs(policy)
    base = make_model("llama")
    policy.model = base
    torch.testing.assert_close(reference, own_logprobs(policy), atol=2e-6, rtol=0)


def test_the_training_mode_survives_inference():
    policy = make_policy()
    with policy.as_reference():
        assert not policy.model.training
    assert policy.model.training
    assert all(parameter.requires_grad for parameter in policy.parameters_of(policy.adapter).values())
    assert len(policy.parameters_of(policy.adapter)) == 2 * 7 * 2  # A and B of seven linears in two layers


def test_only_fp32_adapters_are_trained():
    policy = make_policy(bf16=True)
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in policy.parameters_of(policy.adapter).items())
    assert policy.head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dropped", ["softcap", "logit_scale", "bias"])
def test_a_head_that_lacks_something_the_model_does_is_refused(dropped):
    family = {"softcap": "gemma2", "logit_scale": "granite", "bias": "qwen2"}[dropped]
    model = make_model(family)
    if dropped == "bias":
        model.lm_head.bias = torch.nn.Parameter(torch.randn(128) * 0.01, requires_grad=False)
    model.requires_grad_(False)
    head = read_head(model)
    probe_head(model, head)
    without = head._replace(**{dropped: 1.0 if dropped == "logit_scale" else None})
    assert without != head
    with pytest.raises(ValueError, match="does something besides bias, scale and tanh softcap"):
        probe_head(model, without)
    if dropped != "bias":
        found = probed_head(model, without)
        assert found.logit_scale == pytest.approx(head.logit_scale, rel=1e-6) and found.softcap == head.softcap


def test_rows_that_fill_up_a_vocabulary_are_no_part_of_the_head():
    model = make_model("llama").requires_grad_(False)
    original = type(model).forward

    def cut(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        output.logits = output.logits[..., :120]
        return output

    model.forward = cut.__get__(model)
    assert probed_head(model, read_head(model)).weight.shape == (120, 64)


def test_a_head_that_does_something_unknown_is_refused():
    model = make_model("llama").requires_grad_(False)
    own = model.lm_head.forward
    probe_head(model, Head(model.lm_head.weight, None, 1.0, None, torch.float32))
    assert model.lm_head.forward == own, "the probe leaves the model as it was"

    original = type(model).forward

    def shifted(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        output.logits = output.logits * torch.linspace(1, 1.01, 128)
        return output

    model.forward = shifted.__get__(model)
    with pytest.raises(ValueError, match="not supported"):
        probe_head(model, read_head(model))


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=128, n_embd=64, n_layer=1, n_head=2, n_positions=64, eos_token_id=1, bos_token_id=1),
        Qwen3MoeConfig(
            vocab_size=128, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=4, num_experts_per_tok=2, eos_token_id=1,  # pyright: ignore[reportCallIssue]: transformers takes head_dim, undeclared
        ),
    ],
)  # fmt: skip
def test_decoders_that_return_more_than_hidden_states_are_probed_too(config, tokenizer):
    torch.manual_seed(0)
    policy = make_policy(AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer, load_in_4bit=False)
    torch.testing.assert_close(flat_logprobs(policy), own_logprobs(policy), atol=2e-6, rtol=0)


@pytest.mark.parametrize("family", ["qwen2", "llama"])  # with and without biases
def test_gradients_after_an_inference_are_those_before_it(family):
    """On CPUs with AVX512-BF16 bitsandbytes repacks weights at the first inference, which breaks training after it."""
    policy = make_policy(family, bf16=True)

    def gradients():
        for batch in batches(policy):
            policy.logprobs(batch, 1.0).sum().backward()
        found = [parameter.grad.clone() for parameter in policy.parameters_of(policy.adapter).values()]
        policy.model.zero_grad()
        return found

    before = gradients()
    with policy.inference():
        flat_logprobs(policy)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))
    assert any(gradient.abs().max() > 0 for gradient in before)
    assert not any(m.support_avx512bf16_for_cpu for m in policy.model.modules() if isinstance(m, Linear4bit))


def test_checkpointing_does_not_change_gradients():
    results = []
    for gradient_checkpointing in (False, True):
        policy = make_policy("qwen3", gradient_checkpointing=gradient_checkpointing)
        for batch in batches(policy):
            policy.logprobs(batch, 1.0).sum().backward()
        results.append([parameter.grad for parameter in policy.parameters_of(policy.adapter).values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def four_bit_layers(policy):
    return sum(isinstance(module, Linear4bit) for module in policy.model.modules())


def test_a_loaded_model_and_its_folder_make_the_same_policy(tmp_path, tokenizer):
    model = make_model("qwen2")
    model.save_pretrained(tmp_path)
    from_object, from_folder = make_policy(model), make_policy(str(tmp_path), tokenizer)
    assert four_bit_layers(from_object) == four_bit_layers(from_folder) == 14
    torch.testing.assert_close(flat_logprobs(from_object), flat_logprobs(from_folder))


def test_a_model_that_is_quantized_on_its_way_to_the_device_is_4_bit_there_whatever_still_lies_elsewhere():
    model = make_model("qwen2")
    quantize_linears(model, torch.device("cpu"), torch.float32)
    model.model.embed_tokens.to("meta")  # stands for the memory that the model came in
    with pytest.raises(NotImplementedError, match="meta tensor"):  # that it is moved, and not refused
        _placed(model, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="4-bit on cpu, and the run is on cuda:0; load it there, or set use_cpu"):
        refuse_4bit_elsewhere(model, torch.device("cuda", 0))


def test_a_4_bit_model_on_another_gpu_is_refused():
    class Elsewhere(Params4bit):
        device = torch.device("cuda", 1)

    model = torch.nn.Module()
    model.weight = Elsewhere(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    refuse_4bit_elsewhere(model, torch.device("cuda", 1))
    with pytest.raises(ValueError, match="4-bit on cuda:1, and the run is on cuda:0; load it there$"):
        refuse_4bit_elsewhere(model, torch.device("cuda", 0))


def test_a_loaded_model_that_is_spread_over_gpus_is_refused():
    model: Any = make_model("qwen2")
    model.hf_device_map = {"model": 0, "lm_head": 0}
    find_model(model, GRPOConfig(use_cpu=True))
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(ValueError, match="spread over devices 0 and 1; load the whole model into the memory of one"):
        find_model(model, GRPOConfig(use_cpu=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_model_loaded_into_cpu_memory_is_trained_on_the_gpu(tokenizer):
    policy = load_policy(make_model("qwen2"), tokenizer, GRPOConfig())
    assert {p.device.type for p in policy.model.parameters()} == {"cuda"}
    assert four_bit_layers(policy) == 14
    policy.logprobs(batches(policy)[0], 1.0).sum().backward()


def test_a_4_bit_checkpoint_is_loaded_as_it_is(tmp_path, tokenizer):
    make_model("qwen2").save_pretrained(tmp_path / "dense")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
    )
    small = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=quantization, dtype=torch.float32
    )
    small.save_pretrained(tmp_path / "small")
    policy = make_policy(str(tmp_path / "small"), tokenizer)
    torch.testing.assert_close(flat_logprobs(policy), flat_logprobs(make_policy(str(tmp_path / "dense"), tokenizer)))
    layer = next(module for module in policy.model.modules() if isinstance(module, Linear4bit))
    assert layer.compute_dtype == torch.float32, "the run's compute dtype wins over the checkpoint's"


def test_the_tokenizer_is_of_the_models_revision(tmp_path, tokenizer):
    repository = tmp_path / "models--me--m"
    (repository / "refs").mkdir(parents=True)
    for branch, commit, end in (("main", 40 * "a", "="), ("v2", 40 * "b", "+")):
        (repository / "refs" / branch).write_text(commit)
        other = copy.deepcopy(tokenizer)
        other.eos_token = end
        other.save_pretrained(repository / "snapshots" / commit)
        shutil.copy(DEMO_MODEL / "config.json", repository / "snapshots" / commit)
    where = {"cache_dir": str(tmp_path), "local_files_only": True}
    ends = [
        load_tokenizer("me/m", GRPOConfig(model_init_kwargs={**where, **revision})).eos_token
        for revision in ({}, {"revision": "v2"})
    ]
    assert ends == ["=", "+"]


def test_an_adapter_folder_continues_that_adapter(tmp_path, tokenizer):
    make_model("qwen2").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    first = make_policy(str(tmp_path / "base"), tokenizer)
    first.save(tmp_path / "adapter")
    config = GRPOConfig(bf16=False, use_cpu=True, gradient_checkpointing=False)
    adapter = str(tmp_path / "adapter")
    second = load_policy(adapter, load_tokenizer(adapter, config), config)
    torch.testing.assert_close(flat_logprobs(second), flat_logprobs(first))
    assert second.parameters_of(second.adapter)
    with pytest.raises(ValueError, match="leave it out to continue that one"):
        load_policy(adapter, tokenizer, config, LoraConfig())


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("dtype", "set fp16=True, or bf16=False"), ("torch_dtype", "set fp16=True"), ("device_map", "remove it"),
        ("quantization_config", "set load_in_4bit"), ("trust_remote_code", "set trust_remote_code itself"),
    ],
)  # fmt: skip
def test_what_the_config_decides_cannot_be_passed_beside_it(name, remedy):
    with pytest.raises(ValueError, match=f"model_init_kwargs has {name}: .*{remedy}"):
        find_model(str(DEMO_MODEL), GRPOConfig(model_init_kwargs={name: "x"}))


def test_a_loaded_peft_model_gets_the_compute_dtype_and_keeps_its_masters(tokenizer):
    model = get_peft_model(make_model("qwen2"), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    master = next(p for name, p in model.named_parameters() if "lora_A" in name)
    before = master.detach().clone()
    policy = load_policy(model, tokenizer, GRPOConfig(use_cpu=True, load_in_4bit=False))
    assert policy.head.weight.dtype == torch.bfloat16
    assert torch.equal(master, before)


def test_a_loaded_peft_model_continues_its_adapter(tokenizer):
    config = GRPOConfig(bf16=False, use_cpu=True, load_in_4bit=False)
    model = get_peft_model(make_model("qwen2"), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.requires_grad_(False)
    policy = load_policy(model, tokenizer, config)
    assert len(policy.parameters_of(policy.adapter)) == 4
    with pytest.raises(ValueError, match="set load_in_4bit=False"):
        load_policy(model, tokenizer, GRPOConfig(bf16=False, use_cpu=True))


def test_options_that_would_have_no_effect_are_refused(tmp_path, tokenizer):
    model = make_model("qwen2")
    with pytest.raises(ValueError, match="lora_r has no effect beside peft_config"):
        find_model(model, GRPOConfig(lora_r=4), LoraConfig())
    with pytest.raises(ValueError, match="model_init_kwargs has no effect"):
        find_model(model, GRPOConfig(model_init_kwargs={"attn_implementation": "eager"}))
    make_policy(model, tokenizer).save(tmp_path)
    with pytest.raises(ValueError, match="lora_alpha has no effect beside the model's own adapter"):
        find_model(str(tmp_path), GRPOConfig(lora_alpha=4))


@pytest.mark.parametrize(
    ("quantization", "settings", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, {}, "quantized otherwise than in bitsandbytes 4-bit"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, {}, "quantized otherwise than in bitsandbytes 4-bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {"load_in_4bit": False}, "is 4-bit already"),
    ],
)
def test_checkpoints_of_another_quantization_are_refused(quantization, settings, message, tmp_path):
    config = make_model("qwen2").config
    config.quantization_config = quantization
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        find_model(str(tmp_path), GRPOConfig(**settings))


def test_a_model_that_was_loaded_in_4_bits_cannot_be_asked_not_to_be(tokenizer):
    policy = make_policy("qwen2", tokenizer)
    with pytest.raises(ValueError, match="the model was loaded in 4-bit; leave load_in_4bit at True"):
        find_model(policy.model, GRPOConfig(load_in_4bit=False))


def test_peft_config_wins_over_the_lora_fields(tokenizer):
    config = GRPOConfig(bf16=False, use_cpu=True)
    policy = load_policy(make_model("qwen2"), tokenizer, config, LoraConfig(r=2, target_modules=["q_proj"]))
    shapes = {tuple(p.shape) for name, p in policy.parameters_of(policy.adapter).items() if "lora_A" in name}
    assert shapes == {(2, 64)}


@pytest.mark.parametrize(
    "peft_config",
    [
        LoraConfig(target_modules=["q_proj", "lm_head"]),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ],
)
def test_an_adapter_on_the_head_is_refused(peft_config, tokenizer):
    with pytest.raises(ValueError, match="leave lm_head and the embeddings out"):
        load_policy(make_model("qwen2"), tokenizer, GRPOConfig(bf16=False, use_cpu=True), peft_config)


def test_only_lora_is_accepted(tokenizer):
    with pytest.raises(ValueError, match="only LoraConfig"):
        load_policy(make_model("qwen2"), tokenizer, GRPOConfig(use_cpu=True), PrefixTuningConfig())


def test_modules_that_are_not_there_are_refused(tokenizer):
    with pytest.raises(ValueError, match="lora_target_modules has 'no_such_proj', and no module of the model ends so"):
        load_policy(make_model("qwen2"), tokenizer, GRPOConfig(use_cpu=True, lora_target_modules=["no_such_proj"]))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "nobody/no-such-model"])
def test_an_unknown_model_is_named_in_one_sentence(name):
    with pytest.raises(ValueError, match=f"model '{name}' is n") as caught:
        find_model(name, GRPOConfig())
    assert "\n" not in str(caught.value)


def test_every_end_of_sequence_id_counts(tokenizer):
    model = make_model("qwen2")
    model.generation_config.eos_token_id = [7, 9]
    model.config.eos_token_id = 11
    assert make_policy(model, tokenizer).eos_token_ids == [1, 7, 9, 11]


def test_the_padding_is_an_end_token_where_the_tokenizer_has_neither():
    bare = AutoTokenizer.from_pretrained(DEMO_MODEL)
    bare.pad_token = bare.eos_token = None
    assert make_policy("llama", bare).pad_token_id == 1


def test_biases_are_not_trained(tokenizer):
    with pytest.raises(ValueError, match="set bias='none'"):
        find_model(make_model("qwen2"), GRPOConfig(), LoraConfig(bias="lora_only"))


def test_a_saved_adapter_loads_in_plain_peft(tmp_path, tokenizer):
    policy = make_policy("qwen2", load_in_4bit=False)
    policy.save(tmp_path)
    plain = PeftModel.from_pretrained(make_model("qwen2"), str(tmp_path)).eval()
    given = torch.tensor([PROMPTS[0] + COMPLETIONS[0]])
    with torch.no_grad(), policy.inference():
        torch.testing.assert_close(plain(input_ids=given).logits, policy.model(input_ids=given).logits)


def test_the_demo_model_is_quantized_but_for_its_head(tokenizer):
    policy = make_policy(str(DEMO_MODEL), tokenizer, bf16=True)
    wake_adapters(policy)
    assert four_bit_layers(policy) == 3 * 7
    assert policy.head.weight.shape == (128, 128)


def test_scores_with_a_softcap_are_not_left_to_an_attention_that_has_none():
    """By transformers 5.17 sdpa is Gemma 2's, and leaves its softcap out: 1e-3 of a log-probability here."""
    for family, expected in (("gemma2", "eager"), ("llama", "sdpa")):
        model = make_model(family)
        model.config._attn_implementation = "sdpa"
        assert make_policy(model).base.config._attn_implementation == expected

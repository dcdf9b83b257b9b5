"""Experts in 4 bits: computed one at a time, read one at a time, in NF4 or as a checkpoint in MXFP4 has them."""

import copy
import gc
import json
from functools import partial
from importlib.metadata import version
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import DEMO_MODEL, SMALL, make_policy
from torch.utils._pytree import tree_map_only
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from lowmem_grpo import GRPOConfig, train
from lowmem_grpo.benchmarks.random_model import CONFIGS
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.demo import task
from lowmem_grpo.errors import InputError
from lowmem_grpo.generate.sample import Sampler
from lowmem_grpo.inputs.identity import weights_of
from lowmem_grpo.kernels import expert_product
from lowmem_grpo.model import experts, offload
from lowmem_grpo.model.adapters import lora_config
from lowmem_grpo.model.experts import (
    Mxfp4Stack,
    Nf4Stack,
    experts_of,
    pack_experts,
    packed_bytes,
    packed_name,
    weight_names,
)
from lowmem_grpo.model.load import load_policy
from lowmem_grpo.model.packing import pack
from lowmem_grpo.model.quantizer import Quantizer
from lowmem_grpo.planner.plan import forecast
from lowmem_grpo.planner.trace import Key, Live, few_tokens_bytes, skeleton

FEW = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "topk_group": 1}
MLA = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
       "num_key_value_heads": 4}  # fmt: skip
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
          "linear_value_head_dim": 16}  # fmt: skip
MIXTURES = {
    "qwen3_moe": {**FEW, "head_dim": 16},
    "qwen2_moe": {**FEW, "shared_expert_intermediate_size": 32},
    "mixtral": LOCAL,
    "gpt_oss": {**LOCAL, "head_dim": 16, "sliding_window": 24},  # transposed, biases, a gate of its own
    "qwen3_5_moe_text": {
        **FEW, **LINEAR, "head_dim": 16, "shared_expert_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "lfm2_moe": {**FEW, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "granitemoe": LOCAL,
    "granitemoehybrid": {
        **LOCAL, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 64, "mamba_n_heads": 4,
        "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2,
    },
    "glm4_moe": {**ROUTED, "first_k_dense_replace": 1, "head_dim": 16, "n_group": 1},
    "glm4_moe_lite": {**ROUTED, **MLA, "n_group": 1},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {**ROUTED, **MLA, "first_k_dense_replace": 1, "n_group": 2},
    "gemma4_text": {
        "head_dim": 16, "global_head_dim": 16, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
        "moe_intermediate_size": 32, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24,
    },
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "phimoe": LOCAL,
    "nemotron_h": {  # no gate
        **ROUTED, "moe_shared_expert_intermediate_size": 32, "hybrid_override_pattern": "*E", "n_group": 1,
        "head_dim": 16,
    },
}  # fmt: skip
DISTINCT = {"qwen3_moe", "gpt_oss", "gemma4_text", "nemotron_h"}  # the others run with the slow tests
CPU = torch.device("cpu")
on_gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))
TOKENIZER = AutoTokenizer.from_pretrained(DEMO_MODEL)
SETTINGS = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False}
EXPERT = "model.layers.0.mlp.experts.2.gate_proj.weight"
PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]


def make_mixture(name="qwen3_moe", **changes):
    """A random mixture in fp32, with weights wide enough that its router is not undecided."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SMALL, **MIXTURES[name], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.15)
    return model.requires_grad_(False)


def packed_and_eager(model):
    """The model with packed experts, and a copy with the same weights dequantized and its own eager experts."""
    eager = copy.deepcopy(model)
    pack_experts(model, CPU, torch.float32)
    for (_, packed), (_, own) in zip(experts_of(model), experts_of(eager), strict=True):
        for name in weight_names(own):
            stack = getattr(packed, packed_name(name))
            own._parameters[name].data = torch.stack([stack.matrix(e, torch.float32) for e in range(own.num_experts)])
        own.config._experts_implementation = "eager"
    return model, eager


def logits_and_gradient(model):
    ids = torch.randint(2, 128, (2, 9), generator=torch.Generator().manual_seed(3))
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=x).logits
    (logits * torch.linspace(0, 20, logits.shape[-1]).sin()).sum().backward()
    return logits.detach(), x.grad


def one_layer(**changes):
    """Packed experts of one layer and the eager ones of the same weights."""
    model = make_mixture(num_hidden_layers=1, **changes)
    packed, eager = packed_and_eager(model)
    return next(experts_of(packed))[1], next(experts_of(eager))[1]


def run_experts(module, hidden, chosen):
    """Output and gradients for hidden and routing weights."""
    x = hidden.clone().requires_grad_()
    w = torch.rand(chosen.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = module(x, chosen, w)
    (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
    return out.detach(), x.grad, w.grad


@pytest.mark.parametrize(
    "name", [name if name in DISTINCT else pytest.param(name, marks=pytest.mark.slow) for name in MIXTURES]
)
def test_packed_experts_compute_what_the_models_own_do(name):
    packed, eager = packed_and_eager(make_mixture(name))
    assert any(experts_of(packed)) and experts.are_packed(packed) and not experts.are_packed(eager)
    (logits, gradient), (truth, true_gradient) = logits_and_gradient(packed), logits_and_gradient(eager)
    assert (logits - truth).norm() <= 1e-6 * truth.norm()
    assert (gradient - true_gradient).norm() <= 2e-6 * true_gradient.norm()


@pytest.mark.parametrize("rows", [3, 2048])
@pytest.mark.parametrize(
    "chosen",
    [
        [[0, 1], [1, 3], [3, 0], [1, 0], [0, 3]],  # nobody chooses 2
        [[2, 1], [2, 0], [2, 3], [2, 1], [2, 0]],  # everybody does
        [[4, 1], [4, 4], [2, 4], [0, 1], [3, 4]],  # 4 is no expert
    ],
)
def test_experts_that_nobody_or_everybody_chooses_compute_as_their_own_form(chosen, rows, monkeypatch):
    monkeypatch.setattr(experts, "ROWS", rows)
    if max(map(max, chosen)) == 4 and Version(version("transformers")) < Version("5.23"):
        pytest.skip("its own form asks that every choice is an expert")
    packed, eager = one_layer()
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    for found, truth in zip(*(run_experts(x, hidden, torch.tensor(chosen)) for x in (packed, eager)), strict=True):
        torch.testing.assert_close(found, truth, atol=2e-6, rtol=1e-5)


def test_one_dense_expert_exists_at_a_time_and_none_is_kept():
    packed, _ = one_layer(num_experts=16, hidden_size=128, moe_intermediate_size=128)
    hidden, chosen = torch.randn(4, 128), torch.tensor([[2 * j + i for i in range(2)] for j in range(4)])
    one = 4 * 3 * 128 * 128
    with Live(packed) as live:
        run_experts(packed, hidden, chosen)
    assert one < live.peak < 1.2 * one
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        packed(hidden.requires_grad_(), chosen, torch.rand(4, 2))
    assert sum(x.nbytes for x in kept) == hidden.nbytes + chosen.nbytes + 4 * 2 * 4


def test_a_stack_has_nf4s_bytes_and_bitsandbytes_numbers():
    """Rows of 96 are no multiple of a block, where bitsandbytes' own kernel for CPUs is 0.25 off at scales of 1."""
    weights = torch.randn(3, 40, 96, generator=torch.Generator().manual_seed(0))
    stack = Nf4Stack(3, (40, 96), False, CPU)
    stack.pack(0, weights)
    several = stack.matrices(torch.tensor([2, 0]), torch.float32)
    for place, matrix in enumerate(weights):
        truth = dequantize_4bit(*quantize_4bit(matrix.view(1, -1), quant_type="nf4", compress_statistics=True))
        found = stack.matrix(place, torch.float32)
        assert torch.equal(found, truth.view(40, 96))
        assert (found - matrix).abs().mean() < 0.08
    assert torch.equal(several, torch.stack([stack.matrix(place, torch.float32) for place in (2, 0)]))
    assert sum(buffer.nbytes for buffer in stack.buffers()) == 3 * (40 * 96 // 2 + 40 * 96 // 64 + 4 + 4) + 4 * 256


# An odd number of weights bitsandbytes quantizes on a CPU by code that it compiles first, which takes 10 s.
@pytest.mark.parametrize("shape", [(40, 72), (24, 20), pytest.param((9, 13), marks=pytest.mark.slow)])
def test_several_matrices_are_the_single_ones_whatever_their_shape(shape):
    weights = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    stack = Nf4Stack(3, shape, False, CPU)
    stack.pack(0, weights)
    for place, found in zip((2, 0, 1), stack.matrices(torch.tensor([2, 0, 1]), torch.float32), strict=True):
        assert torch.equal(found, stack.matrix(place, torch.float32))
        assert (found - weights[place]).abs().mean() < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_mxfp4_code_and_exponent_means_what_transformers_makes_of_it(dtype):
    stack = Mxfp4Stack(2, (256, 16 * 32), CPU)
    stack.fill_table()
    stack.blocks.copy_(torch.arange(256, dtype=torch.uint8).view(16, 16).expand(2, 256, 16, 16))
    # transformers makes infinities and NaN of 2^128 and above; no checkpoint has them.
    stack.scales.copy_(torch.arange(256).clamp(0, 250)[None, :, None].expand(2, 256, 16))
    truth = convert_moe_packed_tensors(stack.blocks, stack.scales, dtype=dtype)  # (E, in, out)
    assert truth.isfinite().all()
    for place in range(2):
        found = stack.matrix(place, dtype)
        assert found.dtype == dtype and torch.equal(found, truth[place].t())


def saved(model, folder, **arguments):
    model.save_pretrained(folder, **arguments)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def stacks(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, Nf4Stack | Mxfp4Stack)}


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "granitemoe"])  # apart, joined, and that by another name
def test_a_checkpoint_is_packed_as_it_is_read_as_a_loaded_model_is_in_place(name, tmp_path):
    model = make_mixture(name)
    folder = saved(model, tmp_path, max_shard_size="50KB")
    from_folder = load_policy(folder, TOKENIZER, GRPOConfig(**SETTINGS)).base
    in_place = load_policy(model, TOKENIZER, GRPOConfig(**SETTINGS)).base
    found, truth = stacks(from_folder), stacks(in_place)
    assert len(found) == 4 and found.keys() == truth.keys()
    for path, stack in found.items():
        for buffer, other in zip(stack.buffers(), truth[path].buffers(), strict=True):
            assert torch.equal(buffer, other)
    assert from_folder.config.quantization_config.to_dict()["quant_method"] == "bitsandbytes"


class AllLive(Live):
    """Counts what is read from files too, which is first seen as an argument."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        tree_map_only(torch.Tensor, self._see, (arguments, keywords))
        return super().__torch_dispatch__(function, types, arguments, keywords)

    def _see(self, tensor):
        if not tensor.is_meta:
            super()._see(tensor)


@pytest.mark.parametrize(
    "quantized", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["dense", "with 4-bit linear layers"]
)
def test_a_load_never_holds_more_than_a_few_dense_experts(quantized, tmp_path):
    wide = {"num_experts": 32, "moe_intermediate_size": 64, "hidden_size": 128, "num_hidden_layers": 2}
    model = make_mixture(**wide).bfloat16()
    if quantized:
        plain = saved(model, tmp_path / "plain")
        in_4bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=in_4bit)
    folder = saved(model, tmp_path / "model", max_shard_size="500KB")
    dense = sum(2 * x.numel() for _, e in experts_of(model) for x in (e.gate_up_proj, e.down_proj))
    del model
    with AllLive(torch.nn.Module()) as live:
        policy = load_policy(folder, TOKENIZER, GRPOConfig(**{**SETTINGS, "bf16": True}))
    packed = packed_bytes(policy.base)
    assert packed < 0.27 * dense
    # One layer's matrices of one kind are a third of a layer, where the checkpoint has them joined.
    assert live.peak < packed + 0.25 * dense + 10**6


def test_experts_stay_as_they_are_without_load_in_4bit(tmp_path):
    model = make_mixture()
    own = model.config._experts_implementation
    policy = load_policy(saved(model, tmp_path), TOKENIZER, GRPOConfig(**SETTINGS, load_in_4bit=False))
    assert not stacks(policy.base) and policy.base.config._experts_implementation == own


def test_experts_that_an_older_transformers_put_in_4_bits_apart_are_refused(tmp_path):
    model = make_mixture()
    plain = saved(model, tmp_path / "plain")
    folder = saved(quantized(plain), tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    for name in [name for name in weights if ".experts." in name]:
        weights[name] = torch.zeros(weights[name].numel() // 2, 1, dtype=torch.uint8)
        weights[f"{name}.absmax"] = torch.zeros(weights[name].numel() // 32)
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="its experts are in 4 bits in a form .*; take its unquantized form"):
        load_policy(folder, TOKENIZER, GRPOConfig(**SETTINGS))


def test_experts_and_checkpoints_are_known_as_transformers_before_5_21_has_them(tmp_path, monkeypatch):
    """It says nothing of a norm after each expert, and asks for conversions without saying of which model."""
    folder, model = saved(make_mixture(), tmp_path), make_mixture()
    for module in model.modules():
        vars(module).pop("has_post_expert_norm", None)
    ours = Quantizer.update_weight_conversions
    monkeypatch.setattr(
        Bnb4BitHfQuantizer, "update_weight_conversions", lambda self, found: found + self.get_weight_conversions()
    )
    monkeypatch.setattr(Quantizer, "update_weight_conversions", lambda self, found, *model: ours(self, found))
    loaded = load_policy(folder, TOKENIZER, GRPOConfig(**SETTINGS)).base
    in_place = stacks(load_policy(model, TOKENIZER, GRPOConfig(**SETTINGS)).base)
    assert in_place and stacks(loaded).keys() == in_place.keys()
    assert all(torch.equal(stack.matrix(3, torch.float32), in_place[path].matrix(3, torch.float32))
               for path, stack in stacks(loaded).items())  # fmt: skip


def quantized(folder):
    """The model of a folder with linear layers in 4 bits, as transformers loads it."""
    in_4bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=in_4bit)


def test_the_engine_samples_by_the_probabilities_of_a_training_forward():
    policy = make_policy(make_mixture())
    assert policy.packs
    sampler = Sampler(policy, GRPOConfig(**SETTINGS, max_completion_length=6))
    assert sampler.engine_refusal is None
    torch.manual_seed(0)
    found = sampler.complete([Prompt("", ids, {}) for ids in PROMPTS], 2).completions
    repeated = [prompt for prompt in PROMPTS for _ in range(2)]
    batches = pack(repeated, [one.ids for one in found], token_budget=10**6, pad_token_id=0, device=CPU)
    with torch.no_grad():
        truth = torch.cat([policy.logprobs(batch, 1.0) for batch in batches])
    torch.testing.assert_close(torch.cat([one.logprobs for one in found]), truth, atol=1e-5, rtol=0)


def test_the_adapters_gradient_is_the_same_with_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        policy = make_policy(make_mixture(), gradient_checkpointing=checkpointing)
        (batch,) = pack([[3, 4, 5]] * 2, [[6, 7], [8, 9, 10]], token_budget=10**6, pad_token_id=0, device=CPU)
        policy.logprobs(batch, 1.0).sum().backward()
        gradients.append([p.grad for p in policy.parameters_of(policy.adapter).values()])
    for found, truth in zip(*gradients, strict=True):
        torch.testing.assert_close(found, truth, atol=1e-6, rtol=1e-5)
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])


def test_all_linear_leaves_experts_and_router_out():
    policy = make_policy(make_mixture("qwen2_moe"))
    names = {path.split(".")[-4] for path in policy.parameters_of(policy.adapter)}
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= names and not names & {"gate", "experts"}


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("qwen3_moe", {"lora_target_modules": ["q_proj", "up_proj"]}, "experts of a mixture in 4 bits get no adapter"),
        ("glm4_moe", {"lora_target_modules": ["q_proj", "down_proj"]}, "change down_proj of the experts"),
        ("qwen3_moe", {"model_init_kwargs": {"experts_implementation": "eager"}}, "set load_in_4bit=False"),
    ],
)
def test_what_experts_in_4_bits_cannot_have_is_refused_before_weights_are_read(name, settings, message, tmp_path):
    make_mixture(name).config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    with pytest.raises(InputError, match=message):
        load_policy(str(tmp_path), TOKENIZER, GRPOConfig(**SETTINGS, **settings))


def test_target_parameters_that_name_experts_are_refused():
    peft_config = LoraConfig(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    with pytest.raises(InputError, match="change experts.gate_up_proj of the experts, which in 4 bits have none"):
        load_policy(make_mixture(), TOKENIZER, GRPOConfig(**SETTINGS), peft_config)


def test_a_loaded_adapter_on_experts_is_refused():
    model = get_peft_model(make_mixture(), LoraConfig(target_modules="all-linear"))
    with pytest.raises(InputError, match="change down_proj of the experts, which in 4 bits have none"):
        load_policy(model, TOKENIZER, GRPOConfig(**SETTINGS))


def mxfp4_checkpoint(folder):
    """A tiny gpt-oss as the hub has it: attention in 16 bits, experts in blocks and scales. Gives the dense model."""
    model = make_mixture("gpt_oss").bfloat16()
    weights = {name: x for name, x in model.state_dict().items() if not name.endswith(("gate_up_proj", "down_proj"))}
    draw = torch.Generator().manual_seed(5)
    for path, module in experts_of(model):
        for name in weight_names(module):
            num, inputs, outputs = module._parameters[name].shape
            blocks = torch.randint(256, (num, outputs, inputs // 32, 16), dtype=torch.uint8, generator=draw)
            scales = torch.randint(119, 125, blocks.shape[:-1], dtype=torch.uint8, generator=draw)
            weights |= {f"{path}.{name}_blocks": blocks, f"{path}.{name}_scales": scales}
            module._parameters[name].data = convert_moe_packed_tensors(blocks, scales)
    saved(model, folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return model


def test_an_mxfp4_checkpoint_is_held_as_it_is(tmp_path, monkeypatch):
    dense = mxfp4_checkpoint(tmp_path)
    policy = load_policy(str(tmp_path), TOKENIZER, GRPOConfig(**{**SETTINGS, "bf16": True}))
    assert len(stacks(policy.base)) == 4
    for (_, packed), (_, own) in zip(experts_of(policy.base), experts_of(dense), strict=True):
        for name in weight_names(own):
            stack = getattr(packed, packed_name(name))
            assert type(stack) is Mxfp4Stack
            for e in range(4):
                assert torch.equal(stack.matrix(e, torch.bfloat16).t(), own._parameters[name][e])
            assert torch.equal(getattr(packed, f"{name}_bias"), getattr(own, f"{name}_bias"))
    hidden, chosen = torch.randn(5, 64), torch.tensor([[0, 1], [1, 3], [3, 0], [1, 0], [0, 3]])
    own.config._experts_implementation = "eager"
    truth = packed.float()(hidden, chosen, torch.ones(5, 2))
    for by_kernel in (False, True):
        with monkeypatch.context() as patched:
            if by_kernel:
                serve_all(patched)
            few = few_tokens(packed, hidden, torch.ones(5, 2), chosen, torch.float32)
        assert (few - truth).norm() <= 1e-6 * truth.norm()
    for found, truth in zip(*(run_experts(x.float(), hidden, chosen) for x in (packed, own)), strict=True):
        torch.testing.assert_close(found, truth, atol=2e-6, rtol=1e-5)
    key = Key(AutoConfig.from_pretrained(tmp_path), LoraConfig(target_modules="all-linear"))
    assert packed_bytes(skeleton(key, "bfloat16", False, True)) == packed_bytes(policy.base)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda w: w.pop(EXPERT),
            "mlp.experts.gate_up_proj of 3 x 64 x 64, and by its config.json it is of 4 x 64 x 64",
        ),
        (lambda w: w.update({EXPERT: w[EXPERT].t()}), "what it has of .*experts.gate_up_proj does not fit together"),
        (lambda w: w.update({EXPERT.replace(".2.", ".4."): w[EXPERT] + 1}), "gate_up_proj of 5 x 64 x 64, and by"),
        (lambda w: w.update({x: w[x][:, :16] for x in w if "down" in x}), "down_proj of 4 x 64 x 16, and by its"),
    ],
)
def test_experts_that_do_not_fit_the_configuration_are_named(change, message, tmp_path):
    folder = saved(make_mixture(num_hidden_layers=1), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(
        {x: y.contiguous() for x, y in weights.items()}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(InputError, match=message):
        load_policy(folder, TOKENIZER, GRPOConfig(**SETTINGS))


def test_gpt_oss_20b_is_planned_with_its_experts_in_mxfp4():
    settings = json.loads((CONFIGS / "gpt-oss-20b.json").read_text(encoding="utf-8"))
    config = AutoConfig.for_model(settings.pop("model_type"), **{**settings, "num_hidden_layers": 2})
    whole = skeleton(Key(config, LoraConfig(target_modules="all-linear")), "bfloat16", False, True)
    numbers = 32 * (2880 * 5760 + 2880 * 2880)  # of a layer, at 4.25 bits, and two tables of 256 pairs
    assert packed_bytes(whole) == 2 * (numbers * 17 // 32 + 2 * 256 * 2 * 4)


def test_what_an_mxfp4_checkpoint_lacks_is_named_as_in_its_files(tmp_path):
    mxfp4_checkpoint(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="has no model.layers.1.mlp.experts.down_proj_scales"):
        load_policy(str(tmp_path), TOKENIZER, GRPOConfig(**SETTINGS))


def test_experts_by_other_names_are_named_beside_those_that_are_lacking(tmp_path):
    folder = saved(make_mixture("gpt_oss", num_hidden_layers=1), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.mlp.experts.down_projs.0.weight"] = weights.pop("model.layers.0.mlp.experts.down_proj")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"has no .*experts.down_proj, .* beside it a .*experts.down_projs.0.weight"):
        load_policy(folder, TOKENIZER, GRPOConfig(**SETTINGS))


def test_a_model_with_packed_experts_is_not_saved_without_them(tmp_path):
    folder = saved(make_mixture(), tmp_path / "model")
    for model in (make_mixture(), folder, get_peft_model(quantized(folder), LoraConfig(target_modules=["q_proj"]))):
        policy = load_policy(model, TOKENIZER, GRPOConfig(**SETTINGS))
        policy.save(tmp_path / "adapter")
        with pytest.raises(InputError, match="experts are in 4 bits, .* and cannot be saved; save the adapter"):
            policy.model.unload().save_pretrained(tmp_path / "again")


def test_an_mxfp4_checkpoint_is_not_taken_in_16_bits(tmp_path):
    mxfp4_checkpoint(tmp_path)
    with pytest.raises(InputError, match="is 4-bit already; leave load_in_4bit at True"):
        load_policy(str(tmp_path), TOKENIZER, GRPOConfig(**SETTINGS, load_in_4bit=False))


def test_an_mxfp4_checkpoint_trains_saves_and_resumes(tmp_path):
    mxfp4_checkpoint(tmp_path / "model")
    arguments = dict(
        bf16=False, use_cpu=True, max_completion_length=4, num_generations=2, prompts_per_step=1, save_steps=1,
        output_dir=str(tmp_path / "out"),
    )  # fmt: skip

    def lengths(completions, **_):
        return [float(len(completion[0]["content"])) for completion in completions]

    rows = task.rows(task.splits()[0][:4])
    train(str(tmp_path / "model"), lengths, rows, config=GRPOConfig(**arguments, max_steps=1))
    result = train(
        str(tmp_path / "model"), lengths, rows, config=GRPOConfig(**arguments, max_steps=2, resume_from_checkpoint=True)
    )
    assert [line["step"] for line in result.history] == [1, 2]


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_an_adapter_that_was_saved_goes_on_on_packed_experts(name, tmp_path):
    folder = saved(make_mixture(name), tmp_path / "base")
    policy = make_policy(folder)
    policy.save(tmp_path / "adapter")
    again = load_policy(str(tmp_path / "adapter"), TOKENIZER, GRPOConfig(**SETTINGS))
    own, theirs = (one.parameters_of(one.adapter) for one in (policy, again))
    assert own.keys() == theirs.keys() and all(torch.equal(x, theirs[path]) for path, x in own.items())


def test_an_adapter_of_dense_experts_is_not_continued_on_packed_ones(tmp_path):
    folder = saved(make_mixture(), tmp_path / "base")
    make_policy(folder, load_in_4bit=False).save(tmp_path / "adapter")
    with pytest.raises(InputError, match="change down_proj of the experts, which in 4 bits have none"):
        load_policy(str(tmp_path / "adapter"), TOKENIZER, GRPOConfig(**SETTINGS))


def test_another_experts_weights_are_another_model():
    policy = make_policy(make_mixture())
    before = weights_of(policy)
    stack: Any = next(iter(stacks(policy.base).values()))
    stack.codes[3] ^= 255
    after = weights_of(policy)
    assert before.keys() == after.keys() and [kind for kind in before if before[kind] != after[kind]] == [
        "in 4 bits on cpu"
    ]


def serve_all(monkeypatch):
    """Have the kernel's twin serve on a CPU, which leaves NaN where there is no expert."""
    monkeypatch.setattr(experts, "serves", lambda *_: True)
    make = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kwargs: make(*size, **kwargs).fill_(torch.nan))


def few_tokens(module, hidden, weights, chosen, dtype):
    """By the kernel where that serves, as on a GPU."""
    stacks = experts.for_kernel(module, dtype, hidden.device)
    return experts.few_tokens(module, hidden, weights, chosen, dtype, stacks)


@pytest.mark.parametrize("by", ["one", "several", "kernel"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_few_tokens_are_computed_as_many_are(name, by, monkeypatch):
    """As a captured step does: nothing is read by the host, which a tensor without values shows."""
    model = make_mixture(name, **({} if name == "gpt_oss" else {"moe_intermediate_size": 64}))
    pack_experts(model, CPU, torch.float32)
    module = next(experts_of(model))[1]
    monkeypatch.setattr(experts, "AT_ONCE", 1 if by == "one" else 2**26)
    if by == "kernel":
        serve_all(monkeypatch)
    hidden, chosen = torch.randn(4, 64), torch.tensor([[0, 1], [1, 3], [4, 0], [1, 0]])
    weights = torch.rand(4, 2)
    truth = module(hidden, chosen, weights)
    found = few_tokens(module, hidden, weights, chosen, torch.float32)
    assert (found - truth).norm() <= 1e-6 * truth.norm()
    hidden, weights, chosen = (x.to("meta") for x in (hidden, weights, chosen))
    dtype = torch.bfloat16 if by == "kernel" else torch.float32
    assert few_tokens(module.to("meta"), hidden, weights, chosen, dtype).shape == truth.shape


def test_the_kernel_serves_as_many_choices_as_a_step_has_and_blocks_of_inputs_alone():
    """By FEW alone 64 rows of 10 choices would be computed one expert after another."""
    arguments = (torch.bfloat16, torch.device("meta"))
    wide, narrow, turned = (
        next(experts_of(packed_and_eager(make_mixture(name, **changes))[0]))[1].to("meta")
        for name, changes in (("qwen3_moe", {"moe_intermediate_size": 64}), ("qwen3_moe", {}), ("gpt_oss", {}))
    )
    stacks = [experts.for_kernel(module, *arguments) for module in (wide, narrow, turned)]
    assert stacks[0] is not None and experts.most_choices(wide, stacks[0]) >= 64 * 10
    assert stacks[1:] == [None, None] and all(
        experts.most_choices(module, None) == 4 * 4 for module in (narrow, turned)
    )


def interpreted(launch, *arguments):
    """What a launch gives in the interpreter, which holds its arguments in a cycle."""
    found = launch(*arguments, backend="triton")
    gc.collect()
    return found


@pytest.mark.parametrize("by", ["kernel", pytest.param("kernel on a GPU", marks=on_gpu), "several", "one"])
def test_what_few_tokens_take_is_what_is_planned(by, monkeypatch):
    width = {"moe_intermediate_size": 64 if "kernel" in by else 32, "num_experts": 8, "num_hidden_layers": 1}
    if by == "kernel":
        if torch.cuda.is_available() or expert_product.triton is None:
            pytest.skip("the kernel runs on the GPU, or not at all")
        monkeypatch.setattr(experts, "serves", lambda *_: True)
        for name in ("grouped", "expert_product"):
            monkeypatch.setattr(experts, name, partial(interpreted, getattr(experts, name)))
    elif by != "kernel on a GPU":
        monkeypatch.setattr(experts, "AT_ONCE", 1 if by == "one" else 2**26)
    model = make_mixture(**width)
    whole = skeleton(Key(model.config, LoraConfig(target_modules="all-linear")), "bfloat16", False, True)
    pack_experts(model, CPU, torch.bfloat16)
    module, device = next(experts_of(model))[1], "cuda" if by.endswith("GPU") else "cpu"
    planned = few_tokens_bytes.__wrapped__(whole, 12, 2, torch.bfloat16)
    if by == "kernel":  # this machine's card
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for_this, planned = planned, few_tokens_bytes.__wrapped__(whole, 12, 2, torch.bfloat16)
        monkeypatch.setattr(experts, "serves", lambda *_: False)
        assert for_this == few_tokens_bytes.__wrapped__(whole, 12, 2, torch.bfloat16) > planned
        monkeypatch.setattr(experts, "serves", lambda *_: True)
    with torch.no_grad(), torch.device(device):
        module.to(device)
        with Live(module) as live:
            torch.cuda.reset_peak_memory_stats() if device == "cuda" else None
            before = torch.cuda.memory_allocated() if device == "cuda" else 0
            hidden = torch.randn(12, 64, dtype=torch.bfloat16)
            stream, weights, chosen = torch.zeros_like(hidden), torch.rand(12, 2), torch.tensor([[3, 5]] * 12)
            stream += few_tokens(module, hidden, weights, chosen, torch.bfloat16)
        seen = torch.cuda.max_memory_allocated() - before if device == "cuda" else live.peak
    assert abs(planned - seen) <= (0.05 * seen if device == "cpu" else 512 * 16)  # which CUDA's allocator rounds up to


def test_steps_of_a_mixture_are_planned_with_its_experts_at_work():
    model = make_mixture(moe_intermediate_size=64, vocab_size=32, num_hidden_layers=1).config
    config = GRPOConfig(
        output_dir="unused", bf16=True, max_prompt_length=8, max_completion_length=8, prompts_per_step=4
    )
    found = forecast(model, config)
    slots, whole = 4 * config.num_generations, skeleton(Key(model, lora_config(config)), "bfloat16", False, True)
    at_work = few_tokens_bytes(whole, slots, 2, torch.bfloat16)
    assert found.resident["captured steps"] == 4 * 32 * slots + at_work
    assert found.phases["rollout"]["prefill or logits"] >= at_work > few_tokens_bytes(whole, 1, 2, torch.bfloat16) > 0


def test_liger_leaves_packed_experts_alone():
    model = make_mixture()
    pack_experts(model, CPU, torch.float32)
    offload.use_liger_kernels(model)
    assert all("forward" not in vars(module) for _, module in experts_of(model))
    assert any("forward" in vars(module) for module in model.modules())
    offload.undo(model)

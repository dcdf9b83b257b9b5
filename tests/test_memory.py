"""The forecast against what a real policy keeps, counted here without any help of memory.py."""

import contextlib
import copy
import inspect
import itertools
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_models import BY_LAYER, CONFIGS, FAMILIES, HYBRIDS, SMALL
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BambaConfig,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from lowmem_grpo.benchmarks.measure import peak_allocated
from lowmem_grpo.cli import main
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.reward import RewardConfig
from lowmem_grpo.config.sft import SFTConfig
from lowmem_grpo.data.examples import Example
from lowmem_grpo.data.pairs import Pair
from lowmem_grpo.generate.graphs import Kept
from lowmem_grpo.generate.shape import PAGE, store_shape
from lowmem_grpo.generate.step import FastStep
from lowmem_grpo.generate.store import Store
from lowmem_grpo.generate.weights import dense_bytes
from lowmem_grpo.model.experts import Nf4Stack
from lowmem_grpo.model.layer_shapes import LayerShape
from lowmem_grpo.model.load import adapter_config, load_policy, lora_config, read_config
from lowmem_grpo.model.outline import read
from lowmem_grpo.model.outlined import OutlinedLayer
from lowmem_grpo.model.packing import pack
from lowmem_grpo.model.teacher import FoundTeacher, as_teacher
from lowmem_grpo.planner import plan as planner
from lowmem_grpo.planner import trace
from lowmem_grpo.update import nll
from lowmem_grpo.update.critic import Critic
from lowmem_grpo.update.optimizer import make_optimizer
from lowmem_grpo.update.pairs import micro_batches as micro_batches_of_pairs

WIDE = {"vocab_size": 512, "max_position_embeddings": 1024, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
SHAPES = {
    "qwen2": FAMILIES["qwen2"](),
    "mistral": FAMILIES["mistral"](),
    "llama, 5 layers": LlamaConfig(
        **WIDE, hidden_size=128, intermediate_size=352, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=8,
    ),
    "qwen3, untied": Qwen3Config(
        **WIDE, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, head_dim=64, tie_word_embeddings=False,
    ),
    "gemma2": Gemma2Config(**{**SMALL, "num_hidden_layers": 4}, head_dim=16, sliding_window=24),
    "qwen2.5-0.5b": Qwen2Config(
        **{**WIDE, "vocab_size": 151936}, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
    ),
}  # fmt: skip
MIXED = {  # whose layers are not all alike
    "qwen3 moe, dense first": Qwen3MoeConfig(
        **{**SMALL, "num_hidden_layers": 6}, moe_intermediate_size=32, head_dim=16, num_experts=8,  # pyright: ignore[reportCallIssue]: transformers takes head_dim, undeclared
        num_experts_per_tok=2, mlp_only_layers=[0, 1, 2],
    ),
    "qwen3 moe, dense last": Qwen3MoeConfig(
        **{**SMALL, "num_hidden_layers": 6, "intermediate_size": 256}, moe_intermediate_size=32, head_dim=16,  # pyright: ignore[reportCallIssue]: transformers takes head_dim, undeclared
        num_experts=8, num_experts_per_tok=2, mlp_only_layers=[4, 5],
    ),
    "gemma3": Gemma3TextConfig(**{**SMALL, "num_hidden_layers": 8}, head_dim=16, sliding_window=24),
    "deepseek v3": DeepseekV3Config(
        **{**SMALL, "num_hidden_layers": 3, "num_key_value_heads": 4}, moe_intermediate_size=32, first_k_dense_replace=1,
        n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, q_lora_rank=32, kv_lora_rank=16,
        qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    ),
    "gpt-oss": GptOssConfig(
        **{**SMALL, "num_hidden_layers": 4}, head_dim=16, sliding_window=24, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen3-next": Qwen3NextConfig(
        **{**SMALL, "num_hidden_layers": 8}, head_dim=16, linear_num_value_heads=4, linear_num_key_heads=2,
        linear_key_head_dim=16, linear_value_head_dim=16, moe_intermediate_size=32, shared_expert_intermediate_size=32,
        num_experts=4, num_experts_per_tok=2,
    ),
    "bamba": BambaConfig(
        **{**SMALL, "num_hidden_layers": 6}, attn_layer_indices=[1, 4], mamba_n_heads=4, mamba_d_head=32,
        mamba_d_state=16, mamba_n_groups=2, mamba_chunk_size=16,
    ),
    "one layer": Qwen2Config(**{**SMALL, "num_hidden_layers": 1}),
    "two layers": Qwen3MoeConfig(
        **SMALL, moe_intermediate_size=32, head_dim=16, num_experts=8, num_experts_per_tok=2, mlp_only_layers=[0]  # pyright: ignore[reportCallIssue]: transformers takes head_dim, undeclared
    ),
}  # fmt: skip
MIXED |= {name: CONFIGS[name]() for name in BY_LAYER if "gemma4" in name}
MIXED["gemma4, E, 15 layers"] = AutoConfig.for_model(
    BY_LAYER["gemma4, E"][0],
    **BY_LAYER["gemma4, E"][1]
    | {
        "num_hidden_layers": 15, "num_kv_shared_layers": 6,
        "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 3,
    },
)  # fmt: skip
MIXED["lfm2, 6 layers"] = AutoConfig.for_model(
    "lfm2", **HYBRIDS["lfm2"] | {"num_hidden_layers": 6, "layer_types": ["conv", "conv", "full_attention"] * 2}
)
SLOW = [name for name in MIXED if "gemma4" in name or name in ("qwen3-next", "bamba") or "qwen3 moe" in name]
PADDED = {  # that neither packing nor the engine serves: Mamba 1 ignores the state that a text goes on from
    "jamba": JambaConfig(
        **{**SMALL, "num_hidden_layers": 3}, attn_layer_period=2, attn_layer_offset=1, num_experts=2,
        num_experts_per_tok=1, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False,
    ),
}  # fmt: skip
TASK = dict(prompts_per_step=2, num_generations=4, max_prompt_length=40, max_completion_length=24, use_cpu=True)
RUNGS = {
    "none": dict(gradient_checkpointing=False),
    "checkpointing": dict(gradient_checkpointing=True),
    "tiled": dict(gradient_checkpointing=False, tiled_mlp=True),
    "both": dict(gradient_checkpointing=True, tiled_mlp=True),
    "padded": dict(gradient_checkpointing=False, padding_free=False),
    "split, fp32": dict(gradient_checkpointing=False, token_budget=87, bf16=False),
}
TOKENIZER = SimpleNamespace(eos_token_id=1, pad_token_id=0)


def make_policy(name, config):
    shape = copy.deepcopy({**SHAPES, **MIXED, **PADDED}[name])  # from_config writes the dtype into its own
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    return load_policy(model, TOKENIZER, config)


def micro_batches(policy, config, prompts=None, completions=None):
    """Of a step whose prompts and completions have these lengths; all of full length by default."""
    prompts = prompts or [config.max_prompt_length] * config.prompts_per_step
    completions = completions or [config.max_completion_length] * (config.prompts_per_step * config.num_generations)
    return pack(
        [[5] * length for length in prompts], [[7] * length for length in completions],
        token_budget=config.token_budget, pad_token_id=0, device=policy.device,
        num_generations=config.num_generations, padding_free=config.padding_free and policy.packs,
    )  # fmt: skip


def kept_bytes(policy, config, batch=None, compute=None):
    """Unique storages that a micro-batch's forward saves, the even step's first by default, but for the model's own.

    Positions and masks are not saved by autograd: layers hand them to their recomputation by keyword.
    """
    own = {t.untyped_storage().data_ptr() for t in [*policy.model.parameters(), *policy.model.buffers()]}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    batch = batch or next(micro_batches(policy, config))
    by_keyword = "position_embeddings", "attention_mask"
    by_outline = policy.outlined is not None and batch.packing is not None
    watches = [
        layer.register_forward_pre_hook(
            lambda _, arguments, keywords: (
                tree_map_only(torch.Tensor, keep, [keywords.get(x) for x in by_keyword]) and None
            ),
            with_kwargs=True,
        )
        for layer in (() if by_outline else policy.decoder.layers)  # a hooked layer goes by itself
    ]
    own_forward = OutlinedLayer.forward

    def forward(layer, hidden, cos_sin):
        tree_map_only(torch.Tensor, keep, cos_sin)
        return own_forward(layer, hidden, cos_sin)

    with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        patch.setattr(OutlinedLayer, "forward", forward)
        logprobs = policy.logprobs(batch, 1.0) if compute is None else compute(batch)
    for watch in watches:
        watch.remove()
    for mask in batch.packing.masks.values() if batch.packing else ():  # of attention, with the micro-batch
        keep(mask)
    assert logprobs.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def most_kept_bytes(policy, config, worst):
    """Of the first micro-batch of the even step, or of one whose lengths are given as micro_batches() has them."""
    return max(kept_bytes(policy, config, next(micro_batches(policy, config, **step))) for step in ({}, worst))


def and_slow(first, names):
    """The first of the names, and the others where the slow tests are run: seconds each."""
    others = (name for name in names if name != first and "0.5b" not in name)
    return [first, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


def assert_near(predicted, measured, share=0.05):
    assert abs(predicted - measured) <= share * measured, f"predicted {predicted}, measured {measured}"


def some_of(*quick, names=SHAPES, rungs=RUNGS):
    """Every name with every rung, of which all but the quick are slow."""
    pairs = ((name, rung) for name in names for rung in rungs if "0.5b" not in name)
    marks = {pair: () if pair in quick else pytest.mark.slow for pair in pairs}
    return pytest.mark.parametrize(("name", "rung"), [pytest.param(*pair, marks=one) for pair, one in marks.items()])


@some_of(  # each shape and each rung
    ("qwen2", "none"), ("qwen2", "split, fp32"), ("mistral", "both"), ("llama, 5 layers", "checkpointing"),
    ("qwen3, untied", "tiled"), ("gemma2", "padded"),
)  # fmt: skip
def test_activations_are_as_predicted(name, rung, monkeypatch):
    monkeypatch.setattr("lowmem_grpo.model.offload.TILE_TOKENS", 96)
    config = GRPOConfig(**TASK, **RUNGS[rung])
    predicted = planner.forecast(SHAPES[name], config).phases["update"]["activations kept"]
    policy = make_policy(name, config)
    # Of 87 tokens, as many as there may be, and the keys of four tails; or two groups that share no mask.
    worst = {"completions": [24, 9, 9, 9] * 2} if "split" in rung else {"prompts": [40, 39]}
    assert_near(predicted, most_kept_bytes(policy, config, worst))


@some_of(("qwen2", "none"), ("gemma2", "both"), rungs=["none", "checkpointing", "both"])
def test_peaks_of_layers_at_work_are_those_of_torchs_own_record(name, rung, monkeypatch):
    """Of a backward and of a pass without one, up to the head, by the allocator's events, over the activations kept."""
    monkeypatch.setattr("lowmem_grpo.model.offload.TILE_TOKENS", 96)
    random_numbers = torch.get_rng_state()  # 5,056 bytes for each checkpoint, in a CPU's memory also on a GPU
    monkeypatch.setattr(torch, "get_rng_state", lambda: random_numbers)
    config = GRPOConfig(**TASK, **RUNGS[rung], load_in_4bit=False, beta=0.1)
    phases = planner.forecast(SHAPES[name], config).phases
    policy = make_policy(name, config)
    batch = next(micro_batches(policy, config))
    for parameter in policy.parameters_of(policy.adapter).values():
        parameter.grad = torch.zeros_like(parameter)

    def update():
        hidden = policy.hidden_states(batch)
        hidden.backward(torch.ones_like(hidden))

    def reference():
        with policy.as_reference():
            policy.hidden_states(batch)

    update()  # the masks, which stay with the batch
    kept = sum(mask.nbytes for mask in batch.packing.masks.values())
    measured = [kept + peak_allocated(run, policy.device) for run in (update, reference)]
    at_work = phases["update"]["activations kept"] + phases["update"]["one layer at work"]
    assert_near(at_work, measured[0])
    assert_near(phases["reference"]["activations"], measured[1])


@some_of(("qwen2", "none"), names=["qwen2", "qwen3, untied"], rungs=["none", "checkpointing"])
def test_peaks_of_a_critics_passes_are_those_of_torchs_own_record(name, rung, monkeypatch):
    """Of its values and of its backward, which have no logits; weights, gradients and optimizer are by their sizes."""
    random_numbers = torch.get_rng_state()
    monkeypatch.setattr(torch, "get_rng_state", lambda: random_numbers)
    # Long completions, since scores of few tokens are a matter of bytes.
    sizes = dict(max_prompt_length=8, max_completion_length=120, num_generations=1, prompts_per_step=4)
    config = GRPOConfig(**{**TASK, **RUNGS[rung], **sizes, "load_in_4bit": False, "adv_estimator": "gae"})
    found = planner.forecast(SHAPES[name], config)
    policy = make_policy(name, config)
    critic = Critic(policy, config, total_steps=10)
    batch = next(micro_batches(policy, config))
    for parameter in critic.learner.parameters:
        parameter.grad = torch.zeros_like(parameter)

    def update():
        policy.scores(batch).sum().backward()

    @torch.no_grad()
    def values():
        policy.scores(batch)

    with policy.wearing("critic"):
        update()  # the masks, which stay with the batch
        kept = sum(mask.nbytes for mask in batch.packing.masks.values())
        measured = {name: kept + peak_allocated(run, policy.device) for name, run in
                    (("critic", update), ("values", values))}  # fmt: skip
    phases = found.phases
    grads = storages([parameter.grad for parameter in critic.learner.parameters])
    assert phases["critic"].pop("the critic's gradients") == grads == found.resident["the critic"]
    for name, most in measured.items():
        assert_near(sum(phases[name].values()), most, 0.01)
    critic.learner.step(lambda: None)
    state = critic.learner.optimizer.state
    moments = [v for entry in state.values() for v in entry.values() if isinstance(v, torch.Tensor) and v.dim()]
    assert found.resident["the critic's optimizer state"] == storages(moments)


@pytest.mark.parametrize("rung", [pytest.param("none", marks=pytest.mark.slow), "checkpointing"])
def test_no_uneven_lengths_keep_more_than_is_predicted(rung):
    lengths = dict(prompts_per_step=4, max_prompt_length=80, max_completion_length=100, token_budget=600)
    config = GRPOConfig(**{**TASK, **lengths, **RUNGS[rung]})
    policy = make_policy("qwen2", config)
    predicted = planner.forecast(SHAPES["qwen2"], config).phases["update"]["activations kept"]

    @settings(max_examples=12, derandomize=True, deadline=None, database=None)
    @given(
        prompts=st.lists(st.integers(1, 80), min_size=4, max_size=4),
        completions=st.lists(st.integers(1, 100), min_size=16, max_size=16),
    )
    def never_more(prompts, completions):
        measured = max(kept_bytes(policy, config, b) for b in micro_batches(policy, config, prompts, completions))
        assert measured <= 1.05 * predicted

    never_more()


@pytest.mark.parametrize(
    "name, rung",
    [
        *((name, "none") for name in MIXED if name not in SLOW),
        *(pytest.param(name, "none", marks=pytest.mark.slow) for name in SLOW),
        ("qwen3 moe, dense last", "checkpointing"),
    ],
)
def test_layers_that_differ_are_counted_by_their_kind(name, rung):
    config = GRPOConfig(**TASK, **RUNGS[rung])
    predicted = planner.forecast(MIXED[name], config)
    policy = make_policy(name, config)
    kept = most_kept_bytes(policy, config, {"prompts": [40, 39]})
    assert_near(predicted.phases["update"]["activations kept"], kept)
    trained = policy.parameters_of(policy.adapter).values()
    assert predicted.resident["adapters"] == storages(trained)
    known = {id(p) for p in trained} | {id(p) for p in policy.base.parameters() if hasattr(p, "quant_state")}
    others = [*(p for p in policy.base.parameters() if id(p) not in known), *policy.base.buffers()]
    packed = [buffer for part in policy.base.modules() if isinstance(part, Nf4Stack) for buffer in part.buffers()]
    assert predicted.resident.get("4-bit experts", 0) == storages(packed)
    others = [one for one in others if id(one) not in set(map(id, packed))]
    assert_near(predicted.resident["embedding, head and the rest"], storages(others), 0.01)


@pytest.mark.parametrize("name", and_slow("qwen3 moe, dense first", {**MIXED, **PADDED, **SHAPES}))
def test_a_few_layers_of_each_kind_tell_what_running_all_of_them_shows(name):
    model, config = {**SHAPES, **MIXED, **PADDED}[name], GRPOConfig(**TASK, **RUNGS["checkpointing"], beta=0.1)
    whole = trace.skeleton(trace.Key(model, lora_config(config)), config.compute_dtype, False, True)
    config = replace(config, padding_free=name not in PADDED)
    with trace.fake_policy(whole, tuple(range(model.num_hidden_layers)), config) as policy:
        ran = trace.run_few(policy, config)[0].ran
        layers = {} if name in PADDED else policy.layer_shapes
    assert trace.run_layers(whole, config, trace._few_of_each(trace._kinds(whole), layers)) == ran


def test_layers_that_look_themselves_up_by_their_number_are_run_at_other_places():
    """Zamba 2's shared layers have adapters by the numbers of the layers that they are in: here 1 and 3, at 1 and 2."""
    mixed = {"num_hidden_layers": 5, "layers_block_type": ["mamba", "hybrid"] * 2 + ["mamba"], "num_mem_blocks": 2}
    model, config = AutoConfig.for_model("zamba2", **{**HYBRIDS["zamba2"], **mixed}), GRPOConfig(**TASK)
    whole = trace.skeleton(trace.Key(model, lora_config(config)), config.compute_dtype, False, True)
    assert trace._kinds(whole) == [0, 1, 0, 3, 0]
    padded, layers, states, choices = trace._shapes(whole, config.compute_dtype)
    assert padded is None and layers.keys() == {1, 3} and states.held > 0 and choices == 0


def test_layers_that_share_their_weights_are_counted_once_in_16_bits():
    """Zamba 2's, which from_pretrained leaves out of 4 bits, and so are those of a loaded model."""
    mixed = {"num_hidden_layers": 3, "layers_block_type": ["hybrid"] * 2 + ["mamba"], "num_mem_blocks": 1}
    model, config = AutoConfig.for_model("zamba2", **{**HYBRIDS["zamba2"], **mixed}), GRPOConfig(**TASK)
    resident = planner.forecast(model, config).resident
    policy = load_policy(AutoModelForCausalLM.from_config(model, dtype=torch.bfloat16), TOKENIZER, config)
    frozen = {p.data_ptr(): p for p in policy.base.parameters() if not p.requires_grad}
    in_4bit = [p for p in frozen.values() if hasattr(p, "quant_state")]
    assert resident["4-bit linear layers"] == sum(trace.nf4_bytes(2 * p.numel()) for p in in_4bit) > 0
    others = sum(p.nbytes for p in frozen.values() if not hasattr(p, "quant_state"))
    assert resident["embedding, head and the rest"] == others + sum(b.nbytes for b in policy.base.buffers())


def test_a_layer_without_keys_and_values_of_its_own_is_counted_after_one_that_has_them():
    """And per-layer embeddings have their part for each of the model's layers, whichever of them run."""
    kind, settings = BY_LAYER["gemma4, E"]
    few = {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5, "num_kv_shared_layers": 2}
    model, config = AutoConfig.for_model(kind, **{**settings, **few}), GRPOConfig(**TASK, **RUNGS["padded"])
    whole = trace.skeleton(trace.Key(model, lora_config(config)), config.compute_dtype, False, True)
    with trace.fake_policy(whole, tuple(range(5)), config) as policy:
        ran, layers = trace.run_few(policy, config)[0].ran, policy.layer_shapes
    assert [layer.source for layer in layers.values()] == [0, 1, 2, 2, 2]
    assert trace.run_layers(whole, config, trace._few_of_each(trace._kinds(whole), layers)) == ran


@pytest.mark.parametrize("name", PADDED)
def test_what_is_not_packed_is_planned_as_padded_rows_and_transformers_generate(name):
    short = {**TASK, "max_prompt_length": 20, "max_completion_length": 12}  # Mamba 1 loops over tokens in Python
    config = GRPOConfig(**short, rollout_token_budget=100, load_in_4bit=False)
    predicted = planner.forecast(PADDED[name], config)
    policy = make_policy(name, config)
    assert not policy.packs
    assert_near(predicted.phases["update"]["activations kept"], kept_bytes(policy, config))
    with policy.inference(), policy.autocast():  # a wave of 3 rows of 32 tokens; the last one's keys are never made
        out = policy.base.generate(
            torch.full((3, 20), 5), attention_mask=torch.ones(3, 20), max_new_tokens=12, min_new_tokens=12,
            do_sample=False, return_dict_in_generate=True,
        )  # fmt: skip
    held = [x for layer in out.past_key_values.layers for x in tree_leaves(vars(layer)) if isinstance(x, torch.Tensor)]
    whole = trace.skeleton(trace.Key(PADDED[name], lora_config(config)), config.compute_dtype, False, True)
    row = trace.run_generate(whole, config)
    assert_near(3 * row.cache, sum(x.nbytes for x in held), 0.01)
    # At this size the prompts take more than a token does at the end.
    parts = predicted.phases["rollout"]
    assert parts["keys and values"] == 3 * row.prompt_cache and parts["prefill or logits"] >= 3 * row.prefill
    told = planner.as_text(planner.plan(PADDED[name], config))
    assert "Trained on padded rows, sampled from by transformers' generate: " in told
    with pytest.raises(ValueError, match="rollout_kv='int8' does not serve this model: .*; leave it out"):
        planner.forecast(PADDED[name], replace(config, rollout_kv="int8"))
    with pytest.raises(ValueError, match="rollout_weights='dense' does not serve"):
        planner.forecast(PADDED[name], replace(config, rollout_weights="dense"))


@pytest.mark.slow
@pytest.mark.parametrize("rung", ["none", "checkpointing"])
def test_activations_of_a_real_shape_are_as_predicted(rung):
    config = GRPOConfig(**TASK, **RUNGS[rung])
    predicted = planner.forecast(SHAPES["qwen2.5-0.5b"], config).phases["update"]["activations kept"]
    assert_near(predicted, kept_bytes(make_policy("qwen2.5-0.5b", config), config))


def storages(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit"])
@pytest.mark.parametrize("name", and_slow("qwen3, untied", SHAPES))
def test_weights_gradients_and_the_optimizers_state_are_as_predicted(name, optim):
    config = GRPOConfig(**TASK, optim=optim, lora_r=32)
    resident = planner.forecast(SHAPES[name], config).resident
    policy = make_policy(name, config)
    parameters = list(policy.parameters_of(policy.adapter).values())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = make_optimizer(parameters, config)
    optimizer.step()
    state = [v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, torch.Tensor)]
    assert_near(resident["optimizer state"], storages([v for v in state if v.dim()]))
    assert resident["gradients"] == storages([p.grad for p in parameters])
    assert resident["adapters"] == storages(parameters)
    quantized, others = [], []
    for module in policy.base.modules():
        for parameter in module.parameters(recurse=False):
            if hasattr(parameter, "quant_state"):
                scales = parameter.quant_state
                quantized += [parameter.data, scales.absmax, scales.code, scales.offset]
                quantized += [scales.state2.absmax, scales.state2.code]
            elif not parameter.requires_grad:
                others.append(parameter)
    # Tables of codes are shared by some versions of bitsandbytes: 1 KiB a layer, which tiny layers notice.
    assert_near(resident["4-bit linear layers"], sum(t.nbytes for t in quantized), 0.02)
    assert_near(resident["embedding, head and the rest"], storages([*others, *policy.base.buffers()]))


@pytest.mark.parametrize("name", and_slow("qwen3, untied", SHAPES))
def test_keys_and_values_are_as_predicted(name):
    """Of one trace a shape, which neither of these settings changes."""
    for rollout_kv, use_cpu in itertools.product(("full", "int8"), (True, False)):
        config = GRPOConfig(**{**TASK, "use_cpu": use_cpu}, rollout_token_budget=200, rollout_kv=rollout_kv)
        predicted = planner.forecast(SHAPES[name], config).phases["rollout"]["keys and values"]
        shape = store_shape(
            prompt_tokens=40, num_prompts=2, num_generations=4, max_completion_length=24, budget_tokens=200,
            paged=not use_cpu,
        )  # fmt: skip
        dtype = torch.int8 if rollout_kv == "int8" else torch.bfloat16
        model = SHAPES[name]
        heads, size = model.num_attention_heads, getattr(model, "head_dim", None)
        size = size or model.hidden_size // heads
        layers = {n: LayerShape(heads, model.num_key_value_heads, size, n) for n in range(model.num_hidden_layers)}
        store = Store(layers, shape, dtype, torch.device("cpu"))
        parts = [part for rows in (store.own, store.prefix) for group in rows.groups for part in group.tensors()]
        assert predicted == sum(part.nbytes for part in parts)


@pytest.mark.parametrize("settings", [{}, {"lora_target_modules": ["q_proj"]}, {"load_in_4bit": False}], ids=str)
def test_a_dense_copy_of_the_4_bit_layers_is_planned(settings):
    """And no layer besides, which only 4-bit products dequantize."""
    config = GRPOConfig(**TASK, **settings)
    dense = replace(config, rollout_weights="dense")
    parts = planner.forecast(SHAPES["qwen2"], dense).phases["rollout"]
    expected = dense_bytes(make_policy("qwen2", config).base, torch.bfloat16)
    assert parts["dense weights"] == expected and (expected > 0) == config.load_in_4bit
    assert planner.forecast(SHAPES["qwen2"], config).phases["rollout"] == parts, "what auto is on a CPU"
    others = planner.forecast(SHAPES["qwen2"], replace(config, rollout_weights="4bit")).phases["rollout"]
    assert "dense weights" not in others
    assert (others["prefill or logits"] > parts["prefill or logits"]) == config.load_in_4bit


def test_a_plan_takes_no_dense_copy_away_where_there_is_none():
    config = GRPOConfig(**TASK, rollout_weights="dense")
    for in_4bit in (True, False):
        tight = replace(config, load_in_4bit=in_4bit)
        found = planner.forecast(SHAPES["qwen2"], tight)
        found = replace(found, phases={"rollout": found.phases["rollout"]})  # and so the largest
        key = planner.Key(SHAPES["qwen2"], lora_config(tight))
        names = [change.name for change in planner._changes(key, tight, found)]
        assert ("rollout_weights" in names) == in_4bit


CAPTURED = ("captured steps", "adapters in the compute dtype")


def test_captured_steps_have_memory_of_their_own():
    config = GRPOConfig(**{**TASK, "use_cpu": False}, rollout_token_budget=200)
    slots = store_shape(
        prompt_tokens=40, num_prompts=2, num_generations=4, max_completion_length=24, budget_tokens=200, paged=True
    ).slots
    largest = SHAPES["qwen2"].hidden_size * SHAPES["qwen2"].intermediate_size  # a linear layer, in 16 bits
    many, llama = replace(config, prompts_per_step=8, rollout_token_budget=100_000), SHAPES["llama, 5 layers"]
    for length, at_work in (
        (24, 4 * 2 * llama.intermediate_size),  # the fp32 parts of gate and up
        (1000, 4 * 8 * (16 + 2) * (2 + 8)),  # of 8 heads the fp32 sums of a prompt's 2 splits and 8 others
    ):
        found = planner.forecast(llama, replace(many, max_completion_length=length))
        assert found.resident["captured steps"] == 32 * (4 * llama.vocab_size + at_work)
    lasting = planner.forecast(SHAPES["qwen2"], config)
    assert lasting.resident["captured steps"] == 4 * slots * SHAPES["qwen2"].vocab_size + 2 * largest
    again = planner.forecast(SHAPES["qwen2"], replace(config, rollout_graphs_last=False))
    for name in CAPTURED:
        assert lasting.resident[name] == again.phases["rollout"][name] > 0
        assert name not in again.resident and name not in lasting.phases["rollout"]
    assert lasting.peaks()["rollout"] == again.peaks()["rollout"]
    assert lasting.peaks()["update"] - again.peaks()["update"] == sum(lasting.resident[name] for name in CAPTURED)
    for other in ({"rollout_cuda_graphs": False}, {"offload_embedding": True}):
        found = planner.forecast(SHAPES["qwen2"], replace(config, **other))
        assert "captured steps" not in found.phases["rollout"] | found.resident
    dense = planner.forecast(SHAPES["qwen2"], replace(config, rollout_weights="dense"))
    assert "captured steps" in dense.phases["rollout"], "which read the copy, and go with it"


@pytest.mark.parametrize("rank", [8, 16])
def test_what_a_fast_step_keeps_is_as_predicted(rank):
    config = GRPOConfig(**{**TASK, "use_cpu": False}, lora_r=rank)
    predicted = planner.forecast(SHAPES["qwen3, untied"], config).resident
    policy = make_policy("qwen3, untied", replace(config, use_cpu=True))
    fast, kept = FastStep(policy, read(policy), 64), Kept()
    with fast.ready(dense=False, kept=kept):
        assert predicted["adapters in the compute dtype"] == sum(x.nbytes for x in kept.tensors.values())
    assert predicted["cosines and sines"] == sum(x.nbytes for pair in fast.tables for x in pair)


def test_a_plan_gives_up_lasting_graphs_before_it_gives_up_graphs():
    config = GRPOConfig(**{**TASK, "use_cpu": False})
    found = planner.forecast(SHAPES["qwen2"], config)
    for phase, expected in (("update", "rollout_graphs_last"), ("rollout", "rollout_cuda_graphs")):
        largest = replace(found, phases={phase: found.phases[phase]})
        assert next(planner._changes(SHAPES["qwen2"], config, largest)).name == expected
    assert planner._fit(
        planner.Key(SHAPES["qwen2"], planner.lora_config(config)),
        replace(config, vram_budget=f"{found.peak() / 0.97 / 2**20 - 0.001:.3f}MiB"),
    )[0].rollout_graphs_last == (found.largest_phase() == "rollout")


def test_on_a_cpu_nothing_of_a_gpus_is_counted():
    gpu = GRPOConfig(**{**TASK, "use_cpu": False, "max_completion_length": 256}, rollout_token_budget=1000)
    cpu = replace(gpu, use_cpu=True)
    (on_gpu, on_cpu) = (planner.forecast(SHAPES["qwen2"], config) for config in (gpu, cpu))
    assert set(on_gpu.resident) - set(on_cpu.resident) == {"CUDA and its libraries", "cosines and sines", *CAPTURED}
    assert set(on_cpu.phases["rollout"]) >= set(on_gpu.phases["rollout"])
    others = {"dense weights", "adapters in the compute dtype"}
    assert set(on_cpu.phases["rollout"]) - set(on_gpu.phases["rollout"]) == others, "auto is dense there"
    assert on_gpu.phases["update"] == on_cpu.phases["update"], "tiles of the head are as large, of so small a model"
    asked = dict(prompt_tokens=40, num_prompts=2, num_generations=4, max_completion_length=256, budget_tokens=1000)
    paged, plain = (store_shape(**asked, paged=paged).num_tokens() for paged in (True, False))
    assert paged != plain, "else this says nothing"
    assert on_cpu.phases["rollout"]["keys and values"] * paged == on_gpu.phases["rollout"]["keys and values"] * plain


LARGE = GRPOConfig(max_completion_length=512, beta=0.01, token_budget=2048)


def large_shape(layers=28):
    return Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=layers, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip


def test_a_plan_fits_its_budget_with_the_cheapest_settings():
    peaks = []
    for budget in ("24GB", "9GB", "7.5GB"):
        found = planner.plan(large_shape(), replace(LARGE, vram_budget=budget))
        assert found.remedy is None and found.forecast.peak() <= found.budget
        assert all(getattr(found.config, change.name) == change.value for change in found.changes)
        peaks.append((found.forecast.peak(), len(found.changes)))
    assert peaks == sorted(peaks, key=lambda pair: -pair[0]), "a smaller budget, a smaller peak"
    assert [count for _, count in peaks] == sorted(count for _, count in peaks), "and no fewer changes"


def test_a_plan_lets_go_of_what_later_savings_made_needless(monkeypatch):
    """Without any of what it changed, or with more of what it lowered, it would not fit."""
    assert set(planner.COSTLIEST_FIRST) == set(re.findall(r'Change\(\s*"(\w+)"', inspect.getsource(planner)))
    lowered = {"token_budget": lambda value: 2 * value, "rollout_token_budget": lambda value: value + PAGE}
    asked, plans = replace(LARGE, max_prompt_length=512), []
    for budget in ("9GB", "7.5GB", "6GB"):
        found = planner.plan(large_shape(), replace(asked, vram_budget=budget))
        for name, value in ((change.name, change.value) for change in found.changes):
            changed = lowered[name](value) if name in lowered else getattr(asked, name)
            more = planner.forecast(large_shape(), replace(found.config, **{name: changed}))
            assert not planner._fits(more, found.budget), name
        plans.append({change.name: change.value for change in found.changes})
    text = planner.as_text(found)
    assert "offload_embedding=True: the embedding is looked up in CPU memory, and no decoding step is captured" in text
    monkeypatch.setattr(planner, "_eased", lambda key, asked, config, found, changes: (config, found))
    for budget, plan in zip(("9GB", "7.5GB", "6GB"), plans, strict=True):
        found = planner.plan(large_shape(), replace(asked, vram_budget=budget))
        one_by_one = {change.name: change.value for change in found.changes}
        assert plan.keys() <= one_by_one.keys() and plan["rollout_token_budget"] > one_by_one["rollout_token_budget"]
    assert one_by_one.keys() - plan.keys() >= {"rollout_cuda_graphs", "optim", "activation_offloading"}


def test_a_plan_raises_no_budget_of_tokens_to_more_than_was_asked_for(monkeypatch):
    """Even where the forecast of more tokens were less memory."""
    tried = []

    def forecast(key, config):
        tried.append((config.token_budget, config.rollout_token_budget))
        return planner.Forecast({}, {"update": {"all": 2 * ((2000 in tried[-1]) or max(tried[-1]) > 10**6)}})

    monkeypatch.setattr(planner, "_forecast", forecast)
    monkeypatch.setattr(planner, "_fits", lambda found, budget: found.peak() < 2)
    asked = replace(LARGE, token_budget=2000, rollout_token_budget=2000, vram_budget="6GB")
    changes = {name: planner.Change(name, 1536, "") for name in ("token_budget", "rollout_token_budget")}
    config, _ = planner._eased(None, asked, replace(asked, token_budget=1536, rollout_token_budget=1536), None, changes)
    assert (config.token_budget, config.rollout_token_budget) == (1536, 1984)
    assert {name: change.value for name, change in changes.items()} == {
        "token_budget": 1536, "rollout_token_budget": 1984,
    }  # fmt: skip
    assert max(map(max, tried)) == 2000


def test_where_the_critic_takes_the_most_a_plan_computes_layers_again_and_moves_checkpoints():
    """Its update has the gradients of both, and all else that the policy's has but the head."""
    found = planner.Forecast({}, {"update": {"activations": 1}, "critic": {"activations": 2}})
    for changes, name in (
        (dict(gradient_checkpointing=False), "gradient_checkpointing"),
        (dict(optim="adamw_8bit"), "activation_offloading"),
    ):
        config = GRPOConfig(**TASK, **changes, adv_estimator="gae", token_budget=64)
        key = planner.Key(SHAPES["qwen2"], lora_config(config))
        assert name in {change.name for change in planner._changes(key, config, found)}


def test_without_a_budget_nothing_is_chosen():
    found = planner.plan(large_shape(), LARGE)
    assert found.config == LARGE and not found.changes and found.remedy is None


EVERYTHING = replace(
    LARGE, prompts_per_step=1, max_completion_length=1024, optim="adamw_8bit", tiled_mlp=True,
    activation_offloading=True, offload_embedding=True, load_head_in_8bit=True, token_budget=512,
    rollout_token_budget=1,
)  # fmt: skip


@pytest.mark.slow
def test_where_completions_cannot_be_shorter_prompts_are():
    prompts = replace(EVERYTHING, vram_budget="5.5GB", max_completion_length=64, max_prompt_length=4096)
    remedy = planner.plan(large_shape(), prompts).remedy
    assert remedy.startswith("max_prompt_length=")
    fitting = replace(prompts, max_prompt_length=int(remedy.split("=")[1].split()[0]))
    assert planner.plan(large_shape(), fitting).remedy is None
    both = planner.plan(large_shape(), replace(EVERYTHING, vram_budget="5.4GB", max_prompt_length=4096)).remedy
    assert both.startswith("max_completion_length=64 and max_prompt_length=")


def test_where_nothing_fits_the_smallest_change_is_named():
    short = replace(EVERYTHING, vram_budget="5.47GB", max_completion_length=224)
    found = planner.plan(large_shape(), short)
    length = int(found.remedy.removeprefix("max_completion_length=").removesuffix(" would fit"))
    assert planner.plan(large_shape(), replace(short, max_completion_length=length)).remedy is None
    longer = replace(short, max_completion_length=length + 32)
    _, tight, _ = planner._fit(planner.Key(large_shape(), lora_config(longer)), longer)
    assert not planner._fits(tight, longer.vram_budget_bytes)
    with pytest.raises(
        ValueError, match="vram_budget=4GB is too little, the predicted peak is .*CUDA alone take .* GB: .*smaller"
    ):
        planner.plan_to_fit(large_shape(), replace(short, vram_budget="4GB", max_completion_length=64))


def test_offloaded_activations_do_not_grow_with_the_layers():
    config = replace(LARGE, activation_offloading=True, token_budget=1024)
    small, large = (planner.forecast(large_shape(layers), config) for layers in (4, 8))
    assert large.phases["update"] == small.phases["update"]


def test_the_command_prints_a_table_or_json(tmp_path, capsys):
    SHAPES["qwen3, untied"].save_pretrained(tmp_path)
    small = ["--prompts_per_step=1", "--num_generations=2", "--max_prompt_length=32"]  # a few settings to choose from
    plan = ["plan", "--model", str(tmp_path), *small]
    assert main([*plan, "--vram_budget", "1GB"]) == 0
    assert "This fits 1 GB." in capsys.readouterr().out
    assert main([*plan, "--vram_budget", "0.5GB", "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["fits"] is False and "choose a smaller model" in printed["remedy"]
    assert printed["peaks"]["update"] == sum(printed["resident"].values()) + sum(printed["phases"]["update"].values())


def test_the_table_is_in_gb_as_the_budget_is():
    forecast = planner.Forecast({"weights": 1_500_000_000, "adapters": 2_000_000}, {"update": {"head": 2**28}})
    assert planner.as_text(planner.Plan(GRPOConfig(), forecast, 2 * 10**9, [], 512, [])).splitlines() == [
        "resident throughout                   1.502 GB",
        "  weights                             1.500 GB",
        "  adapters                            0.002 GB",
        "at the peak of the update             1.770 GB",
        "  head                                0.268 GB",
        "",
        "Predicted peak: 1.770 GB, in the update.",
        "This fits 2 GB.",
    ]


def test_a_file_for_training_can_be_planned(tmp_path, capsys):
    SHAPES["qwen3, untied"].save_pretrained(tmp_path / "model")
    path = tmp_path / "run.yaml"
    path.write_text(f"model_name_or_path: {tmp_path / 'model'}\ndataset_name: d\nreward_funcs: [r]\nseed: 1\n")
    assert main(["plan", "--config", str(path)]) == 0
    assert "Predicted peak" in capsys.readouterr().out


def test_a_plan_says_which_prompts_it_is_for(tmp_path, capsys):
    SHAPES["qwen3, untied"].save_pretrained(tmp_path)
    plan = ["plan", "--model", str(tmp_path), "--max_completion_length", "64"]
    assert main([*plan, "--max_prompt_length", "100"]) == 0
    assert "assumed to have 100 tokens: max_prompt_length is 100." in capsys.readouterr().out
    assert main([*plan, "--max_prompt_length", "none"]) == 0
    assert "assumed to have 512 tokens: max_prompt_length is none." in capsys.readouterr().out
    assert main([*plan, "--max_prompt_length", "none", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["prompt_tokens"] == 512 and "max_prompt_length is none" in printed["assumptions"][0]


@pytest.mark.parametrize("limit", [None, 50])
def test_a_run_is_planned_for_its_longest_prompt(limit):
    model = SHAPES["qwen2"]
    config = replace(GRPOConfig(**TASK), max_prompt_length=limit, vram_budget="24GB", token_budget=250)
    found = planner.plan_to_fit(model, config, None, 90)
    assert found.forecast == planner.forecast(model, replace(config, max_prompt_length=90))
    assert found.config.max_prompt_length == limit, "the run's own is left as it is"
    assert found.longest == 90 and not found.assumptions
    shorter = planner.plan_to_fit(model, config, None, 30).forecast
    assert shorter == planner.forecast(model, replace(config, max_prompt_length=30)) != found.forecast


def test_a_setting_that_a_model_does_not_know_is_not_chosen(monkeypatch):
    monkeypatch.setattr(planner, "TILE_TOKENS", 150)  # of which a text has more
    model = MIXED["two layers"]
    config = GRPOConfig(**{**TASK, "max_completion_length": 120}, token_budget=160, optim="adamw_8bit")
    config = replace(config, vram_budget=f"{planner.forecast(model, config).peak() / 10**9 - 0.001:.4f}GB")
    with pytest.raises(ValueError, match="tiled_mlp does not know the MLP of Qwen3MoeDecoderLayer"):
        planner.forecast(model, replace(config, tiled_mlp=True))
    names = [change.name for change in planner.plan(model, config).changes]
    assert "activation_offloading" in names and "tiled_mlp" not in names


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_limit_on_memory_ends_with_the_run():
    device = torch.device("cuda", torch.cuda.current_device())
    found = planner.plan(SHAPES["qwen3, untied"], GRPOConfig(**{**TASK, "use_cpu": False}, vram_budget="2GB"))
    torch.cuda.set_per_process_memory_fraction(0.9, device)
    try:
        with pytest.raises(KeyError), planner.limit_memory(found, device):
            with pytest.raises(torch.OutOfMemoryError):
                torch.empty(2 * 10**9, dtype=torch.uint8, device=device)
            raise KeyError
        assert torch.cuda.get_per_process_memory_fraction(device) == pytest.approx(0.9)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def test_bad_input_is_one_sentence(tmp_path, capsys):
    assert main(["plan", "--vram_budget", "1GB"]) == 2
    assert "--model is missing" in capsys.readouterr().err
    assert main(["plan", "--model", str(tmp_path / "none"), "--vram_budget", "1GB"]) == 2
    assert "is not a folder on this machine" in capsys.readouterr().err
    assert main(["plan", "--model", "x", "--vram_budget", "lots"]) == 2
    assert "vram_budget='lots' is not a size; write it as 8GB or 7.5GiB" in capsys.readouterr().err
    for words in (["--vram_buget", "8GB"], ["--vram_buget", "8GB", "--model", "x"], ["sft", "--vram_buget", "8GB"]):
        assert main(["plan", "--model", "x", *words] if words[0] != "sft" else ["plan", *words]) == 2
        assert "did you mean vram_budget?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8 * 10**9), ("7.5GiB", 15 * 2**29), ("512 mb", 512 * 10**6), ("1kib", 1024)]
)
def test_sizes_are_read_as_they_are_written(text, size):
    assert GRPOConfig(vram_budget=text).vram_budget_bytes == size


@pytest.mark.parametrize("text", ["8", "0GB", "-1GB", "8 gigabytes", " "])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is not a size"):
        GRPOConfig(vram_budget=text)


def test_a_model_that_cannot_be_adapted_is_refused_in_a_sentence(tmp_path, capsys):
    MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=3).save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path), "--lora_target_modules", "out_proj"]) == 2
    assert "no adapter could be added" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [pytest.param({"fp16": True}, marks=pytest.mark.slow), {"max_prompt_length": None}, {"load_in_4bit": False}],
    ids=str,
)
def test_a_mixture_of_experts_is_predicted(changes):
    model = Qwen3MoeConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2, eos_token_id=1,  # pyright: ignore[reportCallIssue]: transformers takes head_dim, undeclared
    )  # fmt: skip
    found = planner.forecast(model, GRPOConfig(**{**TASK, **changes}))
    experts = 4 * 4 * 3 * 32 * 64  # layers, experts, matrices
    if changes.get("load_in_4bit", True):
        codes_and_scales, stacks = experts // 2 + experts // 64, 4 * 2
        doubles = 4 * 256 + 4 * (4 + 4)  # what codes of scales mean, and of each expert a scale of scales and an offset
        assert found.resident["4-bit experts"] == codes_and_scales + stacks * doubles
    else:
        assert found.resident["embedding, head and the rest"] >= 2 * experts


def test_what_cannot_run_without_memory_is_refused_in_a_sentence(monkeypatch):
    def needs_values(*_):
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(trace, "_activations", needs_values)
    with pytest.raises(ValueError, match="memory of a 'qwen2' model cannot be predicted: data-dependent"):
        planner.forecast(SHAPES["qwen2"], GRPOConfig(**TASK, lora_r=3))


@pytest.mark.parametrize("given_as", ["peft_config", "a PeftModel", "an adapter folder"])
def test_a_plan_is_for_the_adapter_that_is_trained(given_as, tmp_path, capsys):
    shape, config = SHAPES["qwen3, untied"], GRPOConfig(**TASK, vram_budget="2GB")
    wide = LoraConfig(r=64, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    expected = planner.forecast(shape, replace(config, lora_r=64, lora_target_modules=["q_proj", "v_proj"]))
    if given_as == "peft_config":
        found = planner.plan_to_fit(shape, config, adapter_config("name", config, wide))
        assert found.forecast == expected and found.config.lora_r == config.lora_r
        return
    shape.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    base.name_or_path = str(tmp_path)
    model = get_peft_model(base, wide)
    if given_as == "a PeftModel":
        found = planner.plan_to_fit(read_config(model, config), config, adapter_config(model, config))
        assert found.forecast == expected
        return
    model.save_pretrained(tmp_path / "adapter")
    settings = [f"--{name}={str(value).lower()}" for name, value in TASK.items()]
    assert main(["plan", "--model", str(tmp_path / "adapter"), *settings, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["resident"] == planner.forecast(shape, replace(config, vram_budget=None), wide).resident
    assert printed["resident"]["adapters"] == expected.resident["adapters"]


def test_what_an_objective_needs_besides_is_planned():
    """An entropy bonus keeps one more (N, D); a snapshot of the adapter is resident; a pass before the update is one."""
    model = FAMILIES["qwen2"]()
    given = dict(max_completion_length=64, prompts_per_step=2, num_generations=4, max_prompt_length=16)
    plain = planner.forecast(model, GRPOConfig(**given, beta=0.1))
    bonus = planner.forecast(model, GRPOConfig(**given, beta=0.1, entropy_coef=0.01))
    rows = 2 * 4 * 64 * model.hidden_size * 2
    assert bonus.phases["update"]["activations kept"] == plain.phases["update"]["activations kept"] + rows
    snapshot = planner.forecast(model, GRPOConfig(**given, beta=0.1, reference="initial"))
    assert snapshot.resident["the reference's adapter"] == plain.resident["gradients"]
    for changes in (dict(steps_per_generation=2), dict(top_entropy_quantile=0.5)):
        assert planner.forecast(model, GRPOConfig(**given, **changes)).phases["old"]["activations"] > 0


def test_plans_of_two_kinds_of_training_of_one_model_are_apart(monkeypatch):
    """Each is traced by settings that the other has not."""
    model = FAMILIES["qwen2"]()
    trainings = [SFTConfig(use_cpu=True, max_length=96), GRPOConfig(**TASK), SFTConfig(use_cpu=True, max_length=64)]
    alone = []
    for config in trainings:
        monkeypatch.setattr(trace, "_TRACED", {})
        alone.append(planner.forecast(model, config))
    monkeypatch.setattr(trace, "_TRACED", {})
    assert [planner.forecast(model, config) for config in trainings] == alone


NOT_TRACED = dict(
    rollout_token_budget=100, rollout_kv="int8", rollout_weights="4bit", rollout_cuda_graphs=False, optim="adamw_8bit",
    vram_budget="8GB", learning_rate=1e-3, reference="initial", loss_type="grpo", output_dir="elsewhere",
)  # fmt: skip


def test_trying_a_setting_that_activations_do_not_depend_on_traces_nothing(monkeypatch):
    traced, run = [], trace._trace
    monkeypatch.setattr(trace, "_trace", lambda *given: traced.append(given) or run(*given))
    monkeypatch.setattr(trace, "_TRACED", {})
    model, config = MIXED["one layer"], GRPOConfig(**TASK, beta=0.1)
    planner.forecast(model, config)
    for name, value in NOT_TRACED.items():
        planner.forecast(model, replace(config, **{name: value}))
    assert len(traced) == 1
    planner.forecast(model, replace(config, token_budget=87))
    assert len(traced) == 2


def test_layers_run_once_for_settings_that_change_none_of_their_passes(monkeypatch):
    """Where weights lie, and where checkpoints wait, is counted without another run."""
    model, config, ran, own = MIXED["two layers"], GRPOConfig(**TASK), [], trace.run_few
    monkeypatch.setattr(trace, "_TRACED", {})
    trace._runs_of.cache_clear()
    monkeypatch.setattr(trace, "run_few", lambda *arguments: ran.append(0) or own(*arguments))
    key = trace.Key(model, lora_config(config))
    plain = trace.trace(key, config)
    before = len(ran)
    assert before > 0
    other = trace.trace(key, replace(config, offload_embedding=True, activation_offloading=True))
    assert len(ran) == before and other.ran == plain.ran
    trace.trace(key, replace(config, token_budget=config.token_budget - 1))
    assert len(ran) > before


TRACED = [
    {}, dict(beta=0.1), dict(beta=0.1, kl_in_reward=True, replay_buffer_size=4), dict(steps_per_generation=2),
    dict(entropy_coef=0.01), dict(bf16=False), dict(padding_free=False), dict(token_budget=87), dict(tiled_mlp=True),
]  # fmt: skip


@pytest.mark.parametrize("padded", [False, True])
def test_a_trace_depends_on_no_setting_but_those_that_it_read(padded):
    model = GptOssConfig(**{**SMALL, "num_hidden_layers": 1}, head_dim=16) if padded else MIXED["one layer"]
    key, found, shared = trace.Key(model, lora_config(GRPOConfig())), [], 0
    for changes in TRACED[:4] if padded else TRACED:
        config, read = GRPOConfig(**TASK, **changes), set()
        found.append((config, read, trace._trace(key, config, read)))
    for config, read, traced in found:
        for other, _, traced_there in found:
            if other != config and all(getattr(config, name) == getattr(other, name) for name in read):
                assert traced == traced_there
                shared += 1
    assert shared == 2, "with beta, the pass that a replayed KL needs makes no difference"


def test_a_known_run_that_does_not_serve_adds_nothing_to_what_a_trace_depends_on(monkeypatch):
    config, ran, whole = GRPOConfig(**TASK, beta=0.1), [], object()
    monkeypatch.setattr(trace, "fake_policy", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(trace, "run_few", lambda policy, watched: ran.append(watched.beta) or "found")
    trace._runs_of(whole)[GRPOConfig] = [({"learning_rate": -1.0}, None)]
    for _ in ("anew", "known"):
        read = set()
        assert trace._run_few(whole, trace.Watched(config, read), ()) == "found"
        assert read == {"beta"} and ran == [0.1]


def test_float16_is_planned_in_16_bits_whatever_bf16_says():
    model, config = MIXED["one layer"], GRPOConfig(**TASK, fp16=True, bf16=False)
    assert planner.forecast(model, config) == planner.forecast(model, replace(config, bf16=None))


def test_an_evaluation_holds_no_more_than_a_step_was_planned_with():
    """256 prompts at once would fill the whole budget of tokens, of which a step takes 2 (16 + 4 x 64)."""
    config = GRPOConfig(prompts_per_step=2, num_generations=4, max_completion_length=64, max_prompt_length=16)
    found = planner.plan(FAMILIES["qwen2"](), config)
    assert planner.for_evaluation(found, config).rollout_token_budget == 2 * (16 + 4 * 64)
    assert planner.for_evaluation(None, config) is config


@some_of(
    ("qwen2", "none"), ("qwen2", "split, fp32"), ("qwen2", "padded"), ("qwen3, untied", "both"),
    names=["qwen2", "qwen3, untied"],
)  # fmt: skip
def test_activations_of_supervised_training_are_as_predicted(name, rung):
    settings = {key: value for key, value in RUNGS[rung].items()}
    config = SFTConfig(max_length=64, examples_per_step=8, use_cpu=True, **settings)
    policy = make_policy(name, config)
    # Full ones; and of 87 tokens, as many as there may be.
    steps = [[64] * 8] if config.token_budget > 87 else [[64], [64, 24]]
    examples = [[Example([5] * length, [False] + [True] * (length - 1)) for length in lengths] for lengths in steps]
    batches = [next(nll.micro_batches(policy, step, config, config.token_budget))[0] for step in examples]
    found = planner.forecast(SHAPES[name], config)
    assert_near(found.phases["update"]["activations kept"], max(kept_bytes(policy, config, one) for one in batches))
    assert set(found.phases) == {"update", "evaluation"} and "reference" not in found.phases


@some_of(("qwen2", "both"), ("qwen2", "padded"), names=["qwen2", "qwen3, untied"], rungs=["none", "both", "padded"])
def test_activations_of_a_reward_models_training_are_as_predicted(name, rung):
    config = RewardConfig(max_length=64, pairs_per_step=8, use_cpu=True, **RUNGS[rung])
    policy = make_policy(name, config)
    policy.add_score_head(policy.adapter, seed=0)
    apart = [Pair([5] * 64, [6] * 64)] * 8
    batch = next(micro_batches_of_pairs(policy, apart, config, config.token_budget))
    found = planner.forecast(SHAPES[name], config)
    assert_near(found.phases["update"]["activations kept"], kept_bytes(policy, config, batch, policy.scores))
    assert set(found.phases) == {"update", "evaluation"}
    head = sum(4 * p.numel() for p in policy.parameters_of(policy.adapter).values())
    assert found.resident["adapters"] + found.resident["score head"] // 4 == head


def test_a_reward_models_training_is_planned_for_its_longest_text():
    found = planner.plan(FAMILIES["qwen2"](), RewardConfig(max_length=96, pairs_per_step=4, use_cpu=True))
    assert found.assumptions == ["The longest text of a pair is assumed to have 96 tokens: max_length is 96."]


@pytest.mark.slow
def test_supervised_training_is_planned_for_its_longest_example():
    config = SFTConfig(max_length=4096, vram_budget="8GB")
    found = planner.plan(large_shape(), config)
    assert found.assumptions == ["The longest example is assumed to have 4096 tokens: max_length is 4096."]
    assert found.remedy is None and found.forecast.peak() <= 8e9 and found.config.max_length == 4096
    assert len(planner.plan(large_shape(), config, longest=700).changes) < len(found.changes)
    remedy = planner.plan(large_shape(), replace(config, vram_budget="6GB")).remedy
    assert "max_length=" in remedy and remedy.endswith("would fit")
    fitting = int(remedy.split("max_length=")[1].split()[0])
    assert planner.plan(large_shape(), replace(config, max_length=fitting, vram_budget="6GB")).remedy is None


def test_a_teachers_weights_and_its_pass_are_as_predicted():
    config = GRPOConfig(**TASK, gradient_checkpointing=False, load_in_4bit=False, teacher="a larger model")
    own = as_teacher("a larger model", config)
    found = FoundTeacher("a larger model", lora_config(own), SHAPES["qwen3, untied"])
    predicted = planner.forecast(SHAPES["qwen2"], config, teacher=found)
    teacher = make_policy("qwen3, untied", own)
    held = sum(size for name, size in predicted.resident.items() if name.startswith("the teacher's"))
    assert_near(held, storages([*teacher.model.parameters(), *teacher.model.buffers()]))
    rounded = planner.forecast(SHAPES["qwen2"], replace(config, load_head_in_8bit=True), teacher=found)
    assert rounded.phases["teacher"] == predicted.phases["teacher"], "the teacher's head stays"
    batch = next(micro_batches(teacher, config))

    def rate():
        with teacher.as_base():
            teacher.hidden_states(batch)

    rate()  # the masks, which stay with the batch
    kept = sum(mask.nbytes for mask in batch.packing.masks.values())
    assert_near(predicted.phases["teacher"]["activations"], kept + peak_allocated(rate, teacher.device))


def test_a_teacher_on_the_policys_base_takes_the_memory_of_its_adapter_alone():
    config = GRPOConfig(**TASK, teacher="an adapter")
    alone = planner.forecast(SHAPES["qwen2"], replace(config, teacher=None))
    adapter = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    worn = planner.forecast(SHAPES["qwen2"], config, teacher=FoundTeacher("an adapter", adapter))
    text = SHAPES["qwen2"]
    numbers = text.num_hidden_layers * 4 * 2 * text.hidden_size  # two factors a layer
    assert worn.resident == {**alone.resident, "the teacher's adapter": 4 * numbers}
    assert set(worn.phases) - set(alone.phases) == {"teacher"} and worn.phases["teacher"]["activations"] > 0
    base = planner.forecast(SHAPES["qwen2"], config, teacher=FoundTeacher("base", None))
    assert base.resident == alone.resident

import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton.language as tl
from test_generate import in_turn, one_layer, slow
from tiny_models import DEMO_MODEL, FAMILIES, SMALL, make_model, make_policy
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig
from transformers.models.qwen2 import modeling_qwen2
from triton.runtime import interpreter

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.errors import InputError
from lowmem_grpo.generate.step_trial import known_step
from lowmem_grpo.model import offload
from lowmem_grpo.model.adapters import add_adapter, lora_config
from lowmem_grpo.model.find import find_model
from lowmem_grpo.model.load import load_policy
from lowmem_grpo.model.offload import (
    Offloading,
    offload_embedding,
    tile_mlps,
    token_embeddings,
    undo,
    use_liger_kernels,
)
from lowmem_grpo.model.packing import pack

gpu = pytest.mark.gpu


def run(policy, length=60, prompt=20):
    """Log-probabilities and gradients by name."""
    (batch,) = pack(
        [[5] * prompt], [[7, 8, 9] * (length // 3)], token_budget=1000, pad_token_id=0, device=policy.device
    )
    logprobs = policy.logprobs(batch, 1.0)
    logprobs.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in policy.parameters_of(policy.adapter).items()}
    policy.model.zero_grad()
    return logprobs.detach(), gradients


def assert_same(found, expected, bound=3e-6, atol=8e-6):
    torch.testing.assert_close(found[0], expected[0], atol=atol, rtol=0)
    for name, gradient in found[1].items():
        assert (gradient - expected[1][name]).norm() <= bound * expected[1][name].norm(), name


@pytest.mark.parametrize(("family", "gradient_checkpointing"), in_turn(FAMILIES, False, True))
def test_a_tiled_mlp_is_exact(family, gradient_checkpointing, monkeypatch):
    monkeypatch.setattr(offload, "TILE_TOKENS", 7)
    settings = {"gradient_checkpointing": gradient_checkpointing}
    assert_same(run(make_policy(family, tiled_mlp=True, **settings)), run(make_policy(family, **settings)))


def test_a_tiled_mlp_keeps_no_intermediates(monkeypatch):
    """Nothing as wide as the MLP, for all tokens, waits for the backward."""
    monkeypatch.setattr(offload, "TILE_TOKENS", 16)
    widest = []
    for tiled_mlp in (False, True):
        policy = make_policy("llama", tiled_mlp=tiled_mlp)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.shape) or t, lambda t: t):
            (batch,) = pack([[5] * 20], [[7] * 60], token_budget=1000, pad_token_id=0, device=policy.device)
            policy.logprobs(batch, 1.0)
        widest.append(any(shape[-1] == 96 and shape.numel() >= 80 * 96 for shape in sizes if len(shape) > 1))
    assert widest == [True, False]


def test_a_model_that_is_loaded_again_has_only_what_that_asks_for():
    model = make_model("llama")
    asked = dict(tiled_mlp=True, gradient_checkpointing=True)
    for settings in (asked, {"tiled_mlp": False, "gradient_checkpointing": False}, asked):
        policy = load_policy(
            model,
            SimpleNamespace(eos_token_id=1, pad_token_id=0),
            GRPOConfig(use_cpu=True, load_in_4bit=False, bf16=False, **settings),
        )
        for layer in policy.decoder.layers:
            assert layer.gradient_checkpointing == settings["gradient_checkpointing"]
            assert ("forward" in vars(layer.mlp)) == settings["tiled_mlp"]
            assert not settings["tiled_mlp"] or not isinstance(layer.mlp.forward.forward, offload._Ours), "once"
        model = policy.model


def test_mlps_that_are_not_plain_are_not_tiled():
    config = Qwen3MoeConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2, eos_token_id=1,  # pyright: ignore[reportCallIssue]: transformers takes head_dim, undeclared
    )  # fmt: skip
    with pytest.raises(ValueError, match="tiled_mlp does not know the MLP of Qwen3MoeDecoderLayer"):
        tile_mlps(AutoModelForCausalLM.from_config(config).get_decoder(), nullcontext)


@pytest.fixture
def everything_is_large(monkeypatch):
    monkeypatch.setattr(offload, "LEAST_BYTES", 1)


def test_offloaded_checkpoints_come_back_as_they_were(family, everything_is_large):
    policy = make_policy(family, gradient_checkpointing=True)
    expected = run(policy)
    policy.saved_activations = Offloading(policy.device)
    assert_same(run(policy), expected, bound=0)
    assert_same(run(policy), expected, bound=0)


def test_every_layers_input_but_the_first_is_sent_away_and_fetched_ahead(everything_is_large, monkeypatch):
    policy = make_policy("llama", gradient_checkpointing=True)
    sent, brought = [], []

    class Watched(Offloading):
        def _send(self, tensor):
            kept = super()._send(tensor)
            if not isinstance(kept, torch.Tensor):
                sent.append(tuple(tensor.shape))
            return kept

        def _bring(self, away):
            brought.append(tuple(away.copy.shape))
            return super()._bring(away)

    policy.saved_activations = Watched(policy.device)
    run(policy)
    assert sent.count((1, 80, 64)) >= 1, "the input of the second layer"
    assert sorted(brought) == sorted(sent), "each once"


def test_a_forward_without_a_backward_leaves_nothing_behind(everything_is_large):
    policy = make_policy("llama", gradient_checkpointing=True)
    policy.saved_activations = offloading = Offloading(policy.device)
    (batch,) = pack([[5] * 20], [[7] * 60], token_budget=1000, pad_token_id=0, device=policy.device)
    logprobs = policy.logprobs(batch, 1.0)
    assert offloading.last() is not None
    del logprobs
    assert offloading.last() is None


def test_an_embedding_on_the_cpu_looks_up_the_same():
    model = make_model("qwen3")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # untied
    policy = make_policy(model)
    expected = run(policy)
    offload_embedding(policy.base)
    assert_same(run(policy), expected, bound=0)


def test_a_table_with_a_vector_for_each_layer_is_looked_up_on_the_cpu(monkeypatch):
    """Whose scale goes with it. The input's embedding stays, which is the head too."""
    policy = make_policy("gemma4, E", load_in_4bit=False)
    table = policy.decoder.embed_tokens_per_layer
    assert token_embeddings(policy.base) == [table]
    expected = run(policy)
    offload_embedding(policy.base)
    assert "forward" in vars(table) and "forward" not in vars(policy.decoder.embed_tokens)
    assert_same(run(policy), expected, bound=0, atol=0)
    undo(policy.base)
    assert "forward" not in vars(table)


def test_an_embedding_that_is_the_head_stays():
    message = "is its head too, which stays on the GPU; leave offload_embedding out"
    with pytest.raises(InputError, match=message):
        offload_embedding(make_model("gemma2"))
    with pytest.raises(InputError, match=message):
        find_model(str(DEMO_MODEL), GRPOConfig(offload_embedding=True))


def test_an_embedding_with_an_adapter_stays(tmp_path):
    """Which is refused before any weights are read, and is not chosen by a plan."""
    config = GRPOConfig(lora_target_modules=["embed_tokens", "q_proj"])
    model = LlamaConfig(**SMALL)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((DEMO_MODEL / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"does not know peft.*\.Embedding; leave offload_embedding out"):
        find_model(str(tmp_path), replace(config, offload_embedding=True))
    adapted = add_adapter(AutoModelForCausalLM.from_config(model).requires_grad_(False), lora_config(config))
    assert not token_embeddings(adapted.get_base_model())


def test_liger_is_asked_only_for_what_it_knows():
    model = make_model("llama")
    model.config.model_type = "nobody's"
    with pytest.raises(ValueError, match='liger-kernel does not know "nobody\'s" models'):
        use_liger_kernels(model)


LIGERS_FAMILIES = sorted({*FAMILIES} - {"cohere"})  # which Liger does not know


@pytest.fixture
def liger_interpreted(monkeypatch):
    """Give Triton's interpreter what Liger's kernels ask for: floats as scalars, and two functions of libdevice."""
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled here, not interpreted")
    monkeypatch.setattr(pytest.importorskip("liger_kernel.ops.rms_norm"), "rsqrt", lambda x: tl.rsqrt(x))
    monkeypatch.setattr(pytest.importorskip("liger_kernel.ops.geglu"), "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)
    convert = interpreter._implicit_cvt

    def with_floats(argument):
        if not isinstance(argument, float):
            return convert(argument)
        return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)


@pytest.mark.parametrize(
    "liger_family",  # of kernels there are two norms, two MLPs, one of which has joined weights, and the rotation
    [name if name in ("gemma3", "phi3", "qwen2") else slow(name) for name in LIGERS_FAMILIES],
)
def test_ligers_kernels_compute_what_the_model_does(liger_family, liger_interpreted):
    policy = make_policy(one_layer(liger_family), gradient_checkpointing=True)
    expected = run(policy, length=6, prompt=3)
    use_liger_kernels(policy.base)
    found = run(policy, length=6, prompt=3)
    equal = [torch.equal(gradient, expected[1][name]) for name, gradient in found[1].items()]
    assert not all(equal), "Liger's kernels ran, which round otherwise"
    assert_same(found, expected)


@pytest.mark.parametrize("liger_family", LIGERS_FAMILIES)
def test_liger_replaces_norms_attention_and_mlps_of_one_model_and_nothing_else(liger_family):
    pytest.importorskip("liger_kernel")
    model, other = make_model(liger_family), make_model(liger_family)
    names = vars(sys.modules[type(model).__module__])
    names_before = dict(names)
    use_liger_kernels(model)
    replaced = {name.rpartition(".")[2] for name, layer in model.named_modules() if "forward" in vars(layer)}
    assert {"mlp", "self_attn", "norm", "input_layernorm", "post_attention_layernorm"} <= replaced
    assert all(name in ("mlp", "self_attn") or name.endswith("norm") for name in replaced), "no head, no model"
    assert names == names_before and names["apply_rotary_pos_emb"].__module__ == type(other).__module__
    assert torch.nn.functional.cross_entropy.__module__ == "torch.nn.functional"
    assert not any("forward" in vars(layer) for layer in other.modules())


def test_a_rotary_embedding_is_ligers_while_the_model_attends_and_then_transformers_own(monkeypatch):
    rope = pytest.importorskip("liger_kernel.transformers.rope")
    model, other = make_model("qwen2"), make_model("qwen2")
    seen = []

    def attend(layer, fails=False):
        seen.append(modeling_qwen2.apply_rotary_pos_emb)
        if fails:
            raise NotImplementedError

    monkeypatch.setattr(modeling_qwen2.Qwen2Attention, "forward", attend)
    own = modeling_qwen2.apply_rotary_pos_emb
    use_liger_kernels(model)
    for attention in (model.model.layers[0].self_attn, other.model.layers[0].self_attn):
        attention()
        with pytest.raises(NotImplementedError):
            attention(fails=True)
    assert seen == [rope.liger_rotary_pos_emb] * 2 + [own] * 2 and own.__module__ == modeling_qwen2.__name__


def test_the_fast_step_knows_a_model_with_ligers_kernels(liger_interpreted):
    """It asks transformers' rotary embedding for q and k that are one tensor, in which Liger's would rotate twice."""
    policy = make_policy(one_layer("qwen3"), load_in_4bit=False)
    use_liger_kernels(policy.base)
    assert known_step(policy, 40) is not None


def test_undo_takes_ligers_kernels_away():
    pytest.importorskip("liger_kernel")
    model, written = make_model("qwen3"), str(make_model("qwen3"))
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    use_liger_kernels(model)
    undo(model)
    assert torch.equal(model(ids).logits, expected) and str(model) == written


def test_liger_is_refused_where_an_mlp_has_another_activation():
    pytest.importorskip("liger_kernel")
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, hidden_act="gelu"))
    with pytest.raises(ValueError, match="liger-kernel has another activation than this model's MLPs"):
        use_liger_kernels(model)
    assert not any("forward" in vars(layer) for layer in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation_offloading": True}, "activation_offloading is about a GPU's memory"),
        ({"offload_embedding": True}, "offload_embedding is about a GPU's memory"),
        ({"use_liger_kernel": True}, "use_liger_kernel is about a GPU's memory"),
        ({"optim": "paged_adamw_8bit"}, "pages from a GPU.*use adamw_8bit"),
    ],
)
def test_what_has_no_effect_on_a_cpu_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        load_policy(make_model(), None, GRPOConfig(use_cpu=True, **settings))


def test_offloading_asks_for_checkpointing():
    with pytest.raises(ValueError, match="activation_offloading=True is read only with gradient_checkpointing"):
        GRPOConfig(activation_offloading=True, gradient_checkpointing=False)


@gpu
@pytest.mark.parametrize("setting", ["activation_offloading", "tiled_mlp", "offload_embedding", "use_liger_kernel"])
def test_each_way_on_a_gpu_gives_the_same_gradient(setting, monkeypatch):
    monkeypatch.setattr(offload, "LEAST_BYTES", 1)
    monkeypatch.setattr(offload, "TILE_TOKENS", 7)

    def policy(**settings):
        model = make_model("qwen3")
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        return make_policy(model, use_cpu=False, gradient_checkpointing=True, **settings)

    assert_same(run(policy(**{setting: True})), run(policy()), bound=1e-3, atol=1e-5)

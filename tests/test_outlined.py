"""Checkpointed layers by their outlines, beside the model's own layers."""

import dataclasses
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig
from test_step import FAMILIES, SPOILED, model_of, swapped
from tiny_models import make_policy
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lowmem_grpo.errors import InputError
from lowmem_grpo.kernels import layer_pass
from lowmem_grpo.model import outlined, outlined_trial
from lowmem_grpo.model.outline import Unknown, read_layers
from lowmem_grpo.model.packing import pack
from lowmem_grpo.planner.trace import Live


def policy_of(name="llama", changes=None, **settings):
    return make_policy(model_of(name, **(changes or {})), gradient_checkpointing=True, **settings)


TWO = [list(range(20, 33)), list(range(40, 47))], [[7, 8, 9] * 5, [9, 7], [11] * 4, [3]]


def batch_of(made, texts=TWO, **settings):
    """Two prompts, each once for its two completions."""
    given = dict(num_generations=2, padding_free=made.packs, token_budget=1000, pad_token_id=0) | settings
    (batch,) = pack(*texts, device=made.device, **given)
    return batch


def results(made, batch=None, backward=lambda loss: loss.backward()):
    """Log-probabilities, and the gradients of the adapter that is worn, flat."""
    batch = batch_of(made) if batch is None else batch
    logprobs = made.logprobs(batch, 1.0)
    backward((logprobs * torch.linspace(-1, 1, len(logprobs), device=made.device)).sum())
    parameters = made.parameters_of(made.adapters.worn[0]).values()
    found = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    made.model.zero_grad()
    return logprobs.detach(), found


def test_switched_off_layers_on_a_gpu_compute_by_themselves(monkeypatch):
    """Also where the embedding, whose weight is the first, is on the CPU."""
    decoder = policy_of().decoder
    monkeypatch.setenv("LOWMEM_GRPO_TRITON", "0")
    assert outlined.may_go_by_outline(decoder)
    path, weight = next(decoder.layers[0].named_parameters())
    parent, _, name = path.rpartition(".")
    on_gpu = FakeTensor(FakeTensorMode(), torch.empty(weight.shape, device="meta"), torch.device("cuda"))
    setattr(decoder.layers[0].get_submodule(parent), name, torch.nn.Parameter(on_gpu))
    assert decoder.embed_tokens.weight.is_cpu and not outlined.may_go_by_outline(decoder)


def by_own_layers(made, work):
    """What work(made) gives when its layers compute by themselves."""
    kept, made.outlined = made.outlined, None
    try:
        return work(made)
    finally:
        made.outlined = kept


def assert_as_own_layers(made, limit=2e-6):
    ours, theirs = results(made), by_own_layers(made, results)
    assert theirs[1].any()
    for found, expected in zip(ours, theirs, strict=True):
        assert (found - expected).norm() <= limit * expected.norm()


@pytest.fixture
def computed(monkeypatch):
    """How many layers were computed by their outlines, forward and backward."""
    count = Counter()
    for name in ("compute", "backward"):
        own = getattr(outlined.OutlinedLayer, name)

        def counted(self, *arguments, own=own, name=name):
            count[name] += 1
            return own(self, *arguments)

        monkeypatch.setattr(outlined.OutlinedLayer, name, counted)
    return count


@pytest.mark.parametrize("name", FAMILIES)
def test_results_and_gradients_are_those_of_the_models_own_layers(name, computed):
    made = policy_of(name)
    batch = batch_of(made)
    assert made.outlined is not None
    computed.clear()
    results(made, batch)
    assert computed == {"compute": 3, "backward": 3}
    assert_as_own_layers(made)
    with made.as_base():
        ours, theirs = made.logprobs(batch, 1.0), by_own_layers(made, lambda made: made.logprobs(batch, 1.0))
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


@pytest.mark.parametrize("settings", [{"load_in_4bit": False}, {"bf16": None, "fp16": True}], ids=["dense", "fp16"])
def test_other_settings(settings):
    made = policy_of("qwen2", **settings)
    assert made.packs and made.outlined
    assert_as_own_layers(made, 2e-2 if "fp16" in settings else 2e-6)


def test_in_16_bits_gradients_are_as_near_to_those_in_fp32_as_the_models_own(monkeypatch):
    made, exact = policy_of("llama", bf16=True), policy_of("llama")
    truth = results(exact)[1]
    ours, theirs = ((found[1] - truth).norm() / truth.norm() for found in (results(made), by_own_layers(made, results)))
    assert made.outlined and 1e-3 < ours < 1.15 * theirs


ADAPTERS = {
    "one layer": dict(layers_to_transform=[1], target_modules=["q_proj", "v_proj", "down_proj"]),
    "some linears": dict(target_modules=["q_proj", "v_proj", "down_proj"]),
    "several ranks": dict(rank_pattern={"k_proj": 3, "up_proj": 5}, alpha_pattern={"k_proj": 7}),
    "rank-stabilized": dict(use_rslora=True, r=6),
}  # fmt: skip


@pytest.mark.parametrize("changes", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_of_other_shapes(changes, computed):
    made = policy_of("llama")
    assert made.packs and made.outlined
    made.add("other", LoraConfig(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}))
    with torch.no_grad():
        for parameter in made.parameters_of("other").values():
            parameter.normal_(std=0.1)
    computed.clear()
    with made.wearing("other"):
        assert_as_own_layers(made)
    assert computed["backward"] == 3 - changes.get("layers_to_transform", [0])[0]


def test_an_adapter_that_is_added_later_is_not_overlooked():
    """It may wrap linear layers that wore none when the outlines were read."""
    made = make_policy(model_of("llama"), gradient_checkpointing=True)
    few = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    made.add("few", few)
    assert made.packs and made.outlined
    before = made.outlined
    made.add("wide", LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert made.outlined not in (None, before)
    for parameter in made.parameters_of("wide").values():
        torch.nn.init.normal_(parameter, std=0.1)
    with made.wearing("wide"):
        assert_as_own_layers(made)


def test_a_weight_that_has_another_in_its_place_is_read_anew():
    """As a merge leaves one."""
    made = policy_of("llama")
    assert made.packs and made.outlined
    here, there = (layer.mlp.up_proj.get_base_layer() for layer in made.decoder.layers[:2])
    here.weight = there.weight
    assert_as_own_layers(made)


def test_an_adapter_that_is_refused_leaves_the_outlines():
    made = policy_of("llama")
    assert made.packs
    with pytest.raises(InputError, match="there is one of that name"):
        made.add(made.adapter)
    made.add("other")
    assert made.outlined
    assert_as_own_layers(made)


def test_a_model_that_is_loaded_again_goes_by_new_outlines(computed):
    first = policy_of("llama")
    assert first.packs
    made = make_policy(first.model, gradient_checkpointing=True)
    assert made.packs and made.outlined
    computed.clear()
    results(made)
    assert computed["backward"] == 3
    made = make_policy(first.model)
    assert not any("forward" in vars(layer) for layer in made.decoder.layers)


def test_a_backward_computes_with_the_adapters_of_its_forward():
    made = policy_of("llama")
    made.packs  # noqa: B018
    made.add("other")
    expected = results(made)[1]

    def elsewhere(loss):
        with made.wearing("other"), torch.no_grad():
            loss.backward()

    torch.testing.assert_close(results(made, backward=elsewhere)[1], expected, atol=0, rtol=0)


@pytest.mark.parametrize("by_outlines", [True, False])
def test_a_backward_may_run_in_another_thread(by_outlines):
    """As torch has it for a GPU, where nothing of the forward's thread is in force."""
    made = policy_of("gemma2")
    assert made.packs and made.outlined
    if not by_outlines:
        made.outlined = None
    expected = results(made)[1]

    def elsewhere(loss):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(loss.backward).result()

    assert expected.any() and torch.equal(results(made, backward=elsewhere)[1], expected)


def test_a_trial_in_16_bits_takes_linears_without_adapters():
    """bitsandbytes rounds their weights to the model's dtype in a backward of its own, which the trial does not."""
    made = make_policy(
        model_of("llama").bfloat16(), gradient_checkpointing=True, bf16=True, lora_target_modules=["q_proj"]
    )
    assert made.packs and made.outlined

    made = policy_of("llama", bf16=True)
    with made.as_base():  # as where a reference's pass comes first
        assert made.packs and made.outlined


def with_dropout(made):
    return made.wearing(made.adapter)


def hooked(made):
    made.decoder.layers[1].mlp.register_forward_hook(lambda *_: None)
    return nullcontext()


def hooked_backward(made):
    made.decoder.layers[1].mlp.register_full_backward_hook(lambda *_: None)
    return nullcontext()


def with_a_bias(made):
    made.add("biased", LoraConfig(target_modules=["q_proj", "down_proj"], lora_bias=True, task_type="CAUSAL_LM"))
    assert made.outlined
    return made.wearing("biased")


SITUATIONS = [({"lora_dropout": 0.5}, with_dropout), ({}, hooked), ({}, hooked_backward), ({}, with_a_bias)]


@pytest.mark.parametrize(("settings", "situation"), SITUATIONS)
def test_where_a_pass_is_not_the_outlines_the_models_own_layers_compute(settings, situation, computed):
    made = policy_of("llama", **settings)
    assert made.packs and made.outlined
    with situation(made):
        computed.clear()
        results(made)
    assert not computed


def test_texts_whose_queries_grow_with_their_place_go_through_the_models_own_layers(computed):
    """Ministral 3's, later in a text than the trial sees."""
    grows = dict(rope_type="default", rope_theta=1e4, llama_4_scaling_beta=0.5, original_max_position_embeddings=32)
    made = policy_of("ministral3", dict(head_dim=32, max_position_embeddings=256, rope_parameters=grows))
    assert made.packs and made.outlined.reach == 32
    for length, count in ((13, 3), (14, 0)):  # the last token is not computed
        batch = batch_of(made, texts=([[5] * 20], [[7] * length, [9]]))
        computed.clear()
        results(made, batch)
        assert computed["backward"] == count


def test_padded_rows_go_through_the_models_own_layers(computed):
    made = policy_of("llama")
    assert made.packs
    computed.clear()
    results(made, batch_of(made, padding_free=False))
    assert not computed


@pytest.mark.parametrize("settings", [{"gradient_checkpointing": False}, {"tiled_mlp": True}])
def test_layers_that_are_asked_to_compute_otherwise_are_left_alone(settings, recwarn):
    made = make_policy(model_of("llama"), **{"gradient_checkpointing": True, **settings})
    assert made.packs and made.outlined is None
    assert not [w for w in recwarn if "own layers" in str(w.message)]


@pytest.mark.parametrize("spoiled", SPOILED)
def test_a_wrong_outline_is_found_out(spoiled, monkeypatch):
    def read_wrongly(made):
        first, *rest = read_layers(made)
        changes = SPOILED[spoiled]
        if spoiled == "up and gate":
            gate_up = dataclasses.replace(first.gate_up, weights=[])
            return [dataclasses.replace(first, gate_up=swapped(gate_up)), *rest]
        return [dataclasses.replace(first, **changes(first)), *rest]

    monkeypatch.setattr(outlined_trial, "read_layers", read_wrongly)
    made = policy_of("gemma2")
    with pytest.warns(UserWarning, match="is trained by its own layers, which is slower: .* layer 0"):
        assert made.packs
    assert made.outlined is None and not any("forward" in vars(layer) for layer in made.decoder.layers)


def test_a_gradient_that_is_wrong_is_found_out(monkeypatch):
    own = layer_pass.gated_backward
    monkeypatch.setattr(layer_pass, "gated_backward", lambda grad, *rest: own(grad * 1.01, *rest))
    with pytest.raises(Unknown, match="the gradient of what layer 0 adds is 0.0"):
        outlined_trial.outlined_layers(policy_of("llama"))


def test_a_norm_that_is_trained_too_is_refused():
    made = policy_of("llama")
    made.decoder.layers[1].input_layernorm.weight.requires_grad_()
    with pytest.raises(Unknown, match="its 1.input_layernorm.weight is trained, too"):
        outlined_trial.outlined_layers(made)


def test_adapters_are_copied_to_their_own_strides(monkeypatch):
    """A GPU has a launch for many of them only there, and a slower one for each elsewhere."""
    made = policy_of("llama", bf16=True)
    assert made.packs
    strides = []
    monkeypatch.setattr(
        outlined,
        "foreach_copy",
        lambda to, of: strides.extend((x.stride(), y.stride()) for x, y in zip(to, of, strict=True)),
    )
    for worn in made.outlined.worn():
        outlined.copies_of(worn, torch.bfloat16)
    assert len(strides) == 2 * 3 * 7 and all(to == of for to, of in strides)


def test_no_second_gradient():
    made = policy_of("llama")
    hidden = made.hidden_states(batch_of(made))
    with pytest.raises(RuntimeError, match="no second gradient"):
        torch.autograd.grad(hidden.sum(), [*made.parameters_of(made.adapter).values()], create_graph=True)


def test_each_weight_is_dequantized_once_a_gradient_and_none_for_the_embeddings(monkeypatch):
    asked = Counter()
    own = outlined.weight_4bit
    monkeypatch.setattr(
        outlined, "weight_4bit", lambda base: lambda dtype: asked.update([id(base)]) or own(base)(dtype)
    )
    made = policy_of("qwen2", changes=dict(hidden_size=128))
    batch = batch_of(made)
    asked.clear()
    results(made, batch)
    attention = made.decoder.layers[0].self_attn
    first = {id(linear.get_base_layer()) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)}
    assert len(asked) == 3 * 7 - 3 and set(asked.values()) == {1} and not first & asked.keys()


def test_less_memory_than_by_the_models_own_layers():
    """At the peak of the backward, where an MLP's activations are most of it."""
    made = policy_of("llama", changes=dict(intermediate_size=4096), bf16=True)
    made.packs  # noqa: B018
    (batch,) = pack(
        [[5] * 100], [[7] * 300], token_budget=1000, pad_token_id=0, device=made.device, padding_free=True
    )  # fmt: skip

    def peak(made):
        for parameter in made.parameters_of(made.adapter).values():
            parameter.grad = torch.zeros_like(parameter)
        with Live(made.model) as live:
            hidden = made.hidden_states(batch)
            hidden.backward(torch.zeros_like(hidden))
        return live.peak

    assert peak(made) < 0.82 * by_own_layers(made, peak)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"bf16": None, "fp16": True}], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["qwen3", "phi3", "gemma2", "glm4", "olmo2", "granite"])
def test_on_a_gpu(name, settings):
    made = policy_of(name, use_cpu=False, **settings)
    assert made.packs and made.outlined
    assert_as_own_layers(made, 2e-2 if settings else 2e-5)


@pytest.mark.parametrize("name", ["qwen3", "phi3", "gemma2", "glm4", "olmo2", "smollm3"])
def test_outlines_by_shape_have_the_shapes_of_those_that_are_read(name):
    made = policy_of(name)
    with made.inference(), made.autocast():
        by_shape, read = read_layers(made, by_shape=True), read_layers(made)
    for ours, theirs in zip(by_shape, read, strict=True):
        assert (ours.qkv.sizes, ours.kv_heads, ours.head_dim) == (theirs.qkv.sizes, theirs.kv_heads, theirs.head_dim)
        norms = (*ours.before, *ours.after, ours.query_norm, ours.key_norm)
        for norm, other in zip(norms, (*theirs.before, *theirs.after, theirs.query_norm, theirs.key_norm), strict=True):
            assert (norm and norm.gain.shape) == (other and other.gain.shape)

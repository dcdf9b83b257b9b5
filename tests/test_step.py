"""A step of decoding by numbers read off a model's layers, beside the model's own layers."""

import dataclasses
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from test_generate import PROMPTS, ShapedSampler, ids_of, paged_shapes
from tiny_models import make_policy
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lowmem_grpo.generate import hf, sample, slots, step, store
from lowmem_grpo.generate.graphs import Kept
from lowmem_grpo.generate.sampling import SamplingParams
from lowmem_grpo.generate.scheduler import Scheduler
from lowmem_grpo.generate.shape import StoreShape
from lowmem_grpo.generate.slots import Slots
from lowmem_grpo.generate.step import FastStep
from lowmem_grpo.generate.step_trial import difference, known_step
from lowmem_grpo.generate.store import Store
from lowmem_grpo.generate.weights import fast_linears
from lowmem_grpo.model.attention import attending
from lowmem_grpo.model.outline import Unknown, read

SIZES = dict(
    num_hidden_layers=3, hidden_size=128, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=128, max_position_embeddings=2048, bos_token_id=None, eos_token_id=0, pad_token_id=1,
)  # fmt: skip
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "llama": {}, "qwen2": {}, "qwen3": dict(head_dim=32), "seed_oss": dict(head_dim=32), "helium": dict(head_dim=32),
    "gemma": dict(head_dim=32), "gemma2": dict(head_dim=32, sliding_window=8), "mistral": dict(sliding_window=8),
    "gemma3_text": dict(head_dim=32, sliding_window=8, layer_types=LAYERS), "phi3": {}, "olmo2": {},
    "ministral": dict(sliding_window=8, head_dim=32, layer_types=LAYERS), "smollm3": dict(no_rope_layers=[1, 0, 1]),
    "granite": dict(embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.08, logits_scaling=8.0),
    "olmo3": dict(sliding_window=8), "exaone4": dict(sliding_window=8), "glm": dict(head_dim=32),
    "glm4": dict(head_dim=32, partial_rotary_factor=0.5), "ernie4_5": dict(head_dim=32), "granite_swa": dict(sliding_window=8, layer_types=LAYERS),
}  # fmt: skip
TEXTS = [list(range(20, 33)), list(range(40, 47))]  # of more tokens than a window, and of as many after one step


def model_of(name, **changes):
    """A random model in fp32 whose norms and biases show."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**{**SIZES, **FAMILIES.get(name, {}), **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(std=0.08)
    return model.float().eval()


def policy_of(name="llama", changes=None, **settings):
    return make_policy(model_of(name, **(changes or {})), **settings)


def slots_of(policy, fast=None, dtype=None):
    """Two completions of each of TEXTS, admitted, in pages of 16."""
    shape = StoreShape(4, 32, 2, 12, 9, 16)
    dtype = dtype or policy.dtype
    made = Store(policy.layer_shapes, shape, dtype, policy.device)
    found = Slots(policy, made, shape, Scheduler([0, 1, 2, 3], 2, 4, 2, 9, 16), fast=fast)
    found.admit(TEXTS, 100, 32)
    found.reserve(32)
    return found


def steps(policy, fast, count, dtype=None):
    """Logits (4, V) of steps from the same tokens: by the fast step, by the model's layers, by a whole forward."""
    with policy.inference(), policy.autocast(), attending(policy.configs), fast.ready(dense=False):
        ours, general = slots_of(policy, fast, dtype), slots_of(policy, None, dtype)
        texts = [list(TEXTS[i // 2]) for i in range(4)]
        draw = torch.Generator().manual_seed(7)
        for _ in range(count):
            with attending(policy.configs, "eager"):
                whole = [policy.decoder(input_ids=torch.tensor([text]), use_cache=False) for text in texts]
            own = policy.logits(torch.cat([out.last_hidden_state[:, -1] for out in whole]))
            yield tuple(x.float() for x in (policy.logits(ours.hidden(4)), policy.logits(general.hidden(4)), own))
            picked = torch.randint(2, 128, (4,), generator=draw)
            for text, token in zip(texts, picked.tolist(), strict=True):
                text.append(token)
            for each in (ours, general):
                each.token_ids.copy_(picked)
                each.positions += 1


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fast_step_gives_what_the_models_own_layers_give(name, monkeypatch):
    """In fp32: 5e-6 apart where logits are about 5, as far as the general path is from the model's own forward."""
    monkeypatch.setattr(step, "splits_of", lambda *_: 2)
    policy = policy_of(name)
    fast = known_step(policy, 40)
    for ours, general, own in steps(policy, fast, 3):
        assert own.std() > 0.1
        for theirs in (own, general):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_in_16_bits_a_fast_step_is_as_far_from_training_as_the_models_own_layers(monkeypatch):
    """Root mean square over 6,144 numbers: 1.07 to 1.13 times as far."""
    attend = store.Store.attend

    def in_fp32(*args, **kwargs):  # as on a GPU; autocast reaches into the reference of a CPU
        with torch.autocast("cpu", enabled=False):
            return attend(*args, **kwargs)

    monkeypatch.setattr(store.Store, "attend", in_fp32)
    squares = torch.zeros(2, dtype=torch.float64)
    for name in ("llama", "qwen3", "gemma3_text"):
        policy = policy_of(name, bf16=True)
        for ours, general, own in steps(policy, known_step(policy, 40), 4):
            for square, found in zip(squares, (ours, general), strict=True):
                square += (found.log_softmax(-1) - own.log_softmax(-1)).square().sum()
    assert 0 < squares[0] < 1.5**2 * squares[1]


def test_int8_keys_and_values_are_read_and_written_alike():
    policy = policy_of("qwen3")
    fast = known_step(policy, 40)
    for ours, general, own in steps(policy, fast, 5, torch.int8):
        torch.testing.assert_close(ours, general, atol=2e-5, rtol=0)
        assert (ours - own).abs().max() > 1e-3  # it is int8


LAUNCHES = dict(start=1, product=1, heads=1, residual=1, gated=1, sample_next=2)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi3", "olmo2"])
@pytest.mark.parametrize("truncated", [False, True])
def test_a_step_is_ten_launches_a_layer_and_four_outside(name, truncated, monkeypatch):
    """By the calls of what is a kernel on a GPU; attention is two. Truncation has today's own kernels in its place."""
    policy, launches = policy_of(name), Counter()

    def counted(what, count, function):
        def call(*args, **kwargs):
            launches[what] += count
            return function(*args, **kwargs)

        return call

    for what, count in LAUNCHES.items():
        module = {"sample_next": slots, "heads": store}.get(what, step)
        monkeypatch.setattr(module, what, counted(what, count, getattr(module, what)))
    monkeypatch.setattr(store.Store, "attend", counted("attention", 2, store.Store.attend))
    monkeypatch.setattr(policy, "bare_logits", counted("head", 1, policy.bare_logits))
    fast = FastStep(policy, read(policy), 40)
    with policy.inference(), attending(policy.configs), fast.ready(dense=False):
        made = slots_of(policy, fast)
        made.params = SamplingParams(max_completion_length=9, temperature=1.0, top_k=5 if truncated else 0)
        made.uniforms = torch.full((4, 9), 0.5)
        launches.clear()
        made.step(4)
    layers = 3 * dict(product=4, heads=1, attention=2, residual=2, gated=1)["product"]
    assert launches["product"] == layers == 12
    outside = {"start": 1, "head": 1} | ({} if truncated else {"sample_next": 2})
    assert sum(launches.values()) == 10 * 3 + sum(outside.values())
    assert {what: launches[what] for what in outside} == outside


@pytest.fixture
def fast_on_a_cpu(monkeypatch):
    monkeypatch.setattr(sample, "FAST", {"cpu"})


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi3", "glm4", "exaone4"])
def test_greedy_completions_are_those_of_generate(name, fast_on_a_cpu):
    policy = policy_of(name)
    params = SamplingParams(max_completion_length=10, temperature=0)
    theirs, _ = hf.sample(policy, PROMPTS, 1, params, 10_000)
    shape = next(paged_shapes(PROMPTS, 1, 10, 3))
    sampler = ShapedSampler(policy, shape, rollout_weights="4bit", max_completion_length=10)
    assert ids_of(sampler.run(1, temperature=0)) == ids_of(theirs)
    assert sampler.fast_step(99) is not None


@pytest.mark.parametrize(
    "weights, params",
    [
        ("4bit", {}), ("dense", {"top_p": 0.9, "top_k": 30, "repetition_penalty": 1.3}), ("dense", {"temperature": 0}),
    ],
)  # fmt: skip
def test_a_rollout_samples_what_it_samples_by_the_models_own_layers(weights, params, fast_on_a_cpu, monkeypatch):
    """With refills and preemption. Uniforms are the same, and fp32 rounds far below what moves a token."""
    policy = policy_of("qwen3")
    for shape in list(paged_shapes(PROMPTS, 3, 12, 4))[1 if params else 0 :]:
        sampler = ShapedSampler(policy, shape, rollout_weights=weights)
        ours = sampler.run(**params)
        assert sampler.fast_steps[policy.adapters.worn] is not None
        monkeypatch.setattr(sample, "FAST", set())
        theirs = sampler.run(**params)
        monkeypatch.setattr(sample, "FAST", {"cpu"})
        assert ids_of(ours) == ids_of(theirs)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.logprobs, b.logprobs, atol=2e-5, rtol=0)
            torch.testing.assert_close(a.proposal_logprobs, b.proposal_logprobs, atol=2e-5, rtol=0)


def test_adapters_are_taken_over_at_each_rollout_in_place():
    policy = policy_of("llama")
    fast = known_step(policy, 40)
    kept = Kept()
    with fast.ready(dense=False, kept=kept):
        before = [x.data_ptr() for layer in fast.layers for linears in layer for x in (linears.a, linears.b)]
    first = next(steps(policy, fast, 1))[0]
    with torch.no_grad():
        for parameter in policy.parameters_of(policy.adapter).values():
            parameter.mul_(-0.5)
    ours, _, own = next(steps(policy, fast, 1))
    torch.testing.assert_close(ours, own, atol=2e-5, rtol=0)
    assert (ours - first).abs().max() > 0.01
    with fast.ready(dense=False, kept=kept):
        after = [x.data_ptr() for layer in fast.layers for linears in layer for x in (linears.a, linears.b)]
    assert before == after
    assert fast.layers[0][0].a is None, "what is not kept is given back"


@pytest.mark.parametrize(
    "config",
    [
        dict(r=3, lora_alpha=5, target_modules="all-linear"),
        dict(r=20, lora_alpha=7, target_modules="all-linear", rank_pattern={"q_proj": 5, "up_proj": 33}),
        dict(r=4, lora_alpha=4, target_modules=["v_proj", "up_proj"]),
    ],
)
def test_ranks_that_are_ragged_and_linears_without_an_adapter_are_filled_up_with_zeros(config):
    policy = make_policy(model_of("llama"))
    policy.add("other", LoraConfig(**config))
    with torch.no_grad():
        for parameter in policy.parameters_of("other").values():
            parameter.normal_(std=0.1)
    with policy.wearing("other"):
        for ours, _, own in steps(policy, known_step(policy, 40), 2):
            torch.testing.assert_close(ours, own, atol=2e-5, rtol=0)


def test_an_adapter_that_is_worn_has_a_step_of_its_own(fast_on_a_cpu):
    policy = policy_of("llama")
    policy.add("other")
    sampler = ShapedSampler(policy, rollout_weights="4bit")
    first = sampler.fast_step(40)
    with policy.wearing("other"):
        assert sampler.fast_step(40) is not first
    assert sampler.fast_step(40) is first
    assert sampler.fast_step(first.num_positions + 1) is not first
    with policy.as_base():
        bare = sampler.fast_step(40)
        with bare.ready(dense=False) as shared:
            assert all(linears.a is None for layer in bare.layers for linears in layer) and not shared.factors
        for ours, _, own in steps(policy, bare, 1):
            torch.testing.assert_close(ours, own, atol=2e-5, rtol=0)


def test_dense_weights_are_one_matrix_for_the_step_and_for_prompts():
    policy = policy_of("llama")
    fast = FastStep(policy, read(policy), 40)
    with (
        fast.ready(dense=True) as shared,
        fast_linears(policy.base, policy.dtype, dense=True, matrices=(matrices := shared.matrices)),
    ):
        q, k, v = (base for base in fast.outline.layers[0].qkv.bases)
        assert matrices[q].data_ptr() == fast.layers[0][0].matrices[0].data_ptr()
        assert torch.equal(torch.cat([matrices[q], matrices[k], matrices[v]]), fast.layers[0][0].matrices[0])
        assert len(matrices) == 3 * 7
        for index in range(2):
            assert q.forward(torch.eye(128)).T[index, 3] == matrices[q][index, 3]
        made = fast.layers[0][0](torch.randn(2, 128))
    assert fast.layers[0][0].matrices is None and len(made[0]) == 1


def test_a_model_that_is_not_quantized_is_decoded_by_its_own_matrices():
    policy = policy_of("llama", load_in_4bit=False)
    for ours, _, own in steps(policy, known_step(policy, 40), 2):
        torch.testing.assert_close(ours, own, atol=2e-5, rtol=0)


def test_an_embedding_in_cpu_memory_is_looked_up_by_the_model(monkeypatch):
    policy = policy_of("llama", dict(tie_word_embeddings=False))
    fast = known_step(policy, 40)
    ids = torch.tensor([5, 9, 5])
    stream, h = fast.begin(ids)
    elsewhere = SimpleNamespace(weight=SimpleNamespace(device="elsewhere"))
    looked_up = lambda given: policy.decoder.embed_tokens(given)  # noqa: E731
    fast.outline = dataclasses.replace(fast.outline, embedding=_Elsewhere(looked_up, elsewhere.weight))
    for ours, theirs in zip(fast.begin(ids), (stream, h), strict=True):
        assert torch.equal(ours, theirs)


class _Elsewhere:
    def __init__(self, look_up, weight):
        self.look_up, self.weight = look_up, weight

    def __call__(self, ids):
        return self.look_up(ids)


def norms(change):
    """The spoiled norms of a layer."""

    def spoiled(layer):
        return dict(
            before=tuple(n and change(n) for n in layer.before), after=tuple(n and change(n) for n in layer.after)
        )

    return spoiled


def swapped(product):
    """A product whose linears change places; their sizes are equal."""
    return dataclasses.replace(product, linears=product.linears[::-1], weights=product.weights[::-1])


SPOILED = {
    "share": lambda layer: dict(share=layer.share * 1.05),
    "scaling": lambda layer: dict(scaling=layer.scaling * 1.01),
    "no positions": lambda layer: dict(table=None),
    "another rotation": lambda layer: dict(paired=not layer.paired),
    "a window": lambda layer: dict(window=None if layer.window else 8),
    "a longer window": lambda layer: dict(window=(layer.window or 4096) + 1),
    "a softcap": lambda layer: dict(softcap=30.0),
    "eps": norms(lambda norm: norm._replace(eps=0.05)),
    "kind of norm": norms(lambda norm: norm._replace(gain=norm.gain - 1)),
    "up and gate": lambda layer: dict(gate_up=swapped(layer.gate_up)),
    "activation": lambda layer: dict(activation="gelu" if layer.activation == "silu" else "silu"),
}  # fmt: skip


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_an_outline_with_one_number_spoiled_is_found_out(name, bf16):
    policy = policy_of(name, bf16=bf16)
    outline = read(policy)
    assert difference(FastStep(policy, outline, 40)) is None
    first, spoiled, last = outline.layers
    for what, change in SPOILED.items():
        wrong = dataclasses.replace(outline, layers=[first, dataclasses.replace(spoiled, **change(spoiled)), last])
        reason = difference(FastStep(policy, wrong, 40))
        assert reason is not None and "layer 1" in reason, what
    wrong = dataclasses.replace(outline, embedding_scale=outline.embedding_scale * 1.04)
    assert "embedding" in difference(FastStep(policy, wrong, 40))
    wrong = dataclasses.replace(outline, norm=outline.norm._replace(gain=outline.norm.gain * 1.04))
    assert "last hidden state" in difference(FastStep(policy, wrong, 40))


def test_a_position_far_from_the_first_and_a_factor_in_a_wrong_row_are_found_out(monkeypatch):
    policy = policy_of("llama")
    fast = known_step(policy, 40)
    fast.tables[0][0][-1] += 0.01
    assert "of layer 0 is" in difference(fast)

    fast = known_step(policy, 40)
    worn = step.adapters_of
    monkeypatch.setattr(step, "adapters_of", lambda linear: [(a.roll(1, 0), b, scale) for a, b, scale in worn(linear)])
    assert "of layer 0 is" in difference(fast)


def test_a_model_that_is_not_understood_warns_once_and_its_own_layers_sample(fast_on_a_cpu, monkeypatch):
    policy = policy_of("olmo")
    sampler = ShapedSampler(policy, next(paged_shapes(PROMPTS, 3, 12, 9)), rollout_weights="4bit")
    with pytest.warns(
        UserWarning, match="OlmoForCausalLM is sampled from by its own layers.*not an RMS norm"
    ) as caught:
        ours = sampler.run(temperature=0)
        sampler.run(temperature=0)
    assert sum("own layers" in str(warning.message) for warning in caught) == 1
    monkeypatch.setattr(sample, "FAST", set())
    assert ids_of(sampler.run(temperature=0)) == ids_of(ours)


def test_without_our_kernels_there_is_no_fast_step(fast_on_a_cpu, monkeypatch):
    sampler = ShapedSampler(policy_of("llama"))
    monkeypatch.setenv("LOWMEM_GRPO_TRITON", "0")
    assert sampler.fast_step(40) is None
    monkeypatch.delenv("LOWMEM_GRPO_TRITON")
    assert sampler.fast_step(40) is not None
    monkeypatch.setattr(sample, "FAST", {"cuda"})
    assert sampler.fast_step(40) is None


REFUSED = {
    "olmo": "OlmoLayerNorm is not an RMS norm", "stablelm": "LayerNorm is not an RMS norm",
    "cohere": "rotates queries and keys in a way that is not known", "starcoder2": "Starcoder2MLP has no gate_proj",
    "nemotron": "NemotronMLP has no gate_proj",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_is_not_understood_is_refused_with_a_reason(name):
    with pytest.raises(Unknown, match=REFUSED[name]):
        read(policy_of(name))


def merged(policy):
    policy.decoder.layers[1].mlp.down_proj.merged_adapters.append(policy.adapter)


def in_fp4(policy):
    policy.decoder.layers[1].mlp.down_proj.get_base_layer().weight.quant_state.quant_type = "fp4"


def with_sinks(policy):
    policy.decoder.layers[2].self_attn.sinks = nn.Parameter(torch.zeros(4))


def with_a_scalar(policy):
    policy.decoder.layers[2].register_buffer("layer_scalar", torch.ones(1))


def with_another_activation(policy):
    policy.decoder.layers[0].mlp.act_fn = nn.ReLU()


def with_a_norm_of_the_embedding(policy):
    policy.decoder.embed_tokens.register_forward_hook(lambda _, __, out: nn.functional.normalize(out, dim=-1))


def with_a_product_and_more(policy):
    policy.decoder.layers[0].mlp.down_proj = nn.Sequential(policy.decoder.layers[0].mlp.down_proj)


CHANGED = {
    merged: "adapter of its is merged", in_fp4: "not NF4", with_sinks: "nothing is known of its self_attn.sinks",
    with_a_scalar: "nothing is known of its layer_scalar", with_another_activation: "activation is not known",
    with_a_norm_of_the_embedding: "embedding does something besides a scale",
    with_a_product_and_more: "it has a Sequential",
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGED, ids=lambda change: change.__name__)
def test_a_part_that_is_not_understood_is_refused_with_a_reason(change):
    policy = policy_of("llama")
    read(policy)
    change(policy)
    with pytest.raises(Unknown, match=CHANGED[change]):
        read(policy)


def test_an_adapter_that_is_not_plain_is_refused():
    policy = policy_of("llama")
    policy.add("dora", LoraConfig(r=4, use_dora=True, target_modules=["v_proj"]))
    with policy.wearing("dora"), pytest.raises(Unknown, match="not plain LoRA"):
        read(policy)


def test_a_layer_that_does_more_than_its_outline_says_is_found_out():
    """What no parameter shows: a residual that is weighed, and a temperature of queries far from the first."""
    policy = policy_of("llama")
    policy.decoder.layers[1].mlp.register_forward_hook(lambda _, __, out: 1.01 * out)
    with pytest.raises(Unknown, match="what layer 1 adds is 0.* away"):
        known_step(policy, 40)

    policy = policy_of("llama")
    policy.decoder.layers[2].self_attn.q_proj.register_forward_hook(
        lambda _, __, out: out * torch.where(torch.arange(out.shape[1]) > 3, 1.01, 1.0)[:, None]  # the trial's last
    )
    with pytest.raises(Unknown, match="the query of layer 2 is 0.* away"):
        known_step(policy, 40)


def test_where_bitsandbytes_product_serves_a_step_is_right_too(monkeypatch):
    """Below sm_80, or where it was measured to be faster; it adds a bias itself."""
    monkeypatch.setattr(step, "splits_of", lambda *_: None)
    monkeypatch.setattr(step, "product", None)
    policy = policy_of("qwen2")
    for ours, _, own in steps(policy, known_step(policy, 40), 2):
        torch.testing.assert_close(ours, own, atol=2e-5, rtol=0)

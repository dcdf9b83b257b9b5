"""Models whose layers attend with different sizes, share keys and values, or have values smaller than keys."""

from dataclasses import replace

import pytest
import torch
from tiny_models import BY_LAYER, OutOfMemory, make_policy

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.generate import engine
from lowmem_grpo.generate.sample import Sampler
from lowmem_grpo.generate.shape import StoreShape
from lowmem_grpo.generate.store import Store
from lowmem_grpo.model.attention import Scoring, attend, laid_out
from lowmem_grpo.model.layer_shapes import LayerShape
from lowmem_grpo.model.packing import pack

PROMPTS = [[5, 9, 13, 4, 22, 7, 31] * 5, [17, 3, 40]]  # the first is longer than a window
SIZES = {  # heads, kv heads, size, and whose keys and values a layer has
    "gemma4, 12B": [(4, 2, 16, 0), (4, 2, 32, 1), (4, 2, 16, 2), (4, 2, 32, 3)],
    "gemma4, 31B": [(4, 2, 16, 0), (4, 1, 32, 1), (4, 2, 16, 2), (4, 1, 32, 3)],
    "gemma4, E": [(4, 2, 16, 0), (4, 2, 32, 1), (4, 2, 16, 0), (4, 2, 32, 1)],
    "gemma4, MoE": [(4, 2, 16, 0), (4, 2, 32, 1), (4, 2, 16, 2), (4, 2, 32, 3)],
    "deepseek_v3": [(4, 4, 24, 0), (4, 4, 24, 1)],
    "glm4_moe_lite": [(4, 4, 24, 0), (4, 4, 24, 1)],
    "gpt2": [(4, 4, 16, 0), (4, 4, 16, 1)],
    "qwen3_next": {1: (4, 2, 16, 1)},
}
STORES = {
    "shared": StoreShape(3, 12, 2, 34), "a row a slot": StoreShape(3, 46, 0, 0), "pages": StoreShape(3, 12, 2, 34, 8, 4),
}  # fmt: skip


class InStore(Sampler):
    """Samples from a store of a given shape."""

    given: StoreShape

    def store_shape(self, prompts, num_generations, num_tokens):
        return self.given


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_those_of_the_layers_that_attend(name):
    policy = make_policy(name, load_in_4bit=False)
    before = torch.random.get_rng_state()
    expected = SIZES[name]
    expected = expected if isinstance(expected, dict) else dict(enumerate(expected))
    with OutOfMemory(nth=1):  # and is begun anew
        found = policy.layer_shapes
    assert found == {layer: LayerShape(*sizes) for layer, sizes in expected.items()}
    assert torch.equal(torch.random.get_rng_state(), before)


CONTAINED = {"gemma4, 12B", "gemma4, MoE", "deepseek_v3"}  # in the others, which have all that these have


@pytest.mark.parametrize("name", [name for name in BY_LAYER if name not in CONTAINED])
def test_they_are_sampled_from_and_packed_like_their_own_forward(name):
    """Log-probabilities 1e-5 apart in fp32, gradients of a packed and checkpointed batch 1e-4 of their norm."""
    policy = make_policy(name, load_in_4bit=False)
    assert engine.refusal(policy, torch.float32) is None and policy.packs
    sampler = InStore(policy, GRPOConfig(max_completion_length=12, use_cpu=True))
    sampler.engine_refusal = None
    for kind, shape in STORES.items():
        sampler.given = shape
        torch.manual_seed(0)
        completions = sampler._sample(PROMPTS, 3, replace(sampler.params, temperature=1.0)).completions
        for index, completion in enumerate(completions):
            prompt = PROMPTS[index // 3]
            with policy.inference():
                logits = policy.model(input_ids=torch.tensor([prompt + completion.ids])).logits[0].float()
            chosen = torch.tensor(completion.ids)[:, None]
            truth = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, chosen)[:, 0]
            torch.testing.assert_close(completion.logprobs, truth, atol=1e-5, rtol=0, msg=lambda m, k=kind: f"{k}: {m}")


def gradients(name, *, packed):
    """Gradients of the log-probabilities of four completions of two prompts, by parameter."""
    policy = make_policy(name, load_in_4bit=False, gradient_checkpointing=packed)
    draw = torch.Generator().manual_seed(0)
    completions = [torch.randint(4, 100, (size,), generator=draw).tolist() for size in (9, 1, 5, 12)]
    batches = pack(
        PROMPTS, completions, num_generations=2, token_budget=1000 if packed else 1, pad_token_id=0,
        device=policy.device, padding_free=packed,
    )  # fmt: skip
    for batch in batches:
        policy.logprobs(batch, 1.0).sum().backward()
    return {path: parameter.grad for path, parameter in policy.parameters_of(policy.adapter).items()}


@pytest.mark.parametrize("name", ["gemma4, E", "glm4_moe_lite"])
def test_gradients_in_a_packed_row_are_those_of_separate_ones(name):
    """With checkpointing, where a layer is computed again that gave its keys and values to later ones."""
    found, truth = gradients(name, packed=True), gradients(name, packed=False)
    for path, gradient in truth.items():
        assert gradient is not None and (found[path] - gradient).norm() < 1e-4 * gradient.norm(), path


def test_a_layer_that_shares_keys_and_values_reads_them_and_stores_none():
    layers = {0: LayerShape(4, 2, 8, 0), 1: LayerShape(4, 1, 16, 1), 2: LayerShape(4, 2, 8, 0)}
    for shape in (StoreShape(2, 4, 0, 0), StoreShape(2, 4, 2, 4, 3, 4)):  # rows and pages
        for dtype in (torch.float32, torch.int8):
            store = Store(layers, shape, dtype, torch.device("cpu"))
            assert [tuple(group.numbers.shape[::5]) for group in store.own.groups] == [(1, 8), (1, 16)]
            key, value = torch.randn(2, 2, 2, 8).unbind()
            at = (torch.arange(2), slice(None), torch.zeros(2, dtype=torch.int64))
            read = store.own.write(0, at, key, value)
            stored = [group.numbers.clone() for group in store.own.groups]
            assert stored[0].any() and not stored[1].any()
            again = store.own.write(2, at, -key, -value)
            where = dict(table=torch.arange(2)[:, None], positions=torch.zeros(2, dtype=torch.int64), prefilled=None)
            if shape.paged:
                store.write_token(-key, -value, layer=2, **where)
            assert all(map(torch.equal, stored, [group.numbers for group in store.own.groups]))
            assert all(map(torch.equal, read, [-x for x in again]))
            assert torch.equal(store.own.read(2, 2, 1, torch.float32)[:, :, :, 0], torch.stack(read))


def test_values_smaller_than_keys_are_filled_up_and_the_result_is_cut():
    class Kept:
        def attend(self, query, key, value, asked):
            self.called = query, key, value, asked
            return value.repeat_interleave(2, 1).transpose(1, 2) + 1

    class Layer:
        layer_idx = 3

    layout = Kept()
    query, key, value = torch.randn(2, 4, 5, 24), torch.randn(2, 2, 5, 24), torch.randn(2, 2, 5, 16)
    with laid_out(layout):
        out, _ = attend(Layer(), query, key, value, None)
        assert torch.equal(out, value.repeat_interleave(2, 1).transpose(1, 2) + 1)
        assert layout.called[2].shape == key.shape and layout.called[3] == Scoring(3, 24**-0.5, None, None)
        assert attend(Layer(), query[..., :8], key[..., :8], value, None)[0].shape == (2, 5, 4, 16)
        assert layout.called[0].shape[3] == layout.called[1].shape[3] == 16
        assert layout.called[3].scaling == 8**-0.5, "of the size before"

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from peft import LoraConfig
from tiny_models import make_model, make_policy, wake_adapters
from torch import nn
from transformers import AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.model import checkpointing
from lowmem_grpo.model.checkpointing import _OneNode, by_torch
from lowmem_grpo.model.load import load_policy
from lowmem_grpo.model.packing import pack
from lowmem_grpo.model.policy import Policy


@pytest.fixture(autouse=True)
def own_layers(monkeypatch):
    """Layers compute by themselves, not by their outlines, which have tests of their own."""
    monkeypatch.setattr(Policy, "_outlined_layers", lambda self: None)


def batch_of(policy: Policy):
    (batch,) = pack(
        [[5] * 20], [[7, 8, 9] * 10, [9, 7] * 4], token_budget=1000, pad_token_id=0, device=policy.device,
        num_generations=2, padding_free=policy.packs,
    )  # fmt: skip
    return batch


def gradients(policy: Policy, backward=lambda loss: loss.backward()):
    """Gradients by name; the random numbers are the same in each call."""
    torch.manual_seed(3)
    backward(policy.logprobs(batch_of(policy), 1.0).square().sum())
    found = {name: p.grad.clone() for name, p in policy.parameters_of(policy.adapter).items()}
    policy.model.zero_grad()
    return found


def by_torchs_own(policy: Policy) -> Policy:
    for layer in policy.decoder.layers:
        layer._gradient_checkpointing_func = layer._gradient_checkpointing_func.torchs
    return policy


def assert_equal(found, expected):
    assert found.keys() == expected.keys() and found
    for name, gradient in found.items():
        assert gradient.any() and torch.equal(gradient, expected[name]), name


SETTINGS = {
    "fp32": {},
    "bf16": {"bf16": True},
    "fp16": {"bf16": None, "fp16": True},
    "not in 4 bits": {"load_in_4bit": False},
    "dropout": {"lora_dropout": 0.3},
    "dropout in bf16": {"lora_dropout": 0.3, "bf16": True},
    "padded rows": {"padding_free": False},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_gradients_are_those_without_checkpointing_to_the_last_bit(settings):
    checkpointed = gradients(make_policy("qwen3", gradient_checkpointing=True, **settings))
    assert_equal(checkpointed, gradients(make_policy("qwen3", **settings)))


def test_every_familys_gradients_are_those_of_torchs_own_checkpointing(family):
    policy = make_policy(family, gradient_checkpointing=True)
    found = gradients(policy)
    assert_equal(found, gradients(by_torchs_own(policy)))


def test_a_layer_keeps_its_input_alone():
    policy = make_policy("llama", gradient_checkpointing=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        hidden = policy.hidden_states(batch_of(policy))
    inputs = (1, batch_of(policy).input_ids.shape[1], 64)
    assert kept.count(inputs) >= len(policy.decoder.layers) == 2
    assert hidden.requires_grad and not [shape for shape in kept if shape[-1:] == (96,)], "nothing of an MLP"


def test_the_first_layers_input_gets_no_gradient():
    policy = make_policy("llama", gradient_checkpointing=True)
    assert policy.packs
    asked = []

    def seen(module, arguments):
        asked.append((torch.is_grad_enabled(), arguments[0].requires_grad))

    policy.decoder.layers[0].input_layernorm.register_forward_pre_hook(seen)
    gradients(policy)
    assert asked == [(False, False), (True, False)], "its forward, then its recomputation"


@pytest.mark.parametrize("adapted", [[0], [1]])
def test_layers_without_adapters_take_no_part(adapted):
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=adapted, task_type="CAUSAL_LM")

    def policy(gradient_checkpointing):
        settings = GRPOConfig(bf16=False, use_cpu=True, gradient_checkpointing=gradient_checkpointing)
        tokenizer = AutoTokenizer.from_pretrained("lowmem_grpo/demo/model")
        made = load_policy(make_model("llama"), tokenizer, settings, config)
        wake_adapters(made)
        return made

    checkpointed, forwards = policy(True), []
    assert checkpointed.packs
    checkpointed.decoder.layers[0].mlp.register_forward_hook(lambda *_: forwards.append(1))
    assert_equal(gradients(checkpointed), gradients(policy(False)))
    assert len(forwards) == (2 if adapted == [0] else 1)


def test_a_backward_inside_autocast_loses_no_gradient():
    """torch's cache of casts would hand the recomputation a cast that was made without a gradient."""
    policy = make_policy("qwen3", gradient_checkpointing=True, bf16=True, lora_dropout=0.3)
    expected = gradients(policy)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(gradients(policy), expected)


def test_the_random_numbers_go_on_where_the_forward_left_them():
    policy = make_policy("qwen3", gradient_checkpointing=True, lora_dropout=0.3)
    after = []

    def backward(loss):
        after.append(torch.get_rng_state())
        loss.backward()
        after.append(torch.get_rng_state())

    gradients(policy, backward)
    assert torch.equal(*after)


class Toy(GradientCheckpointingLayer):
    """A layer of one product, whose output is one tensor or two."""

    def __init__(self, again, pairs=False):
        super().__init__()
        self.linear, self.pairs = nn.Linear(4, 4), pairs
        self.gradient_checkpointing, self._gradient_checkpointing_func = True, _OneNode(self, by_torch(again), again)

    def forward(self, hidden, scale=None):
        out = self.linear(hidden) * (1.0 if scale is None else scale["of it"][0])
        return (out, out.square()) if self.pairs else out


@pytest.fixture
def nodes(monkeypatch):
    """The number of layers that went through a node of our own."""
    count = [0]
    own = checkpointing._Layer.apply

    def counted(*arguments):
        out = own(*arguments)
        count[0] += out is not None
        return out

    monkeypatch.setattr(checkpointing._Layer, "apply", counted)
    return count


@pytest.mark.parametrize("change", ["nothing", "two outputs", "a keyword with a gradient", "an input in a keyword"])
def test_what_one_node_cannot_carry_is_left_to_torch(change, nodes):
    torch.manual_seed(0)
    layer = Toy(nullcontext, pairs=change == "two outputs").train()
    given = torch.randn(3, 4)
    results = []
    for checkpointed in (True, False):
        layer.gradient_checkpointing = checkpointed
        for _ in range(2):
            hidden, scale = given.clone().requires_grad_(), torch.tensor(2.0, requires_grad=change.startswith("a key"))
            keywords = {"scale": {"of it": (scale,)}}
            out = layer(hidden=hidden, **keywords) if change.startswith("an input") else layer(hidden, **keywords)
            (out[0] + out[1] if change == "two outputs" else out).square().sum().backward()
            results.append([hidden.grad, scale.grad, layer.linear.weight.grad.clone()])
            layer.zero_grad()
    for found in results[:3]:
        assert all(a is b or torch.equal(a, b) for a, b in zip(found, results[3], strict=True))
    assert nodes[0] == (2 if change == "nothing" else 0)


def test_a_layer_that_is_frozen_is_known_when_transformers_hands_its_bound_forward(nodes):
    """As 5.17 does; 5.23 hands the layer as an argument."""
    layer = Toy(nullcontext)
    hidden = torch.randn(3, 4)
    run = partial(layer.forward, scale=None)
    assert layer._gradient_checkpointing_func(run, hidden).requires_grad and nodes[0] == 1
    layer.requires_grad_(False)
    assert not layer._gradient_checkpointing_func(run, hidden).requires_grad and nodes[0] == 1

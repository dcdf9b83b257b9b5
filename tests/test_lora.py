import pytest
import torch
from peft import LoraConfig
from tiny_models import make_model, make_policy
from torch import nn
from transformers import AutoTokenizer

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.model.load import load_policy
from lowmem_grpo.model.packing import pack


def leave_to_peft(policy):
    for layer in policy.adapters.layers:
        vars(layer).pop("forward", None)


def run(policy):
    """Log-probabilities, gradients by name, and the bytes that the backward kept besides parameters."""
    (batch,) = pack([[5] * 20], [[7, 8, 9] * 10], token_budget=1000, pad_token_id=0, device=policy.device)
    kept, given = {}, {p.untyped_storage().data_ptr() for p in policy.model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs = policy.logprobs(batch, 1.0)
    size = sum(storage.nbytes() for storage in kept.values())
    logprobs.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in policy.parameters_of(policy.adapter).items()}
    policy.model.zero_grad()
    return logprobs.detach(), gradients, size


@pytest.mark.parametrize("settings", [{}, {"load_in_4bit": False}, {"gradient_checkpointing": True}], ids=str)
def test_the_numbers_are_pefts(family, settings):
    policy = make_policy(family, **settings)
    ours = run(policy)
    leave_to_peft(policy)
    theirs = run(policy)
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=0)
    for name, gradient in ours[1].items():
        assert (gradient - theirs[1][name]).norm() / theirs[1][name].norm() < 1e-6, name


@pytest.mark.parametrize("settings", [{"bf16": True}, {"bf16": None, "fp16": True}], ids=str)
def test_in_16_bits_the_gradient_is_as_close_to_the_truth_as_pefts(settings):
    truth = run(make_policy("llama", load_in_4bit=False))[1]
    policy = make_policy("llama", load_in_4bit=False, **settings)
    errors = []
    for _ in range(2):
        errors.append(sum(((g - truth[n]).norm() / truth[n].norm()).item() for n, g in run(policy)[1].items()))
        leave_to_peft(policy)
    assert errors[0] < 1.3 * errors[1] and errors[0] / len(truth) < 0.1


def test_the_backward_keeps_an_input_once_for_all_who_share_it():
    """Not 7 copies a decoder layer, but the inputs of q, k, v and of gate, up; those of o and down are kept anyway."""
    policy = make_policy("llama", bf16=True)
    hidden, mlp, tokens, layers = 64, 96, 56, 2
    ours = run(policy)[2]
    leave_to_peft(policy)
    theirs = run(policy)[2]
    assert theirs - ours >= 2 * tokens * layers * (6 * hidden + mlp - 2 * hidden)


@pytest.mark.parametrize("change", ["dropout", "dora", "two adapters"])
def test_what_is_not_plain_is_left_to_peft(change):
    given = LoraConfig(
        target_modules=["q_proj", "down_proj"], lora_dropout=0.5 if change == "dropout" else 0.0,
        use_dora=change == "dora", task_type="CAUSAL_LM",
    )  # fmt: skip
    config = GRPOConfig(bf16=False, use_cpu=True, load_in_4bit=False, gradient_checkpointing=False)
    tokenizer = AutoTokenizer.from_pretrained("lowmem_grpo/demo/model")
    policy = load_policy(make_model("llama"), tokenizer, config, given)
    if change == "two adapters":
        policy.model.add_adapter("second", given)
        policy.model.base_model.set_adapter(["default", "second"])  # pyright: ignore[reportCallIssue]: of a LoraModel
        for parameter in policy.model.parameters():
            parameter.requires_grad_(False)
        for name, parameter in policy.model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    torch.manual_seed(0)
    ours = run(policy)
    leave_to_peft(policy)
    torch.manual_seed(0)
    theirs = run(policy)
    assert torch.equal(ours[0], theirs[0])
    assert all(torch.equal(gradient, theirs[1][name]) for name, gradient in ours[1].items())


def test_switched_off_adapters_add_nothing():
    policy = make_policy("llama")
    with policy.as_reference():
        reference = policy.base(input_ids=torch.tensor([[5, 6, 7]])).logits
    leave_to_peft(policy)
    with policy.as_reference():
        assert torch.equal(policy.base(input_ids=torch.tensor([[5, 6, 7]])).logits, reference)


@pytest.mark.parametrize("settings", [{}, {"load_in_4bit": False}, {"gradient_checkpointing": True}], ids=str)
def test_a_model_may_change_in_place_what_an_adapted_layer_gives(settings):
    """As Gemma 3n does."""
    policy = make_policy("llama", **settings)
    for layer in policy.adapters.layers:
        layer.register_forward_hook(lambda _, __, out: out.mul_(1.5).add_(out.detach().mean()))
    ours = run(policy)
    leave_to_peft(policy)
    theirs = run(policy)
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-4, rtol=0)
    for name, gradient in ours[1].items():
        assert (gradient - theirs[1][name]).norm() / theirs[1][name].norm() < 1e-5, name

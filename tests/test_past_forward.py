"""Layers whose weights are read past their forwards stay in 16 bits."""

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from model_matrix import ROWS
from tiny_models import make_policy
from torch import nn
from transformers import AutoModelForCausalLM

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.model.adapters import lora_config
from lowmem_grpo.model.find import without_weights
from lowmem_grpo.model.past_forward import read_past_forward
from lowmem_grpo.planner import trace

READ = {"mamba": {"dt_proj"}, "jamba": {"dt_proj"}, "gemma3n_text": {"prediction_coefs", "correction_coefs"}}


def in_16_bits(model):
    """Last names of a model's linear layers, but for the head, that are not in 4 bits."""
    paths = [path for path, module in model.named_modules() if type(module) is nn.Linear]
    own = [path.removesuffix(".base_layer").rpartition(".")[2] for path in paths if "lora_" not in path]
    return {name for name in own if name != "lm_head"}


@pytest.mark.parametrize("kind", ["mamba", pytest.param("gemma3n_text", marks=pytest.mark.slow), "jamba"])
def test_a_layer_whose_weight_the_model_multiplies_by_itself_is_not_put_in_4_bits(kind, tmp_path):
    """However the model comes; the plan counts it so, and the rest is in 4 bits."""
    torch.manual_seed(0)
    config = ROWS[kind].config()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    settings = GRPOConfig(use_cpu=True, bf16=False)
    whole = trace.skeleton(trace.Key(config, lora_config(settings)), "float32", False, True)
    resident = trace._resident(whole, settings, trace._few_of_each(trace._kinds(whole), {}))[0]
    for given in (model, str(tmp_path)):
        policy = make_policy(given)  # which tries a backward
        assert in_16_bits(policy.base) == READ[kind]
        found: list = [layer.weight for layer in policy.base.modules() if isinstance(layer, Linear4bit)]
        assert resident["4-bit linear layers"] == sum(trace.nf4_bytes(w.quant_state.shape.numel()) for w in found)


def test_layers_whose_weights_only_kernels_for_a_gpu_read_are_put_in_4_bits():
    """Mamba 2 hands `out_proj.weight` to a kernel where it has no cache, which training always gives it."""
    model = without_weights(ROWS["bamba"].config(), False)
    before = {name: id(tensor) for name, tensor in model.state_dict().items()}
    assert read_past_forward(model) == []
    assert {type(module) for path, module in model.named_modules() if path.endswith("_proj")} == {nn.Linear}
    assert before.keys() == model.state_dict().keys() and model.device.type == "meta"


class Own(nn.Module):
    """A layer of which another is a part, whose weight is multiplied by in place of a call."""

    def __init__(self, linear):
        super().__init__()
        self.up_proj = linear

    def forward(self, x):
        return x @ self.up_proj.weight.t()


def test_a_layer_is_found_wherever_in_a_model_it_is_read():
    model = without_weights(ROWS["qwen2"].config(), False)
    assert read_past_forward(model) == []
    model.model.layers[1].mlp.up_proj = Own(model.model.layers[1].mlp.up_proj)
    assert read_past_forward(model) == ["model.layers.1.mlp.up_proj.up_proj"]

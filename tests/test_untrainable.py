"""What a policy is tried for once, as it is loaded: a base without noise that looks at no later token, and a gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from test_train import run, text_reward
from tiny_models import make_model, make_policy
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    BloomConfig,
    CTRLConfig,
    FalconConfig,
    Gemma3nTextConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    MixtralConfig,
    MptConfig,
    OPTConfig,
    PreTrainedConfig,
    SeedOssConfig,
    Starcoder2Config,
    XGLMConfig,
)

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.errors import InputError
from lowmem_grpo.model.load import load_policy

IDS: Any = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
SIZE: Any = {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GATED: Any = {**SIZE, "intermediate_size": 48, "num_key_value_heads": 1}
GPT: Any = {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
WITH_DROPOUT: dict[str, Callable[[], PreTrainedConfig]] = {
    "OPT": lambda: OPTConfig(
        **SIZE, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.2, attention_dropout=0.2,
        layerdrop=0.5,
    ),
    "BLOOM": lambda: BloomConfig(**IDS, hidden_size=32, n_layer=2, n_head=2, hidden_dropout=0.2, attention_dropout=0.2),
    "Falcon": lambda: FalconConfig(**SIZE, hidden_dropout=0.2, attention_dropout=0.2),
    "StarCoder2": lambda: Starcoder2Config(**GATED, residual_dropout=0.2, embedding_dropout=0.2, attention_dropout=0.2),
    "Seed-OSS": lambda: SeedOssConfig(**GATED, head_dim=16, residual_dropout=0.2, attention_dropout=0.2),
    "BioGPT": lambda: BioGptConfig(**SIZE, intermediate_size=48, max_position_embeddings=64, layerdrop=0.2),
    "XGLM": lambda: XGLMConfig(
        **IDS, d_model=32, ffn_dim=48, num_layers=2, attention_heads=2, max_position_embeddings=64, layerdrop=0.2
    ),
    "GPT-BigCode": lambda: GPTBigCodeConfig(**GPT, attn_pdrop=0.2, resid_pdrop=0.2, embd_pdrop=0.2),
    "GPT-2": lambda: GPT2Config(**GPT, attn_pdrop=0.2, resid_pdrop=0.2, embd_pdrop=0.2),
    "GPT-J": lambda: GPTJConfig(**GPT, rotary_dim=8, attn_pdrop=0.2, resid_pdrop=0.2, embd_pdrop=0.2),
    "GPT-Neo": lambda: GPTNeoConfig(
        **IDS, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]], embed_dropout=0.2, resid_dropout=0.2, attention_dropout=0.2,
    ),
    "GPT-NeoX": lambda: GPTNeoXConfig(
        **SIZE, intermediate_size=48, max_position_embeddings=64, attention_dropout=0.2, hidden_dropout=0.2
    ),
    "MPT": lambda: MptConfig(**IDS, d_model=32, n_layers=2, n_heads=2, max_seq_len=64, resid_pdrop=0.2, emb_pdrop=0.2),
    "CTRL": lambda: CTRLConfig(**GPT, dff=48, resid_pdrop=0.2, embd_pdrop=0.2),
    "Gemma 3n": lambda: Gemma3nTextConfig(
        **{**GATED, "num_hidden_layers": 5}, head_dim=16, vocab_size_per_layer_input=128, hidden_size_per_layer_input=8,
        num_kv_shared_layers=2, laurel_rank=8, activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0, 0.0],
        layer_types=["sliding_attention"] * 2 + ["full_attention", "sliding_attention", "full_attention"],
        attention_dropout=0.2,
    ),
}  # fmt: skip
IN_FP32: Any = {"bf16": False, "load_in_4bit": False}


def made(config: PreTrainedConfig) -> Any:
    """A random model whose log-probabilities are far from uniform."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.15)
    return model


@pytest.mark.parametrize("family", WITH_DROPOUT)
@pytest.mark.filterwarnings("ignore")
def test_a_family_with_a_dropout_starts_at_its_reference_and_at_what_was_sampled(family, tmp_path):
    result = run(
        tmp_path, made(WITH_DROPOUT[family]()), text_reward, beta=0.1, max_steps=1, max_completion_length=8, **IN_FP32
    )
    (step,) = result.history
    assert step["kl"] < 1e-8 and step["grad_norm"] > 0
    assert step["clip_ratio/region_mean"] == 0


def noisy(model, add: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The model with a module whose forward adds something in training, and that has no attribute to tell so."""
    layer = model.model.layers[0]

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = layer.mlp

        def forward(self, x):
            out = self.inner(x)
            return out + add(out) if self.training else out

    layer.mlp = Noisy()
    return model


REFUSED = {
    "a dropout that no attribute tells of": (
        lambda: noisy(make_model(), lambda out: torch.nn.functional.dropout(out, 0.1)),
        "Qwen2ForCausalLM computes something else each time in training mode",
    ),
    "noise on what a router reads": (
        lambda: made(MixtralConfig(**GATED, num_local_experts=4, router_jitter_noise=0.3)),
        "MixtralForCausalLM computes something else each time in training mode",
    ),
    "a look at later tokens": (
        lambda: noisy(make_model(), lambda out: out.flip(1)),
        "Qwen2ForCausalLM is no causal language model: its outputs depend on later tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_make_policy_and_sampler_differ_is_refused(what, tokenizer):
    make, words = REFUSED[what]
    with pytest.raises(InputError, match=words):
        load_policy(make(), tokenizer, GRPOConfig(use_cpu=True, **IN_FP32))


def test_an_adapter_on_modules_that_are_not_used_is_refused(tokenizer):
    model = make_model()
    model.model.layers[0].unused = nn.Linear(8, 8)
    with pytest.raises(InputError, match="no weight of the adapter 'default' gets a gradient: .*other target_modules"):
        load_policy(model, tokenizer, GRPOConfig(use_cpu=True, **IN_FP32), LoraConfig(target_modules=["unused"]))


def test_what_a_models_code_raises_in_a_backward_is_one_sentence_when_it_is_loaded(tokenizer):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no backward\nof several lines")

    model = noisy(make_model(), lambda out: Broken.apply(out) - out.detach())
    with pytest.raises(InputError, match="Qwen2ForCausalLM cannot be trained here: no backward$"):
        load_policy(model, tokenizer, GRPOConfig(use_cpu=True, **IN_FP32))


def test_the_trial_leaves_no_gradient_and_keeps_the_adapters_own_dropout():
    policy = make_policy(lora_dropout=0.5)
    assert all(parameter.grad is None for parameter in policy.model.parameters())
    dropouts = [module for name, module in policy.model.named_modules() if isinstance(module, nn.Dropout)]
    assert {module.p for module in dropouts} == {0.5} and all(module.training for module in dropouts)

"""Tiny models of every supported family, all with the demo's tokenizer of one token a character."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.model import load
from lowmem_grpo.model.attention import soften
from lowmem_grpo.model.head import read_head
from lowmem_grpo.model.policy import Policy

DEMO_MODEL = Path(__file__).parents[1] / "lowmem_grpo" / "demo" / "model"
SMALL = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "qwen2": lambda: Qwen2Config(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=16),
    "llama": lambda: LlamaConfig(**SMALL),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=24),
    "gemma2": lambda: Gemma2Config(**SMALL, head_dim=16, sliding_window=24, final_logit_softcapping=30.0),
    "gemma3": lambda: Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=24),
    "phi3": lambda: Phi3Config(**SMALL),
    "granite": lambda: GraniteConfig(**SMALL, logits_scaling=8.0, embedding_multiplier=12.0),
    "cohere": lambda: CohereConfig(**SMALL, logit_scale=0.0625),
}

_DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_chunk_size": 16}
_EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_CONV = {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}
_OF_MAMBA_2 = {"hidden_size": 64, "num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 2, "chunk_size": 16}
_KDA = {"linear_head_dim": 16, "linear_num_heads": 4, "mlp_layer_types": ["dense", "sparse"]}
_LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}  # fmt: skip
# Families with layers that keep a state, by model_type.
HYBRIDS = {
    "qwen3_5_text": {**SMALL, **_DELTA, **_LINEAR, "head_dim": 16},
    "qwen3_5_moe_text": {**SMALL, **_DELTA, **_LINEAR, **_EXPERTS, "head_dim": 16},
    "qwen3_next": {**SMALL, **_DELTA, **_LINEAR, **_EXPERTS, "head_dim": 16},
    "olmo_hybrid": {**SMALL, **_DELTA, **_LINEAR},
    "lfm2": {**SMALL, **_CONV, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**SMALL, **_CONV, **_EXPERTS, "num_dense_layers": 1},
    "bamba": {**SMALL, **_MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **SMALL, **_MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 96,
    },
    "kimi_linear": {**SMALL, **_LINEAR, **_KDA, **_LATENT, **_EXPERTS, "num_local_experts": 4},
    "zaya": {**SMALL, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "router_hidden_size": 16},
    "falcon_h1": {**SMALL, **_MAMBA, "mamba_d_ssm": 128, "head_dim": 16},
    "nemotron_h": {
        **SMALL, "num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "mlp"], "mamba_num_heads": 4,
        "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16, "head_dim": 16,
    },
    "zamba2": {
        **SMALL, "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "mamba_d_state": 16,
        "mamba_ngroups": 2, "n_mamba_heads": 4, "chunk_size": 16, "num_mem_blocks": 1,
    },
    "mamba2": {
        **_OF_MAMBA_2, "vocab_size": 128, "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": 1,
        "pad_token_id": 0,
    },
}  # fmt: skip
_GEMMA_4 = {
    **SMALL, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 16,
    "global_head_dim": 32, "sliding_window": 24, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 128,
}  # fmt: skip
_MLA = {
    **SMALL, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
}  # fmt: skip
# Whose layers are not all of one size, share keys and values, or have values smaller than keys: model_type, settings.
BY_LAYER = {
    "gemma4, 12B": ("gemma4_text", _GEMMA_4),
    "gemma4, 31B": ("gemma4_text", {**_GEMMA_4, "attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    "gemma4, E": (
        "gemma4_text",
        {**_GEMMA_4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "use_double_wide_mlp": True},
    ),
    "gemma4, MoE": (
        "gemma4_text",
        {**_GEMMA_4, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    ),
    "deepseek_v3": ("deepseek_v3", _MLA),
    "glm4_moe_lite": ("glm4_moe_lite", _MLA),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": None,
            "eos_token_id": 1, "pad_token_id": 0,
        },
    ),
}  # fmt: skip
# With sinks, by model_type. All weights are wide: some have three dimensions.
SINKS = {
    "gpt_oss": {
        **SMALL, "head_dim": 16, "sliding_window": 24, "num_local_experts": 4, "num_experts_per_tok": 2,
        "initializer_range": 0.15,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "original_max_position_embeddings": 64, "truncate": False,
        },
    },
    "granite_swa": {**SMALL, "sliding_window": 24},
}  # fmt: skip
CONFIGS = {
    **FAMILIES,
    **{name: partial(AutoConfig.for_model, name, **settings) for name, settings in (HYBRIDS | SINKS).items()},
    **{name: partial(AutoConfig.for_model, kind, **settings) for name, (kind, settings) in BY_LAYER.items()},
}
_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
_QWEN_VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
}  # fmt: skip
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
_GDN = {
    "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}  # fmt: skip
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def _seeing(model_type: str, text: dict, vision: dict, **settings):
    """The configuration of a model of text and images."""
    text = {**SMALL, "head_dim": 16, **text}
    kind: Any = CONFIG_MAPPING[model_type]
    return kind(text_config=text, vision_config=vision, **settings)


# Models of text and images, as they are saved: a decoder with towers beside it.
WRAPPERS = {
    "qwen3_5": lambda: _seeing("qwen3_5", _GDN, {**_QWEN_VISION, "num_position_embeddings": 16}),
    "qwen3_5_moe": lambda: _seeing(
        "qwen3_5_moe",
        {**_GDN, **_MOE, "shared_expert_intermediate_size": 32},
        {**_QWEN_VISION, "num_position_embeddings": 16},
    ),
    "gemma3": lambda: _seeing(
        "gemma3", {"sliding_window": 24}, _VISION, mm_tokens_per_image=4, image_token_index=5, boi_token_index=6,
        eoi_token_index=7,
    ),
    "gemma4": lambda: _seeing(
        "gemma4",
        {"sliding_window": 24, "global_head_dim": 16, "hidden_size_per_layer_input": 0},
        {**_VISION, "num_key_value_heads": 2, "head_dim": 16}, image_token_id=5, boi_token_id=6, eoi_token_id=7,
        audio_token_id=8,
    ),
    "gemma4_unified": lambda: _seeing(
        "gemma4_unified",
        {"sliding_window": 24, "global_head_dim": 16, "hidden_size_per_layer_input": 0},
        {"patch_size": 4, "hidden_size": 32}, image_token_id=5, boi_token_id=6, eoi_token_id=7, audio_token_id=8,
    ),
    "mistral3": lambda: _seeing(
        "mistral3", {"model_type": "mistral"}, {"model_type": "pixtral", **_VISION, "head_dim": 16}, image_token_index=5
    ),
    "qwen3_vl": lambda: _seeing(
        "qwen3_vl", _MROPE, {**_QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    ),
    "qwen3_vl_moe": lambda: _seeing(
        "qwen3_vl_moe",
        {**_MROPE, **_MOE}, {**_QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    ),
    "qwen2_5_vl": lambda: _seeing("qwen2_5_vl", _MROPE, {**_QWEN_VISION, "fullatt_block_indexes": [1]}),
    "smolvlm": lambda: _seeing("smolvlm", {"model_type": "llama"}, _VISION, image_token_id=5, pad_token_id=0),
    "lfm2_vl": lambda: _seeing(
        "lfm2_vl",
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
        {"model_type": "siglip2_vision_model", **_VISION, "num_patches": 16}, image_token_id=5,
    ),
    "llava": lambda: _seeing(
        "llava", {"model_type": "llama"}, {"model_type": "clip_vision_model", **_VISION}, image_token_index=5
    ),
    "internvl": lambda: _seeing(
        "internvl", {"model_type": "qwen2"}, {"model_type": "internvl_vision", **_VISION}, image_token_id=5
    ),
    "glm4v": lambda: _seeing(
        "glm4v",
        {"rope_parameters": {**_MROPE["rope_parameters"], "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}},
        {**_QWEN_VISION, "num_position_embeddings": 16},
    ),
    "minicpmv4_6": lambda: _seeing("minicpmv4_6", {"model_type": "qwen3_5_text", **_GDN}, _VISION),
}  # fmt: skip


def make_wrapper(family: str) -> Any:
    """A random model of text and images, fp32."""
    torch.manual_seed(0)
    return _widened(AutoModelForImageTextToText.from_config(WRAPPERS[family](), dtype=torch.float32))


def make_model(family: str = "qwen2", seed: int = 0):
    """A random model of a family, fp32, with weights wide enough that its log-probabilities are far from uniform."""
    torch.manual_seed(seed)
    return _widened(AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32))


def _widened(model):
    """The model with weights wide enough that its log-probabilities are far from uniform."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.15)
            elif name.endswith("sinks"):
                parameter.copy_(torch.linspace(-30, 30, len(parameter)))
            elif name.endswith(("bias", "qk_norm.temp")):  # the latter of ZAYA, which multiplies keys
                parameter.normal_(std=0.1)
    return model.eval()


TRAINED: set[str] = set()  # of which a backward was tried in this process: 0.035 of make_policy's 0.11 CPU s


def make_policy(model="qwen2", tokenizer=None, **settings) -> Policy:
    """A policy on the CPU in fp32, unless settings say otherwise, with adapters that are not zero."""
    settings = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, **settings}
    of = f"{model} {settings}" if model in CONFIGS else None
    model = make_model(model) if of else model
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(DEMO_MODEL)
    with pytest.MonkeyPatch.context() as patch:
        if of in TRAINED:
            patch.setattr(load, "refuse_untrainable", lambda policy: None)
        policy = load.load_policy(model, tokenizer, GRPOConfig(**settings))
    if of:
        TRAINED.add(of)
    wake_adapters(policy)
    return policy


def wake_adapters(policy: Policy) -> None:
    """Set every adapter to fixed values: LoRA's second factor starts at zero, where the policy is its reference."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters_of(policy.adapter).values():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)


def compute_in_fp64(policy: Policy) -> None:
    """Let the decoder of a dense policy compute in fp64, where sums in another order differ by 1e-15.

    transformers computes norms in fp32 whatever the weights are, so they become their formulas; a softcap's scores
    stay fp32. The head's kernel takes no fp64: see head_by_definition.
    """
    policy.model.double()
    policy.head = read_head(policy.base)  # of which it knows the dtype
    for module in policy.model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            epsilon = module.eps if "Gemma" in kind else module.variance_epsilon
            module.forward = partial(_rms_norm, module, epsilon, 1.0 if "Gemma" in kind else 0.0)


def _rms_norm(module, epsilon: float, offset: float, x: torch.Tensor) -> torch.Tensor:
    return (offset + module.weight) * x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()


def head_by_definition(
    hidden_states, weight, labels, bias=None, temperature=1.0, logit_scale=1.0, softcap=None, return_entropy=False,
    entropy_grad=False, return_top=False, weight_scale=None,
):  # fmt: skip
    """linear_logprobs from full logits, in any dtype, of a head that is not in int8."""
    assert weight_scale is None
    logits = hidden_states @ weight.T + (0 if bias is None else bias)
    scores = soften(logits * logit_scale, softcap) / temperature
    log_p = scores.log_softmax(-1)
    logprobs = log_p.gather(1, labels[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    asked = [logprobs] + [entropy if entropy_grad else entropy.detach()] * return_entropy
    asked += [scores.argmax(-1) == labels] * return_top
    return tuple(asked) if len(asked) > 1 else logprobs


class OutOfMemory(TorchDispatchMode):
    """Raises at the nth matrix product, at some forwards by number, or at each of more tokens than there is memory for."""

    def __init__(self, nth=None, tokens=10**9, forwards=()):
        super().__init__()
        self.nth, self.tokens, self.failing = nth, tokens, forwards
        self.calls = self.forwards = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.calls += 1
            if self.calls == self.nth:
                raise torch.OutOfMemoryError("injected")
        if function.overloadpacket is torch.ops.aten.embedding:
            self.forwards += 1
            if out.shape[:-1].numel() > self.tokens or self.forwards in self.failing:
                raise torch.OutOfMemoryError("injected")
        return out

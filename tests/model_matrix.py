"""Which models of transformers are served, and how: tests try each row, and docs/models.md has its table from them.

A row is a model type as a tiny random configuration beside SMALL. What is expected of a family that the engine samples,
and trains on packed rows, is said by leaving both reasons empty.
"""

from dataclasses import dataclass, field
from typing import Any

import transformers
from packaging.version import Version
from tiny_models import SMALL
from transformers import AutoConfig, PreTrainedConfig

INSTALLED = Version(transformers.__version__)
WINDOW = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
HEADS: dict[str, Any] = {"head_dim": 16}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED: dict[str, Any] = {**MOE, "shared_expert_intermediate_size": 32}
LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
MLA: dict[str, Any] = {
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
KDA: dict[str, Any] = {
    "linear_head_dim": 16, "linear_num_heads": 4, "layer_types": DELTA["layer_types"],
    "mlp_layer_types": ["dense", "sparse"],
}  # fmt: skip
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
CONV = {"layer_types": ["conv", "full_attention"]}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
GEMMA4: dict[str, Any] = {"head_dim": 16, "global_head_dim": 32, "hidden_size_per_layer_input": 0, **WINDOW}
PER_LAYER: dict[str, Any] = {
    "num_hidden_layers": 4, "layer_types": WINDOW["layer_types"] * 2, "sliding_window": 24, "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8, "head_dim": 16,
}  # fmt: skip

PACKED, ENGINE = "", ""  # no reason to the contrary


@dataclass(frozen=True)
class Row:
    """A model type as a tiny configuration, and what is expected of it."""

    kind: str  # transformers' model_type
    settings: dict[str, Any] = field(default_factory=dict)
    shape: str = ""  # which of a type's models, where one stands for several
    padded: str = PACKED  # words of why it is trained on padded rows
    generates: str = ENGINE  # words of why transformers' generate samples from it
    refused: str = ""  # words of why it is refused at load
    dense: tuple[str, ...] = ()  # names of linear layers that stay in 16 bits: the model reads their weights itself
    since: str = "5.17"  # the first transformers with which this holds

    @property
    def name(self) -> str:
        return f"{self.kind} ({self.shape})" if self.shape else self.kind

    def config(self) -> PreTrainedConfig:
        settings = {**SMALL, **self.settings}
        return AutoConfig.for_model(self.kind, **settings)


def rows(*kinds: str, **expected: Any) -> list[Row]:
    """Rows of model types that need no settings of their own."""
    return [Row(kind, **expected) for kind in kinds]


MIXES = "mixes tokens in a way of its own"
OWN = "attention cannot be replaced"
OWN_BEFORE_5_24 = {} if Version("5.24") <= INSTALLED else {"padded": OWN, "generates": OWN}
FORGETS = "does not go on from its recurrent state"
FAMILIES: dict[str, list[Row]] = {
    "Qwen 2, 2.5, 3": [Row("qwen2"), Row("qwen3", HEADS)],
    "Qwen 2, 3 mixtures (A3B)": [Row("qwen2_moe", SHARED), Row("qwen3_moe", {**HEADS, **MOE})],
    "Qwen 3.5, 3.6, 3-Next": [
        Row("qwen3_5_text", {**HEADS, **DELTA}),
        Row("qwen3_5_moe_text", {**HEADS, **DELTA, **SHARED}),
        Row("qwen3_next", {**HEADS, **DELTA, **SHARED}),
    ],
    "Llama 2, 3": [Row("llama"), Row("arcee"), Row("internlm3", HEADS)],
    "Llama 4": [
        Row(
            "llama4_text",
            {**HEADS, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 96,
             "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
            refused="does not tell the decoder",
        )
    ],
    "Mistral, Ministral": [
        Row("mistral", {"sliding_window": 24}), Row("ministral", {**HEADS, **WINDOW}), Row("ministral3", HEADS),
    ],
    "Mixtral, PhiMoE, MiniMax M2, AFMoE, A.X K1, Aria, Beam, Cohere 2, Doge, FlexOLMo, Flint, Granite SWA, Hunyuan 3, "
    "Kolibri, Laguna, Mellum, MiMo 2 Flash, Solar Open": [
        Row("mixtral", LOCAL),
        Row("phimoe", LOCAL | {"router_jitter_noise": 0.0}),
        Row("minimax_m2", {**HEADS, **LOCAL}),
        Row("afmoe", {**HEADS, **MOE, "sliding_window": 24, "num_dense_layers": 1}),
        Row("hy_v3", {**HEADS, **MOE, "mlp_layer_types": ["dense", "sparse"]}),
        Row("axk1", {**MLA, **ROUTED}),
        Row("aria_text", {**HEADS, "moe_num_experts": 4, "moe_topk": 2}),
        Row("beam", {**HEADS, **MOE, **WINDOW, "n_group": 1, "topk_group": 1, "mlp_layer_types": ["dense", "sparse"]}),
        Row("cohere2_moe", {**HEADS, **WINDOW, "num_experts": 4, "num_experts_per_tok": 2}),
        Row("doge", {"num_experts": 4, "num_experts_per_tok": 2}),
        Row("flex_olmo", {"num_experts": 4, "num_experts_per_tok": 2}),
        Row("flint", {**HEADS, **SHARED, **WINDOW}),
        Row("granitemoe_swa", {**WINDOW, **LOCAL, "shared_intermediate_size": 64}),
        Row("kolibri1", {**HEADS, **SHARED, **WINDOW, "num_local_experts": 4}),
        Row("laguna", {**HEADS, **SHARED, **WINDOW, "num_attention_heads_per_layer": [4, 2],
                       "mlp_layer_types": ["dense", "sparse"]}),
        Row("mellum", {**HEADS, **MOE, **WINDOW, "mlp_layer_types": ["sparse", "sparse"]}),
        Row("solar_open", {**HEADS, **ROUTED}),
        Row("mimo_v2_flash", {**HEADS, **ROUTED, **WINDOW, "v_head_dim": 8, "mlp_layer_types": ["dense", "sparse"]}),
    ],
    "Gemma 1, 2, 3": [
        Row("gemma", HEADS), Row("gemma2", {**HEADS, "sliding_window": 24, "final_logit_softcapping": 30.0}),
        Row("gemma3_text", {**HEADS, **WINDOW}), Row("vaultgemma", {**HEADS, **WINDOW}),
    ],
    "Gemma 3n": [
        Row(
            "gemma3n_text", {**PER_LAYER, "laurel_rank": 8, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
            dense=("correction_coefs", "prediction_coefs"),
        )
    ],
    "Gemma 4": [
        Row("gemma4_text", GEMMA4, "12B"),
        Row("gemma4_text", {**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1}, "31B"),
        Row("gemma4_text", {**PER_LAYER, "global_head_dim": 32}, "E2B, E4B"),
        Row("gemma4_text", {**GEMMA4, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
                            "moe_intermediate_size": 32}, "26B-A4B"),
    ],
    "gpt-oss": [Row("gpt_oss", {**HEADS, **WINDOW, **LOCAL})],
    "Phi": [Row("phi"), Row("phi3")],
    "Granite 3": [
        Row("granite", {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "attention_multiplier": 0.08}),
        Row("granitemoe", LOCAL),
        Row("granitemoeshared", {**LOCAL, "shared_intermediate_size": 64}),
    ],
    "Granite 4 hybrid, Bamba": [
        Row("granitemoehybrid", {"layer_types": ["mamba", "attention"], "num_local_experts": 0,
                                 "shared_intermediate_size": 64, **MAMBA}),
        Row("bamba", {"attn_layer_indices": [1], **MAMBA}),
    ],
    "LFM 2, 2.5, 3": [
        Row("lfm2", {**CONV, "block_auto_adjust_ff_dim": False}),
        Row("lfm2_moe", {**CONV, **MOE, "num_dense_layers": 1}),
        Row("lfm3", {**CONV, **HEADS}),
    ],
    "Falcon-H1, Nemotron-H, Zamba 2": [
        Row("falcon_h1", {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
                          "mamba_n_groups": 1, "num_hidden_layers": 1}),
        Row("nemotron_h", {**HEADS, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1,
                           "layers_block_type": ["mamba", "attention", "mlp"]}),
        Row("zamba2", {"n_mamba_heads": 8, "mamba_d_state": 8, "mamba_ngroups": 1, "adapter_rank": 8,
                       "layers_block_type": ["mamba", "hybrid"], "num_key_value_heads": 4}),
    ],
    "Mamba 2": [
        Row("mamba2", {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1, "num_hidden_layers": 1}),
    ],
    "Mamba 1, Falcon-Mamba, Jamba": [
        Row("mamba", {"state_size": 4, "num_hidden_layers": 1}, dense=("dt_proj",), padded=FORGETS, generates=FORGETS),
        Row("falcon_mamba", {"state_size": 4, "num_hidden_layers": 1}, dense=("dt_proj",), padded=FORGETS, generates=FORGETS),
        Row("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1,
                      "mamba_d_state": 4, "mamba_dt_rank": 4}, dense=("dt_proj",), padded=FORGETS, generates=FORGETS),
    ],
    "OLMo 1, 2, 3": [
        *rows("olmo", "olmo2"), Row("olmo3", WINDOW),
        Row("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    ],
    "OLMo hybrid": [
        Row("olmo_hybrid", {"layer_types": DELTA["layer_types"]}),
    ],
    "DeepSeek 2, 3, GLM 4.7 Flash, MiniCPM 3, Youtu (MLA)": [
        Row("deepseek_v2", {**MLA, **ROUTED}),
        Row("deepseek_v3", {**MLA, **ROUTED}),
        Row("glm4_moe_lite", {**MLA, **ROUTED, "mlp_layer_types": ["dense", "sparse"]}),
        Row("minicpm3", MLA),
        Row("youtu", MLA),
    ],
    "GLM 4, 4.5": [Row("glm", HEADS), Row("glm4", HEADS), Row("glm4_moe", {**HEADS, **ROUTED})],
    "SmolLM 3": [Row("smollm3", {"no_rope_layers": [1, 0]})],
    "EXAONE 4": [Row("exaone4", WINDOW), Row("exaone_moe", {**WINDOW, **MOE})],
    "Cohere, Command": [Row("cohere", {"logit_scale": 0.0625}), Row("cohere2", WINDOW)],
    "ERNIE 4.5": [
        Row("ernie4_5", HEADS),
        Row("ernie4_5_moe", {"moe_intermediate_size": 32, "moe_k": 2, "moe_num_experts": 4,
                             "moe_num_shared_experts": 1}),
    ],
    "Hunyuan 1": [
        Row("hunyuan_v1_dense", HEADS),
        Row("hunyuan_v1_moe", {**HEADS, "num_experts": 4, "moe_topk": 2}, dense=("wg",)),
    ],
    "Seed-OSS, Apertus, Helium, Nemotron, BitNet, StarCoder 2, StableLM, nanochat, HyperCLOVA X, JAIS 2, IQuest-Coder, "
    "CWM, Persimmon, Granite SWA": [
        Row("seed_oss", HEADS), *rows("apertus", "nemotron", "bitnet", "starcoder2", "stablelm"), Row("helium", HEADS),
        Row("nanochat", {"num_key_value_heads": 4}),
        *rows("hyperclovax", "persimmon"), Row("jais2", HEADS), Row("iquestcoder", HEADS),
        Row("cwm", {**HEADS, **WINDOW, "bos_token_id": 2}), Row("granite_swa", WINDOW),
    ],
    "Kimi Linear, Ling 3": [
        Row("kimi_linear", {**MLA, **MOE, **KDA, "q_lora_rank": None, "num_local_experts": 4}, since="5.21"),
        Row("bailing_hybrid", {**MLA, **ROUTED, **KDA}, since="5.21"),
    ],
    "MiniMax 1": [
        Row("minimax", {"layer_types": DELTA["layer_types"], "block_size": 16, **LOCAL}, padded=MIXES, generates=MIXES),
    ],
    "GPT-2, GPT-NeoX, OPT, BioGPT": [
        Row("gpt2", GPT), Row("gpt_bigcode", GPT), Row("gpt_neox"),
        Row("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}), Row("biogpt"),
    ],
    "GPT-J, GPT-Neo, CodeGen, BLOOM, MPT, Falcon": [
        Row("gptj", {**GPT, "rotary_dim": 8}, **OWN_BEFORE_5_24),
        Row("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
            padded=OWN, generates=OWN),
        Row("codegen", {**GPT, "rotary_dim": 8}, **OWN_BEFORE_5_24),
        Row("bloom", {"n_layer": 2, "n_head": 4}, padded=OWN, generates=OWN),
        Row("mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}, padded=OWN, generates=OWN),
        Row("falcon", {"num_kv_heads": 2, "new_decoder_architecture": True}, padded=OWN, generates=OWN),
    ],
    "RWKV": [Row("rwkv", {"attention_hidden_size": 64, "context_length": 256}, dense=("output", "value"), padded=OWN, generates=OWN)],
    "RecurrentGemma": [
        Row("recurrent_gemma", {"block_types": ["recurrent", "attention"], "lru_width": 64},
            refused="something besides bias, scale and tanh softcap"),
    ],
    "DiffLlama": [Row("diffllama", generates="attends more than once")],
}  # fmt: skip
ROWS: dict[str, Row] = {row.name: row for rows_ in FAMILIES.values() for row in rows_}

"""Which models of transformers are served, and how: tests try each row, and docs/models.md has its table from them.

A row is a model type as a tiny random configuration beside SMALL. What is expected of a family that the engine samples,
and trains on packed rows, is said by leaving both reasons empty.
"""

from dataclasses import dataclass, field, replace
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
INDEX: dict[str, Any] = {  # with fewer heads, scores that are all 0 would make the choice of tokens a matter of rounding
    "index_topk": 8, "index_head_dim": 16, "index_n_heads": 16, "mlp_layer_types": ["dense", "sparse"],
}  # fmt: skip
CHOOSES: dict[str, Any] = {**MLA, **ROUTED, **INDEX}
SMALLER: dict[str, Any] = {f"swa_{name}": size for name, size in MLA.items()} | {
    "swa_num_attention_heads": 4, "swa_head_dim": 24, "swa_qk_rope_head_dim": 8,
}  # fmt: skip
M3: dict[str, Any] = {
    **HEADS, **LOCAL, "dense_intermediate_size": 96, "shared_intermediate_size": 32, "intermediate_size": 32,
    "rotary_dim": 8, "index_n_heads": 2, "index_head_dim": 16, "index_block_size": 8, "index_topk_blocks": 2,
    "mlp_layer_types": ["dense", "sparse"],
}  # fmt: skip
INKLING: dict[str, Any] = {
    **HEADS, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "d_rel": 4,
    "rel_extent": 64, "sliding_window_size": 24, "moe_intermediate_size": 32, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "unpadded_vocab_size": 120,
}  # fmt: skip
LLAMA = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
HYBRID = ["hybrid_sliding", "hybrid"]
BYTES: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 96,
    "num_hidden_layers": 1, "vocab_size": 260, "max_position_embeddings": 256,
}  # fmt: skip
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
    dense: tuple[str, ...] = ()  # names of linear layers and stacks of matrices that stay in 16 bits
    bare: tuple[str, ...] = ()  # names of linear layers whose adapters learn nothing
    unforeseen: bool = False  # whether a plan takes it for one of the engine's, since its shapes are as those are
    unplanned: str = ""  # words of why its memory cannot be predicted
    since: str = "5.17"  # the first transformers with which this holds
    until: str = ""  # the first with which the engine samples it and packed rows train it, in spite of the reasons

    @property
    def name(self) -> str:
        return f"{self.kind} ({self.shape})" if self.shape else self.kind

    def config(self) -> PreTrainedConfig:
        settings = {**SMALL, **self.settings}
        return AutoConfig.for_model(self.kind, **settings)

    def as_installed(self) -> "Row":
        """The row as it holds with the transformers that is installed."""
        served = self.until and Version(self.until) <= INSTALLED
        return replace(self, padded=PACKED, generates=ENGINE) if served else self


def rows(*kinds: str, **expected: Any) -> list[Row]:
    """Rows of model types that need no settings of their own."""
    return [Row(kind, **expected) for kind in kinds]


MIXES = "mixes tokens in a way of its own"
OWN = "attention cannot be replaced"
BIASED = "takes position_bias"
OFTEN = "attends more than once"
ALONE = "layers are not in one list"
SAVES_NOTHING = "does not support activation checkpointing"
FORGETS = "does not go on from its recurrent state"
FAMILIES: dict[str, list[Row]] = {
    "Qwen 2, 2.5, 3": [Row("qwen2"), Row("qwen3", HEADS)],
    "Qwen 2, 3 mixtures (A3B)": [Row("qwen2_moe", SHARED), Row("qwen3_moe", {**HEADS, **MOE})],
    "Qwen 3.5, 3.6, 3-Next, Lara Mini": [
        Row("qwen3_5_text", {**HEADS, **DELTA}),
        Row("qwen3_5_moe_text", {**HEADS, **DELTA, **SHARED}),
        Row("qwen3_next", {**HEADS, **DELTA, **SHARED}),
        Row("lara_mini", {**HEADS, **DELTA, **SHARED, "num_hidden_layers": 3, "sliding_window": 24,
                          "layer_types": ["linear_attention", "sliding_attention", "full_attention"]}, since="5.24"),
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
    "Mixtral, PhiMoE, MiniMax M2, AFMoE, A.X K1, Aria, Beam, Cohere 2, FlexOLMo, Flint, Granite SWA, Hunyuan 3, "
    "Kolibri, Laguna, Mellum, MiMo 2 Flash, Solar Open, dots 1, Sarvam, MiniMax 3, DBRX": [
        Row("mixtral", LOCAL),
        Row("phimoe", LOCAL | {"router_jitter_noise": 0.0}),
        Row("minimax_m2", {**HEADS, **LOCAL}),
        Row("afmoe", {**HEADS, **MOE, "sliding_window": 24, "num_dense_layers": 1}),
        Row("hy_v3", {**HEADS, **MOE, "mlp_layer_types": ["dense", "sparse"]}),
        Row("axk1", {**MLA, **ROUTED}),
        Row("aria_text", {**HEADS, "moe_num_experts": 4, "moe_topk": 2}),
        Row("beam", {**HEADS, **MOE, **WINDOW, "n_group": 1, "topk_group": 1, "mlp_layer_types": ["dense", "sparse"]}),
        Row("cohere2_moe", {**HEADS, **WINDOW, "num_experts": 4, "num_experts_per_tok": 2}),
        Row("flex_olmo", {"num_experts": 4, "num_experts_per_tok": 2}),
        Row("flint", {**HEADS, **SHARED, **WINDOW}),
        Row("granitemoe_swa", {**WINDOW, **LOCAL, "shared_intermediate_size": 64}),
        Row("kolibri1", {**HEADS, **SHARED, **WINDOW, "num_local_experts": 4}),
        Row("laguna", {**HEADS, **SHARED, **WINDOW, "num_attention_heads_per_layer": [4, 2],
                       "mlp_layer_types": ["dense", "sparse"]}),
        Row("mellum", {**HEADS, **MOE, **WINDOW, "mlp_layer_types": ["sparse", "sparse"]}),
        Row("solar_open", {**HEADS, **ROUTED}),
        Row("mimo_v2_flash", {**HEADS, **ROUTED, **WINDOW, "v_head_dim": 8, "mlp_layer_types": ["dense", "sparse"]}),
        Row("dots1", {**ROUTED, "sliding_window": 24}),
        Row("sarvam_moe", {**HEADS, **ROUTED}, since="5.24"),
        Row("minimax_m3_vl_text", M3, "without an indexer"),
        Row("dbrx", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256,
                     "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
                     "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64}},
            unplanned="nonzero"),
    ],
    "Gemma 1, 2, 3": [
        Row("gemma", HEADS), Row("gemma2", {**HEADS, "sliding_window": 24, "final_logit_softcapping": 30.0}),
        Row("gemma3_text", {**HEADS, **WINDOW}), Row("vaultgemma", {**HEADS, **WINDOW}),
    ],
    "Gemma 3n": [
        Row(
            "gemma3n_text", {**PER_LAYER, "laurel_rank": 8, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
            dense=("correction_coefs", "prediction_coefs"), bare=("correction_coefs",),
        )
    ],
    "Gemma 4": [
        Row("gemma4_text", GEMMA4, "12B"),
        Row("gemma4_text", {**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1}, "31B"),
        Row("gemma4_text", {**PER_LAYER, "global_head_dim": 32}, "E2B, E4B"),
        Row("gemma4_text", {**GEMMA4, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
                            "moe_intermediate_size": 32}, "26B-A4B"),
        Row("gemma4_unified_text", {**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1}),
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
        Row("mamba", {"state_size": 4, "num_hidden_layers": 1}, dense=("dt_proj",), bare=("dt_proj",), padded=FORGETS, generates=FORGETS),
        Row("falcon_mamba", {"state_size": 4, "num_hidden_layers": 1}, dense=("dt_proj",), bare=("dt_proj",), padded=FORGETS, generates=FORGETS),
        Row("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1,
                      "mamba_d_state": 4, "mamba_dt_rank": 4}, dense=("dt_proj",), bare=("dt_proj",), padded=FORGETS, generates=FORGETS),
    ],
    "OLMo 1, 2, 3": [
        *rows("olmo", "olmo2"), Row("olmo3", WINDOW),
        Row("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    ],
    "OLMo hybrid": [
        Row("olmo_hybrid", {"layer_types": DELTA["layer_types"]}),
    ],
    "DeepSeek 2, 3, GLM 4.7 Flash, MiniCPM 3, Youtu, Sarvam (MLA)": [
        Row("deepseek_v2", {**MLA, **ROUTED}),
        Row("deepseek_v3", {**MLA, **ROUTED}),
        Row("glm4_moe_lite", {**MLA, **ROUTED, "mlp_layer_types": ["dense", "sparse"]}),
        Row("minicpm3", MLA),
        Row("youtu", MLA),
        Row("sarvam_mla", {**MLA, **ROUTED}, since="5.24"),
    ],
    "GLM 4, 4.5": [Row("glm", HEADS), Row("glm4", HEADS), Row("glm4_moe", {**HEADS, **ROUTED})],
    "DeepSeek 3.2, 4, GLM 5, A.X K2, dots 3, Hunyuan 4, MiniMax 3, Qwen 4 Exp (attention by an indexer)": [
        Row("deepseek_v32", CHOOSES, padded=OWN, generates=OWN),
        Row("glm_moe_dsa", CHOOSES, padded=OWN, generates=OWN),
        Row("axk2", {**CHOOSES, "gated_norm_rank": 4}, padded=OWN, generates=OWN),
        Row("dots3_note_text", {**CHOOSES, **SMALLER, "head_dim": 24, "shared_experts_intermediate_size": 32,
                                "layer_types": ["indexed_attention", "sliding_attention"], "sliding_window": 24},
            padded=OWN, generates=OWN),
        Row("hy_v4", {**CHOOSES, "head_dim": 8, "indexer_types": ["full", "shared"], "hc_mult": 2},
            padded=OWN, generates=OWN),
        Row("deepseek_v4", {"head_dim": 32, "num_key_value_heads": 1, "q_lora_rank": 24, "o_groups": 2,
                            "o_lora_rank": 16, "hc_mult": 2, "sliding_window": 24, "n_routed_experts": 4,
                            "num_experts_per_tok": 2, "moe_intermediate_size": 32, **INDEX,
                            "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
                            "mlp_layer_types": ["hash_moe", "moe"],
                            "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
            padded="other keys than one of each token", generates="other keys than one of each token",
            bare=("gate_proj", "kv_proj", "q_b_proj", "weights_proj")),
        Row("minimax_m3_vl_text", {**M3, "layer_types": ["full_attention", "minimax_m3_sparse"]},
            padded="takes block_indices", generates="takes block_indices", bare=("k_proj", "q_proj")),
        Row("qwen4_exp_text", {**HEADS, **DELTA, **SHARED, "hc_count": 2, "hc_lowrank": 8, "indexer_n_heads": 2,
                               "layer_types": ["linear_attention", "indexed_attention"], "indexer_kv_heads": 1,
                               "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 4},
            padded="its own code fails there", generates="its own code fails there", bare=("index_qk_proj",),
            unplanned="nonzero"),
    ],
    "ZAYA": [
        Row("zaya", {**HEADS, "moe_intermediate_size": 32, "num_experts": 4, "router_hidden_size": 16}),
    ],
    "Inkling 1, 2": [
        Row("inkling2_text", {**INKLING, "layer_types": HYBRID, "n_layers_per_attn_res_block": 1},
            padded=BIASED, generates=BIASED),
        Row("inkling_text", {**INKLING, **ROUTED, "layer_types": HYBRID, "mlp_layer_types": ["dense", "sparse"]},
            padded=BIASED, generates=BIASED),
        Row("inkling2_loop_text", {**INKLING, "num_hidden_layers": 4, "layer_types": HYBRID * 2, "loop_gate_rank": 4,
                                   "n_layers_per_attn_res_block": 2, "loop_layer_index_start": 2,
                                   "loop_layer_index_end": 4, "loop_num_passes": 2},
            padded=BIASED, generates=BIASED, unplanned="cannot be predicted", since="5.24"),
    ],
    "HRM, Dory (layers in a loop)": [
        Row("hrm_text", {**HEADS, "num_hidden_layers": 12, "num_layers_per_stack": 2, "H_cycles": 1, "L_cycles": 2,
                         "num_key_value_heads": 4}, generates=OFTEN, unplanned=ALONE),
        Row("dory", {**HEADS, **WINDOW, "num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1,
                     "layer_types": [*WINDOW["layer_types"], "full_attention"], "n_output_layers": 1},
            generates=OFTEN, unplanned="cannot be predicted", since="5.24"),
    ],
    "SmolLM 3": [Row("smollm3", {"no_rope_layers": [1, 0]})],
    "EXAONE 3, 4": [Row("exaone4", WINDOW), Row("exaone_moe", {**WINDOW, **MOE}), Row("exaone", since="5.24")],
    "Cohere, Command": [
        Row("cohere", {"logit_scale": 0.0625}), Row("cohere2", WINDOW),
        Row("cohere_compass_text", {**WINDOW, "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in WINDOW["layer_types"]}}),
    ],
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
        Row("apertus1p5_text", since="5.24"),
    ],
    "Kimi Linear, Ling 3": [
        Row("kimi_linear", {**MLA, **MOE, **KDA, "q_lora_rank": None, "num_local_experts": 4}, since="5.21"),
        Row("bailing_hybrid", {**MLA, **ROUTED, **KDA}, since="5.21"),
    ],
    "MiniMax 1": [
        Row("minimax", {"layer_types": DELTA["layer_types"], "block_size": 16, **LOCAL}, padded=MIXES, generates=MIXES),
    ],
    "GPT-2, GPT-NeoX, OPT, BioGPT, CTRL": [
        Row("gpt2", GPT), Row("gpt_bigcode", GPT), Row("gpt_neox"),
        Row("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}), Row("biogpt"),
        Row("ctrl", {**GPT, "dff": 96}, unplanned=SAVES_NOTHING),
    ],
    "GPT-1, GPT-J, GPT-Neo, CodeGen, BLOOM, MPT, Falcon, Japanese GPT-NeoX, BLT": [
        Row("gptj", {**GPT, "rotary_dim": 8}, padded=OWN, generates=OWN, until="5.24"),
        Row("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
            padded=OWN, generates=OWN),
        Row("codegen", {**GPT, "rotary_dim": 8}, padded=OWN, generates=OWN, until="5.24"),
        Row("bloom", {"n_layer": 2, "n_head": 4}, padded=OWN, generates=OWN),
        Row("mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}, padded=OWN, generates=OWN),
        Row("falcon", {"num_kv_heads": 2, "new_decoder_architecture": True}, padded=OWN, generates=OWN),
        Row("openai-gpt", GPT, padded=OWN, generates=OWN, unplanned=SAVES_NOTHING),
        Row("gpt_neox_japanese", {"intermediate_multiple_size": 2}, padded=OWN, generates=OWN, unplanned=SAVES_NOTHING),
        Row("blt", {"vocab_size": 260, "patcher_config": BYTES, "encoder_hash_byte_group_vocab": 50,
                    "encoder_config": BYTES | {"hidden_size_global": 128}, "global_config": BYTES | {"hidden_size": 128},
                    "decoder_config": BYTES | {"hidden_size_global": 128}},
            padded="other keys than one of each token", generates="other keys than one of each token",
            bare=(*LLAMA, "lm_head"), unplanned=ALONE),
    ],
    "RWKV": [Row("rwkv", {"attention_hidden_size": 64, "context_length": 256}, dense=("output", "value"), padded=OWN, generates=OWN)],
    "RecurrentGemma, Doge": [
        Row("recurrent_gemma", {"block_types": ["recurrent", "attention"], "lru_width": 64}, padded="temporal_block is",
            generates="temporal_block is", unforeseen=True, dense=("input_gate_weight", "recurrent_gate_weight")),
        Row("doge", {"num_experts": 4, "num_experts_per_tok": 2}, padded="self_attn is", generates="self_attn is",
            unforeseen=True),
    ],
    "DiffLlama": [Row("diffllama", generates=OFTEN)],
    "JetMoE, LongCat Flash": [
        Row("jetmoe", {**LOCAL, "kv_channels": 16}, dense=("weight",), unplanned=SAVES_NOTHING),
        Row("longcat_flash", {**MLA, "num_layers": 2, "ffn_hidden_size": 96, "moe_topk": 2, "n_routed_experts": 4,
                              "zero_expert_num": 2, "expert_ffn_hidden_size": 32, "head_dim": 8},
            dense=("classifier", "gate_up_proj", "down_proj"), bare=("classifier",), unplanned="nonzero"),
    ],
}  # fmt: skip
ROWS: dict[str, Row] = {row.name: row.as_installed() for rows_ in FAMILIES.values() for row in rows_}

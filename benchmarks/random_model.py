"""A model of a real shape with random weights, and a byte-level BPE tokenizer trained on the spot.

    python -m lowmem_grpo.benchmarks.random_model --shape qwen2.5-0.5b --text train.jsonl --output_dir DIR

Memory and speed do not depend on what the weights are, so such a model measures them without a download.
"""

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.model.experts import Mxfp4Stack, lay_out, pack_experts
from lowmem_grpo.model.load import load_policy, quantize_linears
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.model.quantizer import MXFP4, quantized_by

# Layers, hidden, MLP, query heads, KV heads, vocabulary, tied head.
SHAPES = {
    "tiny": (4, 256, 768, 8, 2, 4096, True),
    "28-tiny-layers": (28, 64, 128, 4, 2, 512, True),
    "tiny-large-vocabulary": (4, 256, 768, 8, 2, 151936, True),
    "qwen2.5-0.5b": (24, 896, 4864, 14, 2, 151936, True),
    "qwen2.5-1.5b": (28, 1536, 8960, 12, 2, 151936, True),
    "qwen2.5-3b": (36, 2048, 11008, 16, 2, 151936, True),
    "qwen2.5-7b": (28, 3584, 18944, 28, 4, 152064, False),
    "llama-3.1-8b": (32, 4096, 14336, 32, 8, 128256, False),
    "qwen3-8b": (36, 4096, 12288, 32, 8, 151936, False),
    "qwen2.5-14b": (48, 5120, 13824, 40, 8, 152064, False),
    "qwen2.5-32b": (64, 5120, 27648, 40, 8, 152064, False),
}
# Other families, a hybrid and mixtures, by their configurations, whose files say where they are from.
CONFIGS = Path(__file__).with_name("configs")
FAMILIES = {path.stem.lower(): path for path in CONFIGS.glob("*.json")}
TINY = {  # of a family, what it has of these; as many numbers as a block in 4 bits has, or a multiple
    "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "sliding_window": 8, "vocab_size": 512,
}  # fmt: skip
NAMES = [*SHAPES, *FAMILIES, *(f"tiny-{family}" for family in FAMILIES)]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(text: Path | None, vocabulary: int = 8192) -> PreTrainedTokenizerFast:
    """A tokenizer trained on a text; without one each byte is a token, so that lengths can be chosen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train([str(text)] if text else [], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[2])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_config(
    shape: str, eos_token_id: int | list[int], pad_token_id: int, vocabulary: int | None = None
) -> PreTrainedConfig:
    settings: dict[str, Any] = settings_of(shape) | ({"vocab_size": vocabulary} if vocabulary else {})
    tokens: dict[str, Any] = {"bos_token_id": None, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    return AutoConfig.for_model(**settings | tokens)


def settings_of(shape: str) -> dict[str, Any]:
    """The settings of a shape's configuration, by transformers' names."""
    family = shape.removeprefix("tiny-")
    if family in FAMILIES:
        settings = json.loads(FAMILIES[family].read_text(encoding="utf-8"))
        del settings["source"]
        return settings if family == shape else {name: TINY.get(name, value) for name, value in settings.items()}
    layers, hidden, mlp, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    kind = shape.split("-")[0]
    return {
        "model_type": kind if kind in ("llama", "qwen3") else "qwen2", "num_hidden_layers": layers,
        "hidden_size": hidden, "intermediate_size": mlp, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "tie_word_embeddings": tied,
        "max_position_embeddings": 32768, "head_dim": hidden // heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }  # fmt: skip


def vocabulary_of(shape: str) -> int:
    return settings_of(shape)["vocab_size"]


def make_random_model(shape: str, text: Path | None, output_dir: Path, vocabulary: int | None = None) -> None:
    torch.manual_seed(0)
    tokenizer: Any = make_tokenizer(text)  # ids are declared as whatever a tokenizer's attribute may be
    config = make_config(shape, tokenizer.eos_token_id, tokenizer.pad_token_id, vocabulary)
    if torch.cuda.is_available():  # a 1.5B takes a minute of a CPU, and 2 s there
        model = made(config, torch.device("cuda", torch.cuda.current_device()), in_4bit=False)
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def random_policy(shape: str, device: str, ends: int = 1, **settings: Any) -> Policy:
    """A policy in 4-bit with adapters that are not zero; the first `ends` ids all end a completion."""
    torch.manual_seed(0)
    config = make_config(shape, list(range(ends)), vocabulary_of(shape) - 1)
    where = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    asked = GRPOConfig(use_cpu=device == "cpu", **settings)
    on_cpu = [name for name in ("offload_embedding", "load_head_in_8bit") if getattr(asked, name)]
    model = made(config, where, in_4bit=True, on_cpu=on_cpu)
    tokenizer = SimpleNamespace(eos_token_id=0, pad_token_id=config.pad_token_id)
    policy = load_policy(model, tokenizer, asked)
    with torch.no_grad():
        for parameter in policy.parameters_of(policy.adapter).values():
            parameter.normal_(std=0.02)
    return policy


def made(config: PreTrainedConfig, device: torch.device, in_4bit: bool, on_cpu: Sequence[str] = ()) -> Any:
    """A random model, made on the device layer by layer: a 7B in 4-bit takes seconds and one dense layer.

    on_cpu: "offload_embedding", "load_head_in_8bit": what these settings are about is made on the CPU.
    """
    as_saved, config = quantized_by(config).get("quant_method"), copy.deepcopy(config)
    vars(config).pop("quantization_config", None)  # what is loaded is no checkpoint any more
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    decoder = model.get_decoder()
    for layer in decoder.layers:
        if in_4bit and as_saved == MXFP4:
            lay_out(layer, mxfp4=True)
        _fill(layer.to_empty(device=device))
        if in_4bit:
            quantize_linears(layer, device, torch.bfloat16)
            pack_experts(layer, device, torch.bfloat16)
    rest = {"offload_embedding": decoder.embed_tokens, "norm": decoder.norm}
    for name, module in {**rest, "load_head_in_8bit": model.get_output_embeddings()}.items():
        _fill(module.to_empty(device="cpu" if name in on_cpu else device))
    model.tie_weights()
    with device:
        decoder.rotary_emb = type(decoder.rotary_emb)(config)
    return model


def _fill(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(name.endswith("weight"))  # of a norm 1, a bias 0
    for stack in module.modules():
        if isinstance(stack, Mxfp4Stack):
            fill_mxfp4(stack)


def fill_mxfp4(stack: Mxfp4Stack) -> None:
    """Write random numbers, of 0.02 in the root mean square, into matrices in MXFP4."""
    stack.blocks.random_(0, 256)
    stack.scales.fill_(120)  # 2^-7
    stack.fill_table()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--text", type=Path, help="file to train the tokenizer on; a token a byte if there is none")
    parser.add_argument("--output_dir", type=Path, required=True)
    make_random_model(**vars(parser.parse_args()))

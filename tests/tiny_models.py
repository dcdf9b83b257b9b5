"""Tiny models of every supported family, all with the demo's tokenizer of one token a character."""

from functools import partial
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
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
from lowmem_grpo.model.attention import soften
from lowmem_grpo.model.load import load_policy
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


def make_model(family: str = "qwen2", seed: int = 0):
    """A random model of a family, fp32, with weights wide enough that its log-probabilities are far from uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.15)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


def make_policy(model="qwen2", tokenizer=None, **settings) -> Policy:
    """A policy on the CPU in fp32, unless settings say otherwise, with adapters that are not zero."""
    settings = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, **settings}
    model = make_model(model) if model in FAMILIES else model
    policy = load_policy(model, tokenizer or AutoTokenizer.from_pretrained(DEMO_MODEL), GRPOConfig(**settings))
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
    for module in policy.model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            epsilon = module.eps if "Gemma" in kind else module.variance_epsilon
            module.forward = partial(_rms_norm, module, epsilon, 1.0 if "Gemma" in kind else 0.0)


def _rms_norm(module, epsilon: float, offset: float, x: torch.Tensor) -> torch.Tensor:
    return (offset + module.weight) * x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()


def head_by_definition(
    hidden_states, weight, labels, bias=None, temperature=1.0, logit_scale=1.0, softcap=None, return_entropy=False,
    entropy_grad=False, return_top=False,
):  # fmt: skip
    """linear_logprobs from full logits, in any dtype."""
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

"""Whether a written model says what the trained policy says: log-probabilities of a few texts by both.

The scale is what training changed: the same difference between the policy and its base without the adapter.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.generate.sample import Sampler
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.model.towers import auto_class
from lowmem_grpo.output.saved import read_lines

MOST_TOKENS = 512  # of a prompt and of a completion, each
# Asked where a run has left no completions.
QUESTIONS = (
    "What is 17 + 25?", "Write one sentence about the sea.", "A train goes 60 km in 45 minutes. How fast is it?",
    "List three colours.", "Why is the sky blue?", "Solve for x: 3x + 5 = 20.", "def is_even(n):", "Once upon a time",
)  # fmt: skip


class Text(NamedTuple):
    """Ids of a prompt and of a completion, of each at least one."""

    prompt: list[int]
    completion: list[int]


@dataclass(frozen=True)
class Difference:
    """How far the log-probabilities of tokens differ from the policy's."""

    mean: float  # of |d log p| over tokens
    largest: float
    kl: float  # mean of r - 1 - log r, r the ratio of probabilities: an estimate of KL(policy || other), in nats

    @classmethod
    def between(cls, policy: Tensor, other: Tensor) -> "Difference":
        """The difference of two models' log-probabilities (N,) of the same tokens."""
        d = other.double() - policy.double()
        k3 = (d.exp() - 1 - d).mean().item()
        return cls(d.abs().mean().item(), d.abs().max().item(), k3)


@dataclass(frozen=True)
class Share:
    """Part of the way from base to policy that a written model has gone: 1 where it is whole.

    Rounding in all three draws both towards 1/2 and never beyond: above that a model is nearer to the policy.
    """

    value: float  # slope of the least squares of (other - base) on (policy - base)
    error: float  # its standard error, by leaving out each token once; infinite where all hangs on one

    @classmethod
    def of(cls, policy: Tensor, other: Tensor, base: Tensor) -> "Share":
        """The share by three models' log-probabilities (N,) of the same tokens."""
        x, y = policy.double() - base.double(), other.double() - base.double()
        products, squares = x * y, x.square()
        each = (products.sum() - products) / (squares.sum() - squares)
        error = (each.var(correction=0) * (len(x) - 1)).sqrt().item()
        return cls((products.sum() / squares.sum()).item(), error if math.isfinite(error) else math.inf)


def texts_of(policy: Policy, run: Path, config: GRPOConfig, num_texts: int) -> list[Text]:
    """A few prompts with completions: what the run has left of its last evaluation, or what the policy says now."""
    found = (_likelier(policy, prompt, completion) for prompt, completion in _sampled(run)[:num_texts])
    return [text for text in found if text is not None] or _asked(policy, config, num_texts)


def _sampled(run: Path) -> list[tuple[str, str]]:
    """Prompts and completions of the last evaluation in a run's samples.jsonl."""
    lines = [
        line for line in read_lines(run / "samples.jsonl")[0]
        if isinstance(line.get("prompt"), str) and isinstance(line.get("completion"), str)
    ]  # fmt: skip
    last = max((line["step"] for line in lines), default=None)
    return [(line["prompt"], line["completion"]) for line in lines if line["step"] == last]


def _likelier(policy: Policy, prompt: str, completion: str) -> Text | None:
    """A text whose prompt is taken as it is or as a chat's, whichever makes the completion likelier.

    None where the prompt or the completion has no token.
    """
    tokenizer = policy.tokenizer
    prompts = [tokenizer(prompt)["input_ids"], *_as_chat(tokenizer, prompt)]
    ids = tokenizer(completion, add_special_tokens=False)["input_ids"][:MOST_TOKENS]
    texts = [Text(one[-MOST_TOKENS:], ids) for one in prompts if one and ids]
    if len(texts) < 2:
        return texts[0] if texts else None
    return max(texts, key=lambda text: by_policy(policy, [text]).mean().item())


def _as_chat(tokenizer: Any, prompt: str) -> list[list[int]]:
    if getattr(tokenizer, "chat_template", None) is None:
        return []
    chat = [{"role": "user", "content": prompt}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except Exception:  # of a template that wants more than a user's message
        return []
    return [tokenizer(text, add_special_tokens=False)["input_ids"]]


def _asked(policy: Policy, config: GRPOConfig, num_texts: int) -> list[Text]:
    """QUESTIONS with what the policy answers greedily."""
    tokenizer = policy.tokenizer
    ids = [[*_as_chat(tokenizer, one), tokenizer(one)["input_ids"]][0] for one in QUESTIONS[:num_texts]]
    prompts = [Prompt(text, its, {}) for text, its in zip(QUESTIONS, ids, strict=False)]
    completions = Sampler(policy, replace(config, max_completion_length=64)).complete_greedily(prompts).completions
    return [Text(one.ids, done.ids) for one, done in zip(prompts, completions, strict=True) if done.ids]


def by_policy(policy: Policy, texts: Sequence[Text], *, as_base: bool = False) -> Tensor:
    """The policy's log-probabilities (N,) fp32 of the tokens of all completions, or those without its adapter."""
    with policy.as_base() if as_base else policy.inference(), policy.autocast():
        return _logprobs(policy.model, texts, policy.device)


def by_model(folder: Path, texts: Sequence[Text], device: torch.device, trust_remote_code: bool) -> Tensor:
    """The log-probabilities (N,) fp32 of the tokens of all completions, by a model that transformers loads.

    On a GPU whose memory it does not fit, layers wait in CPU memory.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    placed: dict[str, Any] = {} if device.type == "cpu" else {"device_map": "auto"}
    model: Any = auto_class(config).from_pretrained(folder, dtype="auto", trust_remote_code=trust_remote_code, **placed)
    with torch.inference_mode():
        return _logprobs(model.eval(), texts, device)


def _logprobs(model: Any, texts: Sequence[Text], device: torch.device) -> Tensor:
    found = []
    for prompt, completion in texts:
        ids = torch.tensor([[*prompt, *completion]], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        chosen = ids[0, len(prompt) :, None].to(logits.device)
        found.append(logits.log_softmax(-1).gather(1, chosen)[:, 0].cpu())
    return torch.cat(found)

"""Completions of prompts, sampled as a configuration says: for a rollout, an evaluation, a demonstration."""

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.generate.completion import Completion
from lowmem_grpo.generate.sample import Sampled, sample
from lowmem_grpo.generate.sampling import SamplingParams
from lowmem_grpo.model.policy import Policy


def complete(policy: Policy, prompts: list[Prompt], count: int, config: GRPOConfig) -> Sampled:
    """count completions of each prompt, drawn with every sampling setting."""
    params = SamplingParams(
        max_completion_length=config.max_completion_length, temperature=config.temperature, top_p=config.top_p,
        top_k=config.top_k, min_p=config.min_p, repetition_penalty=config.repetition_penalty,
        stop_strings=tuple(config.stop_strings or ()),
    )  # fmt: skip
    return _sample(policy, prompts, count, params, config)


def complete_greedily(policy: Policy, prompts: list[Prompt], config: GRPOConfig) -> list[Completion]:
    """The likeliest token each time; draws no random number."""
    params = SamplingParams(
        max_completion_length=config.max_completion_length, temperature=0, stop_strings=tuple(config.stop_strings or ())
    )
    return _sample(policy, prompts, 1, params, config).completions


def _sample(policy: Policy, prompts: list[Prompt], count: int, params: SamplingParams, config: GRPOConfig) -> Sampled:
    return sample(
        policy, [prompt.ids for prompt in prompts], count, params,
        rollout_token_budget=config.rollout_token_budget, token_budget=config.token_budget,
        weights=config.rollout_weights, kv=config.rollout_kv, paged=config.rollout_paged,
        cuda_graphs=config.has_cuda_graphs,
    )  # fmt: skip


def as_text(policy: Policy, prompt: Prompt, completion: Completion) -> str | list[dict]:
    """A completion as reward functions get it: a string, or one chat message where the prompt is a chat."""
    text = policy.tokenizer.decode(completion.ids, skip_special_tokens=True)
    return text if isinstance(prompt.text, str) else [{"role": "assistant", "content": text}]

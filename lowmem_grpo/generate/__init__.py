"""Completions of prompts, by a Sampler: for a rollout, an evaluation, a demonstration."""

from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.generate.completion import Completion
from lowmem_grpo.model.policy import Policy


def as_text(policy: Policy, prompt: Prompt, completion: Completion) -> str | list[dict]:
    """A completion as reward functions get it: a string, or one chat message where the prompt is a chat."""
    text = policy.tokenizer.decode(completion.ids, skip_special_tokens=True)
    return text if isinstance(prompt.text, str) else [{"role": "assistant", "content": text}]

"""Completions of prompts, by a Sampler: for a rollout, an evaluation, a demonstration."""

from typing import Any

from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.generate.completion import Completion
from lowmem_grpo.model.policy import Policy


def as_text(policy: Policy, prompt: Prompt, completion: Completion) -> str | list[dict]:
    """A completion as reward functions get it: a string, or one chat message where the prompt is a chat.

    With tools there are several: what the policy said, and what the tools did.
    """
    if completion.conversation is not None:
        return completion.conversation.messages
    text = words_of(policy, prompt, completion)
    return text if isinstance(prompt.text, str) else [{"role": "assistant", "content": text}]


def words_of(policy: Policy, prompt: Prompt, completion: Completion) -> str:
    """The words of a completion, which may begin within the prompt, as by a `<think>` that opens each answer.

    Of what was sampled only the token that ended it and padding are left out, since think tags are special tokens of
    some tokenizers.
    """
    sampled = completion.ids[:-1] if completion.finish == "eos" else completion.ids
    ids = [token_id for token_id in sampled if token_id != policy.pad_token_id]
    return prompt.said + _continuation(policy.tokenizer, prompt.ids[-1:] if prompt.said else [], ids)


def _continuation(tokenizer: Any, before: list[int], ids: list[int]) -> str:
    """The text of ids that go on from others: alone, some tokenizers would lose the first one's leading space."""

    def decode(token_ids: list[int]) -> str:
        return tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    whole, start = decode([*before, *ids]), decode(before) if before else ""
    return whole.removeprefix(start) if whole.startswith(start) else decode(ids)

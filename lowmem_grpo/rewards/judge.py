"""The policy's own base, without its adapters, as the judge of completions: no second model."""

from typing import Any

import torch

from lowmem_grpo.data.prompts import text_ids
from lowmem_grpo.errors import InputError
from lowmem_grpo.model.packing import pack
from lowmem_grpo.rewards.rows import of_each
from lowmem_grpo.rewards.text import completion_text

QUESTION = """\
Here is a question and an answer to it.

Question:
{prompt}

Answer:
{completion}

{criterion} Say only yes or no."""


def get_judge_reward(
    criterion: str = "Is the answer correct?", yes: str = "yes", no: str = "no", token_budget: int = 16384
) -> "JudgeReward":
    """How likely the base model is to call a completion good, from 0 to 1: P(yes) / (P(yes) + P(no)) as its next word.

    The question goes through the chat template where there is one. yes and no are each judged by their first token.
    A small model is a weak judge, and a policy learns what it is weak at: use it for style, not for truth.
    """
    return JudgeReward(criterion, yes, no, token_budget)


class JudgeReward:
    """A reward function that train() gives the policy, by bind()."""

    def __init__(self, criterion: str, yes: str, no: str, token_budget: int):
        self.__name__ = "judge_reward"
        self.criterion, self.yes, self.no, self.token_budget = criterion, yes, no, token_budget
        self.policy: Any = None

    def bind(self, policy: Any) -> None:
        """Make the policy's base the judge.

        Raises:
            InputError: yes and no begin with the same token.
        """
        self.policy = policy
        if len({words[0] for words in self._verdicts()}) < 2:
            raise InputError(f"{self.yes!r} and {self.no!r} begin with the same token; choose other words")

    def __call__(self, prompts: list, completions: list, **kwargs) -> list[float | Exception | None]:
        if self.policy is None:  # tried out before there is a model
            return [None] * len(completions)
        rewards = of_each(self._question, prompts, completions)
        asked = {index: ids for index, ids in enumerate(rewards) if not isinstance(ids, Exception)}
        if not asked:
            return rewards
        verdicts = [verdict[:1] for verdict in self._verdicts()]
        logprobs = torch.zeros(2 * len(asked), device=self.policy.device)
        batches = pack(
            [*asked.values()], verdicts * len(asked), token_budget=self.token_budget,
            pad_token_id=self.policy.pad_token_id, device=self.policy.device, num_generations=2,
            padding_free=self.policy.packs,
        )  # fmt: skip
        with self.policy.as_base():
            for batch in batches:
                logprobs[batch.token_index] = self.policy.logprobs(batch, 1.0)
        for index, value in zip(asked, logprobs.view(-1, 2).softmax(dim=1)[:, 0].tolist(), strict=True):
            rewards[index] = value
        return rewards

    def _question(self, prompt: str | list[dict], completion: str | list[dict]) -> list[int]:
        asked = prompt if isinstance(prompt, str) else "\n\n".join(m.get("content") or "" for m in prompt)
        text = QUESTION.format(prompt=asked, completion=completion_text(completion), criterion=self.criterion)
        tokenizer = self.policy.tokenizer
        if tokenizer.chat_template is None:
            return text_ids(tokenizer, f"{text}\n")
        messages = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer(rendered, add_special_tokens=False)["input_ids"]

    def _verdicts(self) -> list[list[int]]:
        return [self.policy.tokenizer(word, add_special_tokens=False)["input_ids"] for word in (self.yes, self.no)]

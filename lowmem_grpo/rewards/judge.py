"""A language model as the judge of completions: the policy's own base without its adapters, or one over HTTP."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lowmem_grpo.data.text import completion_text, part_of, refuse_part, text_ids
from lowmem_grpo.errors import InputError, printable, shown
from lowmem_grpo.model.packing import pack
from lowmem_grpo.rewards.endpoint import Endpoint, EndpointError, Messages, Reply, refuse_fields
from lowmem_grpo.rewards.rows import in_place, of_each, sound

QUESTION = """\
Here is a question and an answer to it.

Question:
{prompt}

Answer:
{completion}

{criterion} {form}"""
YES_OR_NO = "Say only yes or no."
MOST_CHARACTERS = 100  # of a judge's words, within a sentence of ours


def get_judge_reward(
    criterion: str = "Is the answer correct?",
    yes: str = "yes",
    no: str = "no",
    token_budget: int = 16384,
    *,
    base_url: str | None = None,
    model: str | None = None,
    score: str | None = None,
    max_concurrent: int = 16,
    timeout: float = 120.0,
    max_retries: int = 5,
    api_key_variable: str | None = None,
    extra_body: dict[str, Any] | None = None,
    part: str = "all",
) -> "JudgeReward | EndpointJudge":
    """A judge's opinion of each completion, from 0 to 1: by the policy's own base, or by a model behind base_url.

    The base's opinion is P(yes) / (P(yes) + P(no)) as its next word; yes and no are each judged by their first token.
    The question goes through the chat template where there is one. A small model is a weak judge, and a policy learns
    what it is weak at: use it for style, not for truth.

    Args:
        base_url: the address of an OpenAI-compatible endpoint, such as http://localhost:8000/v1.
        model: the judge's name there.
        score: "1-10", where 1 gives a reward of 0 and 10 one of 1, or "yes/no"; by default the first.
        max_concurrent: most requests at once.
        timeout: seconds for one reply.
        max_retries: times that a request is sent again after a busy server, an error of its own, or no connection.
        api_key_variable: the name of the environment variable that holds the key, which is never saved.
        extra_body: further fields of each request, {"max_tokens": 4096}; None as a value leaves a field out.
        part: "answer" shows the judge what follows the last `</think>` of a completion, "all" its thoughts, too.

    Raises:
        InputError: a setting that the chosen judge does not read, or that cannot be.
    """
    refuse_part(part)
    of_endpoint = {
        "model": model, "score": score, "max_concurrent": max_concurrent, "timeout": timeout,
        "max_retries": max_retries, "api_key_variable": api_key_variable, "extra_body": extra_body,
    }  # fmt: skip
    of_base = {"yes": yes, "no": no, "token_budget": token_budget}
    known = inspect.signature(get_judge_reward).parameters
    for name, value in (of_endpoint if base_url is None else of_base).items():
        if value != known[name].default:
            whose = "behind an endpoint; give its base_url" if base_url is None else "that is the policy's own base"
            raise InputError(f"{name}={shown(value)} is of a judge {whose}, or leave {name} out")
    if base_url is None:
        return JudgeReward(criterion, yes, no, token_budget, part)
    refuse_fields({} if extra_body is None else extra_body)
    fields = {"temperature": 0, "max_tokens": 1024, **(extra_body or {})}
    endpoint = Endpoint(base_url, model or "", max_concurrent, timeout, max_retries, api_key_variable, fields)
    return EndpointJudge(criterion, "1-10" if score is None else score, endpoint, part)


class JudgeReward:
    """A reward function that train() gives the policy, by bind()."""

    def __init__(self, criterion: str, yes: str, no: str, token_budget: int, part: str):
        self.__name__ = "judge_reward"
        self.criterion, self.yes, self.no, self.token_budget, self.part = criterion, yes, no, token_budget, part
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
        questions = of_each(self._question, prompts, completions)
        asked = sound(questions)
        if not asked:
            return questions
        verdicts = [verdict[:1] for verdict in self._verdicts()]
        logprobs = torch.zeros(2 * len(asked), device=self.policy.device)
        batches = pack(
            asked, verdicts * len(asked), token_budget=self.token_budget,
            pad_token_id=self.policy.pad_token_id, device=self.policy.device, num_generations=2,
            padding_free=self.policy.packs,
        )  # fmt: skip
        with self.policy.as_base():
            for batch in batches:
                logprobs[batch.token_index] = self.policy.logprobs(batch, 1.0)
        return in_place(logprobs.view(-1, 2).softmax(dim=1)[:, 0].tolist(), questions)

    def _question(self, prompt: str | list[dict], completion: str | list[dict]) -> list[int]:
        text = _question(prompt, part_of(completion, self.part), self.criterion, YES_OR_NO)
        tokenizer = self.policy.tokenizer
        if tokenizer.chat_template is None:
            return text_ids(tokenizer, f"{text}\n")
        messages = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer(rendered, add_special_tokens=False)["input_ids"]

    def _verdicts(self) -> list[list[int]]:
        return [self.policy.tokenizer(word, add_special_tokens=False)["input_ids"] for word in (self.yes, self.no)]


def _question(prompt: str | list[dict], completion: str | list[dict], criterion: str, form: str) -> str:
    """The question to a judge about a completion, with the form of its verdict."""
    asked = prompt if isinstance(prompt, str) else "\n\n".join(m.get("content") or "" for m in prompt)
    return QUESTION.format(prompt=asked, completion=completion_text(completion), criterion=criterion, form=form)


class EndpointJudge:
    """An async reward function that asks a model behind an OpenAI-compatible endpoint."""

    def __init__(self, criterion: str, score: str, endpoint: Endpoint, part: str):
        if not isinstance(score, str) or score not in SCORES:
            raise InputError(f"score={shown(score)} is not known; choose {' or '.join(SCORES)}")
        self.__name__ = "judge_reward"
        # What a resumed run has to repeat; the address may be another.
        self.criterion, self.score, self.model, self.part = criterion, score, endpoint.model, part
        self.endpoint = endpoint

    async def __call__(self, prompts: list, completions: list, **kwargs) -> list[float | BaseException]:
        asked = of_each(self._messages, prompts, completions)
        replies = await self.endpoint.replies(sound(asked))
        return in_place((one if isinstance(one, BaseException) else self._verdict(one) for one in replies), asked)

    def _messages(self, prompt: str | list[dict], completion: str | list[dict]) -> Messages:
        form = SCORES[self.score].form
        return [{"role": "user", "content": _question(prompt, part_of(completion, self.part), self.criterion, form)}]

    def _verdict(self, reply: Reply) -> float | EndpointError:
        said = reply.text.rpartition("</think>")[2].strip()
        verdicts = SCORES[self.score].verdicts(said)
        if len(verdicts) == 1:
            return verdicts.pop()
        why = "was cut off before a verdict" if reply.finish == "length" else f"gave no single {self.score}"
        return EndpointError(f"the judge {self.model} {why}: {printable(said[-MOST_CHARACTERS:])}")


@dataclass(frozen=True)
class _Score:
    """A form of verdict: how it is asked for, and the different ones, from 0 to 1, that a text has."""

    form: str
    verdicts: Callable[[str], set[float]]


def _marks(said: str) -> set[float]:
    """The marks of 1 to 10 that a text gives, from 0 to 1: of "8", "Score: 8/10" and "**8** out of 10" the one 8.

    A range such as "8-9" gives none.
    """
    bare = re.sub(r"(/|\bof) *\**10\b", " ", said)
    numbers = {float(number) for number in re.findall(r"(?<![\w.,-])\d+(?:\.\d+)?(?!\w|[.,-]\d)", bare)}
    return {(number - 1) / 9 for number in numbers} if all(1 <= number <= 10 for number in numbers) else set()


def _words(said: str) -> set[float]:
    """1 for a yes and 0 for a no, of those that a text has."""
    return {float(word.lower() == "yes") for word in re.findall(r"\b(?:yes|no)\b", said, flags=re.IGNORECASE)}


SCORES = {
    "1-10": _Score("Say only a whole number from 1 for the worst to 10 for the best.", _marks),
    "yes/no": _Score(YES_OR_NO, _words),
}

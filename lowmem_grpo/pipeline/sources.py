"""The sources of sample()'s completions: a model here, or one behind an endpoint.

Each is a Source: made of (inputs, file, config), it gives the groups that the file has not, batch after batch.
"""

import hashlib
import logging
import math
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

import torch

from lowmem_grpo.config.sample import SampleConfig
from lowmem_grpo.data.prompts import Prompt
from lowmem_grpo.errors import UnansweredError, shown
from lowmem_grpo.generate import as_text
from lowmem_grpo.generate.completion import Completion
from lowmem_grpo.generate.sample import Sampler
from lowmem_grpo.inputs.identity import adapter_weights_of, weights_of
from lowmem_grpo.inputs.prompts import Inputs
from lowmem_grpo.lookup import is_adapter
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.output.saved import as_json
from lowmem_grpo.pipeline.sampled import SampledFile
from lowmem_grpo.rewards.endpoint import Endpoint, EndpointError, Reply

LARGEST_SEED = 2**53  # which every reader of JSON keeps
MOST_WAITING = 512  # prompts that are handed to the endpoint's threads at once
MOST_FAILED = 8  # prompts in a row without a whole group, after which a server is given up
log = logging.getLogger(__name__)


class Drawn(NamedTuple):
    """A completion, with what its source knows of it."""

    text: str | list[dict]  # as reward functions get it
    ids: list[int]  # that were sampled; none where the source gives texts alone
    finish: str  # "eos", "stop" or "length"
    num_tokens: int | None
    logprob_mean: float | None


class Group(NamedTuple):
    prompt_index: int
    seed: int | None
    completions: list[Drawn]


class Batch(NamedTuple):
    step: int  # of num_steps()
    groups: list[Group]


class Source(Protocol):
    name: str  # of the model
    device: torch.device
    identity: dict[str, Any]  # what a file has to share that is gone on with

    def state(self) -> dict[str, Any]:
        """The settings that a run which goes on has to draw by, as JSON."""
        ...

    def batches(self) -> Generator[Batch]:
        """The groups that the file has not; a batch may begin with some that it has."""
        ...


def num_steps(inputs: Inputs, config: SampleConfig) -> int:
    """How many batches a whole file takes; of an endpoint's, each has one group."""
    at_once = config.prompts_per_step if config.base_url is None else 1
    return math.ceil(len(inputs.prompts) / at_once)


class FromModel:
    """A Source: the policy, sampled from its resident weights, prompts_per_step prompts at a time, in their order."""

    def __init__(self, inputs: Inputs, file: SampledFile, config: SampleConfig):
        policy = inputs.load_policy()
        self.inputs, self.file, self.config, self.policy, self.device = inputs, file, config, policy, policy.device
        self.name = inputs.model if isinstance(inputs.model, str) else str(policy.base.name_or_path)
        self.identity = {**inputs.identity, "weights": weights_of(policy), "ends": {"ids": policy.eos_token_ids}}
        if is_adapter(inputs.model) or not isinstance(inputs.model, str):
            self.identity["adapter weights"] = {"adapter": adapter_weights_of(policy)}
        file.refuse_another(self.identity)
        self.sampler = Sampler(policy, inputs.config)
        if file.sampler is not None:
            self.sampler.load(file.sampler)

    def state(self) -> dict[str, Any]:
        return self.sampler.state()

    def batches(self) -> Generator[Batch]:
        prompts, size, count = self.inputs.prompts, self.config.prompts_per_step, self.config.num_generations
        # Batches are those of an undisturbed run: how many rows share a matrix product decides how it is rounded.
        for start in range(self.file.num_groups // size * size, len(prompts), size):
            indices = range(start, min(start + size, len(prompts)))
            seeds = [seed_of(self.config.seed, index) for index in indices]
            asked = [prompts[index] for index in indices]
            drawn = iter(self.sampler.complete(asked, count, seeds=seeds).completions)
            groups = [
                Group(index, seed, [_of_model(self.policy, prompts[index], next(drawn)) for _ in range(count)])
                for index, seed in zip(indices, seeds, strict=True)
            ]
            yield Batch(start // size + 1, groups)


def seed_of(seed: int, prompt_index: int) -> int:
    """The seed of a prompt's group, by the run's seed and the prompt's index alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{prompt_index}".encode()).digest()[:8]) % LARGEST_SEED


def _of_model(policy: Policy, prompt: Prompt, one: Completion) -> Drawn:
    logprob_mean = None if one.logprobs is None else one.logprobs.mean().item()
    return Drawn(as_text(policy, prompt, one), one.ids, one.finish, len(one.ids), logprob_mean)


class FromEndpoint:
    """A Source: a server's model, asked for max_concurrent completions at once; groups come as they are whole.

    A prompt of which a completion has failed is left out, and told at the end.
    """

    def __init__(self, inputs: Inputs, file: SampledFile, config: SampleConfig):
        self.inputs, self.file, self.config = inputs, file, config
        self.name, self.identity, self.device = inputs.model, inputs.identity, inputs.device
        self.endpoint = endpoint_of(inputs, config)

    def state(self) -> dict[str, Any]:
        return {}

    def batches(self) -> Generator[Batch]:
        """Groups one by one.

        Raises:
            UnansweredError: after all others, prompts have no whole group; or MOST_FAILED in a row have none.
        """
        done = set(self.file.done)
        left = [index for index in range(len(self.inputs.prompts)) if index not in done]
        num_done, num_failed, in_a_row, why = len(done), 0, 0, ""
        for start in range(0, len(left), MOST_WAITING):
            for index, completions in self._groups(left[start : start + MOST_WAITING]):
                if isinstance(completions, EndpointError):
                    num_failed, in_a_row, why = num_failed + 1, in_a_row + 1, str(completions)
                    if num_failed.bit_count() == 1:  # the first, the second, the fourth ...
                        log.warning(f"prompt {index} has no whole group: {why} ({num_failed} so far)")
                    if in_a_row == MOST_FAILED:
                        raise self._unanswered(f"{in_a_row} prompts in a row failed, so that no more are asked", why)
                else:
                    num_done, in_a_row = num_done + 1, 0
                    yield Batch(num_done, [Group(index, None, completions)])
        if num_failed:
            raise self._unanswered(f"{num_failed} of {len(left)} prompts failed", why)

    def _groups(self, indices: list[int]) -> Iterator[tuple[int, list[Drawn] | EndpointError]]:
        """A prompt's completions, or why there are not all of them, as soon as either is known."""
        count, stop = self.config.num_generations, threading.Event()
        conversations: Any = [as_json(self.inputs.prompts[index].text) for index in indices for _ in range(count)]
        futures = self.endpoint.start(conversations, stop)
        groups = [futures[start : start + count] for start in range(0, len(futures), count)]
        places = {future: place for place, group in enumerate(groups) for future in group}
        num_left = [count] * len(groups)
        ended: SimpleQueue[Future[Reply]] = SimpleQueue()  # in the order of time, which as_completed() does not keep
        for future in futures:
            future.add_done_callback(ended.put)
        try:
            for _ in futures:
                place = places[ended.get()]
                num_left[place] -= 1
                if num_left[place] == 0:
                    yield indices[place], self._drawn(groups[place])
        finally:
            stop.set()

    def _drawn(self, group: list[Future[Reply]]) -> list[Drawn] | EndpointError:
        try:
            return [self._of_reply(future.result()) for future in group]
        except EndpointError as error:
            return error

    def _of_reply(self, reply: Reply) -> Drawn:
        """A reply as a completion. Raise EndpointError where it ended as no completion does."""
        if reply.finish not in ("stop", "length"):
            raise EndpointError(f"{self.name} ended with finish_reason {shown(reply.finish)}")
        # Servers do not say which stop, and leave the string out.
        finish = reply.finish if reply.finish == "length" or self.inputs.config.stop_strings else "eos"
        # JSON may have half of a pair of surrogates, which no file in UTF-8 takes.
        text = reply.whole.encode(errors="replace").decode()
        return Drawn([{"role": "assistant", "content": text}], [], finish, reply.num_tokens, None)

    def _unanswered(self, words: str, why: str) -> UnansweredError:
        return UnansweredError(
            f"{words}, the last since {why}; {self.file.path} has whole groups of {self.file.num_groups} of "
            f"{len(self.inputs.prompts)} prompts; run the same again, which asks for the others alone"
        )


def endpoint_of(inputs: Inputs, config: SampleConfig) -> Endpoint:
    """The endpoint that a configuration names. Raise InputError for an address or a key that cannot be."""
    fields = {
        "max_tokens": config.max_completion_length, "temperature": config.temperature, "top_p": config.top_p,
        "stop": inputs.config.stop_strings, **(config.extra_body or {}),
    }  # fmt: skip
    return Endpoint(
        config.base_url or "", inputs.model, config.max_concurrent, config.timeout, config.max_retries,
        config.api_key_variable, fields,
    )  # fmt: skip

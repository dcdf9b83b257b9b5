"""Completions in which the policy calls tools: it is sampled turn by turn, with the tools' results between.

What was sampled is never tokenized again: a later turn goes on from the very ids of all before it, and from their keys
and values. The tokens of results are in the completion, too, but the policy did not draw them, and no loss counts them.
"""

import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.data.chats import Template
from lowmem_grpo.data.prompts import Prompt, template_settings
from lowmem_grpo.data.text import in_json
from lowmem_grpo.errors import cause
from lowmem_grpo.generate import words_of
from lowmem_grpo.generate.completion import Completion, Conversation
from lowmem_grpo.generate.sample import Sampled, Sampler
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.tools.call_forms import Call
from lowmem_grpo.tools.environments import Begun
from lowmem_grpo.tools.form import ToolForm
from lowmem_grpo.tools.toolbox import Result, Toolbox
from lowmem_grpo.warn import warn

LONGEST_TOKEN = 256  # characters: what has more for each token that has room is not tokenized to see that


def sampler_of(policy: Policy, config: GRPOConfig, toolbox: Toolbox | None) -> Sampler:
    """A run's sampler, which gives the policy tools where there are any."""
    return Sampler(policy, config) if toolbox is None else ToolSampler(policy, config, toolbox)


class ToolSampler(Sampler):
    """Draws completions in which the policy calls tools, at most max_tool_calling_iterations turns with calls each.

    A completion is cut off where a result, or what the policy says after it, is beyond max_completion_length: results
    count as what was sampled does. One that does not fit is left out.
    """

    def __init__(self, policy: Policy, config: GRPOConfig, toolbox: Toolbox):
        super().__init__(policy, config)
        self.toolbox = toolbox
        self.template = Template(policy.tokenizer)
        self.forms: dict[str, ToolForm] = {}  # by the settings of the chat template and the tools, both a row's own

    def form(self, prompt: Prompt) -> ToolForm:
        """How calls and results are written in a conversation that begins with a prompt."""
        tools = self.toolbox.schemas if prompt.scene is None else prompt.scene.tools
        settings = {**template_settings(prompt.columns, self.template, self.config, "a row"), "tools": tools}
        key = json.dumps(settings, sort_keys=True, default=str)
        if key not in self.forms:
            self.forms[key] = ToolForm(self.policy.tokenizer, settings)
        return self.forms[key]

    def complete(
        self, prompts: list[Prompt], num_generations: int, share: range | None = None, *, at_most: int | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Sampled:  # fmt: skip
        """Draw num_generations completions of each prompt as Sampler does, with the results of tools in them."""
        own = prompts if share is None else prompts[share.start : share.stop]
        talks = self._talks([prompt for prompt in own for _ in range(num_generations)])
        ids = [prompt.ids for prompt in prompts]
        return talks.told(self._sample(ids, num_generations, self.params, share, at_most, seeds, talks))

    def complete_greedily(self, prompts: list[Prompt], *, at_most: int | None = None) -> Sampled:
        """Take the likeliest token each time, for one completion a prompt, with the results of tools in it."""
        talks, ids = self._talks(prompts), [prompt.ids for prompt in prompts]
        return talks.told(self._sample(ids, 1, self.greedy, at_most=at_most, turns=talks))

    def _talks(self, prompts: list[Prompt]) -> "_Talks":
        """Conversations that begin with these prompts, each with an environment of its own where there are any."""
        environments, started = self.toolbox.environments, time.perf_counter()
        begun = [Begun()] * len(prompts)
        if environments is not None:
            begun = environments.begin([prompt.scene for prompt in prompts if prompt.scene is not None])
        reset_s, longest = time.perf_counter() - started, self.config.max_completion_length
        talks = [
            _Talk(prompt, self.form(prompt), self.policy, longest, own)
            for prompt, own in zip(prompts, begun, strict=True)
        ]
        return _Talks(talks, self.toolbox, self.config.max_tool_calling_iterations, reset_s)


class _Talks:
    """The completions of a call, as generate/turns.py has them: tools answer where one calls some."""

    def __init__(self, talks: "list[_Talk]", toolbox: Toolbox, most_turns: int | None, tools_s: float):
        """Begin them, of each of which at most most_turns are answered; tools have taken tools_s so far."""
        self.talks, self.toolbox, self.most_turns, self.tools_s = talks, toolbox, most_turns, tools_s
        self.calling: list[int] = []  # that wait for results

    def end(self, number: int, completion: Completion) -> bool:
        """Take a turn's end; returns whether it calls tools that will answer."""
        talk = self.talks[number]
        talk.say(completion)
        answered = bool(talk.calls) and (self.most_turns is None or talk.num_answered < self.most_turns)
        if answered:
            self.calling.append(number)
        return answered

    def answers(self) -> dict[int, list[int]]:
        """Call the tools that were asked for: the tokens of their results, of each completion that has room for them.

        In the order of the completions, whichever ended first.
        """
        started = time.perf_counter()
        calling, self.calling = sorted(self.calling), []
        talks = [self.talks[number] for number in calling]
        asked = [(call, talk.begun.methods) for talk in talks for call in talk.calls]
        results = iter(self.toolbox([call for call, _ in asked], [methods for _, methods in asked]))
        answers = [talk.hear([next(results) for _ in talk.calls]) for talk in talks]
        self.tools_s += time.perf_counter() - started
        return {number: ids for number, ids in zip(calling, answers, strict=True) if ids is not None}

    def told(self, sampled: Sampled) -> Sampled:
        """Give what was sampled its conversations."""
        told = [talk.as_completion(done) for talk, done in zip(self.talks, sampled.completions, strict=True)]
        metrics = {**sampled.metrics, "time/tools_s": self.tools_s} if told else {}
        own = None if self.toolbox.environments is None else [talk.begun.environment for talk in self.talks]
        return Sampled(told, metrics, own)


class _Talk:
    """A completion as it grows, turn by turn."""

    def __init__(self, prompt: Prompt, form: ToolForm, policy: Policy, longest: int, begun: Begun):
        self.prompt, self.form, self.policy, self.said = prompt, form, policy, prompt.said
        self.longest, self.begun = longest, begun
        self.ids: list[int] = []
        self.drawn: list[bool] = []  # of each
        self.messages: list[dict] = []
        self.calls: list[Call] = []  # of the last turn, which nobody has answered
        self.num_answered = 0  # turns
        self.num_calls, self.num_failures = 0, 0
        self.finish = ""

    def say(self, completion: Completion) -> None:
        """Add a turn of the policy's. A call in one that was cut off is none, nor one beside a lost environment."""
        turn = Completion(completion.ids[len(self.ids) :], None, None, completion.finish)
        before = Prompt([], [*self.prompt.ids, *self.ids], {}, self.said)
        words = words_of(self.policy, before, turn)
        found = self.form.calls(words)
        self.calls = [] if turn.finish == "length" or self.begun.fault else found.calls
        message: dict[str, Any] = {"role": "assistant", "content": words}
        if self.calls:
            calls = [call.as_message() for call in self.calls]
            message |= {"content": found.words, "tool_calls": calls}
        self.messages.append(message)
        self.finish = turn.finish
        self._add(turn.ids, drawn=True)

    def hear(self, results: list[Result]) -> list[int] | None:
        """Add the results of the calls; returns their tokens.

        Where no token more would have room behind them, that is None, and the completion is cut off.
        """
        calls, self.calls = self.calls, []
        contents = [result.content for result in results]
        ended_by = self.policy.tokenizer.decode(self.ids[-1:]) if self.finish == "eos" else ""
        self.num_answered += 1
        self.num_calls += len(results)
        self.num_failures += sum(result.failed for result in results)
        room, ids, said = self.longest - len(self.ids), None, ""
        try:
            if sum(len(in_json(content)) for content in contents) < LONGEST_TOKEN * room:
                ids, said = self.form.result_ids(calls, contents, ended_by)
        except Exception as error:  # of a template, which was tried with other names and results
            warn(f"the chat template cannot show results of tools, so that completions end there: {cause(error)}")
            return None
        if ids is None or len(ids) >= room:
            self.finish = "length"
            return None
        for call, content in zip(calls, contents, strict=True):
            self.messages.append({"role": "tool", "name": call.name, "content": content})
        self.said = said
        self._add(ids, drawn=False)
        return ids

    def _add(self, ids: list[int], drawn: bool) -> None:
        self.ids += ids
        self.drawn += [drawn] * len(ids)

    def as_completion(self, sampled: Completion) -> Completion:
        """Give what was sampled its conversation; log-probabilities are 0 where nothing was drawn."""
        drawn = torch.tensor(self.drawn)

        def of_drawn(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.where(drawn, 0.0)

        conversation = Conversation(self.messages, drawn, self.num_calls, self.num_failures)
        known = of_drawn(sampled.logprobs), of_drawn(sampled.proposal_logprobs)
        return Completion(sampled.ids, *known, self.finish, conversation)

"""Completions in which the policy calls tools: it is sampled turn by turn, with the tools' results between.

What was sampled is never tokenized again: a later turn goes on from the very ids of all before it. The tokens of
results are in the completion, too, but the policy did not draw them, and no loss counts them.
"""

import json
import time
from collections.abc import Sequence
from itertools import count
from random import Random
from typing import Any

import torch
from torch import Tensor

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.data.chats import Template
from lowmem_grpo.data.prompts import Prompt, template_settings
from lowmem_grpo.errors import cause
from lowmem_grpo.generate import words_of
from lowmem_grpo.generate.completion import Completion, Conversation
from lowmem_grpo.generate.sample import Sampled, Sampler
from lowmem_grpo.generate.sampling import SamplingParams
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.tools.call_forms import Call
from lowmem_grpo.tools.form import ToolForm
from lowmem_grpo.tools.toolbox import Toolbox
from lowmem_grpo.warn import warn

ADDED_UP = {"time/rollout_capture_s", "rollout/preempted", "rollout/out_of_memory"}  # of the turns of a rollout


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
        self.forms: dict[str, ToolForm] = {}  # by the settings of the chat template, which a row may have of its own

    def form(self, prompt: Prompt) -> ToolForm:
        """How calls and results are written in a conversation that begins with a prompt."""
        settings = template_settings(prompt.columns, self.template, self.config, "a row")
        key = json.dumps(settings, sort_keys=True, default=str)
        if key not in self.forms:
            self.forms[key] = ToolForm(self.policy.tokenizer, {**settings, "tools": self.toolbox.schemas})
        return self.forms[key]

    def complete(
        self, prompts: list[Prompt], num_generations: int, share: range | None = None, *, at_most: int | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Sampled:  # fmt: skip
        """Draw num_generations completions of each prompt, with the results of tools in them.

        As Sampler's, but that one more number of torch's generator is taken, where there are no seeds: for later turns.
        """
        share = range(len(prompts)) if share is None else share
        given = [int(torch.randint(2**62, ()))] * len(prompts) if seeds is None else seeds
        sampled = super().complete(prompts, num_generations, share, at_most=at_most, seeds=seeds)
        places = [(place, number) for place in share for number in range(num_generations)]
        asked = [prompts[place] for place, _ in places]
        # By the prompt's place among all, so that a share of them is what it is among others; or by its own seed alone.
        marks = [f"{given[place]}/{place if seeds is None else ''}/{number}" for place, number in places]
        return self._continued(asked, sampled, self.params, at_most, marks)

    def complete_greedily(self, prompts: list[Prompt], *, at_most: int | None = None) -> list[Completion]:
        """Take the likeliest token each time, for one completion a prompt, with the results of tools in it."""
        sampled = Sampled(super().complete_greedily(prompts, at_most=at_most), {})
        return self._continued(prompts, sampled, self.greedy, at_most, [""] * len(prompts)).completions

    def _continued(
        self, prompts: list[Prompt], sampled: Sampled, params: SamplingParams, at_most: int | None, marks: list[str]
    ) -> Sampled:
        """Completions, of a prompt each, gone on with until none calls a tool."""
        talks = [_Talk(prompt, self.form(prompt), params.max_completion_length) for prompt in prompts]
        for talk, completion in zip(talks, sampled.completions, strict=True):
            talk.say(completion, self.policy)
        metrics, most = {**sampled.metrics, "time/tools_s": 0.0}, self.config.max_tool_calling_iterations
        for turn in count(1):
            calling = [at for at, talk in enumerate(talks) if talk.calls]
            if not calling or (most is not None and turn > most):
                break
            started = time.perf_counter()
            self._answer([talks[at] for at in calling])
            metrics["time/tools_s"] += time.perf_counter() - started
            going_on = [at for at in calling if talks[at].finish is None]
            for together in self._waves(going_on, talks, at_most):
                later = self._sample(
                    [talks[at].all_ids for at in together], 1, params, at_most=at_most,
                    seeds=[Random(f"{marks[at]}/{turn}").getrandbits(62) for at in together],
                    limits=[talks[at].room for at in together],
                )  # fmt: skip
                for at, completion in zip(together, later.completions, strict=True):
                    talks[at].say(completion, self.policy)
                for name in ADDED_UP & later.metrics.keys():
                    metrics[name] = metrics.get(name, 0.0) + later.metrics[name]
        return Sampled([talk.as_completion() for talk in talks], metrics if talks else {})

    def _waves(self, going_on: list[int], talks: "list[_Talk]", at_most: int | None) -> list[list[int]]:
        """Conversations that go on at once: all, where a store has room for the longest and the most to come.

        Else such of like lengths, since the longest has the least to come.
        """
        budget = self.token_budget(at_most)
        waves: list[list[int]] = []
        for at in sorted(going_on, key=lambda at: len(talks[at].all_ids), reverse=True):
            longest = len(talks[waves[-1][0]].all_ids) if waves else 0
            if waves and longest + max(talks[one].room for one in (*waves[-1], at)) <= budget:
                waves[-1].append(at)
            else:
                waves.append([at])
        return waves

    def _answer(self, talks: "list[_Talk]") -> None:
        """Call the tools that were asked for, and give the results to those who asked."""
        results = iter(self.toolbox([call for talk in talks for call in talk.calls]))
        for talk in talks:
            own = [next(results) for _ in talk.calls]
            contents = [result.content for result in own]
            ended_by = self.policy.tokenizer.decode(talk.ids[-1:]) if talk.finish == "eos" else ""
            talk.num_calls += len(own)
            talk.num_failures += sum(result.failed for result in own)
            try:
                text, said = talk.form.results(talk.calls, contents, ended_by)
            except Exception as error:  # of a template, which was tried with other names and results
                warn(f"the chat template cannot show results of tools, so that completions end there: {cause(error)}")
                talk.calls = []
                continue
            talk.hear(contents, self.policy.tokenizer(text, add_special_tokens=False)["input_ids"], said)


class _Talk:
    """A completion as it grows, turn by turn."""

    def __init__(self, prompt: Prompt, form: ToolForm, most: int):
        self.prompt, self.form, self.said, self.most = prompt, form, prompt.said, most
        self.ids: list[int] = []
        self.parts: list[Completion | int] = []  # turns of the policy's, and numbers of tokens between them
        self.messages: list[dict] = []
        self.calls: list[Call] = []  # of the last turn, which nobody has answered
        self.num_calls, self.num_failures = 0, 0
        self.finish: str | None = None  # None where the policy's turn comes next

    @property
    def all_ids(self) -> list[int]:
        """The prompt, and all since."""
        return [*self.prompt.ids, *self.ids]

    @property
    def room(self) -> int:
        """Number of tokens that may come."""
        return self.most - len(self.ids)

    def say(self, completion: Completion, policy: Policy) -> None:
        """Add a turn of the policy's. A call in one that was cut off is none."""
        before = Prompt([], self.all_ids, {}, self.said)
        words = words_of(policy, before, completion)
        found = self.form.calls(words)
        self.calls = [] if completion.finish == "length" else found.calls
        message: dict[str, Any] = {"role": "assistant", "content": words}
        if self.calls:
            calls = [call.as_message() for call in self.calls]
            message |= {"content": found.words, "tool_calls": calls}
        self.ids += completion.ids
        self.parts.append(completion)
        self.messages.append(message)
        self.finish = completion.finish

    def hear(self, contents: list[str], ids: list[int], said: str) -> None:
        """Add the results of the calls; where no token more would have room behind them, the completion is cut off."""
        calls, self.calls = self.calls, []
        if len(ids) >= self.room:
            self.finish = "length"
            return
        for call, content in zip(calls, contents, strict=True):
            self.messages.append({"role": "tool", "name": call.name, "content": content})
        self.ids += ids
        self.parts.append(len(ids))
        self.finish, self.said = None, said

    def as_completion(self) -> Completion:
        """All turns and what stands between them as one; log-probabilities are 0 where nothing was drawn."""
        assert self.finish is not None
        sampled = [torch.zeros(part) if isinstance(part, int) else torch.ones(len(part.ids)) for part in self.parts]

        def joined(name: str) -> Tensor | None:
            known = [torch.zeros(part) if isinstance(part, int) else getattr(part, name) for part in self.parts]
            return None if any(values is None for values in known) else torch.cat(known)

        conversation = Conversation(self.messages, torch.cat(sampled).bool(), self.num_calls, self.num_failures)
        return Completion(self.ids, joined("logprobs"), joined("proposal_logprobs"), self.finish, conversation)

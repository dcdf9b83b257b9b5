"""Runs the reward functions on a rollout's completions, each isolated from the others and from the run."""

import copy
import inspect
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem_grpo.errors import InputError, counted
from lowmem_grpo.rewards.isolation.kept import process_kept
from lowmem_grpo.rewards.isolation.limit import Outcome, OutOfTime, await_within, call_within
from lowmem_grpo.rewards.made import name_of
from lowmem_grpo.rewards.protocol import Failure, Logs, TrainerState, read, read_awaited
from lowmem_grpo.rewards.route import inner_of

SLOW_S = 10.0  # a call that takes longer is reported, and then one of more than twice the last reported time
log = logging.getLogger(__name__)


class Scores(NamedTuple):
    rewards: Tensor  # (B, R) fp32, NaN where a reward does not apply, or its function failed
    metrics: dict[str, float]  # what the functions logged, averaged; time/reward/{name}_s; rewards/{name}/failures
    extra_columns: dict[str, list]  # what they logged a completion, B values each


class Call(NamedTuple):
    """The result of one function for B completions."""

    rewards: list[float]  # B, NaN where there is none
    failures: list[Failure]  # one for each completion that has no reward because of a failure
    metrics: dict[str, list[float]]
    extra_columns: dict[str, list]
    seconds: float


class RewardRunner:
    """Calls each reward function by TRL's protocol; one that fails gives no reward (NaN), is counted and reported."""

    def __init__(self, reward_funcs: Sequence[Callable], timeout_s: float | None = None):
        self.functions = list(reward_funcs)
        self.timeout_s = timeout_s
        self.names = _names_of(self.functions)
        self.failed_calls: Counter = Counter()  # by name and kind
        self.slow_s = dict.fromkeys(self.names, SLOW_S)
        self.max_steps = 1  # of the run, where there is one: a function may divide by it
        self.trial_s: dict[str, float] = {}  # what a function took for each made-up completion, by name
        self.empty_steps = 0

    def __call__(
        self, prompts: list, completions: list, completion_ids: list[list[int]], columns: dict[str, list],
        global_step: int, prompt_ids: list[list[int]] | None = None, environments: list[Any] | None = None,
        at_most: int | None = None,
    ) -> Scores:  # fmt: skip
        """Rewards of B completions; prompts, completions, ids and every column have B entries.

        A function is called with at most so many completions at once, where that is given, and with all else.

        global_step is the number of steps that the policy has taken before it sampled them.
        prompt_ids are for the functions with an attribute reads_prompt_ids; these give no reward without.
        environments are the completions' own, which are given as they are, and not copied.

        No function's error is raised: the run goes on without its reward.
        """
        size = at_most or max(len(completions), 1)
        parts = [
            self._call_all(
                prompts[part], completions[part], completion_ids[part],
                {name: values[part] for name, values in columns.items()}, global_step,
                None if prompt_ids is None else prompt_ids[part],
                None if environments is None else environments[part],
            )
            for part in (slice(at, at + size) for at in range(0, max(len(completions), 1), size))
        ]  # fmt: skip
        calls = [*map(_joined, zip(*parts, strict=True))]
        metrics: dict[str, list[float]] = {}
        extra_columns: dict[str, list] = {}
        for name, function, call in zip(self.names, self.functions, calls, strict=True):
            own = f"{name_of(function)}/"  # which begins the names of a reward adapter's metrics
            for metric, values in call.metrics.items():
                numbered = f"{name}/{metric.removeprefix(own)}" if metric.startswith(own) else metric
                metrics.setdefault(numbered, []).extend(values)
            extra_columns |= call.extra_columns
            self._report(name, call, len(completions))
        for name, call in zip(self.names, calls, strict=True):
            metrics[f"time/reward/{name}_s"] = [call.seconds]
            metrics[f"rewards/{name}/failures"] = [len(call.failures)]
        if calls and completions and all(math.isnan(reward) for call in calls for reward in call.rewards):
            self.empty_steps += 1
            if _is_power_of_two(self.empty_steps):
                failed = all(len(call.failures) == len(completions) for call in calls)
                what = "every reward function failed on every completion"
                what = what if failed else "every reward function returned None for every completion"
                log.warning(
                    f"after {counted(global_step, 'step')}: {what}, so there is nothing to learn from "
                    f"(such steps so far: {self.empty_steps}); "
                    f"stop the run and mend {', '.join(self.names)}{'' if failed else ' or the columns that they read'}"
                )
        rewards = torch.tensor([call.rewards for call in calls]).view(len(calls), len(completions)).T.contiguous()
        return Scores(rewards, {name: sum(v) / len(v) for name, v in metrics.items()}, extra_columns)

    def rewards_of(
        self, prompts: list, completions: list, completion_ids: list[list[int]], columns: dict[str, list]
    ) -> list[list[float]]:
        """The B rewards of each function, NaN where there is none, without a word in log and metrics."""
        return [call.rewards for call in self._call_all(prompts, completions, completion_ids, columns, global_step=0)]

    def bind(self, policy: Any) -> list[str]:
        """Give the policy to the functions that judge with it; returns what they say of that."""
        said = [function.bind(policy) for function in self.functions if hasattr(function, "bind")]
        return [words for words in said if isinstance(words, str)]

    def check_rows(self, rows: Iterable[Any], name: str) -> None:
        """Have every function that knows rows, by check_row(row), look at all of them.

        Raises:
            InputError: a row with which a function could do nothing, by its number.
        """
        checks = [function.check_row for function in self.functions if hasattr(function, "check_row")]
        for index, row in enumerate(rows if checks else ()):
            for check in checks:
                try:
                    check(row)
                except InputError as error:
                    raise InputError(f"row {index} of {name}: {error}") from error

    def try_out(
        self, prompts: list, columns: dict[str, list], environments: list[Any] | None = None, whose: str = "",
        remedy: str = "",
    ) -> None:  # fmt: skip
        """Call every function once on made-up completions, so that a broken one stops the run at its start.

        An error says whose completions they are, and the remedy where none is known of the failure itself.

        Raises:
            InputError: a function raised, took too long, or returned something other than B numbers or Nones; a NaN
                passes here, since an array has no None.
        """
        trial = "<think>trial</think> <answer>0</answer>"
        completions = [trial if isinstance(p, str) else [{"role": "assistant", "content": trial}] for p in prompts]
        calls = self._call_all(
            prompts, completions, [[0]] * len(prompts), columns, global_step=0, environments=environments
        )
        self.trial_s = {name: call.seconds / len(prompts) for name, call in zip(self.names, calls, strict=True)}
        for failure in (failure for call in calls for failure in call.failures if failure.kind != "NaN"):
            of = f"{counted(len(prompts), 'made-up completion')}{whose}"
            known = _remedy(failure, prompts, columns) or remedy
            raise InputError(f"{failure.message}{known} (on {of}, which every reward is tried on first)")

    def _call_all(
        self, prompts: list, completions: list, completion_ids: list[list[int]], columns: dict[str, list],
        global_step: int, prompt_ids: list[list[int]] | None = None, environments: list[Any] | None = None,
    ) -> list[Call]:  # fmt: skip
        """Call each function in turn, then await concurrently all that the async ones returned."""
        given = {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        state = TrainerState(global_step, self.max_steps)
        logs, count = [Logs(len(completions)) for _ in self.functions], len(completions)
        outcomes = []
        for name, function, own in zip(self.names, self.functions, logs, strict=True):
            # A copy each, so that a function which changes its arguments changes nothing for the others.
            own_given = {**copy.deepcopy(given), "trainer_state": copy.copy(state), **own.functions()}
            if getattr(inner_of(function), "reads_prompt_ids", False):
                own_given["prompt_ids"] = copy.deepcopy(prompt_ids)
            if environments is not None:
                own_given["environments"] = [*environments]
            limit_s = self.timeout_s
            if limit_s is not None and getattr(inner_of(function), "one_by_one", False):  # each within reward_timeout
                limit_s *= count + 1
            with process_kept():
                work = partial(read, name, count, partial(function, **own_given))
                outcomes.append(_timed(limit_s, work, partial(_say, name)))
        waiting = [index for index, outcome in enumerate(outcomes) if inspect.isawaitable(outcome.value)]
        if waiting:
            several = [read_awaited(self.names[index], count, outcomes[index].value) for index in waiting]
            with process_kept():
                awaited = await_within(
                    self.timeout_s, several, partial(_say, ", ".join(self.names[index] for index in waiting))
                )
            for index, outcome in zip(waiting, awaited, strict=True):
                outcomes[index] = outcome
        return [
            self._as_call(name, outcome, own, count)
            for name, outcome, own in zip(self.names, outcomes, logs, strict=True)
        ]

    def _as_call(self, name: str, outcome: Outcome, logs: Logs, count: int) -> Call:
        values = outcome.value
        if isinstance(outcome.error, OutOfTime):
            values = Failure("time", f"reward function {name} took longer than reward_timeout={self.timeout_s} s")
        elif outcome.error:
            values = Failure(type(outcome.error).__name__, f"reward function {name} failed: {outcome.error}")
        if isinstance(values, Failure):
            return Call([math.nan] * count, [values] * count, {}, {}, outcome.seconds)
        rewards = [math.nan if isinstance(value, Failure) else value for value in values]
        failures = [value for value in values if isinstance(value, Failure)]
        return Call(rewards, failures, dict(logs.metrics), dict(logs.columns), outcome.seconds)

    def _report(self, name: str, call: Call, count: int) -> None:
        """Log the first failed call of a kind, the second, the fourth, ...; and a slow call."""
        for kind, several in Counter(failure.kind for failure in call.failures).items():
            self.failed_calls[name, kind] += 1
            times = self.failed_calls[name, kind]
            if _is_power_of_two(times):
                message = next(failure.message for failure in call.failures if failure.kind == kind)
                log.warning(
                    f"{message}; no such reward for {several} of {counted(count, 'completion')} "
                    f"({counted(times, 'call')} failed like this so far)"
                )
        if call.seconds > self.slow_s[name]:
            self.slow_s[name] = 2 * call.seconds
            log.warning(f"reward function {name} took {call.seconds:.1f} s for {counted(count, 'completion')}")


def _joined(calls: Sequence[Call]) -> Call:
    """Calls of one function with some completions each as one call; where one failed, its columns have Nones."""
    metrics: dict[str, list[float]] = {}
    for name, values in (item for call in calls for item in call.metrics.items()):
        metrics.setdefault(name, []).extend(values)
    names = dict.fromkeys(name for call in calls for name in call.extra_columns)
    columns = {name: [call.extra_columns.get(name, [None] * len(call.rewards)) for call in calls] for name in names}
    return Call(
        [*chain.from_iterable(call.rewards for call in calls)],
        [*chain.from_iterable(call.failures for call in calls)], metrics,
        {name: [*chain.from_iterable(values)] for name, values in columns.items()}, sum(call.seconds for call in calls),
    )  # fmt: skip


def _remedy(failure: Failure, prompts: list, columns: dict[str, list]) -> str:
    """The end of a sentence about a function that failed on made-up completions, or nothing where none is known."""
    if failure.kind == "time":
        return "; raise reward_timeout, or load what it needs earlier"
    if failure.kind == "TypeError" and "unexpected keyword argument" in failure.message:
        return "; let it take **kwargs, since it is called with each column of the data"
    if failure.kind == "TypeError" and " missing " in failure.message:
        return f"; the data's columns, which it is called with, are {', '.join(['prompts', *columns])}"
    if failure.kind in ("TypeError", "AttributeError", "KeyError"):  # as where a text is taken for a list of messages
        if isinstance(prompts[0], str):
            return "; each completion is a text, since the prompts are"
        return '; each completion is a list as [{"role": "assistant", "content": "..."}], since the prompts are chats'
    return ""


def _timed(timeout_s: float | None, work: Callable[[], Any], say: Callable[[str], Any]) -> Outcome:
    started, value, error = time.perf_counter(), None, None
    try:
        value = call_within(timeout_s, work, say)
    except OutOfTime as late:
        error = late
    return Outcome(value, error, time.perf_counter() - started)


def _names_of(functions: Sequence[Callable]) -> list[str]:
    """The functions' names, in their order; one that is taken is numbered: judge_reward, judge_reward_2.

    So are rewards of several calls of one factory, and of two folders that end alike.

    Raises:
        InputError: one function is there twice, or has no name that can be printed.
    """
    names: list[str] = []
    for index, function in enumerate(functions):
        name = own = name_of(function)
        if any(function is other for other in functions[:index]):
            raise InputError(f"the reward function {name} is given twice; give it once, with another of reward_weights")
        number = 1
        while name in names:
            number += 1
            name = f"{own}_{number}"
        names.append(name)
    return names


def _say(name: str, words: str) -> None:
    log.warning(f"reward function {name} {words}")


def _is_power_of_two(count: int) -> bool:
    return count.bit_count() == 1

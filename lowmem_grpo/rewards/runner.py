"""Finds reward functions by name and runs them on a rollout's completions."""

import asyncio
import copy
import difflib
import importlib
import inspect
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

LARGEST = 1e30  # squares of rewards must fit into fp32


class Scores(NamedTuple):
    rewards: Tensor  # (B, R) fp32, NaN where a reward does not apply
    metrics: dict[str, float]  # what the functions logged, averaged, and time/reward/{name}_s
    extra_columns: dict[str, list]  # what they logged a completion, B values each


class RewardRunner:
    """Calls each reward function by TRL's protocol and checks what it returns."""

    def __init__(self, reward_funcs: Sequence[Callable]):
        self.functions = list(reward_funcs)
        self.names = [getattr(function, "__name__", type(function).__name__) for function in reward_funcs]
        repeated = {name for name in self.names if self.names.count(name) > 1}
        if repeated:
            raise ValueError(f"two reward functions are named {repeated.pop()!r}; give one another __name__")

    def __call__(
        self, prompts: list, completions: list, completion_ids: list[list[int]], columns: dict[str, list], step: int
    ) -> Scores:
        """Rewards of B completions; prompts, completions, ids and every column have B entries.

        Raises:
            ValueError: a function returned something other than B numbers or Nones.
            RuntimeError: a function raised; its own error is the cause.
        """
        rewards = torch.full((len(completions), len(self.functions)), torch.nan)
        metrics: dict[str, list[float]] = {}
        extra_columns: dict[str, list] = {}
        given = {
            **columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids,
            "trainer_state": SimpleNamespace(global_step=step),
            "log_metric": lambda name, value: metrics.setdefault(name, []).append(float(value)),
            "log_extra": lambda column, values: extra_columns.__setitem__(column, list(values)),
        }  # fmt: skip
        for index, (name, function) in enumerate(zip(self.names, self.functions, strict=True)):
            started = time.perf_counter()
            # A copy each, so that a function which changes its arguments changes nothing for the others.
            values = _checked(name, _call(name, function, copy.deepcopy(given)), len(completions))
            rewards[:, index] = torch.tensor(values)
            metrics[f"time/reward/{name}_s"] = [time.perf_counter() - started]
        for column, values in extra_columns.items():
            if len(values) != len(completions):
                raise ValueError(f"log_extra({column!r}) got {len(values)} values for {len(completions)} completions")
        return Scores(rewards, {name: sum(v) / len(v) for name, v in metrics.items()}, extra_columns)

    def try_out(self, prompts: list, columns: dict[str, list]) -> None:
        """Call every function once on made-up completions, so that one which cannot work stops the run at its start."""
        trial = "<think>trial</think> <answer>0</answer>"
        completions = [trial if isinstance(p, str) else [{"role": "assistant", "content": trial}] for p in prompts]
        try:
            self(prompts, completions, [[0]] * len(prompts), columns, step=0)
        except RuntimeError as error:
            raise ValueError(f"{error} (on made-up completions, which every reward is tried on first)") from error


def _call(name: str, function: Callable, given: dict[str, Any]) -> Any:
    try:
        values = function(**given)
        return _run_async(values) if inspect.isawaitable(values) else values
    except Exception as error:
        raise RuntimeError(f"reward function {name} raised {type(error).__name__}: {error}") from error


def _run_async(awaitable) -> Any:
    async def wait():
        return await awaitable

    with ThreadPoolExecutor(1) as thread:  # a thread of its own, since a notebook's already has a running loop
        return thread.submit(asyncio.run, wait()).result()


def _checked(name: str, values: Any, count: int) -> list[float]:
    """The values as floats, NaN for None; a tensor or an array will do, like any list."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, (list, tuple)) or len(values) != count:
        got = f"{len(values)} values" if isinstance(values, (list, tuple)) else type(values).__name__
        raise ValueError(
            f"reward function {name} returned {got} for {count} completions; return a list, one value each"
        )
    return [math.nan if value is None else _as_float(name, value) for value in values]


def _as_float(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.inf
    if isinstance(value, str) or abs(number) > LARGEST:
        raise ValueError(
            f"reward function {name} returned {value!r}; a reward is a finite number, or None if not applicable"
        )
    return number


def resolve_reward_funcs(reward_funcs: Any, built_in: dict[str, Callable]) -> list[Callable]:
    """Functions from one or several functions or names: a built-in's, or `module.function` on the Python path.

    Raises:
        ValueError: no function, an unknown name, or something that cannot be called.
    """
    several = reward_funcs if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    if not several:
        raise ValueError(f"reward_funcs is empty; give a function or one of {', '.join(built_in)}")
    return [_resolve(reward, built_in) for reward in several]


def _resolve(reward: Any, built_in: dict[str, Callable]) -> Callable:
    if not isinstance(reward, str):
        if not callable(reward):
            raise ValueError(f"reward function {reward!r} cannot be called; give a function or a name")
        return reward
    if reward in built_in:
        return built_in[reward]
    module_name, _, function_name = reward.rpartition(".")
    if not module_name:
        nearest = difflib.get_close_matches(reward, built_in, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"the built-in ones are {', '.join(built_in)}"
        raise ValueError(f"no reward function is named {reward!r}; {hint} (one of your own is module.function)")
    if os.getcwd() not in sys.path:  # an installed command does not look in the current folder by itself
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ValueError(f"reward function {reward!r} cannot be imported: {error}") from error
    return _resolve(function, built_in)

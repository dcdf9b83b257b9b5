"""Finds reward functions by name."""

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any


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

"""Tools found by name."""

import inspect
from collections.abc import Callable
from typing import Any

from lowmem_grpo.errors import InputError, shown
from lowmem_grpo.rewards.isolation.origin import OWN, origin_of_function
from lowmem_grpo.rewards.names import find_function
from lowmem_grpo.tools.program import python

BUILT_IN: dict[str, Callable] = {"python": python}


def find_tools(tools: Any) -> list[Callable]:
    """Functions from one or several functions or names: a built-in tool's, or `module.function`.

    A configuration from elsewhere may name tools, and a model chooses what they are called with, so only functions of
    the user's own modules are taken by name.

    Raises:
        InputError: no function, or a name of none.
    """
    several = list(tools) if isinstance(tools, (list, tuple)) else [tools]
    if not several:
        raise InputError(f"tools is empty; give a function or {', '.join(BUILT_IN)}, or leave it out")
    return [_found(one.strip()) if isinstance(one, str) else _callable(one) for one in several]


def _found(name: str) -> Callable:
    function = find_function(name, BUILT_IN, kind="tool")
    if name not in BUILT_IN and origin_of_function(function) != OWN:
        raise InputError(
            f"tool {shown(name)} is of an installed package; write a function in a module of your own that calls it"
        )
    return function


def _callable(tool: Any) -> Callable:
    if not inspect.isroutine(tool):  # a partial and an object have no name and docstring of their own
        raise InputError(f"tool {shown(tool)} is no function; write one that calls it, with type hints and a docstring")
    return tool

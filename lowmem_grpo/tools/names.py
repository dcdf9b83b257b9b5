"""Tools and environments found by name."""

import inspect
from collections.abc import Callable, Mapping
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


def find_factories(environment_factory: Any) -> Any:
    """Makers of environments: a function, a class or the name of one, `module.Class`, or several by their names.

    By name they are taken as tools are.

    Raises:
        InputError: nothing that can be called, or a name of none.
    """
    if isinstance(environment_factory, Mapping):
        if not environment_factory:
            raise InputError("environment_factory is empty; name an environment for each kind of rows, or leave it out")
        return {name: find_factories(one) for name, one in environment_factory.items()}
    if isinstance(environment_factory, str):
        return _found(environment_factory.strip(), "environment", {})
    if not callable(environment_factory):
        raise InputError(
            f"environment_factory {shown(environment_factory)} cannot be called; give a class, or a function that "
            "makes an environment"
        )
    return environment_factory


def _found(name: str, kind: str = "tool", known: Mapping[str, Callable] = BUILT_IN) -> Callable:
    function = find_function(name, known, kind=kind)
    if name not in known and origin_of_function(function) != OWN:
        raise InputError(
            f"{kind} {shown(name)} is of an installed package; write a function in a module of your own that calls it"
        )
    return function


def _callable(tool: Any) -> Callable:
    if not inspect.isroutine(tool):  # a partial and an object have no name and docstring of their own
        raise InputError(f"tool {shown(tool)} is no function; write one that calls it, with type hints and a docstring")
    return tool

"""Reward functions with their settings, as the factories return them, and the names of reward functions."""

from collections.abc import Callable
from functools import partial

from lowmem_grpo.errors import InputError


def made(function: Callable, *settings, name: str | None = None) -> Callable:
    """A reward function that calls another one with the settings first; it can be pickled, as a closure cannot.

    The settings are given by position, so that no dataset column of the name of one takes its place.
    """
    reward = partial(function, *settings)
    vars(reward).update(__name__=name or function.__name__, __doc__=function.__doc__)
    return reward


def name_of(function: Callable) -> str:
    """The name of a reward function; that of what a partial calls, or of an object's class.

    Raises:
        InputError: it has no name that can be printed.
    """
    while isinstance(function, partial) and "__name__" not in vars(function):
        function = function.func
    try:
        name = getattr(function, "__name__", type(function).__name__)
    except Exception:  # of an object that makes its attributes up
        name = type(function).__name__
    if not isinstance(name, str) or not name or not name.isprintable():
        raise InputError(f"a reward function is named {name!a}; give it a __name__ of printable characters")
    return name

"""made(): a reward function with its settings, as the factories return it."""

from collections.abc import Callable
from functools import partial


def made(function: Callable, *settings, name: str | None = None) -> Callable:
    """A reward function that calls another one with the settings first; it can be pickled, as a closure cannot.

    The settings are given by position, so that no dataset column of the name of one takes its place.
    """
    reward = partial(function, *settings)
    vars(reward).update(__name__=name or function.__name__, __doc__=function.__doc__)
    return reward

"""Callbacks: functions of (step, metrics, policy), checked before the first step."""

import inspect
from collections.abc import Callable
from typing import Any

from lowmem_grpo.errors import InputError, shown

TRANSFORMERS_EVENT = "on_step_end"  # which each of its TrainerCallbacks has
# Kinds of functions of which a call runs nothing yet.
NOT_RUN = (inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction)


def callbacks_of(given: Any) -> list[Callable]:
    """The callbacks as a list. Raise InputError for one that could not be called after a step, or would do nothing."""
    callbacks = [given] if callable(given) or hasattr(given, TRANSFORMERS_EVENT) else [] if given is None else given
    if not isinstance(callbacks, list | tuple):
        raise InputError(f"callbacks={shown(given)} is neither a function nor a list of functions")
    for callback in callbacks:
        name = getattr(callback, "__name__", type(callback).__name__)
        if hasattr(callback, TRANSFORMERS_EVENT):
            raise InputError(
                f"callback {name} is one of transformers' Trainer, whose events do not occur here; pass a function of "
                "(step, metrics, policy)"
            )
        if not callable(callback):
            raise InputError(f"callbacks has {shown(callback)}, which is no function of (step, metrics, policy)")
        if isinstance(callback, type):
            raise InputError(f"callback {name} is a class; pass a function of (step, metrics, policy)")
        if any(is_one(called) for is_one in NOT_RUN for called in (callback, type(callback).__call__)):
            raise InputError(
                f"callback {name} is async or yields, and a call of it does nothing; make it a plain function"
            )
        try:
            inspect.signature(callback).bind(1, {}, None)
        except TypeError as error:
            raise InputError(f"callback {name} cannot be called with (step, metrics, policy): {error}") from error
        except ValueError:  # of some functions in C, whose arguments are not known
            pass
    return list(callbacks)

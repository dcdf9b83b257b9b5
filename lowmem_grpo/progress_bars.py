"""The progress bars of other libraries, switched off while a run reports its own progress."""

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import datasets
from transformers.utils import logging as transformers_logging

P = ParamSpec("P")
T = TypeVar("T")


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Switch off the bars of transformers ("Loading weights") and datasets ("Map"); afterwards each is as it was.

    The hub's own bars are left alone: they show on a terminal only, while something is downloaded, which may take
    minutes in which nothing else is said. Who asks for bars by an environment variable of datasets keeps them.
    """
    of_hub = importlib.import_module("huggingface_hub.utils.tqdm").progress_bar_states
    before = dict(of_hub)
    shown = transformers_logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()

    def switch(transformers_bars: Callable[[], None], datasets_bars: Callable[[], None]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that an environment variable has the last word
            if shown[0]:
                transformers_bars()  # the hub's too
                of_hub.clear()
                of_hub.update(before)
            if shown[1]:
                datasets_bars()

    switch(transformers_logging.disable_progress_bar, datasets.disable_progress_bars)
    try:
        yield
    finally:
        switch(transformers_logging.enable_progress_bar, datasets.enable_progress_bars)


def without_progress_bars(function: Callable[P, T]) -> Callable[P, T]:
    """Return a function that runs within no_progress_bars()."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with no_progress_bars():
            return function(*args, **kwargs)

    return run

"""A training that several processes do together, as torchrun starts them: how they begin, and how they end."""

import contextlib
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from transformers.utils import logging as transformers_logging

from lowmem_grpo import distributed
from lowmem_grpo.config.trl import refuse_unknown_arguments
from lowmem_grpo.errors import InputError
from lowmem_grpo.torchrun import num_started

P = ParamSpec("P")
T = TypeVar("T")


def across_ranks(function: Callable[P, T]) -> Callable[P, T]:
    """Return a training that all processes of a torchrun do together, each on a device of its own.

    In a process that nobody started with others nothing changes. An error on one rank ends the training on all.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        refuse_unknown_arguments(kwargs, signature.parameters, function.__name__)
        config = signature.bind(*args, **kwargs).arguments.get("config")
        device = _device(use_cpu=getattr(config, "use_cpu", False))
        with distributed.joined(device), _silent_but_for_main():
            _refuse_too_few_gpus(config)
            # Before anything goes by them: another seed draws other prompts, another lora_r other shapes.
            settings = vars(config) if is_dataclass(config) else {"config": type(config).__name__}
            distributed.refuse_differences("settings", settings)
            return function(*args, **kwargs)

    return call


def _device(*, use_cpu: bool) -> torch.device:
    """The GPU with the number that torchrun gave this process, or the CPU where there are too few or none."""
    number = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))
    on_gpu = torch.cuda.is_available() and not use_cpu and num_started() <= torch.cuda.device_count()
    return torch.device("cuda", number) if on_gpu else torch.device("cpu")


def _refuse_too_few_gpus(config: Any) -> None:
    """Raise InputError where processes would share a GPU. They are told of it together, and say it once."""
    count, there = num_started(), torch.cuda.device_count()
    if count > 1 and torch.cuda.is_available() and not getattr(config, "use_cpu", False) and there < count:
        raise InputError(
            f"torchrun has started {count} processes, and this machine has {there} GPU{'s' * (there != 1)}; start one "
            "process for each GPU, or set use_cpu=True"
        )


@contextlib.contextmanager
def _silent_but_for_main() -> Iterator[None]:
    """Let rank 0 alone say on standard error what all would say: notes, progress, warnings."""
    if distributed.is_main():
        yield
        return
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stderr(nowhere),
            warnings.catch_warnings(action="ignore"),
        ):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)

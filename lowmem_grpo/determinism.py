"""Passes that a GPU computes alike, to the last bit, however often."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import deterministic as settings_of_torch

from lowmem_grpo.errors import InputError

torchs: Any = settings_of_torch  # a module of another class, whose properties a type checker does not see


@contextlib.contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Have torch choose algorithms inside the `with` that sum in one order, if `on`.

    Else attention's backward and the gradients of a prompt that completions share are summed as blocks of a kernel
    happen to end. This package's kernels and bitsandbytes' have one order without it, and flash-attn is asked for one;
    torch knows nothing of what other packages' kernels do, as fla's.

    Raises:
        InputError: the model computes something of which torch knows no such algorithm.
    """
    if not on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses products on a GPU
    mode, filled = torch.get_deterministic_debug_mode(), torchs.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")
    torchs.fill_uninitialized_memory = False  # all of it is written to
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        operation = str(error).partition(" ")[0]
        raise InputError(
            f"full_determinism cannot be had with this model, for whose {operation} torch has one algorithm alone; "
            "leave it out"
        ) from error
    finally:
        torch.set_deterministic_debug_mode(mode)
        torchs.fill_uninitialized_memory = filled

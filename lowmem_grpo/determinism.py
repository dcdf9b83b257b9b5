"""Passes that a GPU computes alike, to the last bit, however often."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import deterministic as settings_of_torch

from lowmem_grpo.errors import InputError

torchs: Any = settings_of_torch  # a module of another class, whose properties a type checker does not see


def prepare(device: torch.device) -> None:
    """Set what torch asks of a GPU's environment, and try a product; before anything else is computed.

    torch reads CUBLAS_WORKSPACE_CONFIG at a process's first product on a GPU, deterministic or not, and never again.

    Raises:
        InputError: there was a product before.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with deterministic(True):
        torch.mm(*torch.ones(2, 8, 8, device=device))


@contextlib.contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Have torch choose algorithms inside the `with` that sum in one order, if `on`.

    Else attention's backward and the gradients of a prompt that completions share are summed as blocks of a kernel
    happen to end. This package's kernels and bitsandbytes' have one order without it, and flash-attn is asked for one;
    torch knows nothing of what other packages' kernels do, as fla's.

    Raises:
        InputError: the model computes something of which torch knows no such algorithm, or prepare() came too late.
    """
    if not on:
        yield
        return
    mode, filled = torch.get_deterministic_debug_mode(), torchs.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")
    torchs.fill_uninitialized_memory = False  # all of it is written to
    try:
        yield
    except RuntimeError as error:
        if "CUBLAS_WORKSPACE_CONFIG" in str(error):
            raise InputError(
                "full_determinism needs CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment before a process first "
                "multiplies on a GPU; set it before Python starts, or leave full_determinism out"
            ) from error
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

"""The states of all random generators that a step may draw from, saved and restored."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def randomness() -> dict[str, Any]:
    """The states of every generator that a step may draw from: Python's, NumPy's, torch's on the CPU and each GPU.

    As a part of a checkpoint has it: tensors (uint8) by device, and what JSON has.
    """
    states: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    name, keys, *rest = np.random.get_state()
    return {**states, "python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest]}


def restore_randomness(saved: dict[str, Any]) -> None:
    """Put every generator where randomness() found it."""
    torch.set_rng_state(saved["cpu"])
    for name, state in saved.items():
        if name.startswith("cuda:") and int(name.removeprefix("cuda:")) < torch.cuda.device_count():  # 0 without CUDA
            torch.cuda.set_rng_state(state, name)
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), None if gauss is None else float(gauss)))
    np.random.set_state(tuple(saved["numpy"]))


@contextlib.contextmanager
def same_randomness() -> Iterator[None]:
    """Put every generator back where it was before the `with`."""
    saved = randomness()
    try:
        yield
    finally:
        restore_randomness(saved)

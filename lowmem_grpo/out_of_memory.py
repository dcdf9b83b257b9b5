"""Out of memory, whoever says so."""

import contextlib
import re
from collections.abc import Iterator

import torch

# cuBLAS' and cuDNN's handles and workspaces, and what the driver tells Triton and bitsandbytes.
SAYINGS = re.compile(r"out of memory|ALLOC_FAILED|CUDA_ERROR_OUT_OF_MEMORY", re.IGNORECASE)


@contextlib.contextmanager
def as_torch_says_it() -> Iterator[None]:
    """A library's own error for want of memory becomes torch.OutOfMemoryError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if not SAYINGS.search(str(error)):
            raise
        raise torch.OutOfMemoryError(str(error)) from error

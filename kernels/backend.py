"""The choice between a kernel and its twin in plain PyTorch, which every function with a `backend` makes alike."""

import os
from typing import Any, Literal

try:
    import triton
except ImportError:  # Windows, macOS
    triton: Any = None

Backend = Literal["auto", "triton", "torch"]  # auto: the kernel on a GPU where Triton is installed, else the twin


def switched_off() -> bool:
    """Whether LOWMEM_GRPO_TRITON=0 is in the environment, for where a card or a driver does not suit the kernels."""
    return os.environ.get("LOWMEM_GRPO_TRITON") == "0"


def runs_by_triton(backend: str, device_type: str) -> bool:
    """Whether a call with tensors on such a device runs by the kernel.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: backend="triton" where it cannot run.
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend must be 'auto', 'triton' or 'torch', not {backend!r}")
    if backend == "triton" and triton is None:
        raise RuntimeError("backend='triton' needs Triton installed; backend='torch' does without")
    if backend == "triton" and device_type != "cuda" and not triton.knobs.runtime.interpret:
        raise RuntimeError(
            f"backend='triton' on {device_type} runs only in Triton's interpreter: set TRITON_INTERPRET=1 before it is "
            "imported, or use backend='torch'"
        )
    on_a_gpu = device_type == "cuda" and triton is not None and not switched_off()
    return backend == "triton" or (backend == "auto" and on_a_gpu)

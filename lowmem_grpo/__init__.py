"""lowmem_grpo: GRPO on one small GPU, from a 4-bit base with LoRA adapters."""

import importlib
import logging
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from lowmem_grpo.config import GRPOConfig

if TYPE_CHECKING:
    from lowmem_grpo.loss import register_objective
    from lowmem_grpo.policy import Policy
    from lowmem_grpo.train import TrainResult, train

__version__ = "0.1.0"
__all__ = ["GRPOConfig", "Policy", "TrainResult", "register_objective", "train"]

_HOMES = {
    "train": "lowmem_grpo.train", "TrainResult": "lowmem_grpo.train", "Policy": "lowmem_grpo.policy",
    "register_objective": "lowmem_grpo.loss",
}  # fmt: skip

# bitsandbytes warns at import that an inference kernel for AVX512-BF16 CPUs is missing, which is never used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str):
    """Import torch and transformers (seconds) only for what needs them, which `--help` and GRPOConfig do not."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lowmem_grpo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        """Importing the module train would put it in the place of its function, which is what `train` means here."""
        super().__setattr__(name, getattr(value, name) if name == "train" and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package

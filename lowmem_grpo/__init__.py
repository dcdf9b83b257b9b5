"""lowmem_grpo: GRPO on one small GPU, from a 4-bit base with LoRA adapters."""

import importlib
import logging
import sys
from typing import TYPE_CHECKING

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.reward import RewardConfig
from lowmem_grpo.config.sample import SampleConfig
from lowmem_grpo.config.select import SelectConfig
from lowmem_grpo.config.sft import SFTConfig

if TYPE_CHECKING:
    from lowmem_grpo.evaluation.evaluate import evaluate
    from lowmem_grpo.exporting.export import ExportResult, export
    from lowmem_grpo.loops.grpo import train
    from lowmem_grpo.loops.reward import train_reward_model
    from lowmem_grpo.loops.sft import sft
    from lowmem_grpo.model.policy import Policy
    from lowmem_grpo.objective.loss import register_objective
    from lowmem_grpo.pipeline.file import Phase
    from lowmem_grpo.pipeline.pipeline import PipelineResult, run_pipeline
    from lowmem_grpo.pipeline.sample import SampleResult, sample
    from lowmem_grpo.pipeline.select import select
    from lowmem_grpo.run.run import TrainResult

__version__ = "0.1.0"
__all__ = [
    "ExportResult",
    "GRPOConfig",
    "Phase",
    "PipelineResult",
    "Policy",
    "RewardConfig",
    "SFTConfig",
    "SampleConfig",
    "SampleResult",
    "SelectConfig",
    "TrainResult",
    "evaluate",
    "export",
    "register_objective",
    "run_pipeline",
    "sample",
    "select",
    "sft",
    "train",
    "train_reward_model",
]

_HOMES = {
    "evaluate": "lowmem_grpo.evaluation.evaluate",
    "export": "lowmem_grpo.exporting.export", "ExportResult": "lowmem_grpo.exporting.export",
    "train_reward_model": "lowmem_grpo.loops.reward",
    "train": "lowmem_grpo.loops.grpo", "sft": "lowmem_grpo.loops.sft", "TrainResult": "lowmem_grpo.run.run",
    "Policy": "lowmem_grpo.model.policy", "register_objective": "lowmem_grpo.objective.loss",
    "sample": "lowmem_grpo.pipeline.sample", "SampleResult": "lowmem_grpo.pipeline.sample",
    "select": "lowmem_grpo.pipeline.select",
    "Phase": "lowmem_grpo.pipeline.file", "run_pipeline": "lowmem_grpo.pipeline.pipeline",
    "PipelineResult": "lowmem_grpo.pipeline.pipeline",
}  # fmt: skip

# What TRL and Unsloth have in the place of functions.
_ELSEWHERE = {
    "GRPOTrainer": "call train(model, reward_funcs, train_dataset, eval_dataset, config), which is trainer and train()",
    "PPOTrainer": "call train() with GRPOConfig(adv_estimator='gae')",
    "SFTTrainer": "call sft(model, train_dataset, eval_dataset, config)",
    "RewardTrainer": "call train_reward_model(model, train_dataset, eval_dataset, config)",
    "FastLanguageModel": "give train() the model's name, and it is loaded in 4 bits and gets its adapters",
}

# bitsandbytes warns at import that an inference kernel for AVX512-BF16 CPUs is missing, which is never used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str):
    """Import torch and transformers (seconds) only for what needs them, which `--help` and GRPOConfig do not."""
    if name in _ELSEWHERE:
        # `from lowmem_grpo import` loses an AttributeError's words; hasattr() knows no other error.
        is_imported = sys._getframe(1).f_code.co_name == "_handle_fromlist"
        raise (ImportError if is_imported else AttributeError)(f"lowmem_grpo has no {name}: {_ELSEWHERE[name]}")
    if name not in _HOMES:
        raise AttributeError(f"module 'lowmem_grpo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

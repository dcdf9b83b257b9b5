"""A score head: one number for each hidden state, and how PEFT has it in an adapter's folder."""

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SCORE = "base_model.model.score.weight"  # its name in an adapter's file, as of a model for sequence classification
WEIGHTS, SETTINGS, RANGE = "adapter_model.safetensors", "adapter_config.json", "score_range.json"


class ScoreHead:
    """Scores h . w of hidden states h, without a bias, in fp32 whatever dtype they are of."""

    def __init__(self, width: int, device: torch.device, seed: int):
        """Draw w of N(0, 1 / (width + 1)), the variance of arXiv:2009.01325, by a generator of its own."""
        draw = torch.Generator().manual_seed(seed)
        weight = torch.randn(1, width, generator=draw) / math.sqrt(width + 1)
        self.weight = nn.Parameter(weight.to(device))  # (1, D) fp32

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """The score (N,) fp32 of each hidden state (N, D)."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return hidden_states.float() @ self.weight[0]

    def load(self, weight: Tensor) -> None:
        """Take over the values (1, D) of another head."""
        with torch.no_grad():
            self.weight.copy_(weight)


def add_to_folder(folder: Path, head: ScoreHead) -> None:
    """Add a score head to the adapter that PEFT has saved in a folder.

    AutoPeftModelForSequenceClassification loads both then, as a model of one label.
    """
    weights = load_file(folder / WEIGHTS)
    save_file({**weights, SCORE: head.weight.detach().cpu()}, folder / WEIGHTS, metadata={"format": "pt"})
    settings = read_settings(folder)
    whole = [*(settings.get("modules_to_save") or []), "score"]
    changed = {**settings, "task_type": "SEQ_CLS", "modules_to_save": whole}
    (folder / SETTINGS).write_text(json.dumps(changed, indent=2, sort_keys=True), encoding="utf-8")


def read_settings(folder: Path) -> dict[str, Any]:
    """The adapter_config.json in a folder."""
    return json.loads((folder / SETTINGS).read_bytes())


def config_without_head(config: PeftConfig) -> PeftConfig:
    """The configuration of an adapter less its score head, as one of a language model has it."""
    given: Any = copy.copy(config)
    whole = set(given.modules_to_save or ()) - {"score", "classifier"}
    given.modules_to_save, given.init_lora_weights, given.task_type = sorted(whole) or None, True, None
    return given


def without_head(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    """An adapter's tensors by name, less its score head's; and that, (1, D), where there is one."""
    rest = dict(weights)
    return rest, rest.pop(SCORE, None)


def save_range(folder: Path, mean: float, deviation: float) -> None:
    """Write where an adapter's scores lie, as score_range.json beside it."""
    settings = {"mean": mean, "std": deviation}
    (folder / RANGE).write_text(json.dumps(settings, indent=1), encoding="utf-8")


def read_range(folder: Path) -> tuple[float, float] | None:
    """Mean and deviation of an adapter's scores over its training pairs; None where they are not known."""
    try:
        saved = json.loads((folder / RANGE).read_bytes())
        mean, deviation = float(saved["mean"]), float(saved["std"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (mean, deviation) if math.isfinite(mean) and 0 < deviation < math.inf else None

"""The adapter of the best evaluation so far, in output_dir/best."""

import json
import math
import os
from pathlib import Path
from typing import Any

from lowmem_grpo.config.training import TrainingConfig
from lowmem_grpo.distributed import by_main
from lowmem_grpo.errors import InputError
from lowmem_grpo.model.policy import Policy
from lowmem_grpo.output.folder import remove, set_aside, write_folder
from lowmem_grpo.output.manifest import damage, write_manifest
from lowmem_grpo.run.checkpoint import read_tensors
from lowmem_grpo.warn import warn


class BestAdapter:
    """output_dir/best: the adapter of the best evaluation so far, and best.json with its step, metric and value.

    It outlives a resume: an evaluation that was better than all before stays the best, even if the run then stopped
    before its next checkpoint and goes on from an earlier one. A fresh run removes what is there. What is damaged is
    set aside with a warning, and the next evaluation is the best.
    """

    def __init__(self, output_dir: Path, config: TrainingConfig, *, fresh: bool):
        self.folder = output_dir / "best"
        name = config.metric_for_best_model or config.measured[0]
        self.metric = name if name.startswith("eval_") else f"eval_{name}"
        is_loss = self.metric.endswith("loss")
        self.sign = 1.0 if (not is_loss if config.greater_is_better is None else config.greater_is_better) else -1.0
        if fresh:
            by_main(remove)(self.folder)
        by_main(self.record)()

    def keep(self, policy: Policy, step: int, metrics: dict[str, float]) -> None:
        """Write the adapter as it is now if its metric is better than the saved one's.

        Raises:
            InputError: the evaluation has no such metric.
        """
        if self.metric not in metrics:
            raise InputError(
                f"metric_for_best_model={self.metric!r} is none of the evaluation's metrics: {', '.join(metrics)}"
            )
        value, kept = metrics[self.metric], self.record()
        if math.isnan(value) or (kept is not None and self.sign * value <= self.sign * kept["value"]):
            return

        def write(temporary: Path) -> None:
            policy.save(temporary)
            record = {"step": step, "metric": self.metric, "value": value}
            (temporary / "best.json").write_text(json.dumps(record), encoding="utf-8")
            write_manifest(temporary, ["adapter_model.safetensors", "best.json"])

        write_folder(self.folder, write)

    def record(self) -> dict[str, Any] | None:
        """The step, metric and value of the best adapter, or None without one by this metric. A damaged one goes."""
        if not os.path.lexists(self.folder):
            return None
        try:
            kept = _read_record(self.folder)
        except InputError as error:
            aside = set_aside(self.folder, "damaged").name
            warn(f"{error}; it is now {aside}, and the next evaluation is the best")
            return None
        return kept if kept["metric"] == self.metric else None

    def load(self, policy: Policy) -> None:
        """Give the policy the saved adapter; without one, where no evaluation had a value, it stays."""
        if by_main(self.record)() is not None:
            weights = read_tensors(self.folder, "adapter_model", "resume without load_best_model_at_end")
            policy.load_adapter_state(policy.adapter, policy.names.from_file(weights))


def _read_record(folder: Path) -> dict[str, Any]:
    """The step, metric and value in a best.json. Raise InputError for a folder that is damaged."""
    why = damage(folder)
    if why:
        raise InputError(f"{folder} is not the adapter of the best evaluation as it was written: {why}")
    try:
        kept = json.loads((folder / "best.json").read_bytes())
        fits = type(kept["step"]) is int and type(kept["metric"]) is str and not math.isnan(kept["value"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        fits = False
    if not fits:
        raise InputError(f"{folder / 'best.json'} has no step, metric and value")
    return kept

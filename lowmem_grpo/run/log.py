"""A step's metrics, under TRL's names, and where they go: metrics.jsonl, and a line that a person watches."""

import contextlib
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset


def write_completions(output_dir: Path, step: int, table: dict[str, list]) -> None:
    """completions/completions_{step}.parquet, one row a completion, as TRL writes it.

    A column that Parquet cannot hold, since a reward function may log anything, is written as text.
    """
    folder = output_dir / "completions"
    folder.mkdir(exist_ok=True)
    path = folder / f"completions_{step:05d}.parquet"
    columns = {"step": [step] * len(table["completion"]), **table}
    try:
        Dataset.from_dict(columns).to_parquet(path)
    except Exception:  # pyarrow's exceptions have no common base, and values may raise their own
        columns = {name: values if _fits_parquet(values) else _as_texts(values) for name, values in columns.items()}
        Dataset.from_dict(columns).to_parquet(path)


def _fits_parquet(values: list) -> bool:
    try:
        Dataset.from_dict({"values": values}).to_parquet(io.BytesIO())
    except Exception:
        return False
    return True


def _as_texts(values: list) -> list[str | None]:
    """str() of each value, with an escape for a character that UTF-8 lacks."""
    return [None if v is None else str(v).encode("utf-8", "backslashreplace").decode() for v in values]


class MetricsLog:
    """metrics.jsonl: one line a step, evaluation or finding. A run resumed at first_step drops the lines after it."""

    def __init__(self, output_dir: Path, first_step: int):
        self.path = output_dir / "metrics.jsonl"
        kept = [line for line in self.lines() if line["step"] <= first_step] if first_step else []
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a line that a crash cut short
                lines.append(json.loads(line))
        return lines

    def evaluation(self, step: int) -> dict[str, Any] | None:
        """The line of the evaluation at a step, if there was one."""
        return next((line for line in self.lines() if "eval_reward" in line and line["step"] == step), None)

    def write(self, line: Mapping[str, float | str]) -> None:
        """Append one line; what is not finite becomes null, which JSON has."""
        with self.path.open("a", encoding="utf-8") as file:
            known = {k: v if isinstance(v, str) or math.isfinite(v) else None for k, v in line.items()}
            file.write(json.dumps(known) + "\n")

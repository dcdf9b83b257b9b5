"""A step's metrics, under TRL's names, and where they go: metrics.jsonl, and a line that a person watches."""

import errno
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from lowmem_grpo.data.text import as_logged
from lowmem_grpo.output.folder import BEING_WRITTEN, set_aside
from lowmem_grpo.output.saved import as_json, is_evaluation, read_lines
from lowmem_grpo.warn import warn


def write_completions(output_dir: Path, step: int, table: dict[str, list]) -> None:
    """completions/completions_{step}.parquet, one row a completion, as TRL writes it.

    A column that Parquet cannot hold, since a reward function may log anything, is written as text.
    """
    path = output_dir / "completions" / f"completions_{step:05d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}{BEING_WRITTEN}")
    chats = {name: [*map(as_logged, values)] for name, values in table.items() if name in ("prompt", "completion")}
    columns = {"step": [step] * len(table["completion"]), **table, **chats}
    try:
        Dataset.from_dict(columns).to_parquet(temporary)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    except Exception:  # pyarrow's exceptions have no common base, and values may raise their own
        columns = {name: values if _fits_parquet(values) else _as_texts(values) for name, values in columns.items()}
        Dataset.from_dict(columns).to_parquet(temporary)
    os.replace(temporary, path)


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
    """metrics.jsonl: one line a step, evaluation or finding. A run resumed at first_step drops the lines after it.

    Lines that cannot be read are dropped too, with a warning, and the file as it was is kept as metrics.jsonl.damaged.
    A last line without an end, which a kill cut short, is no damage.

    Attributes:
        dropped: the lines after first_step, of steps that an earlier process has taken and this one takes again.
    """

    def __init__(self, output_dir: Path, first_step: int):
        self.path = output_dir / "metrics.jsonl"
        kept, num_damaged = read_lines(self.path) if first_step else ([], 0)
        self.dropped = [line for line in kept if line["step"] > first_step]
        if num_damaged or self.path.is_dir():  # which stands in the way of a fresh run, too
            aside = set_aside(self.path, "damaged")
            warn(
                f"{num_damaged} of {num_damaged + len(kept)} lines of {self.path} cannot be read; the run goes on "
                f"without them, and the file as it was is {aside.name}"
            )
        temporary = self.path.with_name(f"{self.path.name}{BEING_WRITTEN}")
        lines = (json.dumps(line) + "\n" for line in kept if line["step"] <= first_step)
        temporary.write_text("".join(lines), encoding="utf-8")
        os.replace(temporary, self.path)
        self.waiting: list[dict[str, Any]] = []  # lines that the disk has refused so far

    def lines(self) -> list[dict[str, Any]]:
        """The lines of the run so far."""
        return read_lines(self.path)[0] + self.waiting

    def evaluation(self, step: int) -> dict[str, Any] | None:
        """The line of the evaluation at a step, if there was one."""
        return next((line for line in self.lines() if is_evaluation(line) and line["step"] == step), None)

    def write(self, line: Mapping[str, float | str]) -> None:
        """Append one line; what is not finite becomes null, which JSON has.

        Raises:
            OSError: the disk refused. The line waits for the next one, and nothing of it is in the file.
        """
        self.waiting.append(as_json(line))
        text = "".join(json.dumps(one) + "\n" for one in self.waiting).encode()
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(text) < len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(end)
                raise
        self.waiting = []


class HeardLog(MetricsLog):
    """The lines of rank 0's metrics.jsonl, in the memory of another rank, which writes none."""

    def __init__(self, lines: list[dict[str, Any]]):
        self.heard = lines

    def lines(self) -> list[dict[str, Any]]:
        """The lines of the run so far."""
        return [*self.heard]

    def write(self, line: Mapping[str, float | str]) -> None:
        """Remember one line; what is not finite becomes None, as it does in the file."""
        self.heard.append(as_json(line))

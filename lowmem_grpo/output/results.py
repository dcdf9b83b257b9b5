"""The results of an earlier run in an output folder, which a new run does not replace."""

import math
import os
from pathlib import Path

from lowmem_grpo.errors import InputError
from lowmem_grpo.output.saved import read_line, read_lines


def refuse_results(output_dir: Path, resume: Path | None, *, begin_anew: bool) -> None:
    """Raise InputError where a run would replace results without checkpoints, or files that no run wrote.

    What a run leaves that was killed before its first step is nothing to keep. With begin_anew, as of
    resume_from_checkpoint="auto", neither is what one leaves that was killed before its first checkpoint.
    """
    adapter = output_dir / "adapter"
    if resume is not None:  # the rest is its own
        held = ["adapter"] if os.path.lexists(adapter) and not (adapter / "adapter_config.json").is_file() else []
    else:
        steps = {"adapter": math.inf, "best": _best_step(output_dir), "metrics.jsonl": _logged_step(output_dir)}
        steps["completions"] = max(map(_step_of, output_dir.glob("completions/completions_*.parquet")), default=0)
        least = math.inf if begin_anew else 1
        held = [name for name, step in steps.items() if step >= least and os.path.lexists(output_dir / name)]
    if held:
        whose = "of an earlier run, but no checkpoint of it" if resume is None else "that no run wrote"
        raise InputError(
            f"{output_dir} holds {' and '.join(held)} {whose}, and would lose it to this one; move it away, or choose "
            "another output_dir"
        )


def _best_step(output_dir: Path) -> float:
    """The step of output_dir/best, 0 where there is none, and infinity where no run wrote it."""
    if not os.path.lexists(output_dir / "best"):
        return 0
    try:
        record = read_line((output_dir / "best/best.json").read_bytes())
    except OSError:
        record = None
    return math.inf if record is None else record["step"]


def _logged_step(output_dir: Path) -> float:
    """The last step in metrics.jsonl, 0 where there is none, and infinity where no run wrote the file."""
    lines, num_unread = read_lines(output_dir / "metrics.jsonl")
    return math.inf if num_unread else max((line["step"] for line in lines), default=0)


def _step_of(table: Path) -> int:
    digits = table.stem.removeprefix("completions_")
    return int(digits) if digits.isdecimal() else 0

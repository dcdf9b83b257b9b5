"""The results of an earlier run in an output folder, which a new run does not replace."""

import json
import math
import os
from pathlib import Path

from lowmem_grpo.errors import InputError


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
        return _step_in((output_dir / "best/best.json").read_bytes())
    except OSError:
        return math.inf


def _logged_step(output_dir: Path) -> float:
    """The last step in metrics.jsonl, 0 where there is none, and infinity where no run wrote the file."""
    try:
        *lines, _ = (output_dir / "metrics.jsonl").read_bytes().split(b"\n")  # the last may be cut short
    except FileNotFoundError:
        return 0
    except OSError:  # a folder
        return math.inf
    return max(map(_step_in, lines), default=0)


def _step_in(text: bytes) -> float:
    """The step in a line or file of JSON that a run wrote, or infinity for what none did."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return math.inf
    step = found.get("step") if isinstance(found, dict) else None
    return step if type(step) is int else math.inf


def _step_of(table: Path) -> int:
    digits = table.stem.removeprefix("completions_")
    return int(digits) if digits.isdecimal() else 0

"""samples.jsonl: completions of a few held-out prompts, at the first evaluation of a run and at its last."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowmem_grpo.output.folder import write_file
from lowmem_grpo.output.saved import as_json, read_lines

NAME = "samples.jsonl"


def write_samples(folder: Path, step: int, samples: Sequence[dict[str, Any]]) -> None:
    """Write an evaluation's samples with the step, beside those of the first evaluation and in place of all others.

    Raises:
        OSError: the disk refused, and the file is as it was.
    """
    if not samples:
        return
    earlier = [line for line in read_lines(folder / NAME)[0] if line["step"] < step]
    first = min((line["step"] for line in earlier), default=step)
    lines = [line for line in earlier if line["step"] == first]
    lines += [{"step": step, **as_json(sample)} for sample in samples]
    write_file(folder / NAME, "".join(json.dumps(line) + "\n" for line in lines))

"""examples/sums.py with a real model, as its README section shows it: held-out accuracy, CPU-seconds and memory.

    python -m lowmem_grpo.benchmarks.bench_example --model FOLDER [--seeds 0 1] [--output FILE]

Each seed has a process of its own. What is shown is what the example prints and logs, nothing measured anew.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from lowmem_grpo.benchmarks import measure

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "sums.py"
ACCURACY = "eval_pass@1"


def outcome(output_dir: Path, printed: str) -> dict[str, Any]:
    """Evaluations as (step, accuracy, low, high), rewards by step, the paired difference, CPU-seconds and peak MiB."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluated = [line for line in lines if ACCURACY in line]
    used = re.search(r"^(\d+) CPU-seconds, peak resident memory (\d+) MiB", printed, flags=re.MULTILINE)
    if used is None:
        raise ValueError(f"{EXAMPLE.name} printed no CPU-seconds")
    return {
        "evaluations": [
            [line["step"], *(line[f"{ACCURACY}{end}"] for end in ("", "/ci_low", "/ci_high"))] for line in evaluated
        ],
        "difference": [evaluated[-1][f"{ACCURACY}/difference{end}"] for end in ("", "/ci_low", "/ci_high")],
        "rewards": [line["reward"] for line in lines if "loss" in line],
        "cpu_s": int(used[1]), "peak_mib": int(used[2]),
    }  # fmt: skip


def run_one(model: str, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(EXAMPLE), "--model", model, "--seed", str(seed), "--output_dir", folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=True)
        return outcome(Path(folder), done.stdout)


def tables(found: dict[str, Any]) -> str:
    """The document as a table for people: a row a seed."""
    header = [
        f"{found['work']['model']}, right of held-out sums", "before", "after", "difference", "CPU s", "peak MiB",
    ]  # fmt: skip
    rows = []
    for seed, run in zip(found["work"]["seeds"], found["results"], strict=True):
        ends = [_with_interval(*run["evaluations"][place][1:]) for place in (0, -1)]
        rows.append(
            [f"seed {seed}", *ends, _with_interval(*run["difference"], sign="+"), f"{run['cpu_s']}",
             f"{run['peak_mib']}"]
        )  # fmt: skip
    return measure.markdown_table(header, rows)


def _with_interval(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{value:{sign}.3f} ({low:{sign}.2f} to {high:{sign}.2f})"


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--model", required=True, help="folder of a real model, SmolLM2-135M-Instruct for one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    given = parser.parse_args(argv)
    if not EXAMPLE.is_file():
        parser.error(f"{EXAMPLE} is in a clone alone, not in an installed package")
    work = {"model": Path(given.model).resolve().name, "seeds": given.seeds}
    shown = [word.replace(given.model, work["model"]) for word in (sys.argv[1:] if argv is None else argv)]
    results = [run_one(given.model, seed) for seed in given.seeds]
    found = measure.document("bench_example", shown, torch.device("cpu"), work=work, results=results)
    measure.save(found, given.output)
    measure.show(tables(found))


if __name__ == "__main__":
    main()

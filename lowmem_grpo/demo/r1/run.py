"""`make demo-r1`: the phases of R1 on the second embedded model, and a table of what each has changed."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from rich.console import Console
from rich.table import Table

from lowmem_grpo.demo.r1 import task
from lowmem_grpo.errors import InputError, printable_text
from lowmem_grpo.output.folder import writable_folder
from lowmem_grpo.pipeline.file import read_pipeline_file
from lowmem_grpo.pipeline.pipeline import PipelineResult, run_pipeline

MODEL = Path(__file__).parent / "model"
RECIPE = Path(__file__).parent / "r1.yaml"
COLUMNS = {  # of the table: heading, metric, form
    "right": ("eval_rewards/accuracy_reward/mean", ".3f"),
    "in tags": ("eval_rewards/think_format_reward/mean", ".3f"),
    "in the prompt's script": ("eval_rewards/language_consistency_reward/mean", ".3f"),
    "kind": ("eval_rewards/kind_reward/mean", ".2f"),
    "tokens": ("eval_completions/mean_length", ".1f"),
}


def run(seed: int = 0, output_dir: str | None = None) -> PipelineResult:
    """Run the phases in a folder, or go on where they stopped, and print what each has changed."""
    output_dir = time.strftime("demo-output/r1-%Y-%m-%d-%H%M%S") if output_dir is None else output_dir
    return run_recipe(write_recipe(writable_folder(output_dir), seed))


def write_recipe(folder: Path, seed: int) -> Path:
    """Write r1.yaml, with the paths of this run, and the data that it names. Returns its path.

    Raises:
        InputError: the folder is that of a run of another seed, or cannot be written.
    """
    path = folder / RECIPE.name
    if path.is_file():
        before = (read_pipeline_file(str(path)).get("common") or {}).get("seed")
        if before != seed:
            raise InputError(f"{path} is of seed {before}, and not of {seed}; set that, or choose another output_dir")
    paths = {name.upper().replace("-", "_"): str(folder / "data" / f"{name}.jsonl") for name in task.FILES}
    values = {"MODEL": str(MODEL), "FOLDER": str(folder), "SEED": seed, **paths}
    text = Template(RECIPE.read_text(encoding="utf-8")).substitute(
        {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
    )
    try:
        task.write_data(folder / "data")
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{error.filename} cannot be written: {error.strerror}; choose another output_dir") from error
    return path


def run_recipe(path: Path) -> PipelineResult:
    """Run the phases of a file that write_recipe() wrote, and print what each has changed."""
    console = Console(highlight=False, markup=False, emoji=False)
    console.print("R1's phases on a CPU: a Qwen2 of 0.6 million parameters, which is wrong in several ways.\n")
    started = time.process_time()
    settings = read_pipeline_file(str(path))
    result = run_pipeline(
        settings["model"], settings["phases"], settings["output_dir"], common=settings["common"],
        evaluation=settings["eval"],
    )  # fmt: skip
    console.print(table(result.evaluations))
    cpu_s = time.process_time() - started
    console.print(printable_text(f"\n{cpu_s:.0f} CPU-seconds\nphases   {path.parent}\nrecipe   {path}"), soft_wrap=True)
    return result


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The evaluations of the base and of what each phase has trained, a line each."""
    found = Table(title=f"\n{task.NUM_EVAL} held-out sums and {len(task.EVAL_NAMES)} greetings, four samples of each")
    for title in ("after", "from", *COLUMNS):
        found.add_column(title, justify="left" if title in ("after", "from") else "right")
    for row in rows:
        found.add_row(
            row["phase"], row["from"] or "", *(format(row[metric], form) for metric, form in COLUMNS.values())
        )
    return found

"""`make demo-r1`: the phases of R1 on the embedded model, and a table of what each has changed."""

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from lowmem_grpo.config.select import SelectConfig
from lowmem_grpo.demo.r1 import task
from lowmem_grpo.errors import printable_text
from lowmem_grpo.pipeline.phases import Phase
from lowmem_grpo.pipeline.pipeline import PipelineResult, run_pipeline
from lowmem_grpo.pipeline.sampled import read_sampled
from lowmem_grpo.pipeline.select import as_text, select, write_rows

MODEL = Path(__file__).parent / "model"
MAX_COMPLETION_LENGTH = 40
FORM = ["accuracy_reward", "think_format_reward", "language_consistency_reward"]
KIND = "get_routed_reward(reward='lowmem_grpo.demo.r1.task.kind_reward', values=['greeting'], name='kind_reward')"
SELECTION = SelectConfig(min_reward=1, reward_of="all", per_prompt=2)


def recipe(data: Path) -> list[Phase]:
    """R1's phases, with settings under which each had its effect with three of three seeds."""
    rl: dict[str, Any] = {
        "learning_rate": 1e-3, "beta": 0.02, "max_steps": 40, "loss_type": "grpo",
        "max_completion_length": MAX_COMPLETION_LENGTH,
    }  # fmt: skip
    sft: dict[str, Any] = {"learning_rate": 2e-3, "examples_per_step": 16}
    return [
        Phase("cold-start", "sft", dataset=f"{data}/cold.jsonl", num_train_epochs=6, **sft),
        Phase(
            "reasoning-rl", "grpo", dataset=f"{data}/sums.jsonl", reward_funcs=FORM, reward_weights=[1.0, 0.2, 0.5],
            **rl,
        ),
        Phase(
            "rejection-sampling", "sample", dataset=f"{data}/sums.jsonl", dataset_take=400, num_generations=4,
            prompts_per_step=40, reward_funcs=FORM, max_completion_length=MAX_COMPLETION_LENGTH,
        ),
        Phase(
            "sft", "sft", from_="base", dataset=[f"{data}/selected.jsonl", f"{data}/general.jsonl"],
            num_train_epochs=2, **sft,
        ),
        Phase(
            "last-rl", "grpo", dataset=f"{data}/mixed.jsonl", reward_funcs=[*FORM, KIND],
            reward_weights=[1.0, 0.2, 0.5, 1.0], **rl,
        ),
    ]  # fmt: skip


def run(
    seed: int = 0, output_dir: str | None = None, *, until: str | None = None, selection: SelectConfig = SELECTION
) -> PipelineResult:
    """Run the phases in a folder, or go on where they stopped, and print the table of evaluations."""
    console = Console(highlight=False, markup=False, emoji=False)
    folder = Path(time.strftime("demo-output/r1-%Y-%m-%d-%H%M%S") if output_dir is None else output_dir)
    data, started = folder / "data", time.process_time()
    task.write_data(data)
    phases = recipe(data)
    given: dict[str, Any] = {
        "common": {
            "seed": seed, "use_cpu": True, "gradient_checkpointing": False,
            "model_init_kwargs": {"attn_implementation": "eager"},
        },
        "evaluation": {
            "dataset": f"{data}/held-out.jsonl", "reward_funcs": [*FORM, KIND], "num_generations_eval": 4,
            "max_completion_length": MAX_COMPLETION_LENGTH,
        },
    }  # fmt: skip
    sampled = [phase.name for phase in phases].index("rejection-sampling")
    before = until if until in [phase.name for phase in phases[:sampled]] else "rejection-sampling"
    result = run_pipeline(str(MODEL), phases, str(folder), **given, until=before)
    if until not in [phase.name for phase in phases[: sampled + 1]]:
        chosen = select(read_sampled(folder / "03-rejection-sampling/sampled.jsonl"), selection)
        console.print(printable_text(as_text(chosen.funnel)))
        write_rows(data / "selected.jsonl", chosen.rows)
        result = run_pipeline(str(MODEL), phases, str(folder), **given, until=until)
    console.print(printable_text(f"\n{time.process_time() - started:.0f} CPU-seconds\nphases   {folder}"))
    return result

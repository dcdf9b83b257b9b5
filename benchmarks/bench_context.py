"""The predicted peak of a training step against the length of its completions; nothing is measured.

    python -m lowmem_grpo.benchmarks.bench_context [--shape NAME ...] [--max_completion_length N ...] [--output FILE]

Steps of 8 prompts of 512 tokens x 8 completions at GRPOConfig's defaults, and with every setting by which the plan can
save memory, as for a card that is too small. What the prediction was tested against is in the README's status.
"""

from typing import Any

import torch

from lowmem_grpo.benchmarks import measure
from lowmem_grpo.benchmarks.random_model import SHAPES, make_config
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.planner import plan as planner

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
WAYS = {"defaults": None, "every saving": "0.1GB"}  # vram_budget


def peak(shape: str, length: int, budget: str | None) -> int:
    """Predicted peak of a step, in bytes."""
    config = GRPOConfig(max_completion_length=length, max_prompt_length=512, vram_budget=budget)
    return planner.plan(make_config(shape, 0, 1), config).forecast.peak()


def tables(found: dict[str, Any]) -> str:
    """The document as tables for people."""
    rows = [
        [f"{shape}, {way}", *(f"{value / 10**9:.1f}" for value in peaks)]
        for shape, ways in found["predicted"].items()
        for way, peaks in ways.items()
    ]
    return measure.markdown_table(["predicted peak, GB, by completion length", *map(str, found["lengths"])], rows)


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["qwen2.5-1.5b", "qwen2.5-7b"])
    parser.add_argument("--max_completion_length", type=measure.positive, nargs="+", default=list(LENGTHS))
    given = parser.parse_args(argv)
    predicted = {
        shape: {
            way: [peak(shape, length, budget) for length in given.max_completion_length] for way, budget in WAYS.items()
        }
        for shape in given.shape
    }
    found = measure.document(
        "bench_context", argv, torch.device("cpu"), lengths=given.max_completion_length, predicted=predicted
    )
    measure.show(tables(found))
    measure.save(found, given.output)


if __name__ == "__main__":
    main()

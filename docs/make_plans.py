"""Writes what real models are predicted to take into docs/models.md: `python docs/make_plans.py`, minutes of CPU."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from lowmem_grpo.benchmarks.bench_budgets import cell
from lowmem_grpo.benchmarks.measure import markdown_table
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.planner.plan import as_dict, plan

PLACE = Path(__file__).with_name("models.md")
CONFIGS = Path(__file__).parents[1] / "benchmarks" / "configs"
BEGIN, END = "<!-- made by docs/make_plans.py -->\n", "<!-- end -->\n"
BUDGETS = ("8GB", "12GB", "16GB", "24GB")
LENGTHS: dict[str, Any] = {"max_prompt_length": 512, "max_completion_length": 1024}


def models() -> dict[str, Any]:
    """The configurations of real models, by their names."""
    found = {}
    for path in sorted(CONFIGS.glob("*.json")):
        settings = json.loads(path.read_text(encoding="utf-8"))
        del settings["source"]
        found[path.stem] = AutoConfig.for_model(settings.pop("model_type"), **settings)
    return found


def row(name: str, model: Any) -> list[str]:
    """A model's name, and its predicted peak with each budget, with letters for what the plan changed."""
    plans = (plan(model, GRPOConfig(vram_budget=budget, **LENGTHS)) for budget in BUDGETS)
    return [name, *(cell({"plan": as_dict(found)}) for found in plans)]


def with_table(page: str, rows: list[list[str]]) -> str:
    """The page with the table between the marks made of these rows."""
    before, _, rest = page.partition(BEGIN)
    table = markdown_table(["predicted peak, GB", *BUDGETS], rows)
    return f"{before}{BEGIN}\n{table}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    rows = [row(name, model) for name, model in models().items()]
    PLACE.write_text(with_table(PLACE.read_text(encoding="utf-8"), rows), encoding="utf-8")

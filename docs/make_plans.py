"""Writes docs/predicted.md, what real models are predicted to take on small cards: `python docs/make_plans.py`."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.errors import InputError
from lowmem_grpo.planner.plan import plan

PLACE = Path(__file__).with_name("predicted.md")
CONFIGS = Path(__file__).parents[1] / "tests" / "configs"
BUDGETS = (8, 12, 16, 24)
LENGTHS = {"max_prompt_length": 512, "max_completion_length": 1024}
HEADER = """\
# What fits, predicted

**Predicted by `lowmem-grpo plan`, not measured.** GRPO with default settings, prompts of 512 and completions of 1024
tokens, in 4 bits, without a vision or audio tower, on a GPU of so many GB of 10^9 bytes. A cell has the peak, and the
settings that the plan changed to fit; "no" is followed by the change of the task that would fit. The configurations are
in `tests/configs/`, each with its source. This page is made by `python docs/make_plans.py`.
"""


def models() -> dict[str, Any]:
    """The configurations of real models, by their names."""
    found = {}
    for path in sorted(CONFIGS.glob("*.json")):
        settings = json.loads(path.read_text(encoding="utf-8"))
        del settings["source"]
        found[path.stem] = AutoConfig.for_model(settings.pop("model_type"), **settings)
    return found


def cell(model: Any, budget: int) -> str:
    """What the plan of a model says for a budget in GB."""
    try:
        found = plan(model, GRPOConfig(vram_budget=f"{budget}GB", **LENGTHS))
    except InputError as error:
        return str(error)
    if found.remedy is not None:
        return f"no; {found.remedy}"
    peak = f"{found.forecast.peak() / 10**9:.1f} GB"
    return "<br>".join([peak, *(f"`{change.name}={change.value}`" for change in found.changes)])


def page() -> str:
    """The whole of predicted.md."""
    lines = [HEADER, f"| model | {' | '.join(f'{budget} GB' for budget in BUDGETS)} |", f"|---{'|---' * len(BUDGETS)}|"]
    for name, model in models().items():
        lines.append(f"| {name} | {' | '.join(cell(model, budget) for budget in BUDGETS)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    PLACE.write_text(page(), encoding="utf-8")

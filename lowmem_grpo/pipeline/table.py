"""The evaluations of a pipeline: before the first phase and after each that trains the policy, in one table."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_grpo.errors import printable
from lowmem_grpo.evaluation.evaluate import measure
from lowmem_grpo.evaluation.show import with_interval
from lowmem_grpo.evaluation.statistics import differences
from lowmem_grpo.inputs.prompts import read_evaluation_inputs
from lowmem_grpo.model.find import adapter_config, read_config
from lowmem_grpo.output import markdown
from lowmem_grpo.output.saved import as_json
from lowmem_grpo.pipeline.kinds import entries
from lowmem_grpo.pipeline.phases import Evaluation
from lowmem_grpo.pipeline.record import content, settings_of_the_result, write_json, write_whole
from lowmem_grpo.planner.plan import for_evaluation, limit_memory, plan_to_fit
from lowmem_grpo.report.pipeline import LENGTH, foremost_of
from lowmem_grpo.report.reading import EVALUATION
from lowmem_grpo.terminal import fitted, table
from lowmem_grpo.tools.conversation import sampler_of


@dataclass(frozen=True)
class Row:
    """An evaluation of the table: of the model that a pipeline is given, or after a phase."""

    phase: str
    origin: str | None  # the row whose adapter the phase went on with
    metrics: dict[str, float | None]  # None for the mean of nothing
    values: dict[str, list[float | None]]  # of the metrics that are means over prompts, one a prompt


def evaluated(folder: Path, model: str, evaluation: Evaluation) -> dict[str, Any]:
    """Metrics and values of a model's evaluation, measured and written into the folder."""
    found = {"of": _identity(model, evaluation), **_measured(model, evaluation)}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / EVALUATION, found)
    return found


def known(folder: Path, model: str, evaluation: Evaluation) -> dict[str, Any] | None:
    """The content of folder/evaluation.json; None without one of this model, on these prompts and by these rewards."""
    try:
        found = json.loads((folder / EVALUATION).read_bytes())
        return found if found["of"] == _identity(model, evaluation) else None
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or a damaged one
        return None


def _identity(model: str, evaluation: Evaluation) -> dict[str, Any]:
    of = {
        "model": content(model),
        "settings": settings_of_the_result(evaluation.config),
        "dataset": content(evaluation.dataset),
        "reward_funcs": [content(one) for one in entries(evaluation.reward_funcs)],
    }
    for name, given in evaluation.called.items():  # keys that evaluations of earlier versions lack
        of[name] = [content(one) for one in entries(given)]
    return json.loads(json.dumps(of, default=str))


def _measured(model: str, evaluation: Evaluation) -> dict[str, Any]:
    inputs = read_evaluation_inputs(
        model, evaluation.reward_funcs, evaluation.dataset, evaluation.config, **evaluation.called
    )
    config, found = inputs.config, None
    if evaluation.vram_budget is not None:
        planned = dataclasses.replace(config, vram_budget=evaluation.vram_budget)
        longest = max(len(prompt.ids) for prompt in inputs.eval_prompts)
        found = plan_to_fit(read_config(model, config), planned, adapter_config(model, config), longest)
        config = dataclasses.replace(config, rollout_token_budget=for_evaluation(found, config).rollout_token_budget)
    with limit_memory(found, inputs.device):
        sampler = sampler_of(inputs.load_policy(), config, inputs.toolbox)
        measured = measure(sampler, inputs.eval_prompts, inputs.rewards, config, step=0)
    return as_json({"metrics": measured.metrics, "values": measured.values})


def with_changes(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The table's rows as JSON: their metrics, and the differences from the row that each phase went on from."""
    by_name = {row.phase: row for row in rows}
    found = []
    for row in rows:
        before = None if row.origin is None else by_name.get(row.origin)
        changed = {}
        if before is not None:
            changed = differences(_with_nan(before.values), _with_nan(row.values))
        found.append({"phase": row.phase, "from": row.origin, **row.metrics, **as_json(changed)})
    return found


def _with_nan(values: Mapping[str, Sequence[float | None]]) -> dict[str, list[float]]:
    return {name: [math.nan if value is None else value for value in of] for name, of in values.items()}


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The cells of the table, by heading."""
    title, foremost = foremost_of(rows)
    rewards = [name for name in rows[0] if name.startswith("eval_rewards/") and name.count("/") == 2]
    shown = {title: (foremost, ".3f"), "change": (f"{foremost}/difference", "+.3f")}
    shown |= {name.split("/")[1]: (name, ".3f") for name in rewards if name.endswith("/mean")}
    shown |= {"tokens": (LENGTH, ".1f")}
    cells = {title: [_cell(row, name, form) for row in rows] for title, (name, form) in shown.items()}
    return {"after": [str(row["phase"]) for row in rows], "from": [str(row["from"] or "") for row in rows], **cells}


def _cell(row: Mapping[str, Any], name: str, form: str) -> str:
    return with_interval(row, name, form) if name in row else ""


def as_table(rows: Sequence[Mapping[str, Any]], width: int | None) -> str:
    """The table for a terminal of so many columns."""
    columns = _columns(rows)
    title = "evaluations before and after each phase; in brackets 95 % intervals over prompts"
    cells = list(zip(*columns.values(), strict=True))
    return f"{fitted(title, width)}\n\n{table(list(columns), cells, width, left=('from',))}\n"


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown."""
    columns = _columns(rows)
    lines = [[*map(printable, line)] for line in (columns, *zip(*columns.values(), strict=True))]
    return f"{markdown.table(lines[0], lines[1:])}\n"


def write_table(folder: Path, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Write evaluations.json and evaluations.md, and return what is in the first."""
    found = with_changes(rows)
    write_json(folder / "evaluations.json", found)
    write_whole(folder / "evaluations.md", as_markdown(found))
    return found


def row_of(phase: str, origin: str | None, found: Mapping[str, Any]) -> Row:
    """The row of what evaluated() has returned."""
    return Row(phase, origin, found["metrics"], found["values"])

"""The parts of a pipeline's page: a row a phase, from the files of the phases' folders."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowmem_grpo.output.saved import read_object
from lowmem_grpo.report.chart import in_words
from lowmem_grpo.report.page import METHODS, dot_of, duration, headline_of, method_of, shortened, state_of, when
from lowmem_grpo.report.reading import DONE, OF_A_PHASE, is_run, mapping, number, phases_to_come, read_run, texts

OF_A_KIND = {"sample": "Sampling", "select": "Selection", "pairs": "Pairs"}
MOST_METRICS = 8
SHA_256 = re.compile("[0-9a-f]{64}")
ACCURACY, REWARD, LENGTH = "eval_pass@1", "eval_reward", "eval_completions/mean_length"


def pipeline_page_of(folder: Path, phases: Sequence[Path]) -> dict[str, Any]:
    """All that the template pipeline.html shows of a pipeline, by the names that it has there."""
    table = _table(folder)
    measure, foremost = foremost_of(table)
    planned = phases_to_come(folder)
    rows = [_row(path, table, foremost, planned.get(path, {})) for path in phases]
    rows = [row for row in rows if row["kind"] or row["after"]]
    values = [row["value"] for row in rows if row["value"] is not None]
    for row in rows:
        row["bars"] = _bars(row, max(values, default=0.0))
    base = next((row for row in rows if row["number"] == 0 and row["value"] is not None), None)
    measured = [row for row in rows if row["value"] is not None]
    return {
        "name": folder.resolve().name, "rows": rows, "measure": measure,
        "headline": [row["after"].partition(" ") for row in (base, measured[-1])] if base and len(measured) > 1 else [],
        "last": measured[-1]["name"] if measured else "",
        "has_evaluations": bool(measured), "num_phases": sum(row["number"] > 0 for row in rows),
        "are_all_known": bool(planned),
        "num_done": sum(row["state"] == "finished" for row in rows if row["number"] > 0),
    }  # fmt: skip


def foremost_of(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The foremost metric, its word and its name: accuracy, or the reward where none is 1, as of a judge."""
    is_graded = any(number(row.get(REWARD)) for row in rows) and not any(number(row.get(ACCURACY)) for row in rows)
    return ("reward", REWARD) if is_graded else ("accuracy", ACCURACY)


def _table(folder: Path) -> list[dict[str, Any]]:
    """The rows of evaluations.json; none where it is missing or damaged."""
    try:
        found = json.loads((folder / "evaluations.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def _row(path: Path, table: Sequence[dict[str, Any]], foremost: str, planned: Mapping[str, Any]) -> dict[str, Any]:
    """A phase; of one that has not begun what was written of it where the pipeline began."""
    match = OF_A_PHASE.fullmatch(path.name)
    assert match is not None
    name, done = match[2], read_object(path / DONE)
    line = next((row for row in table if row.get("phase") == name), {})
    kind = str(done.get("kind") or planned.get("kind"))
    row: dict[str, Any] = {
        "number": int(match[1]), "name": name, "kind": OF_A_KIND.get(kind) or METHODS.get(kind, ""), "data": "",
        "state": "finished" if done else "begun" if path.is_dir() else "not begun", "link": "", "own": None,
        "time": "", "metrics": [], "from": line.get("from", planned.get("from")),
        "after": dot_of(line, foremost), "change": dot_of(line, f"{foremost}/difference"),
        "value": number(line.get(foremost)), "low": number(line.get(f"{foremost}/ci_low")),
        "high": number(line.get(f"{foremost}/ci_high")), "length": number(line.get(LENGTH)), "when": "",
    }  # fmt: skip
    if is_run(path):
        run = read_run(path)
        seconds = sum(value for _, value in run.values("step_time"))
        state = state_of(run)
        row |= {
            "kind": method_of(run.kind, run.settings), "time": duration(seconds) if run.steps else "",
            "own": headline_of(run),
            "data": ", ".join(_names(mapping(run.about.get("datasets")).get("train"))),
            "state": state["word"], "link": f"{path.name}/report.html" if (path / "report.html").is_file() else "",
            "when": when(run.about.get("started")),
        }  # fmt: skip
    elif done:
        given = mapping(done.get("inputs")).get("dataset")
        metrics = [(key, number(value)) for key, value in mapping(done.get("metrics")).items()]
        row["data"] = ", ".join(_names(given))
        row["metrics"] = [(key, in_words(value)) for key, value in metrics if value is not None][:MOST_METRICS]
    return row


def _names(given: Any) -> list[str]:
    """The names of datasets, of a path its last part; a SHA-256, as records have of files, is left out."""
    entries = [name for one in (given if isinstance(given, list) else [given]) for name in texts(one)]
    return [shortened(name.rpartition("/")[2], 80) for name in entries if not SHA_256.fullmatch(name)]


def _bars(row: dict[str, Any], largest: float) -> dict[str, float] | None:
    """The bar of an evaluation and its interval, in per cent of the greatest value, or of 1."""
    if row["value"] is None:
        return None
    scale = 100 / max(1.0, largest, row["high"] or 0.0)
    low, high = (row["value"] if end is None else end for end in (row["low"], row["high"]))
    bars = {"width": row["value"] * scale, "low": low * scale, "span": (high - low) * scale}
    return {name: max(0.0, value) for name, value in bars.items()}

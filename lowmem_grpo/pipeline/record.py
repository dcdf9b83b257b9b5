"""Settings and inputs that a phase was made of: kept in its folder, compared when the pipeline goes on."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from lowmem_grpo.errors import InputError, NotSavedError, shown
from lowmem_grpo.inputs.identity import digest_of
from lowmem_grpo.lookup import is_adapter
from lowmem_grpo.output.folder import write_file
from lowmem_grpo.paths import expanded
from lowmem_grpo.pipeline.kinds import entries
from lowmem_grpo.pipeline.phases import BASE, PhaseRun, Pipeline
from lowmem_grpo.report.reading import DONE, PIPELINE
from lowmem_grpo.tasks import is_task_name

FORMAT = 1
# Settings that a resumed run may change, and that still decide what it ends with; and one that does not.
OF_THE_RESULT = (
    "max_steps", "num_train_epochs", "load_best_model_at_end", "metric_for_best_model", "num_generations_eval",
)  # fmt: skip
WEIGHTS_AND_SETTINGS = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")  # of a model's folder
MODELS = ("teacher",)  # of the settings, those that are inputs
OF_THE_CARD = ("vram_budget",)
MEASURED = ("time/", "memory/", "tokens_per_s/", "step_time")  # of metrics
SAMPLE = 2**20  # bytes, of a model's file: its first and its last ones


def fingerprint(pipeline: Pipeline, run: PhaseRun) -> dict[str, Any]:
    """Kind, settings and inputs of a phase as JSON: files by the SHA-256 of their content, all else by name."""
    settings = settings_of_the_result(run.config)
    inputs: dict[str, Any] = {"model": content(pipeline.model_of(run))} if run.kind.has_model else {}
    for name, value in run.inputs.items():
        inputs[name] = [_content(pipeline, run, one) for one in entries(value)]
    _take_models(settings, inputs)
    return json.loads(json.dumps({"kind": run.kind.name, "settings": settings, "inputs": inputs}, default=str))


def _take_models(settings: dict[str, Any], inputs: dict[str, Any]) -> None:
    """Make inputs of the settings that name a model, in the record of an older version, too."""
    inputs |= {name: content(settings.pop(name)) for name in MODELS if settings.get(name) is not None}


def settings_of_the_result(config: Any) -> dict[str, Any]:
    """The settings of a configuration that decide what a run or an evaluation ends with."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name in OF_THE_RESULT or not (field.metadata.get("may_change") or field.name in OF_THE_CARD)
    }


def _content(pipeline: Pipeline, run: PhaseRun, value: Any) -> Any:
    """The identity of an input; of one that names phases, also that of what they have made."""
    named = pipeline.named(run, value)
    return [value, *(content(one.output) for one in named)] if named else content(value)


def content(value: Any) -> Any:
    """The identity of an input: SHA-256 of a file or of rows; else a function's name, or the text."""
    if isinstance(value, (str, Path)):
        is_task = is_task_name(str(value))  # which a folder may be named, too
        there = not is_task and os.path.exists(expanded(value))
        return _of_path(Path(expanded(value))) if there else str(value)
    if isinstance(value, (list, tuple, Dataset)):
        return digest_of(value)
    if isinstance(value, Mapping):  # of environments
        return {str(name): content(one) for name, one in value.items()}
    return getattr(value, "__name__", type(value).__name__)


def _of_path(path: Path) -> str:
    """SHA-256 of a file, of an adapter's files, or of the names, sizes and ends of a folder's other files."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    of_adapter = is_adapter(str(path))
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        name = str(file.relative_to(path))
        if of_adapter and not name.startswith("adapter_"):
            continue
        if (path / "config.json").is_file() and file.suffix not in WEIGHTS_AND_SETTINGS:
            continue
        digest.update(f"{name} {file.stat().st_size}\n".encode())
        with file.open("rb") as opened:
            if of_adapter:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
            else:
                digest.update(opened.read(SAMPLE))
                opened.seek(max(SAMPLE, file.stat().st_size - SAMPLE))
                digest.update(opened.read())
    return digest.hexdigest()


def is_done(run: PhaseRun) -> bool:
    """Tell whether a phase has come to its end."""
    return (run.folder / DONE).is_file()


def write_record(run: PhaseRun, made_of: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
    """Write a phase's done.json, with the metrics but for time and memory, which another run would not share."""
    kept = {name: value for name, value in metrics.items() if not name.startswith(MEASURED)}
    write_json(run.folder / DONE, {"format": FORMAT, **made_of, "metrics": kept})


def read_record(run: PhaseRun) -> dict[str, Any]:
    """The content of a phase's done.json. Raise InputError where it is damaged."""
    try:
        found = json.loads((run.folder / DONE).read_bytes())
        if found["format"] == FORMAT and all(isinstance(found[key], dict) for key in ("settings", "inputs", "metrics")):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{run.folder / DONE} cannot be read; remove it, and the phase goes on from its last checkpoint")


def refuse_changed(run: PhaseRun, made_of: Mapping[str, Any]) -> None:
    """Raise InputError where a phase that is done was made of something else than it would be now.

    Settings that only one of two versions knows are not compared.
    """
    saved = read_record(run)
    _take_models(saved["settings"], saved["inputs"])
    now, before = made_of["settings"], saved["settings"]
    changed = [
        f"{name} {shown(before[name])}, which is {shown(now[name])} now"
        for name in now
        if name in before and now[name] != before[name]
    ]
    if made_of["kind"] != saved["kind"]:
        changed = [f"the kind {saved['kind']}, which is {made_of['kind']} now"]
    elif not changed:
        inputs = {**saved["inputs"], **made_of["inputs"]}
        changed = [f"another {name}" for name in inputs if made_of["inputs"].get(name) != saved["inputs"].get(name)]
    if changed:
        raise InputError(
            f"it is done, with {changed[0]}; set that back, or do the phase and all after it anew with "
            f"--from {run.name}, or choose another output_dir"
        )
    if not run.output.exists():
        raise InputError(f"it is done, but {run.output} is gone; put it back, or do it anew with --from {run.name}")


def write_phases(pipeline: Pipeline) -> None:
    """Write pipeline.json: the phases, for whoever wants to know what is to come."""
    rows = [
        {"folder": run.folder.name, "kind": run.kind.name, "from": origin_of(run) if run.kind.has_model else None}
        for run in pipeline.runs
    ]
    write_json(pipeline.output_dir / PIPELINE, {"format": FORMAT, "phases": rows})


def origin_of(run: PhaseRun) -> str:
    """The name of what a phase's model is: a phase before it, or the pipeline's own."""
    return BASE if run.origin is None else run.origin.name


def write_json(path: Path, value: Any) -> None:
    """Write a file of JSON as write_whole() does."""
    write_whole(path, json.dumps(value, indent=1))


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all. Raise NotSavedError where the disk refuses."""
    try:
        write_file(path, text)
    except OSError as error:
        raise NotSavedError(
            f"{path} cannot be written ({error.strerror}); make room and run the same again, which goes on there"
        ) from error

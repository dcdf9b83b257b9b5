"""Checkpoints: small, complete, in safetensors and JSON, and never half-written.

checkpoint-N/ holds the adapter in PEFT's format, the tokenizer, optimizer.safetensors, random_states.safetensors,
trainer_state.json and what else a run needs to go on, such as reference.safetensors. A folder is written under a
temporary name, flushed to the disk and then renamed.
"""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowmem_grpo.errors import InputError, NotFiniteError
from lowmem_grpo.model.policy import Policy, not_finite
from lowmem_grpo.run.folder import write_folder
from lowmem_grpo.run.randomness import restore_randomness
from lowmem_grpo.update.optimizer import load_optimizer

NAME = re.compile(r"checkpoint-(\d+)")


def save_checkpoint(
    output_dir: Path, policy: Policy, optimizer, scheduler, scaler, state: dict[str, Any], randomness: dict[str, Any],
    tensors: dict[str, dict[str, Tensor]],
) -> Path:  # fmt: skip
    """Write checkpoint-{state["step"]} and return its folder; one that is there already is left as it is.

    `tensors` are files of a run's own, by name: {name}.safetensors, for read_tensors.

    Raises:
        OSError: the disk refused; nothing under the final name has changed.
        NotFiniteError: something that a resume would go on with is not finite; likewise.
    """
    folder = output_dir / f"checkpoint-{state['step']}"
    if folder.exists():
        return folder

    def write(temporary: Path) -> None:
        policy.save(temporary)
        moments, plain = _flatten_optimizer(optimizer.state_dict())
        for name, values in {"optimizer": moments, **tensors}.items():
            broken = not_finite(_to_be_finite(values))
            if broken:
                raise NotFiniteError(f"{folder.name} is not saved, since {broken} of its {name} is not finite")
        broken = [name for name, value in state.items() if isinstance(value, float) and math.isnan(value)]
        if broken:
            raise NotFiniteError(f"{folder.name} is not saved, since its {broken[0]} is NaN")
        save_file(moments, temporary / "optimizer.safetensors")
        save_file(randomness["tensors"], temporary / "random_states.safetensors")
        for name, values in tensors.items():
            save_file(values, temporary / f"{name}.safetensors")
        saved = {
            **state, "optimizer": plain, "scheduler": scheduler.state_dict(), "scaler": scaler.state_dict(),
            "python_random": randomness["python"], "numpy_random": randomness["numpy"],
        }  # fmt: skip
        saved["scheduler"].pop("lr_lambdas", None)  # functions; the schedule is built anew from the config
        (temporary / "trainer_state.json").write_text(json.dumps(saved, indent=1), encoding="utf-8")

    write_folder(folder, write)
    return folder


def load_checkpoint(folder: Path, policy: Policy, optimizer, scheduler, scaler) -> dict[str, Any]:
    """Restore everything in place and return the state that was saved.

    Raises:
        InputError: the folder is no checkpoint of this package, or one of another adapter.
    """
    state = read_state(folder)
    weights, moments, states = (read_tensors(folder, name) for name in ("adapter_model", "optimizer", "random_states"))
    own = get_peft_model_state_dict(policy.model)
    if {n: v.shape for n, v in own.items()} != {n: v.shape for n, v in weights.items()}:
        raise InputError(f"{folder} holds another adapter than this run's; resume with its model and peft_config")
    set_peft_model_state_dict(policy.model, weights)
    load_optimizer(optimizer, _restore_optimizer(moments, state["optimizer"]))
    # One step before the saved position and one step on: the rate is that of this run's schedule, even if it is longer.
    position = state["scheduler"]["last_epoch"]
    scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": position - 1, "_step_count": 2})
    scheduler.step()  # at a count of 1 it would warn that no optimizer step came before it
    scheduler._step_count = position + 1
    if state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    restore_randomness({"tensors": states, "python": state["python_random"], "numpy": state["numpy_random"]})
    return state


def read_tensors(folder: Path, name: str, remedy: str = "resume from an older checkpoint") -> dict[str, Tensor]:
    try:
        tensors = load_file(folder / f"{name}.safetensors")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be read: {error}; {remedy}") from error
    broken = not_finite(_to_be_finite(tensors))
    if broken:
        raise InputError(f"{folder} has numbers that are not finite ({name}.safetensors, {broken}); {remedy}")
    return tensors


def _to_be_finite(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All but the rewards of replayed completions and of an evaluation: a NaN there is a reward that does not apply."""
    return {name: values for name, values in tensors.items() if name != "rewards" and not name.startswith("eval_")}


def read_state(folder: Path) -> dict[str, Any]:
    path = folder / "trainer_state.json"
    if not path.is_file():
        raise InputError(f"{folder} is not a checkpoint: it has no trainer_state.json")
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_nan)
    except ValueError as error:
        raise InputError(f"{path} cannot be read: {error}; resume from an older checkpoint") from error


def _no_nan(text: str) -> float:
    """What JSON does not have: Infinity is an entropy that was not measured yet, and NaN nothing that is saved."""
    if text == "NaN":
        raise InputError("it has a NaN")
    return float(text)


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str | bool | None) -> Path | None:
    """The folder to resume from, or None for a fresh start.

    Raises:
        InputError: there is none to resume from, or a fresh start would mix with an earlier run's checkpoints.
    """
    existing = checkpoints(output_dir)
    if isinstance(resume_from_checkpoint, str):
        folder = Path(resume_from_checkpoint).expanduser()
        step = read_state(folder)["step"]
        later = [path for path in existing if int(path.name.split("-")[1]) >= step and not path.samefile(folder)]
        if later:
            raise InputError(
                f"{output_dir} holds {later[0].name}, which the run resumed from {folder} would mix with its "
                "own; move it away, or choose another output_dir"
            )
        return folder
    if resume_from_checkpoint:
        if not existing:
            raise InputError(
                f"resume_from_checkpoint=True, but {output_dir} has no checkpoint; leave it out to start anew"
            )
        return existing[-1]
    if existing:
        raise InputError(
            f"{output_dir} holds {existing[-1].name} of an earlier run; "
            "set resume_from_checkpoint=True to continue it, or choose another output_dir"
        )
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def remove_old_checkpoints(output_dir: Path, save_total_limit: int | None) -> None:
    if save_total_limit is not None:
        for folder in checkpoints(output_dir)[:-save_total_limit]:
            shutil.rmtree(folder)


def _flatten_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors named `{parameter}.{entry}`, the rest as plain values); bitsandbytes has entries of entries."""
    entries: dict[str, Any] = {}
    waiting = [(str(i), entry) for i, entry in state["state"].items()]
    while waiting:
        path, entry = waiting.pop()
        if isinstance(entry, dict):
            waiting += [(f"{path}.{key}", value) for key, value in entry.items()]
        else:
            entries[path] = entry
    # A copy each: bitsandbytes shares one table among all parameters, and a file has room for each tensor alone.
    tensors = {path: value.clone() for path, value in entries.items() if isinstance(value, Tensor)}
    numbers = {path: value for path, value in entries.items() if not isinstance(value, Tensor)}
    return tensors, {"param_groups": state["param_groups"], "numbers": numbers}


def _restore_optimizer(tensors: dict[str, Tensor], plain: dict[str, Any]) -> dict[str, Any]:
    state: dict[Any, Any] = {}
    for path, value in [*tensors.items(), *plain.get("numbers", {}).items()]:
        parameter, *within, last = path.split(".")
        entry = state.setdefault(int(parameter), {})
        for key in within:
            entry = entry.setdefault(key, {})
        entry[last] = value
    return {"state": state, "param_groups": plain["param_groups"]}

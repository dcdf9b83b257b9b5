"""run.json and plan.json: what a run is and how it ended, and the memory that was planned."""

import datetime
import json
import os
import platform
import shlex
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import lowmem_grpo
from lowmem_grpo import errors
from lowmem_grpo.distributed import world_size
from lowmem_grpo.errors import in_a_line
from lowmem_grpo.inputs.prompts import Inputs
from lowmem_grpo.inputs.training import RunInputs, name_of
from lowmem_grpo.kernels.backend import switched_off
from lowmem_grpo.output.folder import remove, write_file
from lowmem_grpo.output.saved import read_object
from lowmem_grpo.output.secrets import command_without_secrets, without_secrets
from lowmem_grpo.planner.plan import as_dict
from lowmem_grpo.report.reading import resumes_of

RUN, PLAN = "run.json", "plan.json"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
PYTHON = {"grpo": "train", "sft": "sft", "reward": "train_reward_model"}  # by kind: the function that a script calls
HERE = Path(lowmem_grpo.__file__).parent
IN_PYTHON = "in Python"  # the end of a `command` that is none


def write_about(inputs: RunInputs, step: int) -> None:
    """Write run.json and plan.json into a run's folder, as it starts or goes on from a step.

    Raises:
        OSError: the disk refused.
    """
    assert inputs.output_dir is not None
    path = inputs.output_dir / RUN
    about: dict[str, Any] = {**about_run(inputs), "resumed": [], "ended": None}
    if inputs.resume is not None:
        before = read_object(path)
        again = [*resumes_of(before), {"started": about["started"], "step": step}]
        about |= {"started": before.get("started") or about["started"], "resumed": again}
    write_file(path, json.dumps(about, indent=1))
    if inputs.plan is None:
        remove(path.with_name(PLAN))
    else:
        write_file(path.with_name(PLAN), json.dumps(as_dict(inputs.plan), indent=1))


def write_end(folder: Path, step: int, how: str, why: str = "") -> None:
    """Write into run.json how a run has ended at a step: "finished", "stopped" or "failed", and the reason.

    Raises:
        OSError: the disk refused.
    """
    ended = {"at": _now(), "step": step, "how": how, "why": why}
    write_file(folder / RUN, json.dumps({**read_object(folder / RUN), "ended": ended}, indent=1))


def about_run(inputs: RunInputs) -> dict[str, Any]:
    """Kind, model, data, rewards, command, device and versions of a run, and the time, which is UTC."""
    kind = inputs.config.kind
    found = {
        "kind": kind,
        "model": name_of(inputs.model),
        "datasets": {"train": inputs.datasets.get("train"), "eval": inputs.datasets.get("eval")},
        "rows": {"train": inputs.num_rows, "eval": inputs.num_eval_rows},
        "rewards": [*inputs.rewards.names] if isinstance(inputs, Inputs) else [],
        "total_steps": inputs.total_steps,
        "command": command_line(sys.argv) or f"{PYTHON[kind]}() {IN_PYTHON}",
        "device": device_name(inputs.device),
        "versions": versions(),
        "started": _now(),
    }
    return without_secrets(found)  # as of a model by an address with a password


def command_line(arguments: list[str]) -> str | None:
    """The command of a process as a shell reads it, without secrets; None where the process is another program."""
    program = Path(arguments[0] if arguments else "")
    if program.stem != "lowmem-grpo" and program.resolve().parent not in (HERE, HERE / "cli"):
        return None
    return shlex.join(["lowmem-grpo", *command_without_secrets(arguments[1:])])


def versions() -> dict[str, str]:
    """The versions of Python, of this package and of those that decide what it computes."""
    found = {"python": platform.python_version(), "lowmem_grpo": lowmem_grpo.__version__}
    for name in PACKAGES:
        try:
            found[name] = _version(name)
        except PackageNotFoundError:  # bitsandbytes, where a system has none
            continue
    return found


_version = cache(version)  # each is read from a file of its own


def circumstances(device: torch.device) -> dict[str, Any]:
    """Versions, device, number of processes and kernels: by them a run is rounded, and no setting says them."""
    kernels = "off" if switched_off() else "on"
    return {**versions(), "device": device_name(device), "processes": world_size(), "Triton kernels": kernels}


def device_name(device: torch.device) -> str:
    """A device and what it is: "cuda:0, NVIDIA T4", or "cpu, x86_64, 8 cores"."""
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_properties(device).name}"
    return f"{device}, {platform.machine()}, {os.cpu_count()} cores"


def is_stop(error: BaseException) -> bool:
    """Tell whether an error is somebody's wish, as of Ctrl-C or a signal, and no fault."""
    return isinstance(error, (KeyboardInterrupt, SystemExit))


def reason(error: BaseException) -> str:
    """An error in a line; one of ours is a sentence, and any other has its type before it."""
    if is_stop(error):
        return ""
    is_ours = type(error).__module__ == errors.__name__
    return in_a_line(error) if is_ours else f"{type(error).__name__}: {in_a_line(error)}"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

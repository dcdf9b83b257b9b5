"""Checkpoints: small, complete, in safetensors and JSON, and never half-written.

checkpoint-N/ holds the adapter in PEFT's format, the tokenizer, trainer_state.json, optimizer.safetensors,
random_states.safetensors, a safetensors file for each part of a run that has tensors, such as reference.safetensors,
and manifest.sha256 with the checksum of every file that a resume reads. A folder is written under a temporary name,
flushed to the disk and then renamed.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowmem_grpo.errors import InputError, NotFiniteError, in_a_line
from lowmem_grpo.model.policy import Policy, not_finite
from lowmem_grpo.output.folder import FORMAT, write_folder
from lowmem_grpo.output.manifest import is_listed, write_manifest

State = dict[str, Any]  # by name: tensors, and what JSON has


class Part(Protocol):
    """A part of a run that a checkpoint saves and loads."""

    def state(self) -> State:
        """Everything that a resumed run goes on with. What it returns must not change afterwards."""
        ...

    def load(self, state: State) -> None:
        """Take over what state() returned in the run to resume."""
        ...


def save_checkpoint(folder: Path, policy: Policy, states: Mapping[str, State], values: State) -> None:
    """Write the policy's adapter, each state's tensors as {name}.safetensors, and all else to trainer_state.json.

    Raises:
        OSError: the disk refused; nothing under the final name has changed.
        NotFiniteError: something that a resume would go on with is not finite; nothing is written.
    """
    tensors = {name: {k: v for k, v in state.items() if isinstance(v, Tensor)} for name, state in states.items()}
    plain = {name: {k: v for k, v in state.items() if not isinstance(v, Tensor)} for name, state in states.items()}
    saved = {"format": FORMAT, **values, "parts": plain}

    def write(temporary: Path) -> None:
        policy.save(temporary)
        files = ["adapter_model"]
        for name, of_name in tensors.items():
            broken = not_finite(_to_be_finite(of_name))
            if broken:
                raise NotFiniteError(f"{folder.name} is not saved, since {broken} of its {name} is not finite")
            if of_name:
                save_file(of_name, temporary / f"{name}.safetensors")
                files.append(name)
        for name, of_name in plain.items():
            broken = [key for key, value in of_name.items() if isinstance(value, float) and math.isnan(value)]
            if broken:
                raise NotFiniteError(f"{folder.name} is not saved, since {broken[0]} of its {name} is NaN")
        (temporary / "trainer_state.json").write_text(json.dumps(saved, indent=1), encoding="utf-8")
        write_manifest(temporary, [*(f"{name}.safetensors" for name in files), "trainer_state.json"])

    write_folder(folder, write)


def load_adapter(folder: Path, policy: Policy) -> None:
    """Give the policy the adapter in a checkpoint. Raise InputError where that is another one than the policy's."""
    weights = policy.names.from_file(read_tensors(folder, "adapter_model"))
    own = policy.adapter_state(policy.adapter)
    if {n: v.shape for n, v in own.items()} != {n: v.shape for n, v in weights.items()}:
        raise InputError(f"{folder} holds another adapter than this run's; resume with its model and peft_config")
    policy.load_adapter_state(policy.adapter, weights)


def load_part(folder: Path, name: str, load: Callable[[State], None], saved: State) -> None:
    """Give a part what its state() was when the checkpoint was written; `saved` is its trainer_state.json.

    Raises:
        InputError: the checkpoint has no such state, or the part refuses it.
    """
    if not isinstance(saved["parts"].get(name), dict):
        raise InputError(f"{folder} has no state of its {name}; resume from an older checkpoint")
    tensors = read_tensors(folder, name) if is_listed(folder, f"{name}.safetensors") else {}
    try:
        load({**saved["parts"][name], **tensors})
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what each part's own code, torch and NumPy raise on what is not theirs
        why = f"it has no {error}" if isinstance(error, KeyError) else in_a_line(error)
        raise InputError(
            f"{folder} has a state of its {name} that cannot be loaded: {why}; resume from an older checkpoint"
        ) from error


def read_tensors(folder: Path, name: str, remedy: str = "resume from an older checkpoint") -> dict[str, Tensor]:
    """The tensors of {name}.safetensors in a folder, by name, on the CPU.

    Raises:
        InputError: the file cannot be read, or holds what is not finite.
    """
    try:
        tensors = load_file(folder / f"{name}.safetensors")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be read: {error}; {remedy}") from error
    broken = not_finite(_to_be_finite(tensors))
    if broken:
        raise InputError(f"{folder} has numbers that are not finite ({name}.safetensors, {broken}); {remedy}")
    return tensors


def _to_be_finite(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose NaN would be an error; in rewards it means that a reward does not apply."""
    return {name: values for name, values in tensors.items() if name != "rewards" and not name.startswith("eval_")}

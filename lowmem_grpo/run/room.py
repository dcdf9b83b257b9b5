"""Room on the disk: what a run saves and what is free, and words for what a disk refuses."""

import contextlib
import errno
import shutil
from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path

from torch import Tensor

from lowmem_grpo.config.sections import SavingFields
from lowmem_grpo.errors import InputError, NotSavedError, counted, in_a_line
from lowmem_grpo.output.folder import checkpoints
from lowmem_grpo.run.checkpoint import State
from lowmem_grpo.run.meter import MIB
from lowmem_grpo.update.optimizer import Learner, state_bytes


def adapter_bytes(learner: Learner) -> int:
    """Bytes of the adapter's tensors."""
    return sum(parameter.nbytes for parameter in learner.parameters)


def checkpoint_bytes(learners: Sequence[Learner], states: Mapping[str, State]) -> int:
    """Bytes of a checkpoint's tensors: of what learns, the optimizers' once they have made a step, and the parts'."""
    parts = sum(value.nbytes for state in states.values() for value in state.values() if isinstance(value, Tensor))
    optimizers = (  # a paged state is saved too
        state_bytes(learner.optim.removeprefix("paged_"), (p.numel() for p in learner.parameters))
        for learner in learners
    )
    return sum(map(adapter_bytes, learners)) + sum(optimizers) + parts


def look_for_room(
    folder: Path, config: SavingFields, steps_left: int, of_adapter: int, of_checkpoint: int
) -> str | None:
    """The warning that a run's checkpoints and adapters take more than is free, or None.

    Raises:
        InputError: there is no room for one checkpoint.
    """
    free = free_bytes(folder)
    if free is None or steps_left <= 0:
        return None
    if free < of_checkpoint:
        raise InputError(
            f"{folder} has {in_mib(free)} free, and a checkpoint takes {in_mib(of_checkpoint)}; make room, or choose "
            "another output_dir"
        )
    num_new = ceil(steps_left / config.save_steps)
    if config.save_total_limit is not None:  # an old one is removed once the next is there
        num_new = min(num_new, max(config.save_total_limit - len(checkpoints(folder)), 0) + 1)
    wanted = num_new * of_checkpoint + 2 * of_adapter
    if free >= wanted:
        return None
    return (
        f"{folder} has {in_mib(free)} free, and what the run saves takes {in_mib(wanted)} "
        f"({counted(num_new, 'checkpoint')} of {in_mib(of_checkpoint)}); make room, raise save_steps or lower "
        "save_total_limit"
    )


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Raise InputError, in a sentence, for what a disk refuses while a run is prepared."""
    try:
        yield
    except OSError as error:
        free = free_bytes(folder) if error.errno == errno.ENOSPC else None
        room = "" if free is None else f", and has {in_mib(free)} free; make room, or"
        raise InputError(
            f"{folder} cannot be written ({refusal(error)}){room or ';'} choose another output_dir"
        ) from error


def free_bytes(folder: Path) -> int | None:
    """Bytes that are free on the disk of a folder, which may be gone, or None where nobody knows."""
    there = next((path for path in [folder, *folder.parents] if path.is_dir()), folder)
    try:
        found = shutil.disk_usage(there)
    except OSError:
        return None
    return found.free if found.total else None


def not_saved(name: str, folder: Path, step: int, error: OSError, needed: int, last_good: Path | None) -> NotSavedError:
    """The error of a checkpoint or adapter that the disk refused, in a sentence with all that helps."""
    free = free_bytes(folder)
    room = "" if free is None else f", and {in_mib(free)} are free"
    resume = f"the last whole checkpoint is {last_good}, from which resume_from_checkpoint=True goes on"
    return NotSavedError(
        f"{name} cannot be written to {folder} after step {step} ({refusal(error)}): it takes {in_mib(needed)}{room}; "
        f"{resume if last_good else 'there is no whole checkpoint yet'}"
    )


def refusal(error: OSError) -> str:
    """The reason of an error of the disk, without the path."""
    return error.strerror or in_a_line(error)


def in_mib(num_bytes: int) -> str:
    """A number of bytes as a person reads it: "3.1 MiB"."""
    return f"{num_bytes / MIB:.1f} MiB"

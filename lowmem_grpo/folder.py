"""The output folder of a run: that it can be written, which checkpoints it holds, and folders never half-written."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowmem_grpo.errors import InputError

NAME = re.compile(r"checkpoint-(\d+)")
FORMAT = 1  # of checkpoints, whose trainer_state.json has it; to be raised where a checkpoint changes its shape


def writable_folder(output_dir: str) -> Path:
    """Make output_dir. Raise InputError if nothing can be written there."""
    folder = Path(output_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"output_dir {output_dir!r} cannot be written: {error.strerror}; choose another folder"
        ) from error
    return folder


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder, flush it to the disk, and rename it to `folder`.

    What `write` raises leaves `folder` as it was, and no temporary one.
    """
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for path in [*temporary.rglob("*"), temporary]:
        _flush(path)
    aside = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        os.replace(folder, aside)
    os.replace(temporary, folder)
    _flush(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    """The complete checkpoints of a folder, oldest first."""
    found = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def remove_old_checkpoints(output_dir: Path, save_total_limit: int | None) -> None:
    if save_total_limit is not None:
        for folder in checkpoints(output_dir)[:-save_total_limit]:
            shutil.rmtree(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's trainer_state.json.

    Raises:
        InputError: the folder is no checkpoint, its file is damaged, or it is of another format.
    """
    path = folder / "trainer_state.json"
    if not path.is_file():
        raise InputError(f"{folder} is not a checkpoint: it has no trainer_state.json")
    try:
        state = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_nan)
    except ValueError as error:
        raise InputError(f"{path} cannot be read: {error}; resume from an older checkpoint") from error
    if not isinstance(state, dict) or "step" not in state:
        raise InputError(f"{path} cannot be read: it holds no state of a run; resume from an older checkpoint")
    if state.get("format") != FORMAT:
        raise InputError(
            f"{folder} is a checkpoint of format {state.get('format', 0)}, and this version reads {FORMAT}; "
            "resume with the version that wrote it, or start a new run from the adapter in it"
        )
    return state


def _no_nan(text: str) -> float:
    """Refuse a NaN, which no checkpoint holds. Infinity passes: an entropy that was not measured yet."""
    if text == "NaN":
        raise InputError("it has a NaN")
    return float(text)

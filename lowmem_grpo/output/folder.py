"""The output folder of a run: that it can be written, which checkpoints it has; nothing is there half-written."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowmem_grpo.errors import InputError
from lowmem_grpo.output import manifest
from lowmem_grpo.paths import expanded
from lowmem_grpo.warn import warn

NAME = re.compile(r"checkpoint-([0-9]+)")
POINTER = b"version https://git-lfs"
FORMAT = 2  # of checkpoints, whose trainer_state.json has it; to be raised where a checkpoint changes its shape
STATE = {"step": int, "identity": dict, "config": dict, "parts": dict}  # what trainer_state.json holds besides
RESULTS = ("metrics.jsonl", "best", "completions")  # of a run that has not ended
OF_RUST = re.compile(r"\(os error ([0-9]+)\)")  # in the text of an error of the disk
# What write_folder() names a folder that it fills, and one that it replaces: names that nobody else gives.
BEING_WRITTEN, REPLACED = ".being-written", ".replaced"


class OtherFormatError(InputError):
    """A checkpoint of another version, which is whole, and which this one cannot read."""


def refuse_pointer(path: Path) -> None:
    """Raise InputError if a file is a Git LFS pointer, which stands for the file itself."""
    if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(POINTER):
        raise InputError(f"{path} is a Git LFS pointer and not the file; run `git lfs pull` where it was cloned")


def writable_folder(output_dir: str) -> Path:
    """Make output_dir. Raise InputError if nothing can be written there, or it is the empty text."""
    if not output_dir.strip():
        raise InputError(f"output_dir is {output_dir!r}, which names no folder; give one, or leave it out")
    folder = Path(expanded(output_dir))  # Path's own raises for a user who is not there
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**16))  # a full disk takes names, and nothing more
    except OSError as error:
        raise InputError(
            f"output_dir {output_dir!r} cannot be written: {error.strerror}; choose another folder"
        ) from error
    return folder


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder, flush it to the disk, and rename it to `folder`.

    What `write` raises leaves `folder` as it was, and no temporary one. A kill may leave one beside it, or a replaced
    one, which mend_folder() settles.

    Raises:
        OSError: the disk refused.
    """
    temporary, replaced = (folder.with_name(f"{folder.name}{end}") for end in (BEING_WRITTEN, REPLACED))
    remove(temporary)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            _flush(path)
    except BaseException as error:
        remove(temporary)
        number = OF_RUST.search(str(error))
        if number:  # safetensors and tokenizers have errors of their own
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error
        raise
    remove(replaced)
    if os.path.lexists(folder):
        os.replace(folder, replaced)
    os.replace(temporary, folder)
    _flush(folder.parent)
    remove(replaced)


def write_file(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, in UTF-8, flushed to the disk. Of two processes the last wins.

    Raises:
        OSError: the disk refused, and what was there before still is.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{BEING_WRITTEN}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def mend_folder(output_dir: Path) -> None:
    """Settle what a kill within write_folder() has left: half a folder goes, and one that is missing comes back."""
    _put_back(output_dir)
    for path in list(output_dir.iterdir()):
        if path.name.endswith((REPLACED, BEING_WRITTEN)):
            remove(path)


def _put_back(output_dir: Path) -> None:
    """Rename each folder that a kill has left replaced by nothing to what it was."""
    for path in list(output_dir.glob(f"*{REPLACED}")):
        original = path.with_name(path.name.removesuffix(REPLACED))
        if not os.path.lexists(original):
            os.replace(path, original)


def remove(path: Path) -> None:
    """Remove a folder with all in it, a file or a link, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def set_aside(path: Path, word: str) -> Path:
    """Rename NAME to NAME.word, or to NAME.word-2 and so on where that is taken. Returns the new path."""
    number, aside = 1, path.with_name(f"{path.name}.{word}")
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.{word}-{number}")
    os.replace(path, aside)
    return aside


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str | bool | None) -> Path | None:
    """The folder to resume from, or None for a fresh start. Warns of each damaged one that is newer.

    Raises:
        InputError: there is none to resume from, or a fresh start would mix with an earlier run's checkpoints.
    """
    _put_back(output_dir)
    if resume_from_checkpoint is None or resume_from_checkpoint is False:
        existing = checkpoints(output_dir)
        if existing:
            raise InputError(
                f"{output_dir} holds {existing[-1].name} of an earlier run; "
                "set resume_from_checkpoint=True to continue it, or choose another output_dir"
            )
        return None
    if resume_from_checkpoint not in (True, "auto"):
        return _named(Path(expanded(str(resume_from_checkpoint))), output_dir)
    newest, damaged = _newest(output_dir)
    if newest is None and resume_from_checkpoint is True:
        reasons = "".join(f"; {path.name} cannot be resumed from, since {why}" for path, why in damaged.items())
        raise InputError(
            f"resume_from_checkpoint=True, but {output_dir} has no whole checkpoint{reasons}; leave it out to start "
            'anew, or set it to "auto" to resume if there is one, and else to start anew'
        )
    for path, why in damaged.items():
        instead = "a new run begins" if newest is None else f"the run goes on from {newest.name}"
        warn(f"{path} cannot be resumed from, since {why}; {instead}")
    return newest


def _named(folder: Path, output_dir: Path) -> Path:
    """The checkpoint that a user names. Raise InputError where it is damaged, or where newer ones stand in its way."""
    why = flaw(folder)
    if why:
        newest, _ = _newest(folder.parent)
        remedy = "give the folder of one" if newest is None else f"the newest whole one beside it is {newest}"
        raise InputError(f"{folder} is no checkpoint that can be resumed from, since {why}; {remedy}")
    step = read_state(folder)["step"]
    others = [path for path in checkpoints(output_dir) if step_of(path) >= step and not path.samefile(folder)]
    later = [path for path in others if not flaw(path)]
    if later:
        raise InputError(
            f"{output_dir} holds {later[0].name}, which the run resumed from {folder} would mix with its "
            "own; move it away, or choose another output_dir"
        )
    return folder


def _newest(output_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint, if there is one, and why each newer one is none."""
    damaged: dict[Path, str] = {}
    for path in reversed(_numbered(output_dir)):
        why = flaw(path)
        if not why:
            return path, damaged
        damaged[path] = why
    return None, damaged


def flaw(folder: Path) -> str | None:
    """Why a folder is no whole checkpoint, in words, or None where it is one.

    Raises:
        OtherFormatError: it is one of another version's.
    """
    if not folder.is_dir():
        return "it is not a folder" if folder.exists() else "it does not exist"
    if not (folder / "trainer_state.json").is_file():
        return "it has no trainer_state.json"
    why = manifest.damage(folder)
    if why and (folder / manifest.NAME).exists():
        return why
    try:
        _read_state(folder)  # which knows the formats that had no manifest
    except OtherFormatError:
        raise
    except (OSError, ValueError) as error:
        return f"its trainer_state.json {error}"
    return why


def set_damaged_aside(output_dir: Path, step: int, resumed: Path | None) -> None:
    """Rename what has the name of a checkpoint that a run is yet to write, with a warning.

    Where the run goes on from none, the results that belong to such a checkpoint are renamed too.
    """
    found = [path for path in _numbered(output_dir) if step_of(path) >= step]
    if resumed is None:
        found += [output_dir / name for name in RESULTS if found and os.path.lexists(output_dir / name)]
    for path in found:
        if resumed is None or not path.exists() or not path.samefile(resumed):
            warn(f"{path} is none of this run's, which may write another; it is now {set_aside(path, 'damaged').name}")


def step_of(path: Path) -> int:
    """N of a checkpoint-N."""
    return int(path.name.rpartition("-")[2])


def _numbered(output_dir: Path) -> list[Path]:
    """All of a folder that is named checkpoint-N, whatever it is, in the order of N."""
    there = output_dir.iterdir() if output_dir.is_dir() else ()
    return sorted((path for path in there if NAME.fullmatch(path.name)), key=step_of)


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return [path for path in _numbered(output_dir) if (path / "trainer_state.json").is_file()]


def remove_old_checkpoints(output_dir: Path, save_total_limit: int | None) -> None:
    """Remove all but the newest save_total_limit checkpoints. What a kill leaves of one, mend_folder() removes."""
    if save_total_limit is not None:
        for folder in checkpoints(output_dir)[:-save_total_limit]:
            half = folder.with_name(folder.name + BEING_WRITTEN)
            with contextlib.suppress(OSError):
                os.replace(folder, half)
            remove(half)
            remove(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's trainer_state.json.

    Raises:
        InputError: the file is damaged, or it is of another format.
    """
    try:
        return _read_state(folder)
    except OtherFormatError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'trainer_state.json'} {error}; resume from an older checkpoint") from error


def _read_state(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's trainer_state.json. Raise ValueError with the end of a sentence on the file."""
    text = (folder / "trainer_state.json").read_bytes()
    try:
        state = json.loads(text, parse_constant=_no_nan)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"holds {text[:20].decode(errors='replace')!r} and no state of a run")
    if state.get("format") != FORMAT:
        raise OtherFormatError(
            f"{folder} is a checkpoint of format {state.get('format', 0)}, and this version reads {FORMAT}; "
            "resume with the version that wrote it, or start a new run from the adapter in it"
        )
    for name, kind in STATE.items():
        if type(state.get(name)) is not kind:
            raise ValueError(f"has no {name} that can be read")
    if state["step"] < 0 or (NAME.fullmatch(folder.name) and state["step"] != step_of(folder)):
        raise ValueError(f"is of step {state['step']}")
    return state


def _no_nan(text: str) -> float:
    """Refuse a NaN, which no checkpoint holds. Infinity passes: an entropy that was not measured yet."""
    if text == "NaN":
        raise ValueError("it has a NaN")
    return float(text)

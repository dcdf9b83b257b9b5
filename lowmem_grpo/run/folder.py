"""Folders: one that can be written, and one that is never half-written."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from lowmem_grpo.errors import InputError


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
    """Let `write` fill a temporary folder, flush it to the disk, and put it in the place of `folder` by a rename.

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

"""Checksums of files in their folder: a flipped bit in any of those, or in the checksums, is found."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

NAME = "manifest.sha256"


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    """Write the SHA-256 of files in a folder to manifest.sha256 there.

    `sha256sum --check manifest.sha256` reads it. Its last line, a comment to that, has the SHA-256 of all lines before.
    """
    lines = "".join(f"{_digest(folder / name)}  {name}\n" for name in names).encode()
    (folder / NAME).write_bytes(lines + _closing(lines))


def damage(folder: Path) -> str | None:
    """The first file of a folder that is not as its manifest says, in words, or None."""
    if not (folder / NAME).exists():
        return f"it has no {NAME}"
    try:
        for name, digest in _read(folder).items():
            path = folder / name
            if not path.is_file():
                return f"it has no {name}"
            if _digest(path) != digest:
                return f"its {name} is damaged: it has changed since it was written"
    except OSError as error:
        return f"its {Path(error.filename or NAME).name} cannot be read: {error.strerror}"
    except ValueError:
        return f"its {NAME} is damaged"
    return None


def is_listed(folder: Path, name: str) -> bool:
    """Tell whether a file is in the manifest of a folder in which damage() found none."""
    return name in _read(folder)


def _read(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file by its name. Raise ValueError for a manifest that is not as it was written."""
    *lines, closing = (folder / NAME).read_bytes().splitlines(keepends=True) or [b""]
    if closing != _closing(b"".join(lines)):
        raise ValueError("the last line is not of those before")
    pairs = (line.decode().removesuffix("\n").split("  ", 1) for line in lines)
    return {name: digest for digest, name in pairs}


def _closing(lines: bytes) -> bytes:
    return f"# {hashlib.sha256(lines).hexdigest()}\n".encode()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""The lock on an output folder, which keeps two runs from writing to one. The kernel releases that of a killed one."""

import contextlib
import os
import socket
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

import psutil

from lowmem_grpo.errors import InputError, in_a_line, printable
from lowmem_grpo.warn import warn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = "run.lock"
_releases: ContextVar[contextlib.ExitStack | None] = ContextVar("releases", default=None)
_descriptors: set[int] = set()


def lock_folder(folder: Path) -> None:
    """Keep a folder for this run alone, to the end of the releasing_locks() around it, or of the process.

    Where the file system knows no locks, that is a warning.

    Raises:
        InputError: another run keeps it; the sentence has its process.
    """
    _lock(folder / NAME, folder, "choose another output_dir")


def lock_file(file: Path) -> None:
    """Keep a file for this run alone, as lock_folder() keeps a folder, by another file beside it.

    Where the file system knows no locks, that is a warning.

    Raises:
        InputError: another run keeps it; the sentence has its process.
    """
    real = Path(os.path.realpath(file))  # whatever link leads to it
    _lock(real.with_name(f"{real.name}.lock"), file, "choose another output")


def _lock(path: Path, kept: Path, remedy: str) -> None:
    releases = _releases.get()
    if releases is None:  # nobody would release it
        return
    try:
        descriptor = _locked(path)
    except BlockingIOError as error:
        raise InputError(f"{kept} is in use by another run ({_holder(path)}); wait for its end, or {remedy}") from error
    except OSError as error:
        warn(f"{kept} cannot be locked ({in_a_line(error)}); take care that no other run writes there")
        return
    _descriptors.add(descriptor)
    releases.callback(_release, path, descriptor)
    with contextlib.suppress(OSError):  # a full disk
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def is_in_use(folder: Path) -> bool:
    """Tell whether a run on this machine keeps a folder, without locking it: by the process that its lock names."""
    try:
        words = (folder / NAME).read_text(encoding="utf-8", errors="replace").split()
        if words[0] != "process" or words[-1] != socket.gethostname():
            return False
        return psutil.Process(int(words[1])).status() != psutil.STATUS_ZOMBIE  # which a killed one may be
    except psutil.AccessDenied:
        return True
    except (OSError, ValueError, IndexError, OverflowError, psutil.Error):
        return False


@contextlib.contextmanager
def releasing_locks() -> Iterator[None]:
    """Release at the end, whatever comes, what lock_folder() has locked within."""
    with contextlib.ExitStack() as releases:
        token = _releases.set(releases)
        try:
            yield
        finally:
            _releases.reset(token)


def _locked(path: Path) -> int:
    """A descriptor that holds the lock. Raise BlockingIOError where another has it, else OSError where none can."""
    if fcntl is None:
        raise OSError("this system has no flock")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                os.truncate(descriptor, 0)
                return descriptor
        except FileNotFoundError:  # its last holder removed it in between
            pass
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _holder(path: Path) -> str:
    """The process that a lock's file names."""
    with contextlib.suppress(OSError):
        return printable(path.read_text(encoding="utf-8", errors="replace").strip()[:100]) or "it has just begun"
    return "unknown"


def _release(path: Path, descriptor: int) -> None:
    """Remove the file, and then let go: nobody can lock a file that others no longer see."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            path.unlink()
    _descriptors.discard(descriptor)
    os.close(descriptor)


def _forget() -> None:
    """Close what a forked process inherited, since a lock lives as long as any process that has it open."""
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

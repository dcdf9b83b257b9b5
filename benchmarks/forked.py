"""Programs that begin at once: forks of a process that has imported everything, and computed nothing.

A fork cannot use CUDA where that had been initialized before, and may hang where other threads computed. preload()
keeps clear of both, and asks a first fork whether CUDA works. Where a fork is not safe, start() begins a new
interpreter, which imports for many seconds.
"""

import importlib
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing.process import BaseProcess
from typing import IO, Any, NamedTuple
from unittest import mock

ANSWER_S = 60  # in which a fork has initialized CUDA
_threads = 0  # that were there after preload(), which libraries keep for themselves; 0 before it, or where forks fail


class Card(NamedTuple):
    """Properties of a GPU."""

    name: str
    total_memory: int
    major: int
    minor: int


def preload(*modules: str) -> None:
    """Import modules, and leave CUDA alone, so that start() can fork. Call it before anything computes."""
    global _threads
    import torch  # here and below: whoever asks for help alone does without

    has_gpu = torch.cuda.is_available()
    # bitsandbytes asks for it when it is imported, which initializes CUDA.
    capability = (card().major, card().minor) if has_gpu else None
    with mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: capability):
        for module in modules:
            importlib.import_module(module)
    if not has_gpu or (not torch.cuda.is_initialized() and in_a_fork(_card)):
        _threads = _threads_now()


def serves() -> bool:
    """Tell whether a fork of this process computes as a new interpreter would."""
    import torch

    return 0 < _threads_now() <= _threads and not torch.cuda.is_initialized()


def _threads_now() -> int:
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0


def start(command: list[str], files: Sequence[IO] = (), own_group: bool = False) -> BaseProcess:
    """Begin a command, with files as its output and errors; `python -m MODULE ...` as a fork that calls main()."""
    forks = command[1] == "-m" and serves()
    process = multiprocessing.get_context("fork").Process(target=_become, args=(command, files, own_group, forks))
    process.start()
    return process


def wait(process: BaseProcess, seconds: float | None = None) -> int | None:
    """The exit status of a process, -9 where SIGKILL ended it; None where it has not ended after so many seconds."""
    until = math.inf if seconds is None else time.monotonic() + seconds
    # join() would wait for a new interpreter without end: that has closed the pipe which it looks at.
    while process.exitcode is None and time.monotonic() < until:
        time.sleep(0.02)
    return process.exitcode


def kill_group(process: BaseProcess) -> None:
    """End a process that was to have a group of its own, and all that is in it."""
    try:
        os.killpg(process.pid or 0, signal.SIGKILL)
    except ProcessLookupError:  # it has not made one yet
        process.kill()
    process.join()


def _become(command: list[str], files: Sequence[IO], own_group: bool, forks: bool) -> None:
    if own_group:
        os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number, file in enumerate(files, 1):
        os.dup2(file.fileno(), number)
    if not forks:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.execv(command[0], command)
    if files:
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    sys.argv = list(command[2:])
    importlib.import_module(command[2]).main(list(command[3:]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # at once: what a library does at an interpreter's end, such as a profiler's, is nobody's here


def in_a_fork(call: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a fork of this process, or None where it failed there."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(call(*arguments)))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(ANSWER_S) else None
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()


def aside(call: Callable[..., Any], *arguments: Any) -> None:
    """Call in a fork, so that this process stays one that can be forked; here where it is none."""
    if not serves():
        call(*arguments)
        return
    process = multiprocessing.get_context("fork").Process(target=call, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{call.__name__}() ended with status {process.exitcode}")


@cache
def card() -> Card:
    """The current GPU. A fork asks, if one can: who asks has initialized CUDA for good."""
    import torch

    return (None if torch.cuda.is_initialized() else in_a_fork(_card)) or _card()


def _card() -> Card:
    import torch

    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Card(found.name, found.total_memory, found.major, found.minor)

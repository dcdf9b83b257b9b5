"""The program of a worker process: it dies with the trainer, and answers requests by another program's reply().

`python -P worker.py CONNECTION PARENT PROGRAM`. Standard library only.
"""

import ctypes
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent's thread that started it ends: with the pool, or the trainer.

    A worker that is busy in C code, or stopped, notices nothing by itself.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before that
        os._exit(1)


def reply_of(path: str) -> Callable[[Any], Any]:
    """The function reply() of a program."""
    spec = importlib.util.spec_from_file_location("program", path)
    assert spec and spec.loader
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program.reply


def serve(trainer: Connection, reply: Callable[[Any], Any]) -> None:
    """Send the reply to each request, or a RuntimeError that says what reply() raised or why it cannot be sent."""
    while True:
        try:
            request = trainer.recv()
        except EOFError:  # the trainer is gone
            return
        try:
            trainer.send(reply(request))
        except Exception as error:
            trainer.send(RuntimeError(f"{type(error).__name__}: {error}"[:1000]))  # not all others can be pickled


if __name__ == "__main__":
    connection, parent, path = sys.argv[1:]
    die_with(int(parent))
    serve(Connection(int(connection)), reply_of(path))

"""Processes that train together, for tests: started once, and given one piece of work after the other."""

import contextlib
import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from typing import Any
from unittest.mock import patch

import torch

from lowmem_grpo import distributed

# For an answer: a rank whose error is its own leaves the others waiting, and a busy machine takes over 60 s for 3 of CPU.
WAIT_S = 300.0


@cache
def forking() -> ForkServerContext:
    """A context whose server imports once what each process would.

    Where it does not, every process takes 5 CPU s: one that runs already, as of a benchmark's test, has imported less,
    and up to Python 3.13 a server passes over what it cannot import, with the path that a new interpreter has.
    """
    forkserver._forkserver._stop()  # type: ignore[attr-defined] # CPython's own tests do so
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rank_runs"])
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()
    return context


class Ranks:
    """So many processes of one group, which wait for work."""

    def __init__(self, size: int):
        context = forking()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def start(self, work: Callable, *given: Any) -> None:
        """Have every process call work(*given); both are pickled."""
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((work, given)))

    def answers(self) -> list[Any]:
        """What start()'s work returned in each process, or the error that it raised."""
        return [self.answer(pipe) for pipe in self.pipes]

    def answer(self, pipe: Any) -> Any:
        assert pipe.poll(WAIT_S), "a process does not answer"
        return pickle.loads(pipe.recv_bytes())

    def call(self, work: Callable, *given: Any) -> list[Any]:
        """The values of work(*given), rank by rank; an error is raised."""
        self.start(work, *given)
        found = self.answers()
        for value in found:
            if isinstance(value, BaseException):
                raise value
        return found

    def close(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):  # it has ended
                pipe.send_bytes(pickle.dumps(None))
        for process in self.processes:
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join()


@contextlib.contextmanager
def ranks(size: int) -> Iterator[Ranks]:
    """Processes that train together, ended afterwards."""
    several = Ranks(size)
    try:
        yield several
    finally:
        several.close()


def _serve(rank: int, size: int, port: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    with distributed.joined(torch.device("cpu")):
        while (asked := pickle.loads(pipe.recv_bytes())) is not None:
            work, given = asked
            try:
                found = work(*given)
            except BaseException as error:
                error.add_note(traceback.format_exc())
                found = error
            try:
                pipe.send_bytes(pickle.dumps(found))
            except Exception as error:
                pipe.send_bytes(pickle.dumps(RuntimeError(f"{found!r} cannot be sent: {error}")))

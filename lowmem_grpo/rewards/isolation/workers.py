"""Worker processes for requests with a time limit, past which a process is killed and replaced.

They are plain subprocesses at the other end of a pipe: nothing of the caller's is imported again, as a multiprocessing
pool would do with a training script.
"""

import atexit
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

WORKERS = min(4, os.cpu_count() or 1)
START = Path(__file__).with_name("worker.py")
FROZEN_S = 20.0  # without any CPU time, after which a worker that should compute is taken to be stopped for good
LOOK_EVERY_S = 0.5


class WorkerPool:
    """Workers that each answer requests by the function reply() of one program."""

    def __init__(self, program: Path, workers: int = WORKERS, environment: Callable[[], dict[str, str]] | None = None):
        self.program, self.workers, self.environment = program, workers, environment  # None: this process's own
        self.started: list[_Worker] = []
        self.local = threading.local()
        self.threads: ThreadPoolExecutor | None = None

    def __reduce__(self):
        """Pickle how the pool was made; the copy starts workers of its own."""
        return type(self), (self.program, self.workers, self.environment)

    def ask_all(self, requests: list, limit_s: float, start_limit_s: float, *, by_cpu_time: bool = False) -> list[Any]:
        """The replies, or in their place a TimeoutError or an EOFError where a worker took too long or died.

        A worker's first reply may take start_limit_s, since it imports what it needs before it. by_cpu_time: the limit
        is one of CPU time where the system tells it (Linux), which a loaded machine does not use up; a worker that uses
        none for FROZEN_S is killed as dead.
        """
        if self.threads is None:
            self.threads = ThreadPoolExecutor(self.workers, thread_name_prefix=self.program.stem)
            atexit.register(self.stop)
        futures = [self.threads.submit(self._ask, request, limit_s, start_limit_s, by_cpu_time) for request in requests]
        try:
            return [future.result() for future in futures]
        except BaseException:  # Ctrl-C, or the end of the reward's time
            for future in futures:
                future.cancel()
            self.stop()
            raise

    def _ask(self, request: Any, limit_s: float, start_limit_s: float, by_cpu_time: bool) -> Any:
        if not hasattr(self.local, "worker"):
            self.local.worker = _Worker()
            self.started.append(self.local.worker)
        return self.local.worker.ask(request, limit_s, start_limit_s, by_cpu_time, self._start)

    def _start(self) -> tuple[subprocess.Popen, Connection]:
        ours, theirs = Pipe()
        with theirs:
            process = subprocess.Popen(
                # -P: the program's folder, whose modules have names such as text.py, is not put on the path.
                [sys.executable, "-P", str(START), str(theirs.fileno()), str(os.getpid()), str(self.program)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()], env=self.environment() if self.environment else None,
                start_new_session=True,  # a Ctrl-C is for the trainer, which stops its workers itself
            )  # fmt: skip
        return process, ours

    def stop(self) -> None:
        for worker in self.started:
            worker.kill()


class _Worker:
    """One subprocess, started when first asked and again after it was killed."""

    def __init__(self):
        self.process: subprocess.Popen | None = None
        self.connection: Connection | None = None

    def ask(self, request: Any, limit_s: float, start_limit_s: float, by_cpu_time: bool, start: Callable) -> Any:
        if self.process is None or self.process.poll() is not None:
            self.process, self.connection = start()
            limit_s = start_limit_s
        assert self.connection
        try:
            self.connection.send(request)
            self._await_reply(limit_s, by_cpu_time)
            return self.connection.recv()
        except TimeoutError as late:
            error = late
        except (OSError, EOFError):
            error = EOFError("the worker process died, or was stopped")
        self.kill()
        self.process = None
        return error

    def _await_reply(self, limit_s: float, by_cpu_time: bool) -> None:
        """Return once there is a reply, or the end of the process.

        Raises:
            TimeoutError: the limit has passed.
            EOFError: the process does not get on.
        """
        assert self.process and self.connection
        used_s = _cpu_s(self.process.pid) if by_cpu_time else None
        end_s = (used_s or 0.0) + limit_s
        if self.connection.poll(limit_s):
            return
        seen = time.monotonic()
        while used_s is not None and used_s < end_s:
            if self.connection.poll(LOOK_EVERY_S):
                return
            now_s = _cpu_s(self.process.pid)
            if now_s != used_s:
                used_s, seen = now_s, time.monotonic()
            elif time.monotonic() - seen > FROZEN_S:
                raise EOFError
        raise TimeoutError(f"no reply within {limit_s:g} s")

    def kill(self) -> None:
        """End the process without more, so that another thread may do it while this one waits for a reply."""
        process = self.process
        if process is not None:
            process.kill()
            process.wait()


def _cpu_s(pid: int) -> float | None:
    """CPU time that a process has used, in seconds; None on a system without /proc."""
    try:
        user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    except OSError:
        return None
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

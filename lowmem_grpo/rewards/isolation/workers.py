"""Worker processes for requests with a time limit, past which a process is killed and replaced.

They are plain subprocesses at the other end of a pipe: nothing of the caller's is imported again, as a multiprocessing
pool would do with a training script.
"""

import atexit
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

WORKERS = min(4, os.cpu_count() or 1)


class WorkerPool:
    """Workers that each run one program, which talks over a connection whose file number is its argument."""

    def __init__(self, program: Path, workers: int = WORKERS, environment: Callable[[], dict[str, str]] | None = None):
        self.program, self.workers, self.environment = program, workers, environment  # None: this process's own
        self.started: list[_Worker] = []
        self.local = threading.local()
        self.threads: ThreadPoolExecutor | None = None

    def __reduce__(self):
        """Pickle how the pool was made; the copy starts workers of its own."""
        return type(self), (self.program, self.workers, self.environment)

    def ask_all(self, requests: list, limit_s: float, start_limit_s: float) -> list[Any]:
        """The replies, or in their place a TimeoutError or an EOFError where a worker took too long or died.

        A worker's first reply may take start_limit_s, since it imports what it needs before it.
        """
        if self.threads is None:
            self.threads = ThreadPoolExecutor(self.workers, thread_name_prefix=self.program.stem)
            atexit.register(self.stop)
        futures = [self.threads.submit(self._ask, request, limit_s, start_limit_s) for request in requests]
        try:
            return [future.result() for future in futures]
        except BaseException:  # Ctrl-C, or the end of the reward's time
            for future in futures:
                future.cancel()
            self.stop()
            raise

    def _ask(self, request: Any, limit_s: float, start_limit_s: float) -> Any:
        if not hasattr(self.local, "worker"):
            self.local.worker = _Worker()
            self.started.append(self.local.worker)
        return self.local.worker.ask(request, limit_s, start_limit_s, self._start)

    def _start(self) -> tuple[subprocess.Popen, Connection]:
        ours, theirs = Pipe()
        with theirs:
            process = subprocess.Popen(
                # -P: the program's folder, whose modules have names such as text.py, is not put on the path.
                [sys.executable, "-P", str(self.program), str(theirs.fileno())],
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

    def ask(self, request: Any, limit_s: float, start_limit_s: float, start: Callable) -> Any:
        if self.process is None or self.process.poll() is not None:
            self.process, self.connection = start()
            limit_s = start_limit_s
        assert self.connection
        try:
            self.connection.send(request)
            if self.connection.poll(limit_s):
                return self.connection.recv()
            error = TimeoutError(f"no reply within {limit_s:g} s")
        except (OSError, EOFError):
            error = EOFError("the worker process died")
        self.kill()
        self.process = None
        return error

    def kill(self) -> None:
        """End the process without more, so that another thread may do it while this one waits for a reply."""
        process = self.process
        if process is not None:
            process.kill()
            process.wait()

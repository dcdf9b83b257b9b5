"""Worker processes that run math-verify, so that an answer which takes for ever costs no more than a time limit.

math-verify's own limit is an alarm signal, which works only in a main thread; in a worker it is one. The workers are
plain subprocesses that speak JSON lines: nothing of the caller's is imported again, as a multiprocessing pool would do
with a training script.
"""

import atexit
import json
import os
import re
import selectors
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

WORKERS = min(4, os.cpu_count() or 1)
TIME_LIMIT_S = 10.0  # for one comparison
START_LIMIT_S = 120.0  # for the first one, since a worker imports sympy before it
MOST_CHARACTERS = 1000  # no answer is longer, and Python refuses to read an integer of more than 4,300 digits
NUMBER = re.compile(r"[-+]?(?:\d+|\d{1,3}(?:,\d{3})+)?(?:\.\d+)?(?:/[1-9]\d*)?")


def math_equal(pairs: list[tuple[str, str]]) -> list[bool]:
    """Whether each (gold, answer) is equal: plain numbers at once, the others by math-verify in the workers."""
    verdicts: list[bool | None] = []
    for gold, answer in pairs:
        if max(len(gold), len(answer)) > MOST_CHARACTERS:
            verdicts.append(gold == answer)
            continue
        numbers = as_number(gold), as_number(answer)
        verdicts.append(True if gold == answer else None if None in numbers else numbers[0] == numbers[1])
    open_pairs = [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict is None]
    if not open_pairs:
        return [bool(verdict) for verdict in verdicts]
    verified = dict(zip(open_pairs, _pool().map(lambda pair: _worker().ask(*pair), open_pairs), strict=True))
    return [bool(verified[pair] if verdict is None else verdict) for pair, verdict in zip(pairs, verdicts, strict=True)]


def as_number(text: str) -> Fraction | None:
    """A plain number, with thousands separators, a dollar or percent sign, or a full stop at its end; else None."""
    plain = (
        text.strip()
        .replace("\N{MINUS SIGN}", "-")
        .replace("\\$", "")
        .replace("$", "")
        .rstrip(".")
        .removesuffix("%")
        .strip()
    )
    if not NUMBER.fullmatch(plain) or not plain[-1:].isdigit() or ("/" in plain and "." in plain):
        return None
    return Fraction(plain.replace(",", ""))


class _Worker:
    """One subprocess, started when first asked and again after it was stopped."""

    def __init__(self):
        self.process: subprocess.Popen | None = None

    def ask(self, gold: str, answer: str) -> bool:
        """math-verify's verdict; False when it takes longer than the time limit or the worker dies."""
        limit = TIME_LIMIT_S
        if self.process is None or self.process.poll() is not None:
            self._start()
            limit = START_LIMIT_S
        assert self.process and self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            self.process.stdin.flush()
            line = self._read_line(limit)
        except BrokenPipeError:
            line = b""
        if not line:
            self.stop()
            return False
        return json.loads(line)

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("math_worker.py"))],  # by path: the package is not imported
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
            start_new_session=True,  # a Ctrl-C is for the trainer, which stops its workers itself
        )  # fmt: skip
        _started.append(self)

    def _read_line(self, limit_s: float) -> bytes:
        """The next line, or nothing once limit_s seconds have passed."""
        assert self.process and self.process.stdout
        line, deadline = b"", time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return b""
                read = os.read(self.process.stdout.fileno(), 4096)
                if not read:
                    return b""
                line += read
        return line

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


_started: list[_Worker] = []
_local = threading.local()
_threads: list[ThreadPoolExecutor] = []


def _pool() -> ThreadPoolExecutor:
    """Threads that wait for the workers, one worker a thread."""
    if not _threads:
        _threads.append(ThreadPoolExecutor(WORKERS, thread_name_prefix="math-verify"))
    return _threads[0]


def _worker() -> _Worker:
    if not hasattr(_local, "worker"):
        _local.worker = _Worker()
    return _local.worker


@atexit.register
def _stop_all() -> None:
    for worker in _started:
        worker.stop()

"""Runs untrusted Python code in a subprocess (jail.py), within limits of time, memory, files and threads."""

import contextlib
import json
import os
import secrets
import signal
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

JAIL = Path(__file__).with_name("jail.py")
LOOK_EVERY_S = 0.02
START_LIMIT_S = 30.0  # for a process to come to the code
MOST_BYTES, MOST_FILES, MOST_THREADS = 32 << 20, 256, 64  # in its folder, and at once
LARGEST_FILE = 8 << 20  # as jail.py has it
LARGEST_OUTPUT = 1 << 20  # longer output is no answer


class SandboxError(Exception):
    """The code was not run, since it could not be isolated."""


@dataclass(frozen=True)
class Limits:
    seconds: float = 5.0
    memory_mb: int = 1024
    isolate: bool = True


def run_tests(code: str, tests: list[str], limits: Limits) -> list[bool]:
    """A truth value for each test, some lines of Python: it raises nothing after the code."""
    _, _, lines = _run({"code": code, "tests": tests}, "", limits)
    passed = {int(line.split()[1]) for line in lines if line.startswith("passed ")}
    return [index in passed for index in range(len(tests))]


def run_program(code: str, given: str, limits: Limits) -> str | None:
    """The code's output when it reads `given` from standard input; None if it fails or is ended."""
    status, output, _ = _run({"code": code, "tests": None}, given, limits)
    return output if status == 0 else None


@lru_cache(maxsize=1)
def cannot_isolate() -> str | None:
    """The reason why this system cannot isolate code, found out by trying; None where it can."""
    try:
        worked = run_tests("import heapq, random, statistics", ["assert statistics.mean([1, 3]) == 2"], Limits(30.0))
    except SandboxError as error:
        return str(error)
    return None if worked == [True] else "isolated code cannot import the standard library"


def _run(job: dict[str, Any], given: str, limits: Limits) -> tuple[int | None, str, list[str]]:
    """Exit status (None: killed at a limit), standard output, and the lines that the jail itself wrote.

    Raises:
        SandboxError: the jail did not come to run the code.
    """
    nonce = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(prefix="lowmem-grpo-code-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as job_file, tempfile.TemporaryFile() as results, tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as stdout,
    ):  # fmt: skip
        settings = {
            "nonce": nonce, "folder": folder, "isolate": limits.isolate, "seconds": limits.seconds,
            "memory_bytes": limits.memory_mb << 20, "parent": os.getpid(),
        }  # fmt: skip
        job_file.write(json.dumps({**job, **settings}).encode())
        stdin.write(given.encode())
        job_file.seek(0)
        stdin.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", str(JAIL), str(job_file.fileno()), str(results.fileno())],
            stdin=stdin, stdout=stdout, stderr=subprocess.DEVNULL, pass_fds=[job_file.fileno(), results.fileno()],
            cwd=folder, start_new_session=True,
            env={"HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},  # no secrets
        )  # fmt: skip
        try:
            files = (job_file, results, stdin, stdout)
            own = {(status.st_dev, status.st_ino) for status in (os.fstat(file.fileno()) for file in files)}
            ended = _watch(process.pid, os.path.realpath(folder), own, results.fileno(), limits.seconds)
        finally:
            _kill(process)
        results.seek(0)
        stdout.seek(0)
        said = results.read(1 << 20).decode(errors="replace").splitlines()
        lines = [line.removeprefix(nonce + " ") for line in said if line.startswith(nonce + " ")]
        if "ready" not in lines:
            reasons = (line.removeprefix("failed ") for line in lines)
            raise SandboxError(next(reasons, f"a process did not come to the code within {START_LIMIT_S:g} s"))
        output = stdout.read(LARGEST_OUTPUT + 1).decode(errors="replace")
        whole = len(output) <= LARGEST_OUTPUT
        return process.returncode if ended and whole else None, output, lines


def _watch(pid: int, folder: str, own: set[tuple[int, int]], results: int, limit_s: float) -> bool:
    """Wait for the process's end without reaping it, so that its id stays its own; False past a limit.

    The time of the code begins as the jail says in the file `results` that it does. Where many processes start, Python
    alone may take seconds.
    """
    deadline, has_begun = time.monotonic() + START_LIMIT_S, False
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if not has_begun and os.fstat(results).st_size:
            deadline, has_begun = time.monotonic() + limit_s, True
        if time.monotonic() > deadline or _threads(pid) > MOST_THREADS or _is_over_full(folder, pid, own):
            return False
        time.sleep(LOOK_EVERY_S)
    return True


def _threads(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[17])
    except OSError:  # a system without /proc
        return 1


def _is_over_full(folder: str, pid: int, own: set[tuple[int, int]]) -> bool:
    """Tell whether a process has written too much: files of its folder, and others that it holds but for `own`."""
    files, total = 0, _bytes_without_a_name(folder, pid, own)
    with os.scandir(folder) as entries:  # flat, since isolated code can make no folders
        for entry in entries:
            try:
                files, total = files + 1, total + entry.stat(follow_symlinks=False).st_size
            except OSError:  # gone meanwhile
                continue
            if files > MOST_FILES:
                return True
    return total > MOST_BYTES


def _bytes_without_a_name(folder: str, pid: int, own: set[tuple[int, int]]) -> int:
    """Bytes of files without a name, which stay on the disk while a process has them open or mapped."""
    sizes = {}
    with contextlib.suppress(OSError):  # the process has ended, or the system has no /proc
        with os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                status = entry.stat()
                if stat.S_ISREG(status.st_mode) and not status.st_nlink:
                    sizes[status.st_dev, status.st_ino] = status.st_size
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if line.endswith(" (deleted)") and f" {folder}/" in line:
                device, inode = line.split(maxsplit=5)[3:5]
                major, minor = (int(number, 16) for number in device.split(":"))
                # How large it is cannot be seen; a page of it holds all of it.
                sizes.setdefault((os.makedev(major, minor), int(inode)), LARGEST_FILE)
    return sum(size for file, size in sizes.items() if file not in own)


def _kill(process: subprocess.Popen) -> None:
    """Kill the process and, where the code was not isolated, its group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.wait()

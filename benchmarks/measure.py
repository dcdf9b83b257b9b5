"""One way to time and one way to measure memory, for every implementation that a benchmark compares.

    python -m lowmem_grpo.benchmarks.measure      prints what results depend on: machine, versions, commit

Time is that of CUDA events. On a CPU it is the CPU time of the process, all threads together, which a busy machine
disturbs less than it does the clock on the wall. The order rotates from repetition to repetition, so that no
implementation always runs in the wake of the same other one.

Memory is the peak above the inputs: what the CUDA allocator hands out, or on a CPU the growth of the resident set of a
child process, one child for each implementation.
"""

import argparse
import ctypes
import gc
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from rich.cells import cell_len

from lowmem_grpo.benchmarks import forked
from lowmem_grpo.out_of_memory import let_go
from lowmem_grpo.terminal import columns_of, fitted, table

OUT_OF_MEMORY = "out of memory"
NOT_INSTALLED = "not installed"
NOT_DONE = "not done in"  # so many seconds
QUIET = "ignore::RuntimeWarning:runpy"
PACKAGES = [
    "torch", "triton", "transformers", "bitsandbytes", "peft", "trl", "liger-kernel", "cut-cross-entropy", "unsloth",
]  # fmt: skip
Run = Callable[[], object]


class Failed(NamedTuple):
    """The reason why a measurement could not be made, in its place."""

    reason: str  # OUT_OF_MEMORY, or the class of the error


class Timing(NamedTuple):
    """Seconds of one call."""

    median: float
    low: float
    high: float
    repetitions: int


class Once(NamedTuple):
    """One call of what a Build makes."""

    peak_bytes: int  # above the inputs
    seconds: float


class Build(Protocol):
    """Makes its inputs, small or as large as asked for, and returns the call to be measured."""

    def __call__(self, small: bool) -> Run: ...


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse, which says which one is bad."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def natural(text: str) -> int:
    """A whole number of at least 0, for argparse, which says which one is bad."""
    return 0 if text == "0" else positive(text)


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A benchmark's parser, described by the first line of its docstring, with --output."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--output", type=_new_file, metavar="FILE", help="JSON, with machine, versions and commit")
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device, by default a GPU where there is one."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")


def _new_file(text: str) -> Path:
    """A file that can be written, found out now and not after hours of work."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path.parent} cannot be written to ({error.strerror})") from None
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; name a file in it")
    return path


def attempt(run: Callable):
    """The result of run(), or Failed; the message goes to stderr."""
    try:
        return run()
    except Exception as error:
        print(f"{type(error).__name__}: {str(error).strip()[:300]}", file=sys.stderr)
        no_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
            words in str(error) for words in ("can't allocate memory", "out of memory", "ALLOC_FAILED")
        )
        failed = Failed(OUT_OF_MEMORY if no_memory else type(error).__name__)
    let_go()  # only here is the error gone, and with it the frames that hold the tensors
    return failed


def time_each(
    runs: Mapping[str, Callable[[int], object]], device: torch.device, repetitions: int, warmups: int
) -> dict[str, Timing | Failed]:
    """Times runs[name](turn) for turn 0, 1, ...; a run may take other inputs each time, and is dropped if it fails."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    failures: dict[str, Failed] = {}
    names = list(runs)
    for turn in range(warmups + repetitions):
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            if name in failures:
                continue
            taken = attempt(lambda run=runs[name], turn=turn: seconds_of(run, turn, device))
            if isinstance(taken, Failed):
                failures[name] = taken
            elif turn >= warmups:
                seconds[name].append(taken)
    return {name: failures.get(name) or _timing(seconds[name]) for name in runs}


def seconds_of(run: Callable[[int], object], turn: int, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.process_time()
        run(turn)
        return time.process_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)  # of the device that is measured, which need not be the current one
    torch.cuda.synchronize(device)
    begin.record(stream)
    run(turn)
    end.record(stream)
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def _timing(seconds: list[float]) -> Timing:
    return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def missing(module: str) -> bool:
    """Tell whether a peer's library is not installed."""
    return find_spec(module.partition(".")[0]) is None


def preload(*modules: str) -> None:
    """Import the needs of peak_above_inputs()'s children, once and in the background. Call it first of all.

    The children are forks of a server that computes nothing: they start at once, and there are no threads for a fork to
    lose.
    """
    # That the program's own module is among them, and then is run once more as the program, is meant.
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), QUIET]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *(module for module in modules if not missing(module))])
    forkserver.ensure_running()


def peak_above_inputs(build: Build, device: torch.device) -> int | Failed:
    """Bytes of the call's peak above what it was given, its outputs included.

    On a CPU build must be picklable, and figures of a few MiB are at the resolution of the method.
    """
    found = once(build, device)
    return found if isinstance(found, Failed) else found.peak_bytes


def once(build: Build, device: torch.device, limit_bytes: int | None = None) -> Once | Failed:
    """Peak and time of one call, on CUDA of the second; on a CPU in a process of its own.

    A limit makes the address space of a CPU's child process so much larger than it is before the call, and no larger.
    """
    if device.type == "cuda":
        return attempt(lambda: _once_on_cuda(build, device))
    if not Path("/proc/self/clear_refs").exists():
        return Failed("needs Linux")
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure_in_child, args=(build, sender, limit_bytes))
    child.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        found = None
    child.join()
    if found is None:  # killed by the kernel, which is out of memory, or never begun
        found = Failed(ended_by(child.exitcode, limit_bytes is not None))
    return found


def ended_by(status: int | None, gets_none: bool) -> str:
    """Why a process left no result. The kernel kills what is out of memory; C++ that gets none aborts."""
    if status == -signal.SIGKILL or (status == -signal.SIGABRT and gets_none):
        return OUT_OF_MEMORY
    return f"ended with status {status}"


def _once_on_cuda(build: Build, device: torch.device) -> Once:
    run = build(small=False)
    run()  # compiles, tunes, and takes the workspaces that stay
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    seconds = seconds_of(lambda turn: run(), 0, device)
    return Once(torch.cuda.max_memory_allocated(device) - before, seconds)


def _measure_in_child(build: Build, sender: Connection, limit_bytes: int | None) -> None:
    sender.send(attempt(lambda: _once_resident(build, limit_bytes)))


def _once_resident(build: Build, limit_bytes: int | None) -> Once:
    build(small=True)()  # threads, libraries and whatever else is there only once
    run = build(small=False)
    give_back_free_memory()
    before = _status_bytes("VmRSS")
    if limit_bytes:
        import resource  # of Unix

        resource.setrlimit(resource.RLIMIT_AS, (_status_bytes("VmSize") + limit_bytes, resource.RLIM_INFINITY))
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, back to VmRSS: man 5 proc
    seconds = seconds_of(lambda turn: run(), 0, torch.device("cpu"))
    return Once(_status_bytes("VmHWM") - before, seconds)


def give_back_free_memory() -> None:
    """Return freed memory to the system: what the process still holds would hide as much of the next peak."""
    gc.collect()
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):  # glibc's
        ctypes.CDLL(None).malloc_trim(0)


def peak_allocated(run: Run, device: torch.device) -> int:
    """Bytes that a call holds at most above those before, by the allocator's own record.

    Exact for a few bytes, too. Takes no note of what is allocated without torch.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    profiler: Any = profile.profiler  # whose events' nbytes() torch does not declare
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(0, *itertools.accumulate(sizes)) if sizes else 0


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def machine(device: torch.device) -> dict[str, str | int | float]:
    """The hardware that a measurement depends on; no name of the host."""
    found: dict[str, str | int | float] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        card = forked.card()
        found |= {
            "gpu": card.name,
            "gpu_memory_gib": round(card.total_memory / 2**30, 1),
            "compute_capability": f"{card.major}.{card.minor}",
        }
    return found


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return named[1].strip() if named else platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str | None]:
    """Version of Python, of CUDA and of each package; None where there is none."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """The commit of the checkout that has this file; None for an installed one.

    "-dirty" where tracked files differ, but for results, to which a suite adds part by part.
    """
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True).stdout.strip()
        except OSError:  # no git
            return ""

    if not git("ls-files", here.name):  # in an environment that lies in a checkout of something else
        return None
    found = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results")
    return (f"{found}-dirty" if changed else found) or None


def document(module: str, argv: Sequence[str] | None, device: torch.device, **found: Any) -> dict[str, Any]:
    """The results of a benchmark, and what they depend on: command (but for its output), machine, commit, versions."""
    words = iter(sys.argv[1:] if argv is None else argv)
    kept = [word for word in words if not word.startswith("--output=") and not (word == "--output" and next(words))]
    command = shlex.join(["python", "-m", f"lowmem_grpo.benchmarks.{module}", *kept])
    return plain(
        {
            "benchmark": module, "command": command, "date": time.strftime("%Y-%m-%d"),
            "machine": machine(device), "commit": commit(),
            "versions": versions(*PACKAGES), **found,
        }
    )  # fmt: skip


def save(found: dict[str, Any], path: Path | None) -> None:
    """Writes a document as JSON, whole or not at all; nothing without a path."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        scratch.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        scratch.replace(path)


def plain(value: Any) -> Any:
    """A value in types that JSON has, with the names of a named tuple's fields."""
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def spread(timing: dict[str, Any], scale: float = 1.0) -> str:
    """Median and range of a plain Timing, or why there is none."""
    if "reason" in timing:
        return timing["reason"]
    return "{:.3g} ({:.3g} to {:.3g})".format(*(scale * timing[key] for key in ("median", "low", "high")))


def mib(peak: int | dict[str, Any]) -> str:
    """A plain peak, or why there is none."""
    return peak["reason"] if isinstance(peak, dict) else f"{peak / 2**20:.0f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads well unrendered: the first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * width if i == 0 else "-" * (width - 1) + ":") for i, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *(line(row) for row in rows)])


def show(text: str) -> None:
    """Print a text in Markdown; a table that is wider than the terminal as one that fits it."""
    width, shown = columns_of(sys.stdout), []
    for is_table, lines in itertools.groupby(text.split("\n"), lambda line: line.startswith("| ")):
        found = list(lines)
        if is_table and width is not None and max(map(cell_len, found)) > width:
            header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in found)
            shown.append(table(header, rows, width))
        else:
            shown += [fitted(line, width) for line in found]
    print(*shown, "", sep="\n", flush=True)


if __name__ == "__main__":
    print(json.dumps(machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))))
    print(json.dumps({**versions(*PACKAGES), "commit": commit()}))

"""The meter: time, tokens per second and peak memory of each phase of a step."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from lowmem_grpo.distributed import gathered

MIB = 2**20


class Meter:
    """Collects `time/{phase}_s` and `memory/{phase}/peak_mib` for the phases of one step.

    On CUDA the peak is torch's allocator's, the model included; on a CPU it is the process's resident memory. Seconds
    are wall clock, after the device has finished.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.metrics: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        reset_peak(self.device)
        started = time.perf_counter()
        with torch.profiler.record_function(f"phase/{name}"):  # for whoever profiles a run
            yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.metrics[f"time/{name}_s"] = time.perf_counter() - started
        self.metrics[f"memory/{name}/peak_mib"] = peak_bytes(self.device) / MIB

    def rates(self, num_tokens: dict[str, int]) -> dict[str, float]:
        """`tokens_per_s/{phase}` of the phases that had so many tokens to do."""
        took = {phase: self.metrics.get(f"time/{phase}_s") for phase in num_tokens}
        did = {phase: (num_tokens[phase], took_s) for phase, took_s in took.items() if took_s and num_tokens[phase]}
        return {f"tokens_per_s/{phase}": count / took_s for phase, (count, took_s) in did.items()}


def of_all_ranks(metrics: dict[str, float]) -> dict[str, float]:
    """A step's metrics for all ranks: of time and memory the worst of any rank, else rank 0's."""
    by_rank = gathered(metrics)
    for name in by_rank[0]:
        least = name.startswith("tokens_per_s/") or name == "memory/token_budget"
        if least or name.startswith(("time/", "memory/")) or name == "step_time":
            values = [one[name] for one in by_rank if name in one]
            by_rank[0][name] = min(values) if least else max(values)
    return by_rank[0]


def reset_peak(device: torch.device) -> None:
    """Start a new peak at what is in use now. Outside Linux, a CPU's peak is that of the whole process's life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)


def peak_bytes(device: torch.device) -> int:
    """Most bytes in use since the last reset_peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return _lifetime_peak_bytes()


def _lifetime_peak_bytes() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

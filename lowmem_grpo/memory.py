"""The meter: time and peak memory of each phase of a step. And what to do when there is not enough of it."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

MIB = 2**20
T = TypeVar("T")


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
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.metrics[f"time/{name}_s"] = time.perf_counter() - started
        self.metrics[f"memory/{name}/peak_mib"] = peak_bytes(self.device) / MIB


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


class TokenBudget:
    """The most tokens of a micro-batch: what the configuration says, until that ran out of memory."""

    def __init__(self, tokens: int):
        self.tokens = tokens
        self.out_of_memory = 0  # how often

    def fit(self, work: Callable[[int], T], lengths: list[int]) -> T:
        """work(tokens), which begins anew when called again, for sequences of these lengths.

        Out of memory, what can be let go is, and the same is tried again; then with half of the tokens, as often as
        need be, and from then on for good. Random numbers are drawn as if nothing had happened.

        Raises:
            torch.OutOfMemoryError: one sequence alone does not fit; a note has the remedy.
        """
        seen = self.out_of_memory
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        drawn = torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None
        while True:
            try:
                return work(self.tokens)
            except torch.OutOfMemoryError as error:
                self.out_of_memory += 1
                if self.out_of_memory > seen + 1:
                    self._halve(error, lengths)
            gc.collect()
            torch.set_rng_state(drawn[0])
            if drawn[1] is not None:
                torch.cuda.set_rng_state(drawn[1])
                torch.cuda.empty_cache()

    def _halve(self, error: torch.OutOfMemoryError, lengths: list[int]) -> None:
        tokens = min(self.tokens, sum(lengths))
        if tokens <= max(lengths):
            error.add_note(
                f"A micro-batch of one sequence, of {max(lengths)} tokens, does not fit. Lower max_completion_length "
                "or max_prompt_length, or choose a smaller model."
            )
            raise error
        self.tokens = max(tokens // 2, max(lengths))

    def metrics(self) -> dict[str, float]:
        return {"memory/token_budget": self.tokens, "memory/out_of_memory": self.out_of_memory}

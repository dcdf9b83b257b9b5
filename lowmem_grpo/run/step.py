"""A step in progress: its phases are measured, and an interruption is let through between them."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from lowmem_grpo.run.interruption import Interruption
from lowmem_grpo.run.meter import Meter


@dataclass
class Step:
    """A step in progress: its number, time and memory of its phases, and counts of optimizer steps."""

    number: int  # the first is 1
    meter: Meter
    interruption: Interruption
    learning_rate: float
    started: float = field(default_factory=time.perf_counter)  # s
    num_updates: int = 0  # optimizer steps
    num_skipped: int = 0  # of those, the ones that changed no weight
    grad_norm: float = math.nan  # before clipping, of the last

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a part of the step, as time/{name}_s and memory/{name}/peak_mib."""
        with self.meter.phase(name):
            yield
        self.interruption.check()

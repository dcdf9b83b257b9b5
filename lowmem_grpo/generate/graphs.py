"""Decoding steps as CUDA graphs: hundreds of launches, recorded once and repeated as one.

A step reads all that changes (tokens, positions, pages, prefix rows, adapters, where the store lies) from device memory
at addresses that stay, so that one captured for some number of rows holds however texts grow, slots change hands and
weights move: in this rollout, and where graphs last in all later ones.
"""

import contextlib
import gc
import time
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowmem_grpo.errors import in_a_line
from lowmem_grpo.kernels.overlap import overlapping
from lowmem_grpo.warn import warn

# Steps of a number of rows before its first capture. They compile kernels and allocate workspaces.
EAGER = 1

Replay = Callable[[], Tensor]
Capture = Callable[[Callable[[], Tensor]], Replay]


class Kept:
    """Tensors that steps read, by name, which stay where they are from rollout to rollout, whatever is in them."""

    def __init__(self, moved: Callable[[], None] = lambda: None):
        """Take what is called where a tensor is made anew, larger: no step may be replayed that read it."""
        self.tensors: dict[Hashable, Tensor] = {}
        self.moved = moved

    def zeros(self, name: Hashable, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zeros of a shape: a view of what is there, if that is large enough in every dimension."""
        there = self.tensors.get(name)
        if there is None or any(size < needed for size, needed in zip(there.shape, shape, strict=True)):
            largest = shape if there is None else tuple(map(max, there.shape, shape))
            if there is not None:
                self.moved()
            there = self.tensors[name] = torch.zeros(largest, dtype=dtype, device=device)
        return there[tuple(slice(size) for size in shape)].zero_()

    def copy(self, name: Hashable, values: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of values in a dtype, with their strides; of one name they always have one shape."""
        if name not in self.tensors:
            self.tensors[name] = torch.empty_like(values, dtype=dtype)
        return self.tensors[name].copy_(values)

    def forget(self, kind: str) -> None:
        """Let tensors go whose names are tuples that begin with a kind. No step may be replayed that read them."""
        self.tensors = {
            name: tensor for name, tensor in self.tensors.items() if not (isinstance(name, tuple) and name[0] == kind)
        }


@dataclass
class Counts:
    """Number of a rollout's decoding steps, and how they were run."""

    steps: int = 0
    replayed: int = 0  # of them
    capture_s: float = 0.0  # time in captures


@dataclass
class Captures:
    """A run's decoding steps as CUDA graphs, and its knowledge of them."""

    model: str  # its name, for the warning
    last: bool = True  # whether graphs and what they read are kept for later rollouts
    overlap: bool = False  # whether kernels of a captured step are launched before the one before them has ended
    refusal: str | None = None  # why none is captured
    trusted: set[Hashable] = field(default_factory=set)  # kinds and rows of steps whose replay was compared, and right
    replays: dict[Hashable, Replay] = field(default_factory=dict)  # by kind and rows
    in_new_pool: Callable[[], Capture] | None = None  # makes what captures steps in one pool of memory
    capture: Capture | None = None  # in the pool of all that are there
    counts: Counts = field(default_factory=Counts)  # of the last rollout

    def __post_init__(self) -> None:
        self.kept = Kept(moved=self.drop_graphs)

    def refuse(self, reason: str) -> None:
        self.refusal = reason
        warn(f"{self.model} is sampled from without CUDA graphs, which is slower: {reason}")

    def separate(self, reason: str) -> None:
        """Capture steps without overlap from now on, those that were captured with it anew."""
        self.overlap = False
        self.drop_graphs()
        warn(f"{self.model} is sampled from without overlapping kernels, which is slower: {reason}")

    def drop_graphs(self) -> None:
        """Let the graphs and their memory go; the next steps are captured anew."""
        self.replays.clear()

    def release(self) -> None:
        """Let the graphs go, and the tensors that they read; not within a rollout, which goes on with those."""
        self.drop_graphs()
        self.kept.tensors.clear()

    def give_way(self) -> None:
        """Let all memory go; if that is any, steps are captured again in each rollout from now on."""
        self.last = self.last and not self.kept.tensors
        self.release()


class Graphs:
    """Runs step(num_rows) by replaying a recording, from its second run on; of a kind once trusted from the first.

    A capture is tried before it is trusted: the same step is run, captured and replayed from the same state, and the
    two results are compared. Where that fails, steps run one by one for the rest of the run, after one warning; where
    kernels overlap, first a capture in which they do not is tried. Of a kind of step that was trusted once, a recording
    that is gone is made anew at the first step: a capture takes 0.05 to 0.1 s on an H200, as long as a step by itself.
    """

    def __init__(
        self, captures: Captures, step: Callable[[int], Tensor], state: list[Tensor],
        held: Callable[[], list[int]], kind: Hashable, commit: Tensor | None = None,
    ):  # fmt: skip
        """Take a step that gives (3, S) fp64, a Choice's tensors, and changes only `state` for the next one.

        held says which rows have a completion; what comes out of the others does not matter. kind is all else than the
        number of rows that a recording fixes: which kernels a step runs, and the numbers that Python hands to them.
        commit () bool is what a step reads of whether to write what else it would change, as layers' states.
        """
        self.captures, self.step, self.state, self.held = captures, step, state, held
        self.kind, self.commit = kind, commit
        self.doubts = 0  # captures whose first replay was another step
        self.ran: Counter[int] = Counter()

    def __call__(self, num_rows: int) -> Tensor:
        self.ran[num_rows] += 1
        captures, key = self.captures, (self.kind, num_rows)
        if key not in captures.replays and captures.refusal is None:
            if key in captures.trusted:
                self._capture_trusted(num_rows)
            elif self.ran[num_rows] > EAGER:
                with self._uncommitted():
                    self._try(num_rows)
        replay = captures.replays.get(key)
        captures.counts.steps += 1
        captures.counts.replayed += replay is not None
        return self._run(num_rows) if replay is None else replay().clone()  # the next replay writes over it

    def _run(self, num_rows: int) -> Tensor:
        with overlapping(self.captures.overlap):
            return self.step(num_rows)

    def _capture(self, num_rows: int) -> Replay:
        started, captures = time.perf_counter(), self.captures
        try:
            if captures.capture is None or not captures.replays:  # torch refuses a pool whose graphs are all gone
                assert captures.in_new_pool is not None
                captures.capture = captures.in_new_pool()
            with _no_garbage_collected():
                return captures.capture(partial(self._run, num_rows))
        finally:
            captures.counts.capture_s += time.perf_counter() - started

    def _capture_trusted(self, num_rows: int) -> None:
        try:
            self.captures.replays[self.kind, num_rows] = self._capture(num_rows)
        except Exception:  # as below, for a reason that was not there the last time: it is tried from the start
            self.captures.trusted.discard((self.kind, num_rows))

    def _try(self, num_rows: int) -> None:
        before, truth = [x.clone() for x in self.state], None
        try:
            with _never_waiting(self.state[0].device):
                truth = self.step(num_rows)  # without overlap
            self._go_back(before)
            replay = self._capture(num_rows)
            held = self.held()
            reason = _difference(replay()[:, held], truth[:, held])
        except Exception as error:  # whatever a model's code, a kernel or the driver has against it
            if truth is None and isinstance(error, torch.OutOfMemoryError):  # not the capture's: fewer slots
                raise
            reason = in_a_line(error.__context__ or error)  # a capture ends with an error about its end
        else:
            if reason is None:
                self.captures.replays[self.kind, num_rows] = replay
                self.captures.trusted.add((self.kind, num_rows))
            self.doubts += reason is not None
        self._go_back(before)
        # Rounding may tip one row into another token, though hardly twice: the next step tries again.
        if reason is None or self.doubts == 1:
            return
        if self.captures.overlap:
            self.doubts = 0
            self.captures.separate(reason)
            return
        self.captures.drop_graphs()
        self.captures.refuse(reason)

    @contextlib.contextmanager
    def _uncommitted(self) -> Iterator[None]:
        """Have steps leave layers' states as they are inside the `with`: twice the same step would move them twice."""
        if self.commit is None:
            yield
            return
        self.commit.fill_(False)
        try:
            yield
        finally:
            self.commit.fill_(True)

    def _go_back(self, before: list[Tensor]) -> None:
        for tensor, values in zip(self.state, before, strict=True):
            tensor.copy_(values)


def _difference(found: Tensor, truth: Tensor) -> str | None:
    """Why a replay's (3, S) is not the step's, or None. One row in 8 may be within rounding of another token."""
    near = (found[0] == truth[0]) & ((found[1:] - truth[1:]).abs() < 0.1).all(0)
    wrong = int((~near).sum())
    return f"a captured step chose otherwise in {wrong} of {len(near)} rows" if 8 * wrong > len(near) else None


@contextlib.contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """Have Python collect no cycles inside the `with`: a graph that dies with one breaks the capture in progress."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def _never_waiting(device: torch.device) -> Iterator[None]:
    """Raise where the host would wait for the device: inside a capture a wait breaks the capture."""
    if device.type != "cuda":
        yield
        return
    mode: Any = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not detect every such operation
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def cuda_capture() -> Capture:
    """A function that captures steps in one pool of memory: a replay's output holds until the next replay."""
    pool = torch.cuda.graph_pool_handle()

    def capture(step: Callable[[], Tensor]) -> Replay:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                out = step()
        except BaseException:
            # Where a capture cannot be ended, torch 2.13 leaves its stream current and its pool in charge.
            torch.cuda.set_stream(before)
            with contextlib.suppress(Exception):
                torch._C._cuda_endAllocateToPool(before.device_index, pool)
            raise

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    return capture

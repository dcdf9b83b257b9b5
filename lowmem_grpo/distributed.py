"""Several processes that train one policy: who this one is, what its share is, and what they put together.

torchrun starts them, on one machine, each with a GPU of its own. Every rank has the whole state: weights, optimizer,
rollout, random generators. Only work is shared, and what came of it is put together in the order of ranks. With one
process, or where nobody called joined(), each function here returns what it was given.

A rank that ends with an error says so in place of its next exchange, so that the others end with a sentence and not in
a wait. One that is killed says nothing, and its connections break.
"""

import contextlib
import functools
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate, chain
from typing import Any, ParamSpec, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from lowmem_grpo.errors import SENTENCES, InputError, LostRankError, in_a_line
from lowmem_grpo.torchrun import num_started

P = ParamSpec("P")
T = TypeVar("T")
# How long a rank waits for the others, whose rewards may be slow. A rank that has died is known at once.
PATIENCE = timedelta(hours=2)
LOOKS_DEAD_S = 2.0  # within which a process whose connections broke has ended
# How long rank 0, which has a sentence to say, waits at its end for others that hang: torchrun kills after 30 s.
PARTING_S = 10.0
ARRIVE_S = 0.02  # how often a rank that has started looks for the others
POLL_S = 0.0005  # how often the host asks whether a sum is done
LOOK_S = 0.5  # how often a wait for others is interrupted by while_waiting()'s call

_alone = 0  # how many alone() are entered
_store: Any = None  # where the processes find each other
_num_joined = 0  # how many joined() were entered with others
_processes: list[int] = []  # process ids, by rank
# Set once the last exchange is done, which goes on where a signal took the main thread away from it. It is no
# Thread's join(), since up to Python 3.12 a thread is taken for ended once a signal has come into that.
_done = threading.Event()
_done.set()
_is_broken = False  # True once ranks could not put something together
_while_waiting: Callable[[], None] | None = None


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, gloo between CPUs and NCCL between GPUs, and leave them at the end.

    Nothing happens in a process that torchrun did not start, that is one of one, or that has joined already.

    Raises:
        InputError: the processes are on several machines.
    """
    if num_started() == 1 or dist.is_initialized():
        yield
        return
    if int(os.environ.get("LOCAL_WORLD_SIZE", num_started())) != num_started():
        raise InputError("torchrun started processes on several machines; use one, with --nnodes 1")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo asks what this host's name means
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Python objects go by gloo: where a GPU waits for a rank that has died, nobody is told.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    place, number = _meeting_place(), int(os.environ["RANK"])
    _wait_for_all(place, number)
    dist.init_process_group(backend, store=place, rank=number, world_size=num_started(), timeout=PATIENCE)
    try:
        _processes[:] = gathered(os.getpid())
        yield
        gathered(None)  # where an error that another rank ends with is heard
    except BaseException as error:
        lost = lost_rank(error)
        if lost is not None:
            raise lost from error
        if not hasattr(error, "was_told"):
            with contextlib.suppress(LostRankError):
                _exchanged(_Sent(error=error, is_last=True), PARTING_S if is_main() else None)
        raise
    finally:
        _leave()


def _meeting_place() -> Any:
    """Return a store in which ranks find each other for one joined(), without the addresses of an earlier one."""
    global _store, _num_joined
    if _store is None:
        _store, _, _ = next(dist.rendezvous("env://", timeout=PATIENCE))  # type: ignore[reportPrivateImportUsage] # in docs
    _num_joined += 1
    return dist.PrefixStore(f"lowmem_grpo/{_num_joined}", _store)  # type: ignore[reportPrivateImportUsage] # in docs


def _wait_for_all(place: Any, number: int) -> None:
    """Wait in a store until every rank is there, since no signal reaches Python within init_process_group().

    Raises:
        LostRankError: one has not come within PATIENCE.
    """
    place.set(f"rank {number}", "")
    until = time.monotonic() + PATIENCE.total_seconds()
    while late := [f"rank {other}" for other in range(num_started()) if not place.check([f"rank {other}"])]:
        if time.monotonic() > until:
            raise LostRankError(f"{' and '.join(late)} did not start within {PATIENCE}")
        time.sleep(ARRIVE_S)


def _leave() -> None:
    """Wait for the others at the end, since torchrun kills those that are left once one has failed."""
    if not is_stranded():
        with contextlib.suppress(LostRankError):
            _exchanged(_Sent(is_last=True), PARTING_S if is_main() else None)
    _processes.clear()
    if not is_stranded():
        dist.destroy_process_group()


def is_stranded() -> bool:
    """True where an exchange has failed, or waits for a rank that hangs, which would keep this process from ending."""
    return _is_broken or not _done.is_set()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Be one process of one within the `with`, as for work that each rank does by itself."""
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


def refuse_several(what: str) -> None:
    """Raise InputError in a process that torchrun started with others, for what is one process's work."""
    count = num_started()
    if count > 1:
        raise InputError(f"{what} is the work of one process, and torchrun has started {count}; start it without")


def world_size() -> int:
    """The number of processes that train together, 1 without others."""
    return 1 if _alone or not dist.is_initialized() else dist.get_world_size()


def rank() -> int:
    """The number of this process, from 0; 0 without others."""
    return 0 if world_size() == 1 else dist.get_rank()


def is_main() -> bool:
    """True in rank 0, which alone writes and speaks."""
    return rank() == 0


def share(weights: Sequence[int]) -> range:
    """The indices of this rank's share of things with these weights, which lie side by side.

    Each thing goes to the rank in whose part of the sum of weights its middle lies. share([1] * n) is a share of n
    equal things, and has one of them where there are as many as ranks.
    """
    size = world_size()
    if size == 1:
        return range(len(weights))
    total = max(1, sum(weights))
    ends = accumulate(weights)
    owners = [(2 * end - weight) * size // (2 * total) for end, weight in zip(ends, weights, strict=True)]
    # A thing without weight at the very end has its middle where the last part ends.
    mine = [index for index, owner in enumerate(owners) if min(owner, size - 1) == rank()]
    return range(mine[0], mine[-1] + 1) if mine else range(0)


def gathered(value: T) -> list[T]:
    """The values of all ranks, in their order, from rank to rank as pickle has them."""
    return [value] if world_size() == 1 else [sent.value for sent in _exchanged(_Sent(value))]


def each(work: Callable[[], T]) -> list[T]:
    """The results of work() on every rank, in their order; each arrives as pickle has it.

    An error of one rank is raised on all of them, the first rank's where there are several.
    """
    if world_size() == 1:
        return [work()]
    try:
        mine = _Sent(pickle.dumps(work()))
    except BaseException as error:
        if hasattr(error, "was_told"):  # an exchange within work ended with it on every rank
            raise
        mine = _Sent(error=error)
    sent = _exchanged(mine)
    for number, one in enumerate(sent):
        if one.error is not None:
            raise mine.error if number == rank() and mine.error is not None else one.error
    return [pickle.loads(one.value) for one in sent]


def by_main(work: Callable[P, T]) -> Callable[P, T]:
    """Return a function that rank 0 alone does; what it returned, or its error, comes to every rank."""

    @functools.wraps(work)
    def done(*args: P.args, **kwargs: P.kwargs) -> T:
        if world_size() == 1:
            return work(*args, **kwargs)
        return each(lambda: work(*args, **kwargs) if is_main() else None)[0]  # type: ignore[return-value] # rank 0's

    return done


def main_first(work: Callable[P, T]) -> Callable[P, T]:
    """Return a function that rank 0 does first, and then the others, who find what it has downloaded.

    An error of one rank is raised on all of them.
    """

    @functools.wraps(work)
    def done(*args: P.args, **kwargs: P.kwargs) -> T:
        if world_size() == 1:
            return work(*args, **kwargs)
        found: list[T] = []
        for of_main in (True, False):
            each(lambda of_main=of_main: found.append(work(*args, **kwargs)) if is_main() is of_main else None)
        return found[0]

    return done


def _as_sent(error: BaseException) -> BaseException:
    """An error that another process can read: itself, or its sentence where pickle cannot have it."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {in_a_line(error)}")


def from_main(value: T) -> T:
    """Rank 0's value, on every rank."""
    return gathered(value if is_main() else None)[0]  # type: ignore[return-value] # rank 0's


def in_order(lists: Sequence[list[T]]) -> list[T]:
    """The ranks' lists as one."""
    return list(chain.from_iterable(lists))


def sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all ranks, in one call for those of one type, on one device."""
    if world_size() == 1:
        return
    kinds: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    flat = [torch.cat([tensor.detach().flatten() for tensor in several]) for several in kinds.values()]
    _exchanged(_Sent(), then=functools.partial(_sum, flat, _computed_on(flat)))
    for several, total in zip(kinds.values(), flat, strict=True):
        for tensor, part in zip(several, total.split([tensor.numel() for tensor in several]), strict=True):
            tensor.detach().copy_(part.view_as(tensor))


def _computed_on(tensors: Sequence[Tensor]) -> torch.cuda.Stream | None:
    """The stream of a GPU that has computed the tensors by now, or None where they are on a CPU.

    What goes wrong on a GPU is raised here, and told to the others before they begin to wait on theirs.
    """
    if not any(tensor.is_cuda for tensor in tensors):
        return None
    stream = torch.cuda.current_stream()
    stream.synchronize()
    return stream


def _sum(tensors: Sequence[Tensor], stream: torch.cuda.Stream | None) -> None:
    """Replace each tensor by its sum over all ranks, which are there.

    NCCL waits for a rank that is killed meanwhile until PATIENCE is over, and everything that comes after it in the
    stream waits with it. So the host looks first whether the sum is done, and whether all live.

    Raises:
        RuntimeError: another rank has ended.
    """
    with torch.cuda.stream(stream):  # which is each thread's own
        works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
        while not all(work.is_completed() for work in works):  # type: ignore[union-attr] # async_op
            if not all(map(_is_alive, _processes)):
                raise RuntimeError("a process has ended while the sum was computed")
            time.sleep(POLL_S)
        for work in works:
            work.wait()  # type: ignore[union-attr] # async_op


def summed(tensor: Tensor) -> Tensor:
    """The tensor's sum over all ranks, in its place."""
    sum_over_ranks([tensor])
    return tensor


def take_from_main(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by rank 0's."""
    if world_size() > 1:
        for tensor in tensors:
            if not is_main():
                tensor.detach().zero_()
        sum_over_ranks(tensors)


def refuse_differences(what: str, values: Mapping[str, object]) -> None:
    """Refuse values that differ between ranks, given by name, as where a script shuffles at random.

    Raises:
        InputError: they differ, on every rank.
    """
    first, *others = gathered({name: repr(value) for name, value in values.items()})
    differing = [name for name in first if any(one.get(name) != first[name] for one in others)]
    if differing:
        raise InputError(
            f"the processes were given different {what} ({', '.join(differing)}); give each the same, by one seed "
            "and one current folder in all, and without the time of day"
        )


@contextlib.contextmanager
def own_randomness(device: torch.device, *seed: int) -> Iterator[None]:
    """Draw other random numbers on every rank within the `with`, by seed and rank; afterwards the same on all again."""
    if world_size() == 1:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(hash((*seed, rank())))
        yield


@dataclass
class _Sent:
    """A message to all ranks: a value, or an error, with which the sender may end."""

    value: Any = None
    error: BaseException | None = None
    is_last: bool = False


def _exchanged(mine: _Sent, patience_s: float | None = None, then: Callable[[], object] | None = None) -> list[_Sent]:
    """The messages of all ranks, in their order, once each has sent one, or patience_s have passed.

    Where none of them is a rank's last, each rank then calls `then`. No signal keeps this rank from it: the others
    would begin it alone.

    Raises:
        LostRankError: another rank has ended, or does not come.
        BaseException: what another rank has ended with.
    """
    found: list[Any] = [None] * dist.get_world_size()
    message = _Sent(mine.value, None if mine.error is None else _as_sent(mine.error), mine.is_last)

    def exchange() -> None:
        dist.all_gather_object(found, message)
        if then is not None and not any(one.is_last for one in found):
            then()

    _together(lambda: _interruptibly(exchange, patience_s))
    ended = [(number, one.error) for number, one in enumerate(found) if one.is_last]
    if ended and not mine.is_last:
        raise _told(*ended[0])
    return found


def _interruptibly(work: Callable[[], object], patience_s: float | None) -> None:
    """Do work in a thread, since no signal reaches Python while the main thread waits within gloo.

    Where a signal raises, or what while_waiting() has set, the work goes on, and the next begins when it is done: ranks
    stay in step.
    """
    global _done
    before, done, failed = _done, threading.Event(), []

    def run() -> None:
        before.wait()
        try:
            work()
        except BaseException as error:
            failed.append(error)
        done.set()

    _done = done
    threading.Thread(target=run, daemon=True).start()
    until = None if patience_s is None else time.monotonic() + patience_s
    while not done.wait(LOOK_S):
        if until is not None and time.monotonic() > until:
            raise RuntimeError(f"not within {patience_s} s")
        if _while_waiting is not None:
            _while_waiting()
    if failed:
        raise failed[0]


def while_waiting(call: Callable[[], None] | None) -> None:
    """Have call() made twice a second while this process waits for others; it may raise. None: no longer."""
    global _while_waiting
    _while_waiting = call


def _told(number: int, error: BaseException | None) -> BaseException:
    """The error that a rank ends with where another has ended: a stop is a stop of all."""
    if isinstance(error, SENTENCES):
        error = type(error)(f"rank {number}: {error}")
    elif not isinstance(error, KeyboardInterrupt | SystemExit):
        why = "has come to its end" if error is None else f"stopped with {type(error).__name__} ({in_a_line(error)})"
        error = LostRankError(f"rank {number} {why}, and this one cannot go on alone")
    error.was_told = True  # type: ignore[attr-defined] # ours
    return error


def _together(work: Callable[[], object]) -> None:
    """Do what every rank does at once.

    Raises:
        LostRankError: another rank has ended, or has not come within PATIENCE.
    """
    global _is_broken
    try:
        work()
    except RuntimeError as error:  # gloo's, whose connection broke, or NCCL's
        _is_broken = True
        until = time.monotonic() + LOOKS_DEAD_S
        while not (who := _who_is_gone()) and time.monotonic() < until:
            time.sleep(0.05)
        raise _lost(who or "another rank does not answer") from error


def lost_rank(error: BaseException) -> LostRankError | None:
    """LostRankError in place of a SIGTERM that comes because another rank has ended; None for any other error.

    torchrun sends one to those that are left, and often before an exchange with the others fails.
    """
    global _is_broken
    if not isinstance(error, SystemExit) or error.code != 128 + signal.SIGTERM or not (who := _who_is_gone()):
        return None
    _is_broken = True
    return _lost(who)


def _lost(who: str) -> LostRankError:
    lost = LostRankError(f"{who}, and this one cannot go on alone")
    lost.was_told = True  # type: ignore[attr-defined] # there is nobody to tell
    lost.speaks = _is_first_left()
    return lost


def _is_first_left() -> bool:
    """True in the first rank of those that live, which speaks where rank 0 is gone."""
    return rank() == next((number for number, process in enumerate(_processes) if _is_alive(process)), 0)


def _who_is_gone() -> str:
    """Which of the other ranks have ended, in words; an empty text where all live."""
    gone = [number for number, process in enumerate(_processes) if not _is_alive(process)]
    named = " and ".join(f"rank {number} (process {_processes[number]})" for number in gone)
    return named and f"{named} {'is' if len(gone) == 1 else 'are'} gone"


def _is_alive(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False

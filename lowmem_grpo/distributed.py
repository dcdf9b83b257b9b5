"""Several processes that train one policy: who this one is, what its share is, and what they put together.

torchrun starts them, on one machine, each with a GPU of its own. Every rank has the whole state: weights, optimizer,
rollout, random generators. Only work is shared, and what came of it is put together in the order of ranks. With one
process, or where nobody called joined(), each function here returns what it was given.
"""

import contextlib
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import accumulate, chain
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from lowmem_grpo.errors import InputError, LostRankError, in_a_line

T = TypeVar("T")
# How long a rank waits for the others, whose rewards may be slow. A rank that has died is known at once.
PATIENCE = timedelta(hours=2)
LOOKS_DEAD_S = 2.0  # within which a process whose connections broke has ended

_alone = 0  # how many alone() are entered
_processes: list[int] = []  # process ids, by rank


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, gloo between CPUs and NCCL between GPUs, and leave them at the end.

    Nothing happens in a process that torchrun did not start, that is one of one, or that has joined already.

    Raises:
        InputError: the processes are on several machines.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]) != os.environ["WORLD_SIZE"]:
        raise InputError("torchrun started processes on several machines; use one, with --nnodes 1")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo asks what this host's name means
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Python objects go by gloo: where a GPU waits for a rank that has died, nobody is told.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        _processes[:] = gathered(os.getpid())
        yield
    finally:
        _processes.clear()
        dist.destroy_process_group()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Be one process of one within the `with`, as for work that each rank does by itself."""
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


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
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    _together(lambda: dist.all_gather_object(found, value))
    return found


def each(work: Callable[[], T]) -> list[T]:
    """The results of work() on every rank, in their order; each arrives as pickle has it.

    An error of one rank is raised on all of them, the first rank's where there are several.
    """
    if world_size() == 1:
        return [work()]
    own: BaseException | None = None
    try:
        sent = pickle.dumps((work(), None))
    except LostRankError:
        raise
    except BaseException as error:
        own, sent = error, pickle.dumps((None, _as_sent(error)))
    outcomes = [pickle.loads(each) for each in gathered(sent)]
    for number, (_, error) in enumerate(outcomes):
        if error is not None:
            raise error if own is None or number != rank() else own
    return [value for value, _ in outcomes]


def _as_sent(error: BaseException) -> BaseException:
    """An error that another process can read: itself, or its sentence where pickle cannot have it."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {in_a_line(error)}")


def from_main(value: T) -> T:
    """Rank 0's value, on every rank."""
    return gathered(value if is_main() else None)[0]  # type: ignore[return-value] # rank 0's


def any_of(said: bool) -> bool:
    """True on every rank where one of them said so."""
    return any(gathered(said))


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
    for several in kinds.values():
        flat = torch.cat([tensor.detach().flatten() for tensor in several])
        _together(lambda flat=flat: _all_reduce(flat))
        for tensor, part in zip(several, flat.split([tensor.numel() for tensor in several]), strict=True):
            tensor.detach().copy_(part.view_as(tensor))


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


def refuse_differences(what: str, value: object) -> None:
    """Refuse to go on where the ranks were given different values of `what`, as by a script that shuffles at random.

    Raises:
        InputError: they differ, on every rank.
    """
    if len({repr(one) for one in gathered(value)}) > 1:
        raise InputError(f"the processes were given different {what}; give each the same, as by one seed in all")


@contextlib.contextmanager
def own_randomness(device: torch.device, *seed: int) -> Iterator[None]:
    """Draw other random numbers on every rank within the `with`, by seed and rank; afterwards the same on all again."""
    if world_size() == 1:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(hash((*seed, rank())))
        yield


def _all_reduce(flat: Tensor) -> None:
    if flat.device.type == "cuda":
        dist.all_reduce(torch.zeros(1))  # ranks wait for each other here, on the host, where a dead one is known
    dist.all_reduce(flat)


def _together(work: Callable[[], object]) -> None:
    """Do what every rank does at once.

    Raises:
        LostRankError: another rank has ended, or has not come within PATIENCE.
    """
    try:
        work()
    except RuntimeError as error:  # gloo's, whose connection broke
        raise LostRankError(f"{_who_is_gone()}, and this one cannot go on alone") from error


def _who_is_gone() -> str:
    """Which of the other ranks have ended, in words."""
    until = time.monotonic() + LOOKS_DEAD_S
    while True:
        gone = [number for number, process in enumerate(_processes) if not _is_alive(process)]
        if gone or time.monotonic() > until:
            break
        time.sleep(0.05)
    if not gone:
        return "another rank does not answer"
    named = " and ".join(f"rank {number} (process {_processes[number]})" for number in gone)
    return f"{named} {'is' if len(gone) == 1 else 'are'} gone"


def _is_alive(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False

"""in_processes(): a CPU-heavy reward function, run on several completions at once in worker processes."""

import os
import sys
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

from lowmem_grpo.errors import InputError
from lowmem_grpo.rewards.isolation.origin import PYTHON, origin_of
from lowmem_grpo.rewards.isolation.workers import WORKERS, WorkerPool
from lowmem_grpo.rewards.made import made

MOST_WORKERS, LONGEST_S = 1024, 86400.0
START_LIMIT_S = 120.0  # for a worker's first completion, before which it imports the function's module


def in_processes(function: str | Callable, workers: int = WORKERS, timeout: float = 10.0) -> Callable:
    """A reward function that calls `function` for each completion alone, in one of `workers` processes.

    A completion that takes longer than `timeout` seconds, or ends its process, has no reward and is counted as a
    failure; the process is replaced. The function is given as "module.function", or as a function of a module, which
    the processes import; it may not be async.

    Raises:
        InputError: a function that no other process can import: of the main script, a lambda, or one made in another.
    """
    module, name = _import_path(function)
    if not 1 <= workers <= MOST_WORKERS or not 0 < timeout <= LONGEST_S:
        raise InputError(
            f"in_processes needs workers={workers} from 1 to {MOST_WORKERS}, and timeout={timeout} above 0 and at most "
            f"{LONGEST_S:g} s"
        )
    pool = WorkerPool(Path(__file__).with_name("function_worker.py"), workers, _environment)
    return made(_reward_in_processes, pool, module, name, timeout, name=name.rpartition(".")[2])


def _reward_in_processes(
    pool: WorkerPool,
    module: str,
    name: str,
    timeout: float,
    /,
    prompts: list,
    completions: list,
    completion_ids: list,
    trainer_state,
    log_metric,
    log_extra,
    **columns,
) -> list:
    columns.pop("environments", None)  # which live in this process
    columns |= {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    state = {"trainer_state": vars(trainer_state)}
    requests = [
        (module, name, {column: [values[index]] for column, values in columns.items()} | state)
        for index in range(len(completions))
    ]
    replies = pool.ask_all(requests, timeout, max(timeout, START_LIMIT_S))
    extra: dict[str, list] = {}
    for index, reply in enumerate(replies):
        if isinstance(reply, Exception):
            continue
        for metric, value in reply[1]:
            log_metric(metric, value)
        for column, value in reply[2]:
            extra.setdefault(column, [None] * len(completions))[index] = value
    for column, values in extra.items():
        log_extra(column, values)
    return [reply if isinstance(reply, Exception) else reply[0] for reply in replies]


def _import_path(function: str | Callable) -> tuple[str, str]:
    """Module and name of a function; workers try those that are given as text."""
    if isinstance(function, str):
        module, _, name = function.rpartition(".")
        if not module:
            raise InputError(f"in_processes({function!r}) needs a function as module.function")
        if origin_of(module) == PYTHON:
            raise InputError(f"{function} is of Python's own and no reward function; give one of a module of your own")
        return module, name
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "<locals>")
    if module in (None, "__main__") or "<" in name or attrgetter(name)(sys.modules[module]) is not function:
        raise InputError(
            f"in_processes cannot send {getattr(function, '__name__', function)!r} to another process; "
            "define it at the top of a module of its own, and pass 'module.function'"
        )
    return module, name


def _environment() -> dict[str, str]:
    """A copy of this process's environment with its search path, on which a script's own folder is first."""
    path = os.pathsep.join(dict.fromkeys(os.path.abspath(folder) for folder in [*sys.path, os.getcwd()]))
    return {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}

"""Time limits: a function that hangs is stopped where it stands, and a coroutine is cancelled."""

import asyncio
import contextlib
import ctypes
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

SIGNAL = getattr(signal, "SIGVTALRM", None)  # not SIGALRM, which math-verify sets and clears for itself
AGAIN_S = 1.0  # between two attempts to stop code that catches every exception
TICK_S = 0.01  # least CPU time between two looks at the clock; the kernel's own grain is 4 ms
GRACE_S = 2.0  # for an event loop to cancel what is over its time


class OutOfTime(BaseException):
    """Raised in code whose time is over. No Exception, so that no `except Exception` of that code catches it."""


def call_within(limit_s: float | None, function: Callable[[], Any]) -> Any:
    """Call function(); raise OutOfTime once limit_s seconds have passed. None sets no limit.

    In the main thread it runs in that thread, since code that uses alarm signals (math-verify) works in no other, and a
    signal stops it. Elsewhere it runs in a thread of its own, which is abandoned if it cannot be stopped.

    No limit stops a single call of C code that neither releases the interpreter's lock nor looks for signals, as `re`
    does in the main thread alone; in_processes() runs such a function where its process can be ended.
    """
    if limit_s is None:
        return function()
    if SIGNAL is not None and threading.current_thread() is threading.main_thread():
        return _interrupted(limit_s, function)
    return _in_thread(limit_s, function)


def _interrupted(limit_s: float, function: Callable[[], Any]) -> Any:
    """Call function(), and raise OutOfTime in this thread once limit_s seconds have passed.

    A watcher thread sends a signal. A timer of the process's CPU time, which rings ten times in limit_s, serves where C
    code holds the interpreter's lock, since no watcher gets to run there.
    """
    assert SIGNAL is not None
    number, main, running, done = SIGNAL, threading.get_ident(), True, threading.Event()
    due = time.monotonic() + limit_s

    def on_signal(number, frame):
        nonlocal due
        if running and time.monotonic() >= due:
            due = time.monotonic() + AGAIN_S / 2  # less than until the watcher's next
            raise OutOfTime

    def watch():
        wait_s = limit_s
        while not done.wait(wait_s):
            signal.pthread_kill(main, number)
            wait_s = AGAIN_S

    previous = signal.signal(number, on_signal)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    tick_s = max(limit_s / 10, TICK_S)
    previous_timer = signal.setitimer(signal.ITIMER_VIRTUAL, tick_s, tick_s)
    try:
        try:
            return function()
        finally:
            running = False
    finally:  # twice, since the signal may arrive in the line above; the next one is AGAIN_S / 2 away
        running = False
        done.set()
        watcher.join()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(number, previous or signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_VIRTUAL, *previous_timer)


def _in_thread(limit_s: float, function: Callable[[], Any]) -> Any:
    results, errors = [], []

    def work():
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(limit_s)
    if errors:
        raise errors[0]
    if not results:
        _stop(thread)
        raise OutOfTime
    return results[0]


def _stop(thread: threading.Thread) -> None:
    """Raise OutOfTime in a thread that runs Python code; one that waits in a system call notices when it returns."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(OutOfTime))


class Outcome(NamedTuple):
    value: Any
    error: BaseException | None  # OutOfTime where the time was over
    seconds: float


def await_within(limit_s: float | None, awaitables: list[Awaitable]) -> list[Outcome]:
    """Await all of them concurrently, in an event loop of a thread of its own: a notebook's already runs one."""
    started = time.perf_counter()
    outcomes: dict[int, Outcome] = {}

    async def caught(awaitable: Awaitable) -> tuple[Any, BaseException | None]:
        try:
            return await awaitable, None
        except BaseException as error:  # SystemExit too, which would end the loop for the others
            return None, error

    async def one(index: int, awaitable: Awaitable) -> None:
        task = asyncio.ensure_future(caught(awaitable))
        await asyncio.wait({task}, timeout=limit_s)
        value, error = task.result() if task.done() else (None, OutOfTime())
        outcomes[index] = Outcome(value, error, time.perf_counter() - started)
        task.cancel()

    async def everything() -> None:
        await asyncio.gather(*(one(index, awaitable) for index, awaitable in enumerate(awaitables)))

    def work() -> None:
        with contextlib.suppress(OutOfTime):
            asyncio.run(everything())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(None if limit_s is None else limit_s + GRACE_S)
    if thread.is_alive():
        _stop(thread)
    late = Outcome(None, OutOfTime(), time.perf_counter() - started)
    return [outcomes.get(index, late) for index in range(len(awaitables))]

"""Time limits: a function that hangs is stopped where it stands, and a coroutine is cancelled."""

import asyncio
import contextlib
import ctypes
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from types import FrameType
from typing import Any, NamedTuple

SIGNAL = getattr(signal, "SIGVTALRM", None)  # not SIGALRM, which math-verify sets and clears for itself
AGAIN_S = 1.0  # between two attempts to stop code that catches every exception
STRIKES = 3  # from which on such code is not left to catch the exception: its `except:` is ended too
NEAREST = 4  # frames and lines of such code where it may be ended
TICK_S = 0.01  # least CPU time between two looks at the clock; the kernel's own grain is 4 ms
GRACE_S = 2.0  # for an event loop to cancel what is over its time
LONG_S = 60.0  # after which a call without a limit is told to be running still
LONGEST_S = 365 * 86400.0  # as good as no limit, and short enough for every clock

Say = Callable[[str], Any]  # gets the end of a sentence that begins with the function's name


class OutOfTime(BaseException):
    """Raised in code whose time is over. No Exception, so that no `except Exception` of that code catches it."""


def call_within(limit_s: float | None, function: Callable[[], Any], say: Say = lambda words: None) -> Any:
    """Call function(); raise OutOfTime once limit_s seconds have passed. None sets no limit.

    In the main thread it runs in that thread, since code that uses alarm signals (math-verify) works in no other, and a
    signal stops it. Elsewhere it runs in a thread of its own, which is abandoned if it cannot be stopped. Code that
    catches OutOfTime gets it again and again, and a value that it returns afterwards does not count.

    No limit stops a single call of C code that neither releases the interpreter's lock nor looks for signals, as `re`
    does in the main thread alone; in_processes() runs such a function where its process can be ended.
    """
    if limit_s is None:
        with _told_when_long(say):
            return function()
    limit_s = min(limit_s, LONGEST_S)
    if SIGNAL is not None and threading.current_thread() is threading.main_thread():
        return _interrupted(limit_s, function, say)
    return _in_thread(limit_s, function, say)


@contextlib.contextmanager
def _told_when_long(say: Say):
    timer = threading.Timer(LONG_S, say, [f"still runs after {LONG_S:g} s; reward_timeout would stop it"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _interrupted(limit_s: float, function: Callable[[], Any], say: Say) -> Any:
    """Call function(), and raise OutOfTime in this thread once limit_s seconds have passed.

    A watcher thread sends a signal. A timer of the process's CPU time, which rings ten times in limit_s, serves where C
    code holds the interpreter's lock, since no watcher gets to run there.
    """
    assert SIGNAL is not None
    number, main, running, done = SIGNAL, threading.get_ident(), True, threading.Event()
    due, strikes, tracer = time.monotonic() + limit_s, 0, sys.gettrace()

    def on_signal(number, frame):
        nonlocal due, strikes
        if running and time.monotonic() >= due:
            due = time.monotonic() + AGAIN_S / 2  # less than until the watcher's next
            strikes += 1
            if strikes >= STRIKES:
                end_handlers(frame, strikes - STRIKES)
            if strikes == STRIKES:
                say(_does_not_stop(limit_s))
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
    value = None
    try:
        try:
            value = function()
        finally:
            running = False
    except BaseException:
        if not strikes:
            raise
    finally:  # twice, since the signal may arrive in the line above; the next one is AGAIN_S / 2 away
        running = False
        if strikes >= STRIKES:
            sys.settrace(tracer)
        done.set()
        watcher.join()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(number, previous or signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_VIRTUAL, *previous_timer)
    if strikes:  # the function may have caught OutOfTime
        raise OutOfTime
    return value


def _does_not_stop(limit_s: float) -> str:
    return (
        f"does not stop {limit_s:g} s after it was called, since it catches every exception; write `except Exception`, "
        "or use in_processes(function=...), which ends such a function with its process"
    )


def end_handlers(frame: FrameType | None, attempt: int) -> None:
    """Raise OutOfTime at a later line too: the one in the `except:` that catches it where a frame stands now.

    Which frame and line that is cannot be known, so attempts 0, 1, 2, ... go through the nearest ones, of the frame and
    those that called it, but for the frames of this module and its callers.
    """
    frames: list[FrameType] = []
    while frame is not None and frame.f_code.co_filename != end_handlers.__code__.co_filename:
        frames.append(frame)
        frame = frame.f_back
    inner = attempt % min(len(frames), NEAREST) if frames else 0
    lines_left = attempt // max(1, min(len(frames), NEAREST)) % NEAREST

    def at_event(frame: FrameType, event: str, argument: Any):
        nonlocal lines_left
        if event == "line":
            if not lines_left:
                raise OutOfTime  # and Python ends the tracing
            lines_left -= 1
        return at_event

    for outer in frames[inner:]:
        outer.f_trace = at_event
    sys.settrace(lambda frame, event, argument: None)  # without which no frame's own f_trace is called


def _in_thread(limit_s: float, function: Callable[[], Any], say: Say) -> Any:
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
        _stop(thread, lambda: say(_does_not_stop(limit_s)))
        raise OutOfTime
    return results[0]


def _stop(thread: threading.Thread, say: Callable[[], Any]) -> None:
    """Raise OutOfTime in a thread that runs Python code, again and again, as long as it lives.

    One that waits in a system call is hit only as it returns from it.
    """

    def strike():
        strikes = 0
        while thread.is_alive():
            _set_error(thread.ident, OutOfTime)
            thread.join(AGAIN_S / 10)
            _take_error_back(thread.ident)
            strikes += 1
            if strikes == STRIKES:
                say()
            thread.join(AGAIN_S)

    threading.Thread(target=strike, daemon=True).start()


def _set_error(thread_id: int | None, error: type[BaseException] | None) -> None:
    error_or_null = ctypes.py_object() if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id or 0), error_or_null)


def _take_error_back(thread_id: int | None) -> None:
    """Take an error back that a thread has not raised yet.

    In Python 3.11 a thread that is traced hangs while one waits. Python forgets that one waits as soon as one is
    raised, which this thread does.
    """
    _set_error(thread_id, None)
    with contextlib.suppress(OutOfTime):
        _set_error(threading.get_ident(), OutOfTime)
        while True:
            time.sleep(0)


class Outcome(NamedTuple):
    value: Any
    error: BaseException | None  # OutOfTime where the time was over
    seconds: float


def await_within(
    limit_s: float | None, awaitables: Sequence[Awaitable], say: Say = lambda words: None
) -> list[Outcome]:
    """Await all of them concurrently, in an event loop of a thread of its own: a notebook's already runs one.

    Where one of them ends the loop, the error of those that had not finished is a RuntimeError that says so.
    """
    started = time.perf_counter()
    limit_s = limit_s and min(limit_s, LONGEST_S)
    outcomes: dict[int, Outcome] = {}
    ended_by: list[BaseException] = []

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
        if not task.done():
            _keep_until_done(task)
            task.cancel()

    async def everything() -> None:
        await asyncio.gather(*(one(index, awaitable) for index, awaitable in enumerate(awaitables)))

    def work() -> None:
        try:
            asyncio.run(everything())
        except BaseException as error:  # a reward that stops the loop, or cancels every task in it
            ended_by.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    if limit_s is None:
        with _told_when_long(say):
            thread.join()
    else:
        thread.join(limit_s + GRACE_S)
    late: BaseException = OutOfTime()
    if thread.is_alive():
        _stop(thread, lambda: None)
    elif ended_by:
        late = RuntimeError(f"an async function ended the event loop: {type(ended_by[0]).__name__}")
    unfinished = Outcome(None, late, time.perf_counter() - started)
    return [outcomes.get(index, unfinished) for index in range(len(awaitables))]


def _keep_until_done(task: asyncio.Task) -> None:
    """Keep a task from the garbage collector, which would close its coroutine, and hang in one that catches that."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(task))
    task.add_done_callback(lambda task: ctypes.pythonapi.Py_DecRef(ctypes.py_object(task)))

"""Ctrl-C, SIGTERM and SIGHUP: raised once, held back while a step is half done or saved, and never swallowed."""

import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from lowmem_grpo.distributed import each, is_main, while_waiting, world_size

P = ParamSpec("P")
T = TypeVar("T")

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
# How long a signal waits for a rank that does not come: torchrun kills after 30 s, and a checkpoint is to be written.
OTHERS_COME_S = 10.0


class Interruption:
    """While entered, SIGINT raises KeyboardInterrupt, SIGTERM SystemExit(143) and SIGHUP SystemExit(129).

    Only the first signal is raised, and not between hold() and release(), which raises it. Later ones are answered with
    a line, since the run is ending and saves; from the third Ctrl-C on each is raised at once. check() raises again
    what foreign code has swallowed. SIGHUP stays ignored where it was, as by nohup. Outside the main thread, where
    Python handles no signals, nothing is changed.
    """

    def __init__(self):
        self.holding = False
        self.error: BaseException | None = None  # what the first signal raises
        self.heard_s = 0.0  # when that was, by the monotonic clock
        self.num_ctrl_c = 0

    def __enter__(self) -> "Interruption":
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            outer = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
            if isinstance(outer, Interruption):
                outer.check()
            for name in SIGNALS:
                number = getattr(signal, name, None)
                if number is not None and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
                    self.previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception) -> None:
        while_waiting(None)
        for number, handler in self.previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: set by code in C

    def _on_signal(self, number, frame) -> None:
        is_first = self.error is None
        if is_first:
            self.heard_s = time.monotonic()
            self.error = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
        self.num_ctrl_c += number == signal.SIGINT
        if is_first and not self.holding:
            raise self.error  # type: ignore[misc] # it was just set
        if number == signal.SIGINT and self.num_ctrl_c >= 3:
            raise KeyboardInterrupt
        at_once = "; a third Ctrl-C ends it at once, unsaved" if self.num_ctrl_c == 2 else ""
        _say(f"the run ends as soon as what is done is saved{at_once}")

    def hold(self) -> None:
        """Let signals wait until release(), however long other ranks take."""
        self.holding = True
        while_waiting(None)

    def hold_everywhere(self) -> None:
        """Let signals wait until release() on all ranks, and raise on all of them one that has come to any.

        A rank that stopped alone, with its weights about to change, would leave the others with half a step. Until
        hold() no weight has changed, and a signal is raised after OTHERS_COME_S of waiting for a rank that hangs.
        """
        if world_size() > 1 and not self.holding:
            self.hold()
            while_waiting(self._lose_patience)
            try:
                each(self._raise_first)
            except BaseException:
                self.holding = False
                while_waiting(None)
                raise

    def _lose_patience(self) -> None:
        """Raise a signal that has waited long enough for a rank that does not come."""
        if self.error is not None and time.monotonic() - self.heard_s > OTHERS_COME_S:
            _say(f"another process has not come for {OTHERS_COME_S:.0f} s, and the run ends without it")
            raise self.error

    def _raise_first(self) -> None:
        if self.error is not None:
            raise self.error

    def release(self) -> None:
        """Raise the signal that waited, if any."""
        self.holding = False
        self.check()

    def check(self) -> None:
        """Raise again a signal that was raised before and swallowed, as by a reward's bare `except:`."""
        if self.error is not None and not self.holding:
            raise self.error


def _say(text: str) -> None:
    """Write a line past Python's streams, which a signal may have struck in the middle of a write."""
    if not is_main():
        return
    with contextlib.suppress(OSError):  # a terminal that has been closed
        os.write(2, f"\n{text}\n".encode())


def interruptible(function: Callable[P, T]) -> Callable[P, T]:
    """Return a function that a signal ends as cleanly while models load as later, within a Run."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with Interruption() as interruption:
            try:
                return function(*args, **kwargs)
            except (KeyboardInterrupt, SystemExit) as error:
                if error is interruption.error and is_main():
                    with contextlib.suppress(OSError):  # a terminal that has been closed
                        print("stopped outside of any step; nothing is lost", file=sys.stderr)
                raise

    return call

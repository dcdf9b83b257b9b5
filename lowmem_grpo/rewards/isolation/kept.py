"""Puts back what a reward function changed of this process, which it shares with the run."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from lowmem_grpo.rewards.isolation.limit import end_handlers

STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")  # Ctrl-C, kill, a closed terminal
ALARMS = ("SIGALRM", "SIGPROF")  # which end a process that sets such a timer and has no handler


class Setting(NamedTuple):
    """One thing to put back: how it is read, and how an earlier value is set again."""

    get: Callable[[], Any]
    put: Callable[[Any], Any]


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def _put_folder(folder: str | None) -> None:
    if folder is not None:
        with contextlib.suppress(OSError):
            os.chdir(folder)


def _put_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)  # None: without a mode that looks at each call


def _raising_filters() -> list:
    return [rule for rule in warnings.filters if rule[0] == "error"]


def _put_raising_filters(before: list) -> None:
    """Drop the filters that turn warnings into errors, but for those before; a library's others stay."""
    warnings.filters[:] = [rule for rule in warnings.filters if rule[0] != "error" or rule in before]  # type: ignore[index]


def _randomness() -> list[bytes]:
    """The states of PyTorch's generators, with which the next completions are sampled."""
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]
    return [state.numpy().tobytes() for state in states]


def _put_randomness(states: list[bytes]) -> None:
    own, *of_gpus = [torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in states]
    torch.set_rng_state(own)
    if of_gpus:
        torch.cuda.set_rng_state_all(of_gpus)


SETTINGS = (
    Setting(torch.get_default_dtype, torch.set_default_dtype),
    Setting(torch.get_default_device, _put_device),
    Setting(torch.is_grad_enabled, torch.set_grad_enabled),
    Setting(sys.gettrace, sys.settrace),
    Setting(lambda: sys.excepthook, lambda hook: setattr(sys, "excepthook", hook)),
    Setting(_folder, _put_folder),
    Setting(_raising_filters, _put_raising_filters),
    Setting(lambda: logging.root.manager.disable, logging.disable),
    # Only what was lowered: a parser raises the limit when it is imported, and needs it in every call.
    Setting(sys.getrecursionlimit, lambda limit: sys.setrecursionlimit(max(limit, sys.getrecursionlimit()))),
    Setting(_randomness, _put_randomness),
)


@contextlib.contextmanager
def process_kept() -> Iterator[None]:
    """Put back settings, standard streams and signals afterwards, and raise what a signal raised meanwhile.

    So a Ctrl-C stops the run even where the reward function caught its KeyboardInterrupt, and a second one ends a
    function that goes on.
    """
    before, has_gradient = [setting.get() for setting in SETTINGS], torch.is_grad_enabled()
    with _signals_kept(), _streams_kept():
        try:
            # Leaving it sets PyTorch's gradient and inference modes to what they were, whatever was entered within.
            with torch.inference_mode(torch.is_inference_mode_enabled()):
                torch.set_grad_enabled(has_gradient)
                yield
        finally:
            for setting, value in zip(SETTINGS, before, strict=True):
                if setting.get() != value:
                    setting.put(value)


class _Unclosable:
    """A standard stream that stays open when it is closed."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)

    def __enter__(self) -> "_Unclosable":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._stream.flush()


@contextlib.contextmanager
def _streams_kept() -> Iterator[None]:
    streams = {name: getattr(sys, name) for name in ("stdin", "stdout", "stderr")}
    copies = {}
    for number in (0, 1, 2):
        with contextlib.suppress(OSError):  # a process may have none
            copies[number] = os.dup(number)
    for name, stream in streams.items():
        setattr(sys, name, None if stream is None else _Unclosable(stream))
    try:
        yield
    finally:
        for name, stream in streams.items():
            setattr(sys, name, stream)
        for number, copy in copies.items():
            if not _are_same(number, copy):
                os.dup2(copy, number)
            os.close(copy)


def _are_same(number: int, copy: int) -> bool:
    try:
        return os.path.samestat(os.fstat(number), os.fstat(copy))
    except OSError:
        return False


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Put back handlers, mask and timers, where Python handles signals: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    raised: list[BaseException] = []

    def noting(handler: Callable) -> Callable:
        def handle(number, frame):
            if raised:  # and the function goes on
                raised.append(raised[0])
                end_handlers(frame, len(raised) - 2)
                raise raised[0]
            try:
                handler(number, frame)
            except BaseException as error:
                raised.append(error)
                raise

        return handle

    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    started, timer = time.monotonic(), signal.getitimer(signal.ITIMER_REAL)
    for number in (getattr(signal, name) for name in STOPPING if hasattr(signal, name)):
        handler = handlers[number]
        if callable(handler):
            signal.signal(number, noting(handler))
    if not timer[0]:
        for number in (getattr(signal, name) for name in ALARMS if hasattr(signal, name)):
            if handlers[number] is signal.SIG_DFL:
                signal.signal(number, lambda number, frame: None)
    try:
        yield
    finally:
        left = timer[0] - (time.monotonic() - started)
        if left > 0 or not timer[0]:
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.0), timer[1])
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:  # None: not set by Python
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if raised:
            raise raised[0]

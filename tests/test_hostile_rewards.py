"""What a reward function does wrong costs its own reward: no traceback, no hang, no changed process, no false number."""

import asyncio
import contextlib
import functools
import gc
import io
import itertools
import locale
import logging
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lowmem_grpo.errors import InputError
from lowmem_grpo.rewards import RewardRunner
from lowmem_grpo.rewards.isolation import limit


def raises(error):
    """A reward function that raises error()."""

    def function(**kwargs):
        raise error()

    return function


def returns(make):
    """A reward function that returns make()."""
    return lambda **kwargs: make()


def does(work):
    """A reward function that does something to the process, and returns rewards."""

    def function(completions, **kwargs):
        work()
        return [1.0 for _ in completions]

    return function


def broken(*names, error=RuntimeError, base=object) -> Any:
    """A class whose methods of these names raise."""

    def method(self, *arguments, **keywords):
        raise error("a broken method")

    return type("Broken", (base,), dict.fromkeys(names, method))


def hanging(name, base=object):
    return type("Hanging", (base,), {name: lambda self, *_: time.sleep(600)})


def endless_error():
    error = ValueError("a loop of causes")
    error.__cause__ = error
    return error


def deep(n=0):
    return deep(n + 1)


def nested_list():
    values: list = []
    return [values.append(values) or values] * 2


class Metaclass(type):
    @property
    def __name__(cls):
        raise RuntimeError("no name")


class Nameless(Exception, metaclass=Metaclass):
    pass


class Awaited:
    def __await__(self):
        raise ZeroDivisionError("no awaitable")


class Lying(list):
    def __len__(self):
        return 2


class Endless(list):
    def __len__(self):
        return 2

    def __iter__(self):
        return itertools.repeat(1.0)


ERRORS = {
    "exit": SystemExit, "exit with success": lambda: SystemExit(0), "exit with failure": lambda: SystemExit(7),
    "exit with text": lambda: SystemExit("bye"), "Ctrl-C without a signal": KeyboardInterrupt,
    "cancelled": asyncio.CancelledError, "generator exit": GeneratorExit, "stop iteration": StopIteration,
    "stop async iteration": StopAsyncIteration, "memory": MemoryError, "recursion": RecursionError,
    "base exception": BaseException, "a group": lambda: BaseExceptionGroup("several", [KeyboardInterrupt(), ValueError()]),
    "broken str": broken("__str__", base=Exception), "broken str and repr": broken("__str__", "__repr__", base=Exception),
    "str that exits": broken("__str__", error=SystemExit, base=Exception), "str that hangs": hanging("__str__", Exception),
    "str that is a number": type("Odd", (Exception,), {"__str__": lambda self: 5}), "no name": Nameless,
    "escapes": lambda: ValueError("\x1b[2J\x1b]0;title\x07 clear"), "surrogate": lambda: ValueError("\ud800"),
    "a megabyte": lambda: ValueError("x\n" * (1 << 19)), "NUL": lambda: OSError(2, "no\0file", "a\0b"),
    "a loop of causes": endless_error, "unicode": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
    "no exception": lambda: 5, "an interrupted call": InterruptedError, "a broken pipe": BrokenPipeError,
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory"),
}  # fmt: skip
VALUES = {
    "nothing": lambda: None, "a number": lambda: 1.0, "a text": lambda: "ab", "bytes": lambda: b"ab", "a set": lambda: {1, 2},
    "a mapping": lambda: {0: 1.0, 1: 1.0}, "a generator": lambda: (x for x in (1.0, 1.0)), "a map": lambda: map(float, "12"),
    "a function": lambda: len, "itself a type": lambda: list, "texts": lambda: ["1", "1"], "numbers as bytes": lambda: [b"1", b"1"],
    "NaN": lambda: [np.nan, float("nan")], "infinities": lambda: [np.inf, -np.inf], "huge": lambda: [1e300, -(10**400)],
    "complex": lambda: [1j, 1 + 0j], "lists": lambda: [[1.0], [1.0]], "a list in itself": nested_list,
    "too many": lambda: [1.0] * 3, "too few": lambda: [1.0], "none at all": list, "a long array": lambda: np.zeros(10**6),
    "two dimensions": lambda: np.zeros((2, 1)), "no dimension": lambda: torch.tensor(1.0), "objects": lambda: [object(), object()],
    "exceptions": lambda: [KeyboardInterrupt(), SystemExit(0)], "exceptions without text": lambda: [broken("__str__", base=Exception)()] * 2,
    "exception types": lambda: [ValueError, ValueError], "coroutines in a list": lambda: [Awaited(), Awaited()],
    "broken float": lambda: [broken("__float__")(), broken("__float__", "__repr__")()],
    "float that exits": lambda: [broken("__float__", error=SystemExit)()] * 2, "float that hangs": lambda: [hanging("__float__")()] * 2,
    "repr that hangs": lambda: [hanging("__repr__")()] * 2, "broken tolist": broken("tolist"),
    "tolist that hangs": hanging("tolist"), "tolist of nothing": lambda: SimpleNamespace(tolist=lambda: None),
    "no method tolist": lambda: SimpleNamespace(tolist=5), "broken attributes": broken("__getattribute__"),
    "broken class": lambda: [broken("__getattribute__")()] * 2, "broken len": lambda: broken("__len__", base=list)([1.0, 1.0]),
    "len of a lie": lambda: Lying([1.0]), "broken iteration": lambda: broken("__iter__", base=list)([1.0, 1.0]),
    "a meta tensor": lambda: torch.zeros(2, device="meta"), "sparse": lambda: torch.zeros(2).to_sparse(), "escapes": lambda: ["\x1b[2J"] * 2,
    "surrogates": lambda: ["\ud800"] * 2, "a broken awaitable": Awaited, "a future of another loop": lambda: asyncio.Future(loop=asyncio.new_event_loop()),
    "an array of objects": lambda: np.array([object(), {}]), "dates": lambda: np.array(["2020-01-01", "2020-01-02"], dtype="M8[D]").astype(object),
}  # fmt: skip


def score(*functions, timeout_s=0.3, columns=None):
    return RewardRunner(functions, timeout_s)(["p", "p"], ["a", "bb"], [[1], [2]], columns or {}, 1)


def sound(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def named(function, name="hostile"):
    function.__name__ = name
    return function


def of_async(function):
    async def hostile(**kwargs):
        await asyncio.sleep(0)
        return function(**kwargs)

    return hostile


HOSTILE = {
    **{f"raises {what}": raises(error) for what, error in ERRORS.items()},
    **{f"returns {what}": returns(make) for what, make in VALUES.items()},
    "recurses": lambda **_: deep(),
    "wants what it is not given": lambda completions, gold: [1.0, 1.0],
    "takes nothing": lambda: [1.0, 1.0],
    "logs a wrong metric": lambda log_metric, **_: [log_metric("mine", "x")],
    "logs a wrong column": lambda log_extra, **_: [log_extra("mine", [1])],
    "lowers the recursion limit": lambda **_: sys.setrecursionlimit(1),
    "is a generator": lambda **_: (yield 1.0),
}


@pytest.mark.parametrize("in_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_no_reward_is_a_counted_failure_in_one_line(what, in_async, impatient, caplog, capfd, recwarn):
    function = of_async(HOSTILE[what]) if in_async else named(lambda *a, **k: HOSTILE[what](*a, **k))
    scores = score(function, sound)
    assert scores.rewards[:, 0].isnan().all() and scores.rewards[:, 1].tolist() == [1.0, 2.0]
    assert scores.metrics["rewards/hostile/failures"] == 2
    said = [record.getMessage() for record in caplog.records if record.name.startswith("lowmem_grpo")]
    assert said and all(line.isprintable() and len(line) < 800 and "reward function hostile" in line for line in said)
    assert not any(capfd.readouterr())
    if what != "returns NaN":
        with pytest.raises(InputError, match="reward function hostile") as refused:
            RewardRunner([function], 0.3).try_out(["p", "p"], {})
        assert str(refused.value).isprintable()


def test_a_list_without_an_end_is_read_as_far_as_it_says_it_goes():
    assert score(named(lambda **_: Endless())).rewards.tolist() == [[1.0], [1.0]]


def test_there_are_a_hundred_hostile_functions():
    assert len(HOSTILE) + len(CHANGES) + len(ENDLESS) >= 100


def close_a_descriptor():
    os.close(1)


def forget_the_folder():
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)


CHANGES = {
    "another folder": lambda: os.chdir("/"), "a folder that is gone": forget_the_folder, "a descriptor": close_a_descriptor,
    "another descriptor": lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2), "standard output": lambda: sys.stdout.close(),
    "standard error": lambda: sys.stderr.close(), "a stream in its place": lambda: setattr(sys, "stdout", io.StringIO()),
    "no stream": lambda: setattr(sys, "stderr", None), "warnings": lambda: warnings.simplefilter("error"),
    "no log": lambda: logging.disable(logging.CRITICAL), "recursion": lambda: sys.setrecursionlimit(400),
    "an alarm": lambda: signal.alarm(1), "a timer": lambda: signal.setitimer(signal.ITIMER_REAL, 0.001),
    "an alarm that rings": lambda: [signal.setitimer(signal.ITIMER_REAL, 0.001), time.sleep(0.05)],
    "Ctrl-C ignored": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    "kill ignored": lambda: signal.signal(signal.SIGTERM, lambda *_: None),
    "signals held": lambda: signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()),
    "gradients": lambda: torch.set_grad_enabled(False), "inference": lambda: torch.inference_mode().__enter__(),
    "precision": lambda: torch.set_default_dtype(torch.float64), "device": lambda: torch.set_default_device("meta"),
    "environment": os.environ.clear, "locale": lambda: locale.setlocale(locale.LC_ALL, "C"), "garbage": gc.disable,
    "printing": lambda: print("\n" * 3),
}  # fmt: skip


def surroundings():
    with warnings.catch_warnings(record=True):
        warnings.warn("is this raised?", stacklevel=1)
    return (
        os.getcwd(), os.fstat(1).st_ino, os.fstat(2).st_ino, sys.stdin, sys.stdout, sys.stderr, sys.stdout.closed,
        logging.root.manager.disable, sys.getrecursionlimit(), signal.getitimer(signal.ITIMER_REAL),
        [signal.getsignal(number) for number in signal.valid_signals()], signal.pthread_sigmask(signal.SIG_BLOCK, []),
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), torch.zeros(1).device,
    )  # fmt: skip


@pytest.fixture
def environment():
    before = dict(os.environ)
    yield
    os.environ.update(before)
    gc.enable()


@pytest.mark.parametrize("timeout_s", [None, 5.0])
@pytest.mark.parametrize("what", CHANGES)
def test_what_a_function_changes_of_the_process_is_put_back(what, timeout_s, environment):
    before = surroundings()
    scores = score(named(does(CHANGES[what])), sound, timeout_s=timeout_s)
    assert surroundings() == before
    assert scores.rewards[:, 1].tolist() == [1.0, 2.0] and scores.metrics["rewards/sound/failures"] == 0
    assert scores.rewards[:, 0].tolist() == [1.0, 1.0] or scores.metrics["rewards/hostile/failures"] == 2


def test_an_alarm_of_the_programs_own_rings_when_it_would_have():
    previous = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(1000)
    try:
        score(does(lambda: signal.alarm(0)))
        assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def catch_all(work):
    def function(**kwargs):
        while True:
            try:  # noqa: SIM105
                work()
            except:  # noqa: E722
                pass

    return function


def suppress_all(**kwargs):
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(600)


def catch_in_a_caller(**kwargs):
    def inner():
        try:
            time.sleep(600)
        finally:
            random.random()

    while True:
        try:
            inner()
        except BaseException:
            continue


def catch_twice(**kwargs):
    while True:
        try:
            try:
                time.sleep(600)
            except BaseException as error:
                raise ValueError from error
        except BaseException:
            time.sleep(0)


def catch_and_return(completions, **kwargs):
    try:
        time.sleep(600)
    except:  # noqa: E722
        return [0.0 for _ in completions]


ENDLESS = {
    "sleeps": catch_all(lambda: time.sleep(600)), "computes": catch_all(lambda: sum(range(1000))), "suppresses": suppress_all,
    "catches in a caller": catch_in_a_caller, "catches twice": catch_twice, "returns a number instead": catch_and_return,
}  # fmt: skip


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(limit, "AGAIN_S", 0.05)
    monkeypatch.setattr(limit, "GRACE_S", 0.1)


@pytest.mark.parametrize("what", ENDLESS)
def test_a_function_that_catches_every_exception_is_ended_and_named(what, impatient, caplog):
    trace = sys.gettrace()
    told = what in ("computes", "returns a number instead")
    for _ in range(3):  # a strike may hit between two lines that catch it, which ends the function before it is named
        scores = score(named(lambda **_: ENDLESS[what](**_)), sound)
        assert scores.rewards[:, 0].isnan().all() and scores.rewards[:, 1].tolist() == [1.0, 2.0]
        assert "reward function hostile took longer than reward_timeout=0.3 s" in caplog.text
        if told := told or "reward function hostile does not stop" in caplog.text:
            break
    assert told
    assert sys.gettrace() is trace


def test_an_async_function_that_catches_every_exception_hangs_no_garbage_collector(impatient):
    async def catcher(**kwargs):
        while True:
            try:  # noqa: SIM105
                await asyncio.sleep(600)
            except:  # noqa: E722
                pass

    assert score(catcher, sound).rewards[:, 1].tolist() == [1.0, 2.0]
    time.sleep(0.3)  # its loop has ended
    gc.collect()


@pytest.mark.parametrize("end", ["stop", "close", "cancel", "raise"])
def test_an_async_function_that_ends_the_event_loop_is_a_failure(end, caplog, capfd):
    async def hostile(completions, **kwargs):
        loop = asyncio.get_running_loop()
        if end == "cancel":
            for task in asyncio.all_tasks():
                task.cancel()
        elif end == "raise":
            loop.call_soon(sys.exit)
        else:
            getattr(loop, end)()
        await asyncio.sleep(0.01)
        return [1.0 for _ in completions]

    scores = score(hostile, sound, timeout_s=5.0)
    assert scores.rewards[:, 1].tolist() == [1.0, 2.0]
    assert scores.rewards[:, 0].tolist() == [1.0, 1.0] or scores.metrics["rewards/hostile/failures"] == 2
    assert "Traceback" not in capfd.readouterr().err


def test_a_call_without_a_limit_is_told_to_run_still(monkeypatch, caplog):
    monkeypatch.setattr(limit, "LONG_S", 0.05)

    async def slow(completions, **kwargs):
        await asyncio.sleep(0.2)
        return [1.0 for _ in completions]

    assert not score(named(does(lambda: time.sleep(0.2))), slow, timeout_s=None).rewards.isnan().any()
    for name in ("hostile", "slow"):
        assert f"reward function {name} still runs after 0.05 s; reward_timeout would stop it" in caplog.text


def swallow_a_signal(number):
    def work():
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except:  # noqa: E722
            pass

    return work


@pytest.mark.parametrize("timeout_s", [None, 5.0])
@pytest.mark.parametrize("in_async", [False, True], ids=["sync", "async"])
def test_a_real_ctrl_c_stops_the_run_even_where_a_function_catches_it(in_async, timeout_s):
    function = does(swallow_a_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        score(of_async(function) if in_async else function, timeout_s=timeout_s)


def test_a_second_ctrl_c_ends_a_function_that_catches_every_exception():
    def press():
        while not done.wait(0.1):
            os.kill(os.getpid(), signal.SIGINT)

    done = threading.Event()
    keyboard = threading.Thread(target=press)
    keyboard.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            score(catch_twice, timeout_s=None)
    finally:
        done.set()
        keyboard.join()


def test_a_signal_whose_handler_raises_stops_the_run_too():
    def stop(number, frame):
        raise SystemExit(143)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(SystemExit, match="143"):
            score(does(swallow_a_signal(signal.SIGTERM)))
    finally:
        signal.signal(signal.SIGTERM, previous)


@pytest.mark.parametrize("seconds", [1e300, float("inf"), 1e10])
@pytest.mark.parametrize("in_main_thread", [True, False])
def test_a_limit_beyond_every_clock_is_none(seconds, in_main_thread):
    async def quick(completions, **kwargs):
        return [1.0 for _ in completions]

    results = []
    thread = threading.Thread(target=lambda: results.append(score(sound, quick, timeout_s=seconds)))
    thread.run() if in_main_thread else thread.start()
    None if in_main_thread else thread.join()
    assert results[0].rewards.tolist() == [[1.0, 1.0], [2.0, 1.0]]


@pytest.mark.parametrize("name", [5, "", "\x1b[2J", "a\nb", "\ud800", None])
def test_a_name_that_no_terminal_shows_is_refused(name):
    function: Any = functools.partial(sound)
    function.__name__ = name
    with pytest.raises(InputError, match="give it a __name__ of printable characters"):
        RewardRunner([function])


def test_a_function_that_seeds_or_draws_from_pytorch_does_not_change_what_is_sampled_next():
    runner = RewardRunner([does(lambda: torch.manual_seed(0) and torch.rand(3))])
    before = torch.get_rng_state()
    runner(["p"], ["c"], [[1]], {}, 1)
    assert torch.equal(torch.get_rng_state(), before)

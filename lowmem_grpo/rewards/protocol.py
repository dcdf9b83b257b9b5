"""The protocol of reward functions: reads what one returned, raised or logged, whatever that is."""

import inspect
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from lowmem_grpo.errors import InputError, counted, printable
from lowmem_grpo.rewards.isolation.limit import OutOfTime

LARGEST = 1e16  # weighted tenfold and squared, thousands of them must add up in fp32, which ends at 3.4e38
MOST_CHARACTERS = 500  # of an error's text
# What the trainer measures, acts upon, and tells lines of metrics.jsonl apart by.
RESERVED_PREFIXES = (
    "eval_", "rewards/", "completions/", "rollout/", "dynamic_sampling/", "replay/", "sampling/", "ratio/",
    "clip_ratio/", "vespo/", "time/", "memory/", "tokens_per_s/", "tools/",
)  # fmt: skip
RESERVED = {
    "step", "epoch", "loss", "reward", "reward_std", "frac_reward_zero_std", "kl", "teacher_kl", "entropy", "beta",
    "entropy_coef", "last_entropy", "learning_rate", "grad_norm", "num_tokens", "step_time", "frac_tokens_skipped",
    "cispo_clip_ratio", "skipped_steps", "doctor",
}  # fmt: skip


@dataclass
class TrainerState:
    """How far a run is, as reward functions are told it in `trainer_state`, under transformers' names."""

    global_step: int  # steps done, so that the first one's completions have 0
    max_steps: int

    def __getattr__(self, name: str):
        raise AttributeError(f"trainer_state has {' and '.join(vars(self))} here, and no {name}")


class Failure(NamedTuple):
    kind: str  # failures of one kind are counted together
    message: str


def read(name: str, count: int, work: Callable[[], Any]) -> Any:
    """The `count` values of work(), each a reward, NaN for none, or a Failure.

    It is one Failure where there are no such values. An awaitable is returned as it is, for read_awaited.

    Raises:
        OutOfTime: the time of the function is over.
    """
    try:
        value = work()
        return value if inspect.isawaitable(value) else _values(name, count, value)
    except OutOfTime:
        raise
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: process_kept raises those of a signal
        return _raised(name, error)


async def read_awaited(name: str, count: int, awaitable: Awaitable) -> Any:
    """The values of an async function's result, or one Failure."""
    try:
        return _values(name, count, await awaitable)
    except OutOfTime:
        raise
    except BaseException as error:
        return _raised(name, error)


def _raised(name: str, error: BaseException) -> Failure:
    return Failure(_kind(error), f"reward function {name} raised {_words(error)}")


def _values(name: str, count: int, returned: Any) -> "list[float | Failure] | Failure":
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(values, (list, tuple)) or len(values) != count:
        got = counted(len(values), "value") if isinstance(values, (list, tuple)) else _kind(values)
        wanted = f"returned {got} for {counted(count, 'completion')}; return a list, one value each"
        return Failure("length", f"reward function {name} {wanted}")
    return [_reward(name, value) for _, value in zip(range(count), islice(values, count), strict=True)]


def _reward(name: str, value: Any) -> float | Failure:
    """One completion's reward: NaN for None, a Failure for no finite number or an exception in its place."""
    if value is None:
        return math.nan
    if isinstance(value, BaseException):
        return Failure(_kind(value), f"reward function {name} failed: {_words(value)}")
    number = math.inf
    if not isinstance(value, (str, bytes, bytearray)):  # of which float() would read a number
        number = _tried(lambda: float(value), otherwise=math.inf)
    if abs(number) <= LARGEST:
        return number
    text = f"a whole number of {value.bit_length()} bits" if isinstance(value, int) else _shown(value)
    message = f"reward function {name} returned {text}; a reward is a finite number, or None if not applicable"
    return Failure("NaN" if math.isnan(number) else "value", message)


def _words(error: BaseException) -> str:
    """An error's name and text, in which nothing moves a terminal's cursor."""
    text = _tried(lambda: " ".join(str(error).split()), otherwise="(an error whose text cannot be had)")
    return f"{_kind(error)}: {printable(text[:MOST_CHARACTERS])}".removesuffix(": ")


def _shown(value: Any) -> str:
    return _tried(lambda: printable(repr(value)[:100]), otherwise=f"a {_kind(value)}")


def _kind(thing: Any) -> str:
    return _tried(lambda: printable(type(thing).__name__), otherwise="thing without a name")


def _tried(work: Callable[[], Any], *, otherwise: Any) -> Any:
    """The value of work(), which calls methods of a foreign object; `otherwise` where they raise."""
    try:
        return work()
    except OutOfTime:
        raise
    except BaseException:
        return otherwise


class Logs:
    """One function's logs, held back until its call has succeeded."""

    def __init__(self, count: int):
        self.count = count
        self.metrics: dict[str, list[float]] = {}
        self.columns: dict[str, list] = {}

    def log_metric(self, name: str, value: float) -> None:
        if not isinstance(name, str) or name in RESERVED or name.startswith(RESERVED_PREFIXES):
            raise InputError(
                f"log_metric({name!r}) takes a text that is no name of the trainer's own; choose another name"
            )
        self.metrics.setdefault(name, []).append(float(value))

    def log_extra(self, column: str, values: list) -> None:
        if not isinstance(column, str):
            raise InputError(f"log_extra({column!r}) needs a text as the column's name")
        if len(values) != self.count:
            raise InputError(
                f"log_extra({column!r}) got {counted(len(values), 'value')} for {counted(self.count, 'completion')}"
            )
        self.columns[column] = list(values)

    def functions(self) -> dict[str, Callable]:
        return {"log_metric": self.log_metric, "log_extra": self.log_extra}

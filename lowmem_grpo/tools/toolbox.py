"""The tools of a run, described to the model and called."""

import contextlib
import copy
import inspect
import pickle
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers.utils.chat_template_utils import get_json_schema

from lowmem_grpo.data.text import in_json
from lowmem_grpo.errors import InputError, in_a_line
from lowmem_grpo.rewards.isolation.kept import process_kept
from lowmem_grpo.rewards.isolation.limit import Outcome, OutOfTime, await_within, call_within
from lowmem_grpo.rewards.isolation.workers import WORKERS
from lowmem_grpo.tools import program
from lowmem_grpo.tools.call_forms import Call

if TYPE_CHECKING:
    from lowmem_grpo.tools.environments import Environments

BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Result(NamedTuple):
    """The answer of a tool."""

    content: Any  # of its message: a text, or the list that it returned, which the model reads as JSON
    failed: bool  # it raised, took too long, or is not there; the content says so


class Toolbox:
    """Tools by name. Calls them as a model asks; one that fails tells the model, and the run goes on.

    Attributes:
        functions: the tools by name, without those of environments.
        schemas: what a chat template is given of each of these, in OpenAI's form.
        environments: where a completion has one of its own, with tools of its own.
    """

    def __init__(
        self, functions: Sequence[Callable], timeout_s: float | None, environments: "Environments | None" = None
    ):
        """Describe functions, each by its name, type hints and docstring.

        Raises:
            InputError: one cannot be described, two have one name, or the system cannot isolate programs.
        """
        self.schemas, self.timeout_s, self.environments = described(functions), timeout_s, environments
        names = [schema["function"]["name"] for schema in self.schemas]
        self.functions: dict[str, Callable] = dict(zip(names, functions, strict=True))
        reason = program.why_not() if program.python in self.functions.values() else None
        if reason:
            raise InputError(f"the tool python cannot isolate programs here: {reason}; use another machine or tool")

    def __call__(self, calls: Sequence[Call], methods: Sequence[Mapping[str, Callable]] | None = None) -> list[Result]:
        """The results of all calls: programs side by side, other tools one after another, async ones together.

        `methods` are further tools by name, of each call's own environment.
        """
        results: dict[int, Any] = {}
        known = [self.functions] * len(calls) if methods is None else [{**self.functions, **own} for own in methods]
        functions = [own.get(call.name) for call, own in zip(calls, known, strict=True)]
        with process_kept(), ThreadPoolExecutor(WORKERS, thread_name_prefix="tools") as pool:
            programs = [at for at, function in enumerate(functions) if function is program.python]
            started = {at: pool.submit(self._called, functions[at], calls[at]) for at in programs}
            results |= {at: self._called(functions[at], call) for at, call in enumerate(calls) if at not in started}
            results |= {at: future.result() for at, future in started.items()}
            waiting = [at for at, result in results.items() if not isinstance(result, Result)]
            if waiting:
                awaited = await_within(self.timeout_s, [results[at] for at in waiting])
                for at, one in zip(waiting, awaited, strict=True):
                    results[at] = self._result(partial(_value, one))
        return [results[at] for at in range(len(calls))]

    def _called(self, function: Callable | None, call: Call) -> Any:
        """The result of a function's call, or what is to be awaited for it."""
        if function is None:
            return _failure(f"Tool {call.name} not found.")

        def work() -> Any:
            value = function(**copy.deepcopy(call.arguments))  # which a tool may change, and rewards are told
            return _awaited(value) if inspect.isawaitable(value) else _as_result(value)

        return self._result(partial(call_within, self.timeout_s, work))

    def _result(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except OutOfTime:
            return _failure(f"The tool took longer than {self.timeout_s:g} s.")
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # of foreign code, which may raise anything, or return what cannot be written
            return _failure(in_words(error))


def described(functions: Sequence[Callable]) -> list[dict[str, Any]]:
    """Descriptions of functions as chat templates are given them, by names, type hints and docstrings.

    Raises:
        InputError: one cannot be described, or two have one name.
    """
    schemas: dict[str, dict[str, Any]] = {}
    for schema in map(_described, functions):
        name = schema["function"]["name"]
        if name in schemas:
            raise InputError(f"two tools are named {name}; rename one")
        schemas[name] = schema
    return [*schemas.values()]


def _described(function: Callable) -> dict[str, Any]:
    name = getattr(function, "__name__", type(function).__name__)
    try:
        unnamed = [one.name for one in inspect.signature(function).parameters.values() if one.kind not in BY_NAME]
        schema = get_json_schema(function)
    except Exception as error:
        raise InputError(
            f"the tool {name} cannot be described to the model: {in_a_line(error)} (a tool has a docstring, and a type "
            "hint and a line under `Args:` for each of its parameters)"
        ) from error
    if unnamed:
        raise InputError(f"the tool {name} has {unnamed[0]}, which cannot be given by name; make it a plain parameter")
    return schema


def _value(outcome: Outcome) -> Any:
    """The value that an awaited call returned. Raise what it raised."""
    if outcome.error is not None:
        raise outcome.error
    return outcome.value


async def _awaited(value: Awaitable[Any]) -> Result:
    return _as_result(await value)


def _as_result(value: Any) -> Result:
    """The result that a returned value is; to write it may take as long as the call."""
    return value if isinstance(value, Result) else Result(_as_content(value), False)


def _as_content(value: Any) -> str | list:
    """A returned value as a message's content: a list as TRL has it, anything else as text."""
    if isinstance(value, list):
        with contextlib.suppress(Exception):  # of what cannot be copied for each reward, or sent to another rank
            return pickle.loads(pickle.dumps(value))
    return in_json(value)


def in_words(error: BaseException) -> str:
    """An error of foreign code in a line, whatever its own text does."""
    try:
        return in_a_line(error)
    except BaseException:  # of its own __str__
        return type(error).__name__


def _failure(words: str) -> Result:
    return Result(in_json({"error": words}), True)

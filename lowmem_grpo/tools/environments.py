"""Environments: a user's class, of which each completion has an instance, whose methods are tools."""

import copy
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from lowmem_grpo.data.prompts import Scene
from lowmem_grpo.data.text import in_json
from lowmem_grpo.errors import InputError, counted, shown
from lowmem_grpo.rewards.isolation.kept import process_kept
from lowmem_grpo.rewards.isolation.limit import OutOfTime, await_within, call_within
from lowmem_grpo.rewards.route import RoutedReward
from lowmem_grpo.tools.toolbox import described, in_words

COLUMN = "environment"  # of the data, where there are several kinds
OWN = ("reset", "get_reward")  # methods that are called for the run, and are no tools
log = logging.getLogger(__name__)


class Begun(NamedTuple):
    """An instance that was reset with a row, or the reason why there is none."""

    environment: Any = None
    observation: str | None = None  # what reset returned
    methods: Mapping[str, Callable] = {}  # of the instance, that the policy may call
    fault: str = ""


class Kind:
    """One kind of environment, of which instances are made once and reset for each completion.

    Attributes:
        type: the class of the instances.
        name: of the class, under which what get_reward returns is logged.
        methods: names of those that the policy may call.
        schemas: what a chat template is given of these, and of the run's other tools.
    """

    def __init__(self, factory: Callable, functions: Sequence[Callable], timeout_s: float | None):
        """Make the first instance, and describe its methods beside the other tools.

        Raises:
            InputError: there is no instance, it lacks a plain reset, or a method cannot be described.
        """
        self.factory, self.timeout_s = factory, timeout_s
        try:
            first = self._called(factory)
        except Exception as error:
            raise InputError(f"environment_factory {shown(factory)} makes no environment: {in_words(error)}") from error
        self.type, self.instances = type(first), [first]
        self.name = self.type.__name__
        if not callable(getattr(self.type, "reset", None)) or inspect.iscoroutinefunction(self.type.reset):
            raise InputError(
                f"the environment {self.name} has no plain method reset(self, **row), which begins a completion anew; "
                "write one that returns None, or a text for the prompt"
            )
        # Of the class, since a property of an instance would be computed.
        names = [name for name, _ in inspect.getmembers(self.type, inspect.isfunction)]
        self.methods = [name for name in names if not name.startswith("_") and name not in OWN]
        self.schemas = described([*functions, *(getattr(first, name) for name in self.methods)])
        if not self.schemas:
            raise InputError(
                f"the environment {self.name} has no public method that the policy could call; write one, or give tools"
            )

    def begin(self, row: Mapping[str, Any], place: int) -> Begun:
        """Reset the instance at a place with a row. One that fails is not used again."""
        self.instances += [None] * (place + 1 - len(self.instances))
        try:
            if self.instances[place] is None:
                self.instances[place] = made = self._called(self.factory)
                if type(made) is not self.type:
                    raise TypeError(f"its factory made a {type(made).__name__}; give a dict of factories, one a class")
            instance = self.instances[place]
            methods = {name: getattr(instance, name) for name in self.methods}
            said = self._called(partial(instance.reset, **copy.deepcopy(dict(row))))
            if said is not None and not isinstance(said, str):
                raise TypeError(f"reset returned {shown(said)}, which is neither None nor a text")
            return Begun(instance, None if said is None else in_json(said), methods)
        except Exception as error:
            self.instances[place] = None
            return Begun(fault=f"the environment {self.name} could not be reset: {in_words(error)}")

    def _called(self, function: Callable[[], Any]) -> Any:
        """Call a function of the user's, isolated; whatever it raises, but for Ctrl-C, is an Exception."""
        with process_kept():
            try:
                return call_within(self.timeout_s, function)
            except OutOfTime:
                raise TimeoutError(f"it took longer than tool_timeout={self.timeout_s:g} s") from None
            except (Exception, KeyboardInterrupt):
                raise
            except BaseException as error:
                raise RuntimeError(in_words(error)) from error


class Environments:
    """The environments of a run: of one kind, or of several by what a row's column `environment` has."""

    def __init__(
        self, factory: Callable | Mapping[str, Callable], functions: Sequence[Callable], timeout_s: float | None
    ):
        """Make an instance of each kind, whose methods stand beside the tools `functions`.

        Raises:
            InputError: one cannot be made, or is no environment.
        """
        self.by_column = isinstance(factory, Mapping)
        factories: Mapping[Any, Callable] = factory if isinstance(factory, Mapping) else {None: factory}
        self.kinds = {name: Kind(one, functions, timeout_s) for name, one in factories.items()}
        self.num_faults = 0

    def kind_of(self, row: Mapping[str, Any]) -> Kind:
        """The kind of a row's environment. Raise InputError where it names none."""
        name = row.get(COLUMN) if self.by_column else None
        kind = next((kind for known, kind in self.kinds.items() if known == name), None)
        if kind is None:
            kinds = ", ".join(map(str, self.kinds))
            raise InputError(f"the {COLUMN} {shown(name)} is none of {kinds}; name one in that column")
        return kind

    def reset(self, rows: Sequence[Mapping[str, Any]]) -> list[Begun]:
        """An instance for each row, reset with it. Later calls reset the same instances."""
        counts: Counter[Kind] = Counter()
        begun = []
        for row in rows:
            kind = self.kind_of(row)
            given = {name: value for name, value in row.items() if not (self.by_column and name == COLUMN)}
            begun.append(kind.begin(given, counts[kind]))
            counts[kind] += 1
        return begun

    def begin(self, scenes: Sequence[Scene]) -> list[Begun]:
        """An instance for each completion; one that says something else than its prompt has is a fault.

        Faults are logged: the first, the second, the fourth, ...
        """
        begun = self.reset([scene.row for scene in scenes])
        for place, (one, scene) in enumerate(zip(begun, scenes, strict=True)):
            if not one.fault and one.observation != scene.observation:
                name = type(one.environment).__name__
                begun[place] = one = Begun(
                    fault=f"reset of the environment {name} returned something else for a row than when the run began, "
                    "which a group's one prompt cannot show; draw what is random from the row, as from a column seed"
                )
            if one.fault:
                self.num_faults += 1
                if self.num_faults.bit_count() == 1:
                    so_far = counted(self.num_faults, "completion")
                    log.warning(f"{one.fault}; such a completion is not scored, and has no advantage ({so_far} so far)")
        return begun

    def rewards(self, timeout_s: float | None) -> list[Callable]:
        """A reward function for each class with get_reward, which is for the rows of its kinds alone."""
        names: dict[type, list[Any]] = {}
        for name, kind in self.kinds.items():
            if callable(getattr(kind.type, "get_reward", None)):
                names.setdefault(kind.type, []).append(name)
        found = {one: EnvironmentReward(one, timeout_s) for one in names}
        if not self.by_column:
            return [*found.values()]
        return [RoutedReward(reward, COLUMN, names[one], one.__name__) for one, reward in found.items()]


class EnvironmentReward:
    """A reward function that asks each completion's own environment; one that raises or hangs costs its own alone.

    Attributes:
        one_by_one: says that reward_timeout is for each completion.
    """

    one_by_one = True

    def __init__(self, kind: type, timeout_s: float | None):
        self.__name__ = kind.__name__
        self.kind, self.timeout_s = kind, timeout_s

    def __call__(self, environments: list, **columns: Any) -> list[Any]:
        own = [one for one in environments if type(one) is self.kind]
        if inspect.iscoroutinefunction(self.kind.get_reward):  # type: ignore[attr-defined] # of the user's class
            awaited = await_within(self.timeout_s, [one.get_reward() for one in own])
            values = iter([one.value if one.error is None else self._named(one.error) for one in awaited])
        else:
            values = iter([self._asked(one) for one in own])
        return [next(values) if type(one) is self.kind else None for one in environments]

    def _asked(self, environment: Any) -> Any:
        """The environment's reward, or what it raised."""
        try:
            return call_within(self.timeout_s, environment.get_reward)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return self._named(error)

    def _named(self, error: BaseException) -> BaseException:
        if isinstance(error, OutOfTime):
            return TimeoutError(f"get_reward took longer than reward_timeout={self.timeout_s} s")
        return error

"""Rewards by row: a function that is called with the rows of some kinds alone, and gives the others none."""

import inspect
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lowmem_grpo.errors import InputError, counted, shown
from lowmem_grpo.rewards.made import name_of

if TYPE_CHECKING:
    from datasets import Dataset


def get_routed_reward(
    reward: str | Callable, column: str = "task", values: Sequence[Any] = (), name: str | None = None
) -> "RoutedReward":
    """The reward of another function for rows whose column has one of the values; None for all others.

    The function is not called for other rows, so that a judge or a reward model has no work with them. It is given as
    reward_funcs take it: a function, a name or a call of a factory.

    Args:
        reward: the function, or its name, such as "get_judge_reward(criterion='Is it kind?')".
        column: the column of the data that says of which kind a row is.
        values: the values of that column that this reward is for.
        name: of the reward in metrics; by default the function's and the values, as accuracy_reward_math.

    Raises:
        InputError: there is no value, or no such function.
    """
    from lowmem_grpo.rewards.names import resolve_reward_funcs  # which knows this factory

    given = [values] if isinstance(values, str | int | float) else [*(values or ())]
    if not given:
        raise InputError("get_routed_reward needs values: those of the column that the reward is for, such as ['math']")
    if not isinstance(column, str) or not column:
        raise InputError(f"get_routed_reward: column={shown(column)} is no name of a column")
    (inner,) = resolve_reward_funcs(reward)
    return RoutedReward(inner, column, given, name or "_".join([name_of(inner), *map(str, given)]))


class RoutedReward:
    """A reward function that calls another one with its own rows alone; async where that is.

    Attributes:
        inner: the function that it calls.
    """

    def __init__(self, inner: Callable, column: str, values: list[Any], name: str):
        self.__name__ = name
        self.inner, self.column, self.values = inner, column, values

    def applies(self, row: Mapping[str, Any]) -> bool:
        """Tell whether the reward is for a row."""
        return row.get(self.column) in self.values

    def bind(self, policy: Any) -> Any:
        """Give the policy to the inner function, if it judges with it, and return what that says."""
        return self.inner.bind(policy) if hasattr(self.inner, "bind") else None  # type: ignore[attr-defined] # a judge's

    def check_row(self, row: Mapping[str, Any]) -> None:
        """Raise InputError for a row without the column, or one with which the inner function could do nothing."""
        if self.column not in row:
            raise InputError(
                f"{self.__name__} is for rows by their column {self.column}, which is not there, only "
                f"{', '.join(row)}; add it, or name another column"
            )
        if self.applies(row) and hasattr(self.inner, "check_row"):
            self.inner.check_row(row)  # type: ignore[attr-defined] # code_reward's

    def __call__(self, completions: list, **given: Any) -> Any:
        given = {**given, "completions": completions}
        kinds = given.get(self.column)
        if kinds is None:
            raise InputError(f"{self.__name__} needs the column {self.column}, which is not there")
        own = [index for index, kind in enumerate(kinds) if kind in self.values]
        if not own:
            return [None] * len(completions)

        def spread(values: Any) -> Any:
            """The rewards of the reward's own rows, None in all other places."""
            values = values.tolist() if hasattr(values, "tolist") else values
            if not isinstance(values, list | tuple):
                return values  # which the runner refuses in words of its own
            if len(values) != len(own):  # as many as all rows have would be taken for theirs
                got, wanted = counted(len(values), "value"), counted(len(own), "completion")
                raise ValueError(f"{got} for its {wanted}; return a list, one value each")
            return _spread(values, own, len(completions))

        def log_extra(column: str, values: list) -> None:
            given["log_extra"](column, _spread(values, own, len(completions)))

        of_own = {
            name: [value[index] for index in own] if isinstance(value, list) else value for name, value in given.items()
        }
        if "log_extra" in given:
            of_own["log_extra"] = log_extra
        found = self.inner(**of_own)
        return _awaited(found, spread) if inspect.isawaitable(found) else spread(found)


async def _awaited(found: Awaitable, spread: Callable[[Any], Any]) -> Any:
    return spread(await found)


def _spread(values: Sequence[Any], places: list[int], count: int) -> list:
    """The values in their places of a list of so many, None in all others."""
    found: list[Any] = [None] * count
    for place, value in zip(places, values, strict=True):
        found[place] = value
    return found


def inner_of(function: Any) -> Any:
    """The function that a routed reward calls; any other function itself."""
    while isinstance(function, RoutedReward):
        function = function.inner
    return function


def rows_for(function: Any, rows: "Dataset") -> Sequence[int]:
    """The numbers of the rows that a reward function is for: all of them where it is not routed."""
    if not isinstance(function, RoutedReward):
        return range(len(rows))
    kinds = rows[function.column] if function.column in rows.column_names else []
    return [index for index, kind in enumerate(kinds) if kind in function.values]


def kinds_of_rows(names: Sequence[str], functions: Sequence[Callable], rows: "Dataset") -> Counter[tuple[str, ...]]:
    """How many rows there are of each kind, which is the names of the functions that are for it."""
    of_rows: list[list[str]] = [[] for _ in range(len(rows))]
    for name, function in zip(names, functions, strict=True):
        for index in rows_for(function, rows):
            of_rows[index].append(name)
    return Counter(map(tuple, of_rows))

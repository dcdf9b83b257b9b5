"""The reply of a worker of in_processes to (module, name, arguments): what the function of that name makes of them."""

import importlib
from operator import attrgetter
from types import SimpleNamespace
from typing import Any


def reply(request: tuple[str, str, dict[str, Any]]) -> tuple[Any, list, list]:
    """The function's value for one completion, and what it logged: (name, value) and (column, value) pairs."""
    module, name, given = request
    metrics, columns = [], []
    function = attrgetter(name)(importlib.import_module(module))
    values = function(
        **{**given, "trainer_state": SimpleNamespace(**given["trainer_state"])},
        log_metric=lambda metric, value: metrics.append((metric, float(value))),
        log_extra=lambda column, values: columns.append((column, values[0])),
    )
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, (list, tuple)) or len(values) != 1:
        raise ValueError(f"{name} was given 1 completion and returned {values!r:.100}; return a list, one value each")
    return values[0], metrics, columns

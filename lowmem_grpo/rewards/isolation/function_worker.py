"""The program of a worker of in_processes: gets (module, name, arguments), sends the function's result."""

import importlib
import sys
from multiprocessing.connection import Connection
from operator import attrgetter
from types import SimpleNamespace
from typing import Any


def score(module: str, name: str, given: dict[str, Any]) -> tuple[Any, list, list]:
    """The function's value for one completion, and what it logged: (name, value) and (column, value) pairs."""
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


def main() -> None:
    trainer = Connection(int(sys.argv[1]))
    while True:
        try:
            request = trainer.recv()
        except EOFError:  # the trainer is gone
            return
        try:
            reply = score(*request)
        except Exception as error:
            reply = RuntimeError(f"{type(error).__name__}: {error}"[:1000])  # which can be pickled, as not all can
        try:
            trainer.send(reply)
        except (TypeError, AttributeError, ValueError) as error:  # what was returned or logged cannot be pickled
            trainer.send(RuntimeError(f"{type(error).__name__}: {error}"[:1000]))


if __name__ == "__main__":
    main()

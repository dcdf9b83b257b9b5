"""Output of a command: escaped, and told from a bug where nobody reads it or a disk refuses it."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from lowmem_grpo.errors import NotSavedError, printable, printable_text
from lowmem_grpo.terminal import columns_of, fitted, show
from lowmem_grpo.torchrun import num_started


@contextlib.contextmanager
def writing_output() -> Iterator[None]:
    """Tell a closed pipe and a full disk from a bug, while standard output is written.

    Raises:
        BrokenPipeError: nobody reads the output any more.
        NotSavedError: a disk refuses the output.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_output()
        raise NotSavedError(f"standard output cannot be written: {error.strerror}") from error


def tell(line: str) -> None:
    """Write a line to standard output, in which nothing foreign moves a terminal's cursor."""
    with writing_output():
        show(printable(line))


def speaks() -> bool:
    """True in the process that a person reads: the only one, or the first of those that torchrun has started."""
    return num_started() == 1 or os.environ.get("RANK") == "0"


def open_closed() -> None:
    """Have a standard stream that was closed before the command began, as by `>&-`, read and write nothing."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def drop_output() -> None:
    """Send what is left of standard output nowhere, so that Python does not fail at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say_safely() -> None:
    """Escape, in warnings and in the log, what would move a terminal's cursor: models and data are quoted there."""
    warnings.formatwarning = partial(as_sentence, warnings.formatwarning)
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter())
    logging.getLogger("lowmem_grpo").addHandler(handler)


class PrintableFormatter(logging.Formatter):
    """Makes a line of the log of a record; of a process that does not speak, after its rank."""

    def format(self, record: logging.LogRecord) -> str:
        line = _for_stderr(super().format(record))
        return line if speaks() else f"rank {os.environ['RANK']}: {line}"


def as_sentence(others: Callable[..., str], message: Warning | str, category: Any, filename: str, *line: Any) -> str:
    """A warning of ours without a place, since a command has no line of a user's program to name."""
    is_ours = filename == sys.argv[0]
    return _for_stderr(f"lowmem-grpo: {message}\n" if is_ours else others(message, category, filename, *line))


def _for_stderr(text: str) -> str:
    return fitted(printable_text(text), columns_of(sys.stderr))

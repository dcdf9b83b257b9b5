"""Errors in our words: a user's mistakes, numbers that are not finite, and what foreign code raised."""

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any
from unicodedata import category

MOST_CHARACTERS = 300  # of another's error within a sentence of ours
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxlong = _BRIEF.maxother = MOST_CHARACTERS // 3
_BRIEF.maxlevel = 2


class InputError(ValueError):
    """A user's mistake in one sentence with its remedy, which a command prints before it exits with 2."""


class UnknownNameError(InputError, TypeError):
    """A name that is no field of a configuration. A TypeError too, as Python raises for an unexpected keyword."""


class NotFiniteError(FloatingPointError):
    """A number that a run cannot go on with is NaN or infinite. A command prints the sentence and exits with 1."""


class UnansweredError(RuntimeError):
    """An endpoint that left prompts without completions, in a sentence. A command prints it and exits with 1."""


class NotSavedError(OSError):
    """A folder that a disk refused at the end of a run, in a sentence. A command prints it and exits with 1."""


class NotUploadedError(RuntimeError):
    """An upload that the hub did not take, in a sentence with the remedy. A command prints it and exits with 1."""


class LostRankError(RuntimeError):
    """Another process of the run that has ended, in a sentence. A command prints it and exits with 1.

    Attributes:
        speaks: True in the one process that is to say so.
    """

    speaks = False


class UnhealthyRunError(RuntimeError):
    """A run that doctor="stop" ended, in a sentence with the remedy. A command prints it and exits with 1."""


# What a command says in its sentence, and nothing more; it exits with 2 for a user's mistake, else with 1.
SENTENCES = (
    InputError, NotFiniteError, NotSavedError, NotUploadedError, UnansweredError, UnhealthyRunError, LostRankError,
)  # fmt: skip


def printable(line: str) -> str:
    """A line whose escapes, carriage returns and changes of direction are written out, as `\\x1b`.

    It can be printed on a terminal, whoever wrote it, and encoded in UTF-8.
    """
    return "".join(
        c if c.isprintable() or c == "\t" or category(c) == "Zs" else c.encode("unicode_escape").decode() for c in line
    )


def printable_text(text: str) -> str:
    """A text whose lines are printable(), one below the other."""
    return "\n".join(map(printable, text.split("\n")))


def shown(value: Any) -> str:
    """A value within a sentence, as Python writes it, shortened, whatever its own repr() does."""
    try:
        text = printable(_BRIEF.repr(value))
        return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."
    except Exception:  # 10**5000, whose digits Python refuses to write
        return f"a value of {type(value).__name__}"


def counted(count: int, one: str, several: str | None = None) -> str:
    """A count and its words: "1 row", "2 rows"; of "row has" and "rows have" those that fit."""
    return f"{count:,} {one if count == 1 else several or f'{one}s'}"


def in_a_line(error: BaseException) -> str:
    """An error of foreign code, as a reason within a sentence."""
    words = str(error).strip()
    if isinstance(error, KeyError) or not words:  # the text of a KeyError is the key alone
        words = repr(error)
    return printable(_shortened(words.splitlines()[0]))


def cause(error: BaseException) -> str:
    """The first line of what an error was raised from, at the bottom of the chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return printable(_shortened((str(error).strip().splitlines() or [type(error).__name__])[0]))


def _shortened(line: str) -> str:
    """A line up to the last sentence that ends early enough: some of transformers' list the names of every model."""
    if len(line) <= MOST_CHARACTERS:
        return line
    sentences = line[:MOST_CHARACTERS].rpartition(". ")[0]
    return f"{sentences}." if sentences else f"{line[:MOST_CHARACTERS]}..."


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The end of a refusal: the known name nearest to a wrong one, in whatever case, or other words."""
    spelt = {one.lower(): one for one in known}
    nearest = difflib.get_close_matches(name.lower(), spelt, n=1)
    return f"did you mean {spelt[nearest[0]]}?" if nearest else otherwise

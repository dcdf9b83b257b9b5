"""A path as its user writes it: in a command, in a file of settings, in Python."""

import os
from typing import Any


def expanded(path: Any) -> Any:
    """A path as a text, with ~ and $NAME as a shell reads them; what is no path unchanged.

    No shell does that in a file of settings, or behind the = of a flag. One of a user or a variable that is not there
    stays as it is written, and so does a $ in the name of what is there: a run's folder may be given back. A relative
    path is one from the current folder, wherever it was written.
    """
    if not isinstance(path, str | os.PathLike):
        return path
    return os.path.expanduser(path if os.path.lexists(path) else os.path.expandvars(path))

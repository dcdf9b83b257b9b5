"""A path as its user writes it: in a command, in a file of settings, in Python."""

import os
from typing import Any


def expanded(path: Any) -> Any:
    """A path as a text, with ~ and $NAME as a shell reads them; what is no path unchanged.

    No shell does that in a file of settings, or behind the = of a flag. One of a user or a variable that is not there
    stays as it is written. A relative path is one from the current folder, wherever it was written.
    """
    return os.path.expanduser(os.path.expandvars(path)) if isinstance(path, str | os.PathLike) else path

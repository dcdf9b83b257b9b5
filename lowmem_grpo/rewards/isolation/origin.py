"""Origin of a function: Python itself, an installed package, or a module of the user's own."""

import importlib.util
import site
import sysconfig
from functools import partial
from pathlib import Path
from typing import Any

PYTHON, INSTALLED, OWN = "Python", "installed", "own"


def origin_of(module: str) -> str:
    """PYTHON, INSTALLED or OWN, of a module that need not be imported; OWN where there is none."""
    root = module.partition(".")[0]
    if root == __name__.partition(".")[0]:
        return INSTALLED
    try:
        spec = importlib.util.find_spec(root)
    except ValueError:  # __main__, or a name that is none
        return OWN
    if spec is None:
        return OWN
    if spec.origin in ("built-in", "frozen"):
        return PYTHON
    paths = [Path(path).resolve() for path in (spec.origin, *(spec.submodule_search_locations or [])) if path]
    for origin, folders in ((INSTALLED, _installed()), (PYTHON, _pythons())):  # in this order: the first lie in those
        if any(path.is_relative_to(folder) for path in paths for folder in folders):
            return origin
    return OWN


def origin_of_function(function: Any) -> str:
    """The origin of the module that defines a function, whichever one it was found in."""
    while isinstance(function, partial):
        function = function.func
    return origin_of(getattr(function, "__module__", None) or type(function).__module__)


def _installed() -> list[Path]:
    """Folders of installed packages, with those of a virtual environment's base and of the user."""
    own = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    return [Path(folder).resolve() for folder in [*own, *site.getsitepackages(), site.getusersitepackages()]]


def _pythons() -> list[Path]:
    return [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")]

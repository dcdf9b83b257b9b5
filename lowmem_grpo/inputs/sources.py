"""The sources of what a user's reward function uses, by which a resumed run knows it again.

Of a value that it reads, the statements count that set it: a counter, a cache or a clock is another in each run.
"""

import ast
import contextlib
import functools
import inspect
import sys
from collections.abc import Iterable, Iterator
from importlib.util import resolve_name
from types import CodeType
from typing import Any

from lowmem_grpo.rewards.isolation.origin import OWN, origin_of, origin_of_function

Sources = dict[Any, str]  # by what they are of, so that each is there once


def sources_used_by(function: Any) -> list[str]:
    """The sources of a function, and of what of the user's own it uses: functions, classes, and values of modules."""
    found: Sources = {}
    with contextlib.suppress(Exception):  # of the user's own objects
        _add(function, found)
    return sorted({*found.values()} - {""})  # by which the order does not count that objects come to be there in


def _add(one: Any, found: Sources) -> None:
    """Add a function, a class or an object's class of the user's own, and what it holds and uses."""
    held: Iterable[Any] = ()
    if isinstance(one, functools.partial):
        held = [one.func, *one.args, *one.keywords.values()]
    elif inspect.ismethod(one):
        held = [one.__self__]
    elif id(one) not in found and origin_of_function(one) == OWN:
        found[id(one)] = ""
        if inspect.isfunction(one):
            if origin_of(str(one.__globals__.get("__name__"))) == OWN:  # no decorator's of a package
                found[id(one)] = _source_of(one.__code__)
                _add_named(_names_in(one.__code__), one.__globals__, _text_around(one.__code__), found)
            kept = inspect.getclosurevars(one).nonlocals.values()
            held = [*vars(one).values(), *kept, *(one.__defaults__ or ()), *(one.__kwdefaults__ or {}).values()]
        elif inspect.isclass(one):
            found[id(one)] = _source_of(one)
            held = [*one.__bases__, *(getattr(member, "fget", member) for member in vars(one).values())]
        else:
            held = [type(one), getattr(one, "__func__", None), *getattr(one, "__dict__", {}).values()]
    for each in held:
        _add(each, found)


def _add_named(names: tuple[str, ...], space: dict[str, Any], text: str, found: Sources) -> None:
    """Add what names mean among the globals of a module, whose text is given."""
    for name in [one for one in names if one in space]:
        value = space[name]
        key = (id(value), names) if inspect.ismodule(value) else (id(space), name)
        if key in found:
            continue
        found[key] = ""
        if inspect.ismodule(value):
            if origin_of(value.__name__) == OWN:
                _add_named(names, vars(value), _text_around(value), found)
            continue
        _add(value, found)
        is_defined = inspect.isfunction(value) or inspect.isclass(value)
        for statement in () if is_defined else _statements_of(text).get(name, ()):
            if isinstance(statement, ast.ImportFrom):
                path = resolve_name("." * statement.level + (statement.module or ""), space.get("__package__"))
                home = sys.modules.get(path)
                origins = tuple(one.name for one in statement.names if name in (one.asname, one.name))
                if home is not None and origin_of(path) == OWN:
                    _add_named(origins, vars(home), _text_around(home), found)
                continue
            found[key] += ast.get_source_segment(text, statement) or ""
            read = tuple(node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and node.id != name)
            _add_named(read, space, text, found)


def _names_in(code: CodeType) -> tuple[str, ...]:
    """The names of globals and attributes that code has, and that of functions within it."""
    within = [name for one in code.co_consts if isinstance(one, CodeType) for name in _names_in(one)]
    return (*code.co_names, *within)


def _source_of(one: Any) -> str:
    with contextlib.suppress(OSError, TypeError):  # Python has none
        return inspect.getsource(one)
    return ""


def _text_around(one: Any) -> str:
    """The text of the file, or of the notebook's cell, that has the source of code or of a module."""
    with contextlib.suppress(OSError, TypeError):
        return "".join(inspect.findsource(one)[0])
    return ""


@functools.cache
def _statements_of(text: str) -> dict[str, list[ast.stmt]]:
    """The statements of a module, but no definitions, by the names that they set."""
    found: dict[str, list[ast.stmt]] = {}
    with contextlib.suppress(SyntaxError):  # a notebook's magic
        for statement in _flat(ast.parse(text).body):
            if isinstance(statement, ast.ImportFrom):
                names = {one.asname or one.name for one in statement.names}
            else:
                nodes = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
                names = {node.id for node in nodes if isinstance(node.ctx, ast.Store)}
            for name in names:
                found.setdefault(name, []).append(statement)
    return found


def _flat(statements: Iterable[Any]) -> Iterator[Any]:
    """Statements with those of branches in their place, without definitions."""
    for one in statements:
        if isinstance(one, (ast.If, ast.Try, ast.With)):
            parts = [one.body, getattr(one, "orelse", []), getattr(one, "finalbody", [])]
            yield from _flat(part for several in parts for part in several)
            yield from _flat(part for handler in getattr(one, "handlers", []) for part in handler.body)
        elif not isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield one

"""Tests of what an export is asked for, before anything is read or imported that computes."""

import errno
import os
from pathlib import Path
from typing import NamedTuple

from lowmem_grpo.errors import InputError, shown
from lowmem_grpo.exporting.gguf import OF_ADAPTER, OF_MODEL, find_converter
from lowmem_grpo.output.hub import check_upload
from lowmem_grpo.paths import expanded

ONTO = ("original", "nf4")
DTYPES = ("float32", "bfloat16", "float16")


class Outputs(NamedTuple):
    """The paths that an export writes, and the converter that it calls."""

    merged: Path | None
    gguf: Path | None
    converter: Path | None


def outputs_of(
    model: str, merge_to: str | None, *, onto: str | None, dtype: str | None, num_texts: int, gguf: str | None,
    llama_cpp: str | None, push: str | None, private: bool | None,
) -> Outputs:  # fmt: skip
    """The outputs that export()'s arguments name.

    Raises:
        InputError: the arguments do not fit each other, or something is at one of the outputs' paths.
    """
    if merge_to is None and gguf is None:
        raise InputError("nothing is asked for; give merge, a folder to write the merged model to, or gguf, a file")
    if isinstance(num_texts, bool) or not isinstance(num_texts, int) or num_texts < 0:
        raise InputError(f"num_texts is {shown(num_texts)}, and is a number of completions from 0 on")
    if push is not None:
        if merge_to is None:
            raise InputError("push uploads a merged model; give merge, a folder to write it to")
        check_upload(push)
    elif private is not None:
        raise InputError("private has no effect without push; give that, or leave both out")
    if merge_to is None and (onto is not None or dtype is not None):
        raise InputError("onto and dtype are about a merged model; give merge, a folder to write it to")
    if onto is not None and onto not in ONTO:
        raise InputError(f"onto {shown(onto)} is none; it is original or nf4")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {shown(dtype)} is none; it is float32, bfloat16 or float16")
    out, file = (None if name is None else new_path(name) for name in (merge_to, gguf))
    if out is not None and file is not None:
        _refuse_one_place(out.absolute(), file.absolute())
    if gguf is None:
        if llama_cpp is not None:
            raise InputError("llama_cpp has no effect without gguf; give that, or leave both out")
        return Outputs(out, None, None)
    name, source = (OF_ADAPTER, expanded(model)) if out is None else (OF_MODEL, str(out))
    return Outputs(out, file, find_converter(llama_cpp, name, str(file), source))


def _refuse_one_place(out: Path, file: Path) -> None:
    """Raise InputError where a GGUF file would take the place of a merged folder or of a file within."""
    if file == out or file in out.parents:
        raise InputError(f"gguf is {str(file)!r}, and merge needs a folder there; give them two names")
    if out in file.parents and file.suffix != ".gguf":
        raise InputError(f"gguf is {file.name!r} within merge's folder, which may be a model's file; end it in .gguf")


def new_path(name: str) -> Path:
    """A path that is not there yet, and that can be made, as it is given. Raise InputError otherwise."""
    path = Path(os.path.normpath(expanded(name)))
    if not name.strip() or os.path.lexists(path):
        raise InputError(f"{name!r} is there already; name another" if name.strip() else f"{name!r} names nothing")
    there = next(one for one in path.absolute().parents if os.path.lexists(one))
    why = None if os.access(there, os.W_OK | os.X_OK) else errno.EACCES
    why = why if there.is_dir() else errno.ENOTDIR
    if why is not None:
        raise InputError(f"{name!r} cannot be written: {there}: {os.strerror(why)}; choose another place")
    return path

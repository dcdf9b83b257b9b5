"""Warnings that name the user's line, and not one of this package."""

import os
import sys
import warnings

OURS = os.path.dirname(__file__) + os.sep


def warn(text: str) -> None:
    """Emit a UserWarning at the line outside of this package that started the run.

    That is the caller of the outermost frame of ours: between that frame and the fault there may be frames of torch, of
    functools, and of the user's own reward functions. A stacklevel cannot say it, and neither can Python 3.12's
    skip_file_prefixes, which counts from the inside. A command has no such line, and is named itself.
    """
    frame, caller = sys._getframe(), None
    while frame is not None:
        if frame.f_code.co_filename.startswith(OURS):
            caller = frame.f_back
        frame = frame.f_back
    if caller is None or caller.f_globals.get("__name__") == "runpy":  # python -m lowmem_grpo.cli
        warnings.warn_explicit(text, UserWarning, sys.argv[0], 1)
        return
    within = caller.f_globals
    warnings.warn_explicit(
        text, UserWarning, caller.f_code.co_filename, caller.f_lineno,
        module=within.get("__name__", "<string>"), registry=within.setdefault("__warningregistry__", {}),
    )  # fmt: skip

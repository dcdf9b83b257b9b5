"""The preview of a run's first row, on the screen and in its folder."""

import contextlib
import sys

from lowmem_grpo.inputs.training import RunInputs
from lowmem_grpo.terminal import show
from lowmem_grpo.warn import warn

MOST_CHARACTERS = 4000  # on the screen; the file has them all


def show_and_write(inputs: RunInputs, text: str, on_screen: str | None = None) -> None:
    """Write a preview to output_dir/data_preview.txt and print it, or a shorter one, on standard error.

    A resumed run has shown it before. A disk that is full costs the file or the lines, and not the run.
    """
    if inputs.resume is not None:
        return
    assert inputs.output_dir is not None
    file = inputs.output_dir / "data_preview.txt"
    try:
        file.write_text(f"{text}\n", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        warn(f"{file} cannot be written ({error.strerror}); the run goes on without it")
    with contextlib.suppress(OSError):  # standard error in a file on a full disk
        show(cut(text) if on_screen is None else on_screen, sys.stderr)


def cut(text: str, most_characters: int | None = MOST_CHARACTERS) -> str:
    """A text, of which the middle is left out where it has more characters than that."""
    if most_characters is None or len(text) <= most_characters:
        return text
    half = most_characters // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters ...\n{text[-half:]}"

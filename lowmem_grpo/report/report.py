"""write_report(): report.html of a run's folder, or of a pipeline's."""

import functools
import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from lowmem_grpo.errors import InputError, in_a_line
from lowmem_grpo.output.folder import write_file
from lowmem_grpo.report.page import page_of
from lowmem_grpo.report.pipeline import pipeline_page_of
from lowmem_grpo.report.reading import for_others, phases_of, read_run, readable

NAME = "report.html"
BEGINNING = b"<!doctype html>"  # of every page


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the page of a run or of a pipeline, by default into its folder. Returns its path.

    Raises:
        InputError: there is no run in the folder, or it cannot be read, or `output` is a folder or another file.
        OSError: the disk refused, and what was there before still is.
    """
    path = folder / NAME if output is None else output
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; give a file for the page, such as {path / NAME}")
    try:
        text = _text_of(folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({in_a_line(error)}); give a folder that you may read") from error
    if path != folder / NAME and path.is_file() and not path.read_bytes().startswith(BEGINNING):
        raise InputError(f"{path} is there, and is no page of a report; give another file")
    write_file(path, text)
    return path


def page_for_others(folder: Path) -> str:
    """The text of a run's page without paths of this machine, as it is uploaded.

    Raises:
        InputError: there is no run in the folder.
    """
    return render("run.html", page_of(for_others(read_run(folder))))


def _text_of(folder: Path) -> str:
    """The page of a folder."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give the output_dir of a training or of a pipeline")
    phases = phases_of(folder)
    if phases:
        return render("pipeline.html", pipeline_page_of(folder, phases))
    return render("run.html", page_of(read_run(folder)))


def render(template: str, page: dict[str, Any]) -> str:
    """The text of a page, in which everything foreign is escaped."""
    return _environment().get_template(template).render(page)


@functools.cache
def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    return Environment(loader=loader, autoescape=True, finalize=_finalized, trim_blocks=True, lstrip_blocks=True)


def _finalized(value: Any) -> Any:
    """A value as the template gets it: of a text what is readable; markup stays as it is."""
    return readable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

"""The commands about a run that is there: report and watch."""

from pathlib import Path
from typing import Any

from lowmem_grpo.cli.output import tell, writing_output
from lowmem_grpo.cli.parser import Commands, Once
from lowmem_grpo.errors import NotSavedError, in_a_line
from lowmem_grpo.paths import expanded


def add(commands: Commands) -> None:
    """Add report and watch."""
    parser = commands.plain(
        "report", help="show a run, or a pipeline, as a page",
        description="Write report.html of a run's output_dir, or of a pipeline's: curves, evaluations, completions, "
        "time, memory and settings. A run writes one where it ends, is stopped or fails; of one that goes on or was "
        "killed it shows what is there.",
        usage="lowmem-grpo report RUN [--output FILE]",
    )  # fmt: skip
    parser.set_defaults(run=run_report)
    parser.add_argument("folder", metavar="RUN", help="output_dir of a training or of a pipeline")
    parser.add_argument("--output", action=Once, metavar="FILE", help="the page's file (default RUN/report.html)")

    parser = commands.plain(
        "watch", help="follow a run in the terminal",
        description="Show a run, or the phase of a pipeline that goes on, in the terminal until it ends: curves, "
        "evaluations, memory, completions and what the doctor found. It reads the run's files, and disturbs nothing. "
        "Where the output is no terminal it shows what is there once.",
        usage="lowmem-grpo watch RUN [--once] [--wait]",
    )  # fmt: skip
    parser.set_defaults(run=run_watch)
    parser.add_argument("folder", metavar="RUN", help="output_dir of a training or of a pipeline")
    parser.add_argument("--once", action="store_true", help="show the run as it is now, and end")
    parser.add_argument("--wait", action="store_true", help="wait for a run that has not begun yet")


def run_report(given: dict[str, Any]) -> int:
    from lowmem_grpo.report.report import NAME, write_report

    folder = Path(expanded(given["folder"]))
    output = folder / NAME if given.get("output") is None else Path(expanded(given["output"]))
    try:
        path = write_report(folder, output)
    except OSError as error:
        why = error.strerror or in_a_line(error)
        raise NotSavedError(f"{output} cannot be written ({why}); choose another --output") from error
    tell(f"report: {path}")
    return 0


def run_watch(given: dict[str, Any]) -> int:
    from lowmem_grpo.watch.watch import watch

    with writing_output():
        watch(Path(expanded(given["folder"])), once=given.get("once", False), wait=given.get("wait", False))
    return 0

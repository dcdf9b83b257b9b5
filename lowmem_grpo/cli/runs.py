"""The commands about a run that is there: report."""

from pathlib import Path
from typing import Any

from lowmem_grpo.cli.output import writing_output
from lowmem_grpo.cli.parser import Commands, Once
from lowmem_grpo.errors import NotSavedError, in_a_line, printable


def add(commands: Commands) -> None:
    """Add report."""
    parser = commands.plain(
        "report", help="show a run, or a pipeline, as a page",
        description="Write report.html of a run's output_dir, or of a pipeline's: curves, evaluations, completions, "
        "time, memory and settings. A run writes one at its end; of one that goes on or was stopped it shows what is "
        "there.",
        usage="lowmem-grpo report RUN [--output FILE]",
    )  # fmt: skip
    parser.set_defaults(run=run_report)
    parser.add_argument("folder", metavar="RUN", help="output_dir of a training or of a pipeline")
    parser.add_argument("--output", action=Once, metavar="FILE", help="the page's file (default RUN/report.html)")


def run_report(given: dict[str, Any]) -> int:
    from lowmem_grpo.report.report import write_report

    output = Path(given["output"]).expanduser() if given.get("output") else None
    try:
        path = write_report(Path(given["folder"]).expanduser(), output)
    except OSError as error:
        raise NotSavedError(f"the report cannot be written ({in_a_line(error)}); choose another --output") from error
    with writing_output():
        print(printable(f"report: {path}"))
    return 0

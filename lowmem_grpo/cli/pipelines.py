"""The command that runs several phases in a row."""

import argparse
from typing import Any

from lowmem_grpo.cli.output import tell, writing_output
from lowmem_grpo.cli.parser import Commands, Once
from lowmem_grpo.errors import InputError

PIPELINE_EXAMPLE = """\
example:
  # a recipe that comes with the package, to be edited
  lowmem-grpo r1 --config r1 --print > mine.yaml
  # phases, data and plans
  lowmem-grpo r1 --config mine.yaml --dry_run
  # again after a stop: goes on where it was
  lowmem-grpo r1 --config mine.yaml
"""
PIPELINE_FLAGS = (
    ("--config", "FILE", "YAML file of the phases, or the name of a recipe: r1, r1_zero, rlhf"),
    ("--model", "MODEL", "hub id, model folder or adapter folder, in place of the file's"),
    ("--output_dir", "DIR", "folder of the phases' folders, in place of the file's"),
    ("--until", "PHASE", "the last phase to run"),
    ("--from", "PHASE", "do this phase and all after it anew; what they have made is kept under other names"),
)


def add(commands: Commands) -> None:
    """Add pipeline, and r1, its other name."""
    parser = commands.plain(
        "pipeline", aliases=["r1"], help="run several phases in a row: R1, R1-Zero, RLHF, or your own",
        description="Run the phases of a YAML file one after another, each in a folder of its own. Phases that are "
        "done are left as they are, and one that was stopped goes on.",
        usage="lowmem-grpo r1 --config FILE [--model M] [--output_dir DIR] [--until PHASE] [--from PHASE] [--dry_run]",
        epilog=PIPELINE_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run_phases)
    for flag, metavar, text in PIPELINE_FLAGS:
        parser.add_argument(flag, action=Once, metavar=metavar, help=text)
    parser.add_argument(
        "--dry_run", action="store_true", help="check everything, print phases, data and plans, and train nothing"
    )
    parser.add_argument("--print", action="store_true", help="print the file that --config names, and exit")


def run_phases(given: dict[str, Any]) -> int:
    if not given.get("config"):
        raise InputError("--config is missing; name a YAML file of phases, or a recipe: r1, r1_zero, rlhf")
    from lowmem_grpo.pipeline.file import pipeline_file, read_pipeline_file

    if given.pop("print", False):
        with writing_output():
            print(pipeline_file(given["config"]).read_text(encoding="utf-8"), end="")
        return 0
    settings = read_pipeline_file(given.pop("config"))
    places = {name: given.pop(name, settings.get(name)) for name in ("model", "output_dir")}
    for name, value in places.items():
        if not value:
            raise InputError(f"--{name} is missing; give it, or write {name} into the file")
    from lowmem_grpo.pipeline.phases import look_up, resolve

    common, evaluation = settings.get("common"), settings.get("eval")
    pipeline = resolve(places["model"], settings["phases"], places["output_dir"], common, evaluation)
    until, begin_at = given.get("until"), given.get("from")
    look_up(pipeline, str(places["model"]), until, begin_at)
    from lowmem_grpo.pipeline.pipeline import run_pipeline

    result = run_pipeline(
        places["model"], settings["phases"], places["output_dir"], common=common, evaluation=evaluation,
        until=until, begin_at=begin_at, dry_run=given.get("dry_run", False),
    )  # fmt: skip
    if result.adapter is not None:
        tell(f"adapter: {result.adapter}")
    return 0

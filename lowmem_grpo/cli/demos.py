"""The commands that need nothing: demo and bench."""

from typing import Any

from lowmem_grpo.cli.parser import Commands, Once
from lowmem_grpo.config.fields import from_text
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.errors import InputError, shown


def add(commands: Commands) -> None:
    """Add demo and bench."""
    parser = commands.plain(
        "demo", help="train the embedded model on the embedded task, or another one by R1's phases, on a CPU"
    )
    parser.set_defaults(run=run_demo)
    parser.add_argument(
        "what", nargs="?", default="grpo", metavar="grpo|r1", help="one training, or R1's phases (default grpo)"
    )
    parser.add_argument("--seed", action=Once, metavar="N", help="seed of the run (default 0)")
    parser.add_argument(
        "--output_dir", action=Once, metavar="DIR",
        help="a new folder (default demo-output/TIME); or one in which r1 was stopped, which goes on",
    )  # fmt: skip
    commands.added.add_parser("bench", help="measure this machine, beside TRL, Liger and transformers", add_help=False)


def run_demo(given: dict[str, Any]) -> int:
    what = given.pop("what", "grpo")
    if what not in ("grpo", "r1"):
        raise InputError(f"demo {shown(what)} is none; it is grpo or r1")
    settings = {name: from_text(GRPOConfig, name, value) for name, value in given.items()}
    if what == "r1":
        from lowmem_grpo.demo.r1.run import run as run_r1

        run_r1(**settings)
    else:
        from lowmem_grpo.demo.run import run

        run(**settings)
    return 0


def run_bench(arguments: list[str]) -> int:
    from lowmem_grpo.benchmarks import suite

    return suite.main(arguments)

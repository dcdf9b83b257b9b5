"""The command `lowmem-grpo`: trainings, what goes around them, looks at data and runs, export, demo and bench."""

import contextlib
import io
import sys
import time

import lowmem_grpo
from lowmem_grpo.cli import demos, exports, looks, pipelines, runs, sampled, trainings
from lowmem_grpo.cli.demos import run_bench
from lowmem_grpo.cli.output import drop_output, open_closed, say_safely, speaks, writing_output
from lowmem_grpo.cli.parser import Commands, Parser, refuse_overrides, refuse_unknown_flags, with_underscores
from lowmem_grpo.cli.settings import PLANNED, TRAININGS
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.pairs import PairsConfig
from lowmem_grpo.config.select import SelectConfig
from lowmem_grpo.errors import SENTENCES, InputError, UnknownNameError, printable, printable_text
from lowmem_grpo.terminal import show
from lowmem_grpo.torchrun import num_started

# torchrun ends all processes once one has ended with an error; rank 0 has a sentence to say.
OTHERS_STAY_S = 1.0


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status: 2 for bad input, 1 for a run that cannot go on.

    Both are said in one sentence on standard error.
    """
    if arguments is None:  # the process is the command
        arguments = sys.argv[1:]
        open_closed()
        say_safely()
        if not speaks():
            drop_output()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for what the terminal's encoding lacks
    try:
        try:
            return run_command(arguments)
        finally:
            with writing_output():
                sys.stdout.flush()
    except SENTENCES as error:
        command = " ".join(["lowmem-grpo", *filter(str.isalnum, arguments[:1])])
        if speaks() or getattr(error, "speaks", False):
            with contextlib.suppress(OSError):  # a full disk
                show(f"{command}: {_as_said(error)}", sys.stderr)
        else:
            time.sleep(OTHERS_STAY_S)
        return 2 if isinstance(error, InputError) else 1
    except BrokenPipeError:  # whoever read the output, `head` for one, has had enough
        drop_output()
        return 141
    except KeyboardInterrupt:
        return 130


def _as_said(error: Exception) -> str:
    """An error's sentence; of several unknown names a line each."""
    return printable_text(str(error)) if isinstance(error, UnknownNameError) else printable(str(error))


def run_command(arguments: list[str]) -> int:
    """Run the command that the arguments name, with the others as its flags; without any, print the help."""
    arguments = [with_underscores(argument) for argument in arguments]
    if num_started() > 1 and arguments and arguments[0] not in TRAININGS:
        raise InputError(
            f"`lowmem-grpo {printable(arguments[0]):.50}` is the work of one process, and torchrun has started "
            f"{num_started()}; start it without torchrun"
        )
    if arguments[:1] == ["bench"]:  # has its own options
        return run_bench(arguments[1:])
    configs = {**PLANNED, "select": SelectConfig, "pairs": PairsConfig}
    trains = next((configs[word] for word in arguments[:2] if word in configs), GRPOConfig)  # `sft`, `plan sft`
    parser = make_parser(every_setting="--help_all" in arguments, planned=trains)
    if not arguments:
        parser.print_help()
        return 0
    # Before the parser, which would take an unknown flag's value for a word that it waits for, as `sft` is.
    if arguments[0] in parser.commands:
        refuse_unknown_flags(arguments[0], arguments[1:], parser.commands[arguments[0]], trains)
    options, rest = parser.parse_known_args(arguments)
    if rest:
        refuse_overrides(rest, parser.commands[arguments[0]], trains)
        raise InputError(f"{printable(' '.join(rest)):.200} is not understood; see `lowmem-grpo {arguments[0]} --help`")
    given = {key: value for key, value in vars(options).items() if key not in ("run", "command")}
    return options.run(given)


def make_parser(every_setting: bool = False, planned: type = GRPOConfig) -> Parser:
    """The parser of the whole command, whose help shows every setting or the common ones.

    `plan` takes the settings of a training whose configuration is of the type `planned`.
    """
    parser = Parser(prog="lowmem-grpo", description="GRPO, and what comes before it, on one small GPU.")
    parser.add_argument("--version", action="version", version=f"lowmem-grpo {lowmem_grpo.__version__}")
    commands = Commands(parser, every_setting, planned)
    for group in (trainings, sampled, pipelines, looks, runs, exports, demos):
        group.add(commands)
    return parser

"""Parsers of the commands, and the flags that several of them share."""

import argparse
import re
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from lowmem_grpo.cli.settings import INPUTS, OF_EXAMPLES, ONLY_DATASET
from lowmem_grpo.config.fields import describe, field_types
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.sample import SampleConfig
from lowmem_grpo.config.sections import CALLED, sections
from lowmem_grpo.config.trl import refuse_unknown_fields
from lowmem_grpo.errors import InputError, shown
from lowmem_grpo.terminal import WORD, columns_of, fitted, flowed

DASHES = tuple("‐‑‒–—―−")  # which text editors and web pages make of hyphens
FLAG = re.compile(r"--[A-Za-z][\w-]*")
HELP_ALL = "--help shows the settings that people change, --help_all every setting."


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, and the parsers of its commands."""

    commands: Mapping[str, argparse.ArgumentParser]

    def print_help(self, file: Any = None) -> None:
        """Print the help, fitted to the terminal; an example that goes on in the next line can still be copied."""
        file = sys.stdout if file is None else file
        width, lines = columns_of(file), []
        for line in self.format_help().split("\n"):
            if width is not None and line.startswith("  lowmem-grpo "):
                lines.append(" \\\n".join(flowed(WORD.findall(line), width - 2, "      ")))
            else:
                lines.append(fitted(line, width))
        file.write("\n".join(lines))

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")


class Once(argparse.Action):
    """Keep a flag's value, and refuse a second, other one."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest, values)
        if before != values:
            raise InputError(f"{option_string} is given as {shown(before)} and as {shown(values)}; keep one")
        setattr(namespace, self.dest, values)


class Commands:
    """The commands of a parser, to which each is added with its flags."""

    def __init__(self, parser: Parser, every_setting: bool, planned: type):
        self.every_setting = every_setting  # in the help, in place of the common ones
        self.planned = planned  # of which configuration `plan` takes the settings
        self.added = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        parser.commands = self.added.choices

    def add(self, name: str, example: str, **words: Any) -> argparse.ArgumentParser:
        """Add a command that has a configuration's settings."""
        command = self.plain(
            name, epilog=f"{example}\n{HELP_ALL}", formatter_class=argparse.RawDescriptionHelpFormatter, **words
        )
        command.add_argument("--help_all", action="help", help="show this help with every setting, and exit")
        return command

    def plain(self, name: str, **words: Any) -> argparse.ArgumentParser:
        """Add a command whose flags are no settings."""
        return self.added.add_parser(name, allow_abbrev=False, argument_default=argparse.SUPPRESS, **words)


def with_underscores(argument: str) -> str:
    """A flag as the settings are named, --learning_rate where --learning-rate was written; anything else unchanged."""
    flag, equals, value = argument.partition("=")
    return flag.replace("-", "_").replace("__", "--", 1) + equals + value if FLAG.fullmatch(flag) else argument


def add_inputs(parser: argparse.ArgumentParser, title: str, inputs: Any = INPUTS) -> Any:
    """Add flags for the inputs and for --config, and return their group."""
    group = parser.add_argument_group(title)
    for name, aliases, text in inputs:
        many = "+" if name in ("reward_funcs", "tools") or (inputs is OF_EXAMPLES and name == "dataset") else None
        shape = {"metavar": name.split("_")[-1].upper(), "nargs": many}
        group.add_argument(f"--{name}", *aliases, action=Once, dest=name, help=text, **shape)
    group.add_argument(
        "--config", action=Once, metavar="FILE", help="YAML file with any of these settings; flags win over it"
    )
    return group


def add_files(parser: argparse.ArgumentParser) -> None:
    """Add what reads sampled files and writes another: their names, and --output."""
    parser.add_argument("sampled", nargs="+", metavar="SAMPLED", help="what `lowmem-grpo sample` wrote")
    parser.add_argument("--output", action=Once, metavar="FILE", help="JSONL file to write")


def add_config_flags(
    parser: argparse.ArgumentParser, every_setting: bool, names: set[str] | None = None, config: type = GRPOConfig
) -> None:
    """Add flags for a configuration's fields, or for those of these names, in sections.

    The help of those that people seldom change is hidden, unless of every setting.
    """
    types = field_types(config)
    for title, fields in sections(config):
        group = parser.add_argument_group(title)
        for field in fields:
            if names is not None and field.name not in names:
                continue
            words = describe(types[field.name])
            default = str(field.default).lower() if field.default in (None, True, False) else field.default
            many = "+" if "a list" in words else "?" if "true or false" in words else None
            text = f"{field.metadata.get('help', field.name)} ({words}; default {default})".replace("%", "%%")
            in_help = text if every_setting or field.metadata.get("common") else argparse.SUPPRESS
            # --use_cpu alone is --use_cpu true.
            given: dict[str, Any] = {"nargs": many, "const": "true" if many == "?" else None}
            group.add_argument(f"--{field.name}", action=Once, metavar="X", help=in_help, **given)


def refuse_unknown_flags(command: str, words: list[str], parser: argparse.ArgumentParser, config: type) -> None:
    """Raise InputError for a flag that a command's parser does not know, with the remedy or the nearest name."""
    known, unknown = parser._option_string_actions, []
    for word in words:
        flag = word.partition("=")[0]
        if flag.startswith(DASHES) and f"--{flag.lstrip(''.join(DASHES) + '-')}" in known:
            raise InputError(f"{shown(word)} begins with a dash that is no hyphen; write two hyphens")
        if flag.startswith("--") and flag not in known and " " not in word:  # with a space it is a value
            unknown.append(flag[2:])
    for name in unknown:
        if command == "eval" and name in field_types(GRPOConfig):
            raise InputError(f"--{name} is about training, and an evaluation does not read it; leave it out")
        if command == "sample" and name in field_types(GRPOConfig) and name not in field_types(SampleConfig):
            raise InputError(f"--{name} is about training, and sampling into a file does not read it; leave it out")
        if name == "eval_dataset" and command in ONLY_DATASET:
            raise InputError(f"--eval_dataset is for training; name what to {ONLY_DATASET[command]} with --dataset")
        if command in ("pipeline", "r1"):
            raise InputError(f"--{name} is no flag of a pipeline; write the settings of its phases into its file")
        if name in CALLED:
            raise InputError(f"--{name} is for `lowmem-grpo train`, `eval` and `data`; leave it out")
    if "--help_all" in known:  # else it has no configuration
        refuse_unknown_fields(unknown, config)


def refuse_overrides(words: list[str], parser: argparse.ArgumentParser, config: type) -> None:
    """Raise InputError for a setting without hyphens, as Hydra's and verl's `max_steps=5`: how it is written here."""
    for name, equals, value in (word.lstrip("+").partition("=") for word in words):
        if equals and f"--{name}" in parser._option_string_actions:
            raise InputError(f"{shown(f'{name}={value}')} is not understood; write --{name} {shown(value)}")
        if equals and name.replace(".", "").isidentifier() and "--help_all" in parser._option_string_actions:
            refuse_unknown_fields([name], config)

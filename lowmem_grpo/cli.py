"""The command `lowmem-grpo`: trainings, what goes around them, eval, data, plan, demo and bench."""

import argparse
import contextlib
import io
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from lowmem_grpo.config.fields import describe, field_types, from_text
from lowmem_grpo.config.grpo import EVAL_FIELDS, GRPOConfig
from lowmem_grpo.config.reward import RewardConfig
from lowmem_grpo.config.sample import SampleConfig
from lowmem_grpo.config.sections import sections
from lowmem_grpo.config.select import SelectConfig
from lowmem_grpo.config.sft import SFTConfig
from lowmem_grpo.config.trl import refuse_unknown_fields
from lowmem_grpo.errors import (
    InputError,
    NotFiniteError,
    NotSavedError,
    UnansweredError,
    UnhealthyRunError,
    printable,
    printable_text,
    shown,
)

TRAIN_EXAMPLE = """\
example:
  lowmem-grpo train --model Qwen/Qwen2.5-1.5B-Instruct --dataset openai/gsm8k \\
      --reward_funcs accuracy_reward --max_completion_length 768 --output_dir gsm8k
"""
SFT_EXAMPLE = """\
example:
  lowmem-grpo sft --model Qwen/Qwen2.5-1.5B --dataset cold.jsonl --max_length 4096 --output_dir cold
"""
SAMPLE_EXAMPLE = """\
example:
  lowmem-grpo sample --model cold/adapter --dataset gsm8k --num_generations 16 --output sampled.jsonl
  lowmem-grpo sample --base_url http://localhost:8000/v1 --model large --dataset gsm8k --num_generations 4
"""
SELECT_EXAMPLE = """\
example:
  lowmem-grpo select sampled.jsonl --output sft.jsonl --min_reward 1 --per_prompt 2 --max_pass_rate 0.9
"""
PAIRS_EXAMPLE = """\
example:
  lowmem-grpo pairs sampled.jsonl --output pairs.jsonl --min_margin 0.5
"""
LABEL_EXAMPLE = """\
example:
  lowmem-grpo label sampled.jsonl --output labels.jsonl
"""
REWARD_EXAMPLE = """\
example:
  lowmem-grpo reward --model Qwen/Qwen2.5-1.5B-Instruct --dataset pairs.jsonl --output_dir rm
  lowmem-grpo train --model Qwen/Qwen2.5-1.5B-Instruct --dataset prompts.jsonl --reward_funcs rm/adapter --beta 0.02
"""
EVAL_EXAMPLE = """\
example:
  lowmem-grpo eval --model gsm8k/adapter --dataset gsm8k --num_generations_eval 8 --max_completion_length 768
"""
DATA_EXAMPLE = """\
example:
  lowmem-grpo data --model Qwen/Qwen2.5-1.5B-Instruct --dataset rows.jsonl --reward_funcs accuracy_reward
"""
PLAN_EXAMPLE = """\
example:
  lowmem-grpo plan --model Qwen/Qwen2.5-7B-Instruct --vram_budget 8GB --max_completion_length 1024
  lowmem-grpo plan sft --model Qwen/Qwen2.5-7B --vram_budget 8GB --max_length 4096
  lowmem-grpo plan sample --model Qwen/Qwen2.5-7B-Instruct --vram_budget 8GB --prompts_per_step 32
"""
PIPELINE_EXAMPLE = """\
example:
  lowmem-grpo r1 --config r1 --print > mine.yaml    # a recipe that comes with the package, to be edited
  lowmem-grpo r1 --config mine.yaml --dry_run       # phases, data and plans
  lowmem-grpo r1 --config mine.yaml                 # again after a stop: goes on where it was
"""
DASHES = tuple("‐‑‒–—―−")  # which text editors and web pages make of hyphens
TRAININGS: dict[str, type] = {"train": GRPOConfig, "sft": SFTConfig, "reward": RewardConfig}  # the commands that train
PLANNED = {**TRAININGS, "sample": SampleConfig}  # what can be planned
ONLY_DATASET = {"eval": "evaluate on", "data": "look at", "sample": "ask"}  # by command, what --dataset is for
FLAG = re.compile(r"--[A-Za-z][\w-]*")
HELP_ALL = "--help shows the settings that people change, --help_all every setting."
# What a run is about, besides GRPOConfig's fields: flag, further names, help.
INPUTS = (
    ("model", ("--model_name_or_path",), "hub id, model folder, or adapter folder to continue from"),
    (
        "dataset",
        ("--dataset_name", "--train_dataset"),
        "hub id, JSONL, JSON, CSV or Parquet file, or a task: gsm8k, countdown, reasoning_gym:NAME",
    ),
    (
        "eval_dataset",
        (),
        "hub id (its test split is read), file or task to evaluate on; by default what the task of --dataset holds out",
    ),
    (
        "reward_funcs",
        (),
        "one or more: accuracy_reward, get_regex_reward(pattern='...'), my_module.function; by default the task's own",
    ),
)

OF_EXAMPLES = (
    INPUTS[0],
    (
        "dataset",
        INPUTS[1][1],
        "hub id, JSONL, JSON, CSV or Parquet file, or several; with prompt and completion, messages or text",
    ),
    ("eval_dataset", (), "hub id (its test split is read) or file of examples to measure the loss of"),
)
PIPELINE_FLAGS = (
    ("--config", "FILE", "YAML file of the phases, or the name of a recipe: r1, r1_zero, rlhf"),
    ("--model", "MODEL", "hub id, model folder or adapter folder, in place of the file's"),
    ("--output_dir", "DIR", "folder of the phases' folders, in place of the file's"),
    ("--until", "PHASE", "the last phase to run"),
    ("--from", "PHASE", "do this phase and all after it anew; what they have made is kept under other names"),
)
OF_PAIRS = (
    INPUTS[0],
    ("dataset", INPUTS[1][1], "hub id, JSONL, JSON, CSV or Parquet file, with chosen, rejected and perhaps a prompt"),
    ("eval_dataset", (), "hub id (its test split is read) or file of pairs to measure the accuracy on"),
)
WITHOUT_EVAL_DATASET = [one for one in INPUTS if one[0] != "eval_dataset"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status: 2 for bad input, 1 for a run that cannot go on.

    Both are said in one sentence on standard error.
    """
    if arguments is None:  # the process is the command
        arguments = sys.argv[1:]
        say_safely()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for what the terminal's encoding lacks
    try:
        try:
            return run_command(arguments)
        finally:
            with writing_output():
                sys.stdout.flush()
    except (InputError, NotFiniteError, NotSavedError, UnansweredError, UnhealthyRunError) as error:
        command = " ".join(["lowmem-grpo", *filter(str.isalnum, arguments[:1])])
        with contextlib.suppress(OSError):  # a full disk
            print(f"{command}: {printable(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except BrokenPipeError:  # whoever read the output, `head` for one, has had enough
        drop_output()
        return 141
    except KeyboardInterrupt:
        return 130


@contextlib.contextmanager
def writing_output() -> Iterator[None]:
    """Tell a closed pipe and a full disk from a bug, while standard output is written.

    Raises:
        BrokenPipeError: nobody reads the output any more.
        NotSavedError: a disk refuses the output.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_output()
        raise NotSavedError(f"standard output cannot be written: {error.strerror}") from error


def drop_output() -> None:
    """Send what is left of standard output nowhere, so that Python does not fail at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_command(arguments: list[str]) -> int:
    """Run the command that the arguments name, with the others as its flags; without any, print the help."""
    if arguments[:1] == ["bench"]:  # has its own options
        return run_bench(arguments[1:])
    arguments = [with_underscores(argument) for argument in arguments]
    configs = {**PLANNED, "select": SelectConfig}
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
        raise InputError(f"{printable(' '.join(rest)):.200} is not understood; see `lowmem-grpo {arguments[0]} --help`")
    given = {key: value for key, value in vars(options).items() if key not in ("run", "command")}
    return options.run(given)


def say_safely() -> None:
    """Escape, in warnings and in the log, what would move a terminal's cursor: models and data are quoted there."""
    warnings.formatwarning = partial(as_sentence, warnings.formatwarning)
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter())
    logging.getLogger("lowmem_grpo").addHandler(handler)


class PrintableFormatter(logging.Formatter):
    """Makes a line of the log of a record, and nothing of its own."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_text(super().format(record))


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, and the parsers of its commands."""

    commands: Mapping[str, argparse.ArgumentParser]

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")


class Once(argparse.Action):
    """Keep a flag's value, and refuse a second, other one."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest, values)
        if before != values:
            raise InputError(f"{option_string} is given as {shown(before)} and as {shown(values)}; keep one")
        setattr(namespace, self.dest, values)


def with_underscores(argument: str) -> str:
    """A flag as the settings are named, --learning_rate where --learning-rate was written; anything else unchanged."""
    flag, equals, value = argument.partition("=")
    return flag.replace("-", "_").replace("__", "--", 1) + equals + value if FLAG.fullmatch(flag) else argument


def as_sentence(others: Callable[..., str], message: Warning | str, category: Any, filename: str, *line: Any) -> str:
    """A warning of ours without a place, since a command has no line of a user's program to name."""
    is_ours = filename == sys.argv[0]
    return printable_text(f"lowmem-grpo: {message}\n" if is_ours else others(message, category, filename, *line))


def make_parser(every_setting: bool = False, planned: type = GRPOConfig) -> Parser:
    """The parser of the whole command, whose help shows every setting or the common ones.

    `plan` takes the settings of a training whose configuration is of the type `planned`.
    """
    parser = Parser(prog="lowmem-grpo", description="GRPO, and what comes before it, on one small GPU.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parser.commands = commands.choices

    def add_command(name: str, example: str, **words: Any) -> Parser:
        command = commands.add_parser(
            name, **words, epilog=f"{example}\n{HELP_ALL}", formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False, argument_default=argparse.SUPPRESS,
        )  # fmt: skip
        command.add_argument("--help_all", action="help", help="show this help with every setting, and exit")
        return command

    train_parser = add_command(
        "train", TRAIN_EXAMPLE, help="train a model", description="Train LoRA adapters on a 4-bit model with GRPO.",
        usage="lowmem-grpo train --model M --dataset D [--reward_funcs F [F ...]] [options]",
    )  # fmt: skip
    train_parser.set_defaults(run=run_train)
    add_inputs(train_parser, "what to train, on what, for what")
    add_config_flags(train_parser, every_setting)

    sft_parser = add_command(
        "sft", SFT_EXAMPLE, help="train a model to imitate examples, as the cold start of one",
        description="Train LoRA adapters on a 4-bit model by supervised fine-tuning.",
        usage="lowmem-grpo sft --model M --dataset D [options]",
    )  # fmt: skip
    sft_parser.set_defaults(run=run_sft)
    add_inputs(sft_parser, "what to train, on what", OF_EXAMPLES)
    add_config_flags(sft_parser, every_setting, config=SFTConfig)

    sample_parser = add_command(
        "sample", SAMPLE_EXAMPLE, help="sample completions into a file, with their rewards",
        description="Sample completions of every prompt into a JSONL file, with their rewards. The same command again "
        "goes on where it was stopped. Without rewards nothing is scored, but for a task, which has its own.",
        usage="lowmem-grpo sample --model M --dataset D [--reward_funcs F [F ...]] [--output FILE] [options]",
    )  # fmt: skip
    sample_parser.set_defaults(run=run_sample)
    add_inputs(sample_parser, "what to sample from, what to ask, and what scores it", WITHOUT_EVAL_DATASET)
    add_config_flags(sample_parser, every_setting, config=SampleConfig)

    select_parser = add_command(
        "select", SELECT_EXAMPLE, help="choose sampled completions to train on",
        description="Choose completions of sampled files by rules, and show how many each rule leaves. What is written "
        "are rows for `lowmem-grpo sft`.",
        usage="lowmem-grpo select SAMPLED [SAMPLED ...] --output FILE [options]",
    )  # fmt: skip
    select_parser.set_defaults(run=run_select)
    add_files(select_parser)
    add_config_flags(select_parser, every_setting, config=SelectConfig)

    pairs_parser = add_command(
        "pairs", PAIRS_EXAMPLE, help="pair the best with the worst completion of each prompt",
        description="Pair the best and the worst completion of each prompt of sampled files, by their rewards, for a "
        "reward model. What is written has TRL's preference format.",
        usage="lowmem-grpo pairs SAMPLED [SAMPLED ...] --output FILE [--min_margin X]",
    )  # fmt: skip
    pairs_parser.set_defaults(run=run_pairs)
    add_files(pairs_parser)
    pairs_parser.add_argument(
        "--min_margin", action=Once, metavar="X", help="least difference of their rewards (default: any)"
    )

    label_parser = add_command(
        "label", LABEL_EXAMPLE, help="let a person choose between completions",
        description="Show two completions of each prompt of sampled files, and ask which one is the better. Each "
        "decision is written at once, in TRL's preference format; the same command again goes on.",
        usage="lowmem-grpo label SAMPLED [SAMPLED ...] --output FILE [--seed N]",
    )  # fmt: skip
    label_parser.set_defaults(run=run_label)
    add_files(label_parser)
    label_parser.add_argument(
        "--seed", action=Once, metavar="N", help="draws which two are shown, and which one first (default 42)"
    )
    pipeline_parser = commands.add_parser(
        "pipeline", aliases=["r1"], help="run several phases in a row: R1, R1-Zero, RLHF, or your own",
        description="Run the phases of a YAML file one after another, each in a folder of its own. Phases that are "
        "done are left as they are, and one that was stopped goes on.",
        usage="lowmem-grpo r1 --config FILE [--model M] [--output_dir DIR] [--until PHASE] [--from PHASE] [--dry_run]",
        epilog=PIPELINE_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    pipeline_parser.set_defaults(run=run_phases)
    for flag, metavar, text in PIPELINE_FLAGS:
        pipeline_parser.add_argument(flag, action=Once, metavar=metavar, help=text)
    pipeline_parser.add_argument(
        "--dry_run", action="store_true", help="check everything, print phases, data and plans, and train nothing"
    )
    pipeline_parser.add_argument("--print", action="store_true", help="print the file that --config names, and exit")

    reward_parser = add_command(
        "reward", REWARD_EXAMPLE, help="train a reward model from pairs of a better and a worse text",
        description="Train LoRA adapters and a score head on a 4-bit model to score the better text of a pair higher. "
        "`lowmem-grpo train` takes the adapter as a reward, on the base that it trains anyway.",
        usage="lowmem-grpo reward --model M --dataset D [options]",
    )  # fmt: skip
    reward_parser.set_defaults(run=run_reward)
    add_inputs(reward_parser, "what to train, on what", OF_PAIRS)
    add_config_flags(reward_parser, every_setting, config=RewardConfig)

    eval_parser = add_command(
        "eval", EVAL_EXAMPLE, help="evaluate a model or an adapter",
        description="Evaluate a model, or an adapter beside its base, on a hub dataset's test split, a file, or what a "
        "task holds out. A --config file may be that of training, of which learning's settings are not used.",
        usage="lowmem-grpo eval --model M --dataset D [--reward_funcs F [F ...]] [--num_generations_eval K] "
        "[--show N] [--json]",
    )  # fmt: skip
    eval_parser.set_defaults(run=run_eval)
    of_eval = add_inputs(eval_parser, "what to evaluate, on what, by what", WITHOUT_EVAL_DATASET)
    of_eval.add_argument(
        "--show", action=Once, metavar="N", help="print N completions with their prompts and rewards (default 0)"
    )
    of_eval.add_argument("--json", action="store_true", help="print JSON")
    add_config_flags(eval_parser, every_setting, EVAL_FIELDS)

    data_parser = add_command(
        "data", DATA_EXAMPLE, help="look at training data",
        description="Show prompts as the model gets them, their gold answers as rewards read them, and what each "
        "reward gives for the gold answer and for an empty completion. No weights are read, only the tokenizer.",
        usage="lowmem-grpo data --model M --dataset D [--reward_funcs F [F ...]] [--rows N] [options]",
    )  # fmt: skip
    data_parser.set_defaults(run=run_data)
    of_data = add_inputs(data_parser, "what to look at", WITHOUT_EVAL_DATASET)
    of_data.add_argument("--rows", action=Once, metavar="N", help="show the first N prompts (default 3)")
    add_config_flags(data_parser, every_setting)

    plan_parser = add_command(
        "plan", PLAN_EXAMPLE, help="predict what a run needs",
        description="Predict the peak memory of each phase from a model's configuration, on a GPU or with "
        "--use_cpu true on a CPU, and with --vram_budget choose settings that fit. No weights are downloaded, and no "
        "GPU is needed.",
        usage="lowmem-grpo plan [sft|reward|sample] --model M [--vram_budget 8GB] [--json] [options]",
    )  # fmt: skip
    plan_parser.set_defaults(run=partial(run_plan, planned))
    plan_parser.add_argument(
        "training", nargs="?", choices=tuple(PLANNED), default="train", help="what to plan (default train)"
    )
    names = ("model", "reward_funcs") if planned is GRPOConfig else ("model",)  # of rewards, the reward adapters count
    of_plan = add_inputs(plan_parser, "what to plan", [one for one in INPUTS if one[0] in names])
    of_plan.add_argument("--json", action="store_true", help="print JSON, in bytes")
    add_config_flags(plan_parser, every_setting, config=planned)

    demo_parser = commands.add_parser(
        "demo", help="train the embedded model on the embedded task, or another one by R1's phases, on a CPU",
        allow_abbrev=False, argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    demo_parser.set_defaults(run=run_demo)
    demo_parser.add_argument(
        "what", nargs="?", default="grpo", metavar="grpo|r1", help="one training, or R1's phases (default grpo)"
    )
    demo_parser.add_argument("--seed", action=Once, metavar="N", help="seed of the run (default 0)")
    demo_parser.add_argument(
        "--output_dir", action=Once, metavar="DIR",
        help="a new folder (default demo-output/TIME); or one in which r1 was stopped, which goes on",
    )  # fmt: skip
    commands.add_parser("bench", help="measure this machine, beside TRL, Liger and transformers", add_help=False)
    return parser


def add_inputs(parser: argparse.ArgumentParser, title: str, inputs: Any = INPUTS) -> Any:
    """Add flags for the inputs and for --config, and return their group."""
    group = parser.add_argument_group(title)
    for name, aliases, text in inputs:
        many = "+" if name == "reward_funcs" or (inputs is OF_EXAMPLES and name == "dataset") else None
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
            many = "+" if "a list" in words else None
            text = f"{field.metadata.get('help', field.name)} ({words}; default {default})".replace("%", "%%")
            in_help = text if every_setting or field.metadata.get("common") else argparse.SUPPRESS
            group.add_argument(f"--{field.name}", action=Once, metavar="X", help=in_help, nargs=many)


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
    if command not in ("demo", "pairs", "label"):  # which have no configuration
        refuse_unknown_fields(unknown, config)


def run_train(given: dict[str, Any]) -> int:
    inputs, fields = read_settings(given)
    config = GRPOConfig(**fields)
    from lowmem_grpo.loops.grpo import train

    result = train(
        inputs["model"],
        inputs.get("reward_funcs"),
        inputs["dataset"],
        eval_dataset=inputs.get("eval_dataset"),
        config=config,
    )
    with writing_output():
        print(printable(f"adapter: {Path(result.output_dir) / 'adapter'}"))
    return 0


def run_sft(given: dict[str, Any]) -> int:
    inputs, fields = read_settings(given, command="sft", config=SFTConfig)
    if "reward_funcs" in inputs:
        raise InputError("reward_funcs is for `lowmem-grpo train`; sft imitates examples and has no rewards")
    config = SFTConfig(**fields)
    from lowmem_grpo.loops.sft import sft

    result = sft(inputs["model"], inputs["dataset"], inputs.get("eval_dataset"), config)
    print(printable(f"adapter: {Path(result.output_dir) / 'adapter'}"))
    return 0


def run_sample(given: dict[str, Any]) -> int:
    inputs, fields = read_settings(given, command="sample", config=SampleConfig)
    config = SampleConfig(**fields)
    from lowmem_grpo.pipeline.sample import sample
    from lowmem_grpo.rollout.metrics import in_words

    result = sample(inputs["model"], inputs["dataset"], inputs.get("reward_funcs"), config)
    with writing_output():
        print(printable(f"{result.output}: {result.num_completions} completions of {result.num_prompts} prompts"))
        for name, value in result.metrics.items():
            print(printable(f"  {name:<40} {in_words(value, '.3f')}"))
    return 0


def run_select(given: dict[str, Any]) -> int:
    sampled, output = given.pop("sampled"), output_of(given, "select")
    config = SelectConfig(**{name: from_text(SelectConfig, name, as_list(value)) for name, value in given.items()})
    from lowmem_grpo.pipeline.sampled import read_sampled
    from lowmem_grpo.pipeline.select import as_text, select, write_rows

    found = select([row for path in sampled for row in read_sampled(path)], config)
    path = write_rows(output, found.rows, sampled)
    with writing_output():
        print(printable_text(f"{as_text(found.funnel)}\n{path}: {len(found.rows)} rows"))
    return 0


def run_pairs(given: dict[str, Any]) -> int:
    sampled, output = given.pop("sampled"), output_of(given, "pairs")
    text = given.pop("min_margin", "0")
    try:
        min_margin = float(text)
    except ValueError as error:
        raise InputError(f"--min_margin takes a number, such as 0.5, and not {shown(text)}") from error
    from lowmem_grpo.pipeline.pairs import pairs
    from lowmem_grpo.pipeline.sampled import read_sampled
    from lowmem_grpo.pipeline.select import grouped, write_rows

    rows = [row for path in sampled for row in read_sampled(path)]
    found = pairs(rows, min_margin)
    path = write_rows(output, found, sampled)
    with writing_output():
        print(printable(f"{path}: {len(found)} pairs of {len(grouped(rows))} prompts"))
    return 0


def run_label(given: dict[str, Any]) -> int:
    sampled, output = given.pop("sampled"), output_of(given, "label")
    seed = SelectConfig(**{name: from_text(SelectConfig, name, value) for name, value in given.items()}).seed
    from lowmem_grpo.pipeline.pairs import label
    from lowmem_grpo.pipeline.sampled import read_sampled

    rows = [row for path in sampled for row in read_sampled(path)]
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # what is no text is no answer
    with writing_output():
        found = label(rows, output, seed, sys.stdin, sys.stdout)
        print(printable(f"{output}: {found.num_labels} pairs, {found.num_left} prompts left"))
    return 0


def output_of(given: dict[str, Any], command: str) -> str:
    """Take --output out of what is given."""
    if not given.get("output"):
        raise InputError(f"--output is missing; see `lowmem-grpo {command} --help`")
    return given.pop("output")


def run_phases(given: dict[str, Any]) -> int:
    if not given.get("config"):
        raise InputError("--config is missing; name a YAML file of phases, or a recipe: r1, r1_zero, rlhf")
    from lowmem_grpo.pipeline.phases import pipeline_file, read_pipeline_file

    if given.pop("print", False):
        with writing_output():
            print(pipeline_file(given["config"]).read_text(encoding="utf-8"), end="")
        return 0
    settings = read_pipeline_file(given.pop("config"))
    places = {name: given.pop(name, settings.get(name)) for name in ("model", "output_dir")}
    for name, value in places.items():
        if not value:
            raise InputError(f"--{name} is missing; give it, or write {name} into the file")
    from lowmem_grpo.pipeline.pipeline import run_pipeline

    result = run_pipeline(
        places["model"], settings["phases"], places["output_dir"], common=settings.get("common"),
        evaluation=settings.get("eval"), until=given.get("until"), begin_at=given.get("from"),
        dry_run=given.get("dry_run", False),
    )  # fmt: skip
    if result.adapter is not None:
        with writing_output():
            print(printable(f"adapter: {result.adapter}"))
    return 0


def run_reward(given: dict[str, Any]) -> int:
    inputs, fields = read_settings(given, command="reward", config=RewardConfig)
    if "reward_funcs" in inputs:
        raise InputError("reward_funcs is for `lowmem-grpo train`; reward learns from pairs, and makes one")
    config = RewardConfig(**fields)
    from lowmem_grpo.loops.reward import train_reward_model

    result = train_reward_model(inputs["model"], inputs["dataset"], inputs.get("eval_dataset"), config)
    with writing_output():
        print(printable(f"adapter: {Path(result.output_dir) / 'adapter'}"))
    return 0


def run_eval(given: dict[str, Any]) -> int:
    as_json, show = given.pop("json", False), count_of(given, "show", "completions", 0)
    inputs, fields = read_settings(given, command="eval")
    config = GRPOConfig(**fields)
    from lowmem_grpo.evaluation.evaluate import measure_model
    from lowmem_grpo.evaluation.show import as_difference_table, as_table, examples, examples_as_text

    found = measure_model(inputs["model"], inputs.get("reward_funcs"), inputs["dataset"], config)
    metrics, chosen = {who: one.metrics for who, one in found.items()}, examples(found, show)
    if as_json:
        with writing_output():
            print(json.dumps(finite({**metrics, "shown": chosen} if chosen else metrics), indent=1, default=str))
    else:
        from rich.console import Console

        with writing_output():
            if chosen:
                print(printable_text(examples_as_text(chosen)))
            console = Console(highlight=False)
            console.print(as_table(metrics))
            if "adapter" in metrics:
                console.print(as_difference_table(metrics["adapter"]))
    return 0


def count_of(given: dict[str, Any], flag: str, what: str, default: int) -> int:
    """Take a flag with a count out of what is given."""
    text = given.pop(flag, str(default))
    if not text.isdecimal() or len(text) > 9:
        raise InputError(f"--{flag} takes a number of {what}, such as 5, and not {shown(text)}")
    return int(text)


def run_data(given: dict[str, Any]) -> int:
    count = count_of(given, "rows", "prompts", 3)
    inputs, fields = read_settings(given, command="data")
    config = GRPOConfig(**fields)
    from lowmem_grpo.inputs import read_data_inputs
    from lowmem_grpo.progress_bars import no_progress_bars
    from lowmem_grpo.run.preview import as_text, faults, make_previews

    with no_progress_bars():
        found = read_data_inputs(inputs["model"], inputs.get("reward_funcs"), inputs["dataset"], config)
        previews = make_previews(found, count)
    with writing_output():
        for text in [
            as_text(found, previews),
            *found.notes,
            *(fault.text for fault in faults(found.rewards, previews)),
        ]:
            print(printable_text(text))
    return 0


def finite(value: Any) -> Any:
    """The value with null, which JSON has, in place of each NaN, however deep."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and value != value else value


def run_plan(planned: type, given: dict[str, Any]) -> int:
    """Print the plan of a training, by the type of its configuration; exit status 0 where everything fits, else 1."""
    as_json, training = given.pop("json", False), given.pop("training")
    if PLANNED[training] is not planned:
        raise InputError(f"what is planned comes first; write `lowmem-grpo plan {training}` and then the settings")
    inputs, fields = read_settings(given, ("model",), "plan", planned)  # of a file for training, too
    model, config = inputs["model"], planned(**fields)
    from lowmem_grpo.inputs import worn_by

    if isinstance(config, SampleConfig):
        if config.base_url is not None:
            raise InputError("a model behind base_url takes no memory here, so that there is nothing to plan")
        config = config.for_sampler()
    from lowmem_grpo.model.find import adapter_config, find_model, read_config
    from lowmem_grpo.model.load import run_device
    from lowmem_grpo.model.teacher import find_teacher
    from lowmem_grpo.planner import plan as planner
    from lowmem_grpo.progress_bars import no_progress_bars
    from lowmem_grpo.rewards.names import reward_adapters

    if config.use_cpu:
        run_device(config)  # refuses what is about a GPU
    with no_progress_bars():
        find_model(model, config, needs_weights=False)
        base = read_config(model, config)
        worn = [] if planned is not GRPOConfig else worn_by(base, reward_adapters(inputs.get("reward_funcs") or []))
        teacher = find_teacher(model, config, needs_weights=False) if isinstance(config, GRPOConfig) else None
        rewards = [one.config for one in worn]
        found = planner.plan(base, config, adapter_config(model, config), rewards=rewards, teacher=teacher)
    with writing_output():
        print(json.dumps(planner.as_dict(found), indent=1) if as_json else printable_text(planner.as_text(found)))
    return 0 if found.remedy is None else 1


def run_bench(arguments: list[str]) -> int:
    from lowmem_grpo.benchmarks import suite

    return suite.main(arguments)


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


def read_settings(
    given: dict[str, Any],
    needed: tuple[str, ...] = ("model", "dataset"),
    command: str = "train",
    config: type = GRPOConfig,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and config fields from the flags and the YAML file that --config names; flags win.

    Raises:
        InputError: an unreadable file, an unknown name, a value that does not fit, or a missing input.
    """
    flags = dict(given)
    settings = read_config_file(flags.pop("config")) if "config" in flags else {}
    settings |= {name: as_list(value) for name, value in flags.items()}
    inputs = {name: settings.pop(name) for name, _, _ in INPUTS if name in settings}
    for name in needed:
        if not inputs.get(name):
            raise InputError(f"--{name} is missing; see `lowmem-grpo {command} --help`")
    if "eval_dataset" in inputs and command in ("eval", "sample"):
        raise InputError(f"--eval_dataset is for training; name what to {ONLY_DATASET[command]} with --dataset")
    refuse_unknown_fields(settings, config)
    return inputs, {name: from_text(config, name, value) for name, value in settings.items()}


def as_list(value: Any) -> Any:
    """A flag's values, or where the only one is a list in JSON, as '["a", "b"]', what that holds."""
    if isinstance(value, list) and len(value) == 1 and value[0].startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value[0])
    return value


def read_config_file(path: str) -> dict[str, Any]:
    """The settings of a YAML file, under the names of the fields and INPUTS.

    Raises:
        InputError: a file that cannot be read, or one that says something twice.
    """
    from lowmem_grpo.settings_file import read_settings_file

    aliases = {alias[2:]: name for name, names, _ in INPUTS for alias in names}
    settings: dict[str, Any] = {}
    for written, value in read_settings_file(path).items():
        name = written.replace("-", "_")
        name = aliases.get(name, name)
        if name in settings:
            raise InputError(f"config file {shown(path)} gives {name} twice, by two names; keep one")
        if name == "config":
            raise InputError(f"config file {shown(path)} names another config; write its settings into one file")
        settings[name] = value
    return settings


if __name__ == "__main__":
    sys.exit(main())

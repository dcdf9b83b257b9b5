"""The command `lowmem-grpo`: train, eval, data, plan, demo, bench."""

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lowmem_grpo.config.fields import describe, field_types, from_text
from lowmem_grpo.config.grpo import GRPOConfig, refuse_unknown_fields
from lowmem_grpo.config.sections import sections
from lowmem_grpo.errors import InputError, NotFiniteError, UnhealthyRunError

TRAIN_EXAMPLE = """\
example:
  lowmem-grpo train --model Qwen/Qwen2.5-1.5B-Instruct --dataset openai/gsm8k \\
      --reward_funcs accuracy_reward --max_completion_length 768 --output_dir gsm8k
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
"""
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


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status: 2 for bad input, 1 for a run that cannot go on.

    Both are said in one sentence on standard error.
    """
    if arguments is None:  # the process is the command
        arguments = sys.argv[1:]
        warnings.formatwarning = partial(as_sentence, warnings.formatwarning)
    if arguments[:1] == ["bench"]:  # has its own options
        return run_bench(arguments[1:])
    arguments = [with_underscores(argument) for argument in arguments]
    parser = make_parser(every_setting="--help_all" in arguments)
    options, rest = parser.parse_known_args(arguments)
    given = {key: value for key, value in vars(options).items() if key not in ("run", "command")}
    try:
        refuse_unknown_flags(options.command, rest)
        return options.run(given)
    except (InputError, NotFiniteError, UnhealthyRunError) as error:
        print(f"lowmem-grpo {options.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except BrokenPipeError:  # whoever read the output, `head` for one, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130


def with_underscores(argument: str) -> str:
    """A flag as the settings are named, --learning_rate where --learning-rate was written; anything else unchanged."""
    flag, equals, value = argument.partition("=")
    return flag.replace("-", "_").replace("__", "--", 1) + equals + value if FLAG.fullmatch(flag) else argument


def as_sentence(others: Callable[..., str], message: Warning | str, category: Any, filename: str, *line: Any) -> str:
    """A warning of ours without a place, since a command has no line of a user's program to name."""
    return f"lowmem-grpo: {message}\n" if filename == sys.argv[0] else others(message, category, filename, *line)


def make_parser(every_setting: bool = False) -> argparse.ArgumentParser:
    """The parser of the whole command, whose help shows every setting or the common ones."""
    parser = argparse.ArgumentParser(prog="lowmem-grpo", description="GRPO on one small GPU.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_command(name: str, example: str, **words: Any) -> argparse.ArgumentParser:
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

    eval_parser = add_command(
        "eval", EVAL_EXAMPLE, help="evaluate a model or an adapter",
        description="Evaluate a model, or an adapter beside its base, on a hub dataset's test split, a file, or what a "
        "task holds out. Settings are those of training; what is about learning is not used.",
        usage="lowmem-grpo eval --model M --dataset D [--reward_funcs F [F ...]] [--num_generations_eval K] "
        "[--show N] [--json]",
    )  # fmt: skip
    eval_parser.set_defaults(run=run_eval)
    of_eval = add_inputs(eval_parser, "what to evaluate, on what, by what")
    of_eval.add_argument("--show", metavar="N", help="print N completions with their prompts and rewards (default 0)")
    of_eval.add_argument("--json", action="store_true", help="print JSON")
    add_config_flags(eval_parser, every_setting)

    data_parser = add_command(
        "data", DATA_EXAMPLE, help="look at training data",
        description="Show prompts as the model gets them, their gold answers as rewards read them, and what each "
        "reward gives for the gold answer and for an empty completion. No weights are read, only the tokenizer.",
        usage="lowmem-grpo data --model M --dataset D [--reward_funcs F [F ...]] [--rows N] [options]",
    )  # fmt: skip
    data_parser.set_defaults(run=run_data)
    of_data = add_inputs(data_parser, "what to look at", [one for one in INPUTS if one[0] != "eval_dataset"])
    of_data.add_argument("--rows", metavar="N", help="show the first N prompts (default 3)")
    add_config_flags(data_parser, every_setting)

    plan_parser = add_command(
        "plan", PLAN_EXAMPLE, help="predict what a run needs",
        description="Predict the peak memory of each phase from a model's configuration, on a GPU or with "
        "--use_cpu true on a CPU, and with --vram_budget choose settings that fit. No weights are downloaded, and no "
        "GPU is needed.",
        usage="lowmem-grpo plan --model M [--vram_budget 8GB] [--json] [options]",
    )  # fmt: skip
    plan_parser.set_defaults(run=run_plan)
    of_plan = add_inputs(plan_parser, "what to plan", INPUTS[:1])
    of_plan.add_argument("--json", action="store_true", help="print JSON, in bytes")
    add_config_flags(plan_parser, every_setting)

    demo_parser = commands.add_parser("demo", help="train the embedded model on the embedded task, on a CPU")
    demo_parser.set_defaults(run=run_demo)
    demo_parser.add_argument("--seed", type=int, default=0, help="seed of the run (default 0)")
    demo_parser.add_argument("--output_dir", default=None, help="a new folder (default demo-output/TIME)")
    commands.add_parser("bench", help="measure this machine, beside TRL, Liger and transformers", add_help=False)
    return parser


def add_inputs(parser: argparse.ArgumentParser, title: str, inputs: Any = INPUTS) -> Any:
    """Add flags for the inputs and for --config, and return their group."""
    group = parser.add_argument_group(title)
    for name, aliases, text in inputs:
        many = "+" if name == "reward_funcs" else None
        group.add_argument(f"--{name}", *aliases, dest=name, metavar=name.split("_")[-1].upper(), help=text, nargs=many)
    group.add_argument("--config", metavar="FILE", help="YAML file with any of these settings; flags win over it")
    return group


def add_config_flags(parser: argparse.ArgumentParser, every_setting: bool) -> None:
    """Add a flag for every field of GRPOConfig, in sections; the help of some is hidden, unless of every setting."""
    types = field_types(GRPOConfig)
    for title, fields in sections(GRPOConfig):
        group = parser.add_argument_group(title)
        for field in fields:
            words = describe(types[field.name])
            default = str(field.default).lower() if field.default in (None, True, False) else field.default
            many = "+" if "a list" in words else None
            text = f"{field.metadata.get('help', field.name)} ({words}; default {default})".replace("%", "%%")
            shown = text if every_setting or field.metadata.get("common") else argparse.SUPPRESS
            group.add_argument(f"--{field.name}", metavar="X", help=shown, nargs=many)


def refuse_unknown_flags(command: str, rest: list[str]) -> None:
    """Raise InputError for an unknown flag, with the remedy or the nearest name."""
    if command != "demo":
        refuse_unknown_fields(flag[2:].partition("=")[0] for flag in rest if flag.startswith("--"))
    if rest:
        raise InputError(f"{' '.join(rest)} is not understood; see `lowmem-grpo {command} --help`")


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
    print(f"adapter: {Path(result.output_dir) / 'adapter'}")
    return 0


def run_eval(given: dict[str, Any]) -> int:
    as_json, show = given.pop("json", False), count_of(given, "show", "completions", 0)
    inputs, fields = read_settings(given)
    if "eval_dataset" in inputs:
        raise InputError("--eval_dataset is for training; name what to evaluate on with --dataset")
    config = GRPOConfig(**fields)
    from lowmem_grpo.evaluation.evaluate import measure_model
    from lowmem_grpo.evaluation.show import as_difference_table, as_table, examples, examples_as_text

    found = measure_model(inputs["model"], inputs.get("reward_funcs"), inputs["dataset"], config)
    metrics, shown = {who: one.metrics for who, one in found.items()}, examples(found, show)
    if as_json:
        print(json.dumps(finite({**metrics, "shown": shown} if shown else metrics), indent=1, default=str))
    else:
        from rich.console import Console

        if shown:
            print_safely(examples_as_text(shown))
        console = Console(highlight=False)
        console.print(as_table(metrics))
        if "adapter" in metrics:
            console.print(as_difference_table(metrics["adapter"]))
    return 0


def count_of(given: dict[str, Any], flag: str, what: str, default: int) -> int:
    """Take a flag with a count out of what is given."""
    text = given.pop(flag, str(default))
    if not text.isdecimal():
        raise InputError(f"--{flag} takes a number of {what}, such as 5, and not {text!r}")
    return int(text)


def print_safely(text: str) -> None:
    """Print a text on standard output, with escapes for what its encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


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
    for text in [as_text(found, previews), *found.notes, *faults(found.rewards, previews)]:
        print_safely(text)
    return 0


def finite(value: Any) -> Any:
    """The value with null, which JSON has, in place of each NaN, however deep."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and value != value else value


def run_plan(given: dict[str, Any]) -> int:
    """Print a plan; exit status 0 where everything fits, else 1."""
    as_json = given.pop("json", False)
    inputs, fields = read_settings(given, needed=("model",), command="plan")  # of a file for training, too
    model, config = inputs["model"], GRPOConfig(**fields)
    from lowmem_grpo.model.find import adapter_config, find_model, read_config
    from lowmem_grpo.model.load import run_device
    from lowmem_grpo.planner import plan as planner
    from lowmem_grpo.progress_bars import no_progress_bars

    if config.use_cpu:
        run_device(config)  # refuses what is about a GPU
    with no_progress_bars():
        find_model(model, config, needs_weights=False)
        found = planner.plan(read_config(model, config), config, adapter_config(model, config))
    print(json.dumps(planner.as_dict(found), indent=1) if as_json else planner.as_text(found))
    return 0 if found.remedy is None else 1


def run_bench(arguments: list[str]) -> int:
    from lowmem_grpo.benchmarks import suite

    try:
        return suite.main(arguments)
    except KeyboardInterrupt:
        return 130


def run_demo(given: dict[str, Any]) -> int:
    from lowmem_grpo.demo.run import run

    run(**given)
    return 0


def read_settings(
    given: dict[str, Any], needed: tuple[str, ...] = ("model", "dataset"), command: str = "train"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and config fields from the flags and the YAML file that --config names; flags win.

    Raises:
        InputError: an unreadable file, an unknown name, a value that does not fit, or a missing input.
    """
    settings = {**(read_yaml(given["config"]) if "config" in given else {}), **given}
    settings.pop("config", None)
    settings = {str(name).replace("-", "_"): value for name, value in settings.items()}
    aliases = {alias[2:]: name for name, names, _ in INPUTS for alias in names}
    settings = {aliases.get(name, name): value for name, value in settings.items()}
    inputs = {name: settings.pop(name) for name, _, _ in INPUTS if name in settings}
    for name in needed:
        if not inputs.get(name):
            raise InputError(f"--{name} is missing; see `lowmem-grpo {command} --help`")
    refuse_unknown_fields(settings)
    return inputs, {name: from_text(GRPOConfig, name, value) for name, value in settings.items()}


def read_yaml(path: str) -> dict[str, Any]:
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"config file {path!r} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise InputError(f"config file {path!r} must be a mapping of settings, such as `learning_rate: 1e-5`")
    return settings


if __name__ == "__main__":
    sys.exit(main())

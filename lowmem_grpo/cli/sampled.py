"""The commands that sample into files, and make something of those: sample, select, pairs and label."""

import argparse
import io
import sys
from typing import Any

from lowmem_grpo.cli.output import tell, writing_output
from lowmem_grpo.cli.parser import Commands, Once, add_config_flags, add_files, add_inputs
from lowmem_grpo.cli.settings import OF_SAMPLING, as_list, output_of, read_settings
from lowmem_grpo.config.fields import from_text
from lowmem_grpo.config.pairs import PairsConfig
from lowmem_grpo.config.sample import SampleConfig
from lowmem_grpo.config.select import SelectConfig
from lowmem_grpo.errors import counted
from lowmem_grpo.terminal import show

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


def add(commands: Commands) -> None:
    """Add sample, select, pairs and label."""
    parser = commands.add(
        "sample", SAMPLE_EXAMPLE, help="sample completions into a file, with their rewards",
        description="Sample completions of every prompt into a JSONL file, with their rewards. The same command again "
        "goes on where it was stopped. Without rewards nothing is scored, but for a task, which has its own.",
        usage="lowmem-grpo sample --model M --dataset D [--reward_funcs F [F ...]] [--output FILE] [options]",
    )  # fmt: skip
    parser.set_defaults(run=run_sample)
    add_inputs(parser, "what to sample from, what to ask, and what scores it", OF_SAMPLING)
    add_config_flags(parser, commands.every_setting, config=SampleConfig)

    parser = commands.add(
        "select", SELECT_EXAMPLE, help="choose sampled completions to train on",
        description="Choose completions of sampled files by rules, and show how many each rule leaves. What is written "
        "are rows for `lowmem-grpo sft`.",
        usage="lowmem-grpo select SAMPLED [SAMPLED ...] --output FILE [options]",
    )  # fmt: skip
    parser.set_defaults(run=run_select)
    add_files(parser)
    add_config_flags(parser, commands.every_setting, config=SelectConfig)

    parser = commands.add(
        "pairs", PAIRS_EXAMPLE, help="pair the best with the worst completion of each prompt",
        description="Pair the best and the worst completion of each prompt of sampled files, by their rewards, for a "
        "reward model. What is written has TRL's preference format.",
        usage="lowmem-grpo pairs SAMPLED [SAMPLED ...] --output FILE [--min_margin X]",
    )  # fmt: skip
    parser.set_defaults(run=run_pairs)
    add_files(parser)
    add_config_flags(parser, commands.every_setting, config=PairsConfig)

    parser = commands.plain(
        "label", help="let a person choose between completions",
        description="Show two completions of each prompt of sampled files, and ask which one is the better. Each "
        "decision is written at once, in TRL's preference format; the same command again goes on.",
        usage="lowmem-grpo label SAMPLED [SAMPLED ...] --output FILE [--seed N]",
        epilog=LABEL_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run_label)
    add_files(parser)
    parser.add_argument(
        "--seed", action=Once, metavar="N", help="draws which two are shown, and which one first (default 42)"
    )


def run_sample(given: dict[str, Any]) -> int:
    inputs, fields = read_settings(given, command="sample", config=SampleConfig)
    config = SampleConfig(**fields)
    from lowmem_grpo.inputs.names import look_up_inputs

    look_up_inputs(inputs, config)
    from lowmem_grpo.pipeline.sample import sample
    from lowmem_grpo.rollout.metrics import in_words

    result = sample(inputs["model"], inputs["dataset"], inputs.get("reward_funcs"), config)
    tell(f"{result.output}: {counted(result.num_completions, 'completion')} of {counted(result.num_prompts, 'prompt')}")
    for name, value in result.metrics.items():
        tell(f"  {name:<40} {in_words(value, '.3f')}")
    return 0


def run_select(given: dict[str, Any]) -> int:
    sampled, output = given.pop("sampled"), output_of(given, "select")
    config = _settings(SelectConfig, given)
    rows = _rows_of(sampled)
    from lowmem_grpo.pipeline.select import as_text, select, write_rows

    found = select(rows, config)
    path = write_rows(output, found.rows, sampled)
    with writing_output():
        show(f"{as_text(found.funnel)}\n{path}: {counted(len(found.rows), 'row')}")
    return 0


def run_pairs(given: dict[str, Any]) -> int:
    sampled, output = given.pop("sampled"), output_of(given, "pairs")
    min_margin = _settings(PairsConfig, given).min_margin
    rows = _rows_of(sampled)
    from lowmem_grpo.pipeline.pairs import pairs
    from lowmem_grpo.pipeline.select import grouped, write_rows

    found = pairs(rows, min_margin)
    path = write_rows(output, found, sampled)
    tell(f"{path}: {counted(len(found), 'pair')} of {counted(len(grouped(rows)), 'prompt')}")
    return 0


def run_label(given: dict[str, Any]) -> int:
    sampled, output = given.pop("sampled"), output_of(given, "label")
    seed = _settings(SelectConfig, given).seed
    rows = _rows_of(sampled)
    from lowmem_grpo.pipeline.pairs import label

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # what is no text is no answer
    with writing_output():
        found = label(rows, output, seed, sys.stdin, sys.stdout)
    tell(f"{output}: {counted(found.num_labels, 'pair')}, {counted(found.num_left, 'prompt')} left")
    return 0


def _settings(config: type, given: dict[str, Any]) -> Any:
    """A configuration of what its flags give."""
    return config(**{name: from_text(config, name, as_list(value)) for name, value in given.items()})


def _rows_of(paths: list[str]) -> list[dict[str, Any]]:
    """The rows of sampled files."""
    from lowmem_grpo.pipeline.sampled import read_sampled

    return [row for path in paths for row in read_sampled(path)]

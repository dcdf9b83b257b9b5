"""The command that makes a model of a trained adapter: export."""

import argparse
from typing import Any

from lowmem_grpo.cli.output import tell
from lowmem_grpo.cli.parser import Commands, Once
from lowmem_grpo.cli.settings import count_of
from lowmem_grpo.errors import InputError, shown
from lowmem_grpo.paths import expanded

EXAMPLE = """\
example:
  lowmem-grpo export --model gsm8k/adapter --merge gsm8k-merged
  lowmem-grpo export --model gsm8k/adapter --merge gsm8k-merged --gguf gsm8k.gguf --llama_cpp ~/llama.cpp
  lowmem-grpo export --model gsm8k/adapter --gguf adapter.gguf --llama_cpp ~/llama.cpp
"""
FLAGS = (
    ("model", "ADAPTER", "folder of a trained adapter: gsm8k/adapter, gsm8k/best"),
    ("merge", "FOLDER", "new folder to write the merged model to"),
    ("onto", "WHAT", "nf4: the weights that training saw (the default of a 4-bit run); original: the base's own"),
    ("dtype", "TYPE", "float32, bfloat16 or float16 (default: as the base's files)"),
    ("check", "N", "compare N completions of the run by both models; 0: none (default 8)"),
    ("gguf", "FILE", "file to write by llama.cpp's converters, of the merged model, or without --merge of the adapter"),
    ("llama_cpp", "FOLDER", "checkout of llama.cpp"),
    ("push", "REPO", "repository of the hub to upload the merged model to"),
)
SWITCHES = (
    ("private", "make that repository a private one"),
    ("use_cpu", "compute on the CPU, with a GPU at hand too"),
    ("trust_remote_code", "run modelling code that comes with the base"),
)


def add(commands: Commands) -> None:
    """Add export."""
    parser = commands.plain(
        "export", help="make a model of a trained adapter",
        description="Merge an adapter into its base, one tensor at a time, and test that the result says what was "
        "trained; write it, or the adapter, in GGUF; upload it.",
        usage="lowmem-grpo export --model ADAPTER [--merge FOLDER] [--gguf FILE --llama_cpp FOLDER] [options]",
        epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run_export)
    for name, value, text in FLAGS:
        parser.add_argument(f"--{name}", action=Once, metavar=value, help=text)
    for name, text in SWITCHES:
        parser.add_argument(f"--{name}", action=Once, nargs="?", const="true", metavar="true", help=text)


def run_export(given: dict[str, Any]) -> int:
    if not given.get("model"):
        raise InputError("--model is missing; name the folder of a trained adapter, such as run/adapter")
    num_texts = count_of(given, "check", "completions", 8)
    given |= {name: _is_on(name, given[name]) for name, _ in SWITCHES if name in given}
    model, merge_to = given.pop("model"), given.pop("merge", None)
    from lowmem_grpo.exporting.asked import outputs_of
    from lowmem_grpo.lookup import look_up_model

    names = ("onto", "dtype", "gguf", "llama_cpp", "push", "private")
    outputs_of(model, merge_to, num_texts=num_texts, **{name: given.get(name) for name in names})
    look_up_model(expanded(model))
    # After that, since the import of what computes takes seconds.
    from lowmem_grpo.exporting.export import export

    export(model, merge_to, num_texts=num_texts, say=tell, **given)
    return 0


def _is_on(name: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise InputError(f"--{name} takes true, false or nothing, and not {shown(value)}")
    return value.lower() == "true"

"""Writes docs/settings.md, every setting with its default, from the configurations: `python docs/make_settings.py`."""

from dataclasses import Field
from pathlib import Path
from typing import Any

from lowmem_grpo.config.fields import describe, field_types
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.reward import RewardConfig
from lowmem_grpo.config.sample import SampleConfig
from lowmem_grpo.config.sections import sections
from lowmem_grpo.config.select import SelectConfig
from lowmem_grpo.config.sft import SFTConfig

PLACE = Path(__file__).with_name("settings.md")
HEADER = """\
# Settings

Every field of `GRPOConfig`. In Python `GRPOConfig(max_steps=100)`, on the command line `--max_steps 100`, in a file for
`--config` a line `max_steps: 100`; flags win over the file. Names and defaults are TRL 1.16's where TRL has the field,
but for [stated differences](coming-from-trl.md). This page is made by `python docs/make_settings.py`.

In a file a number is decimal (`010` is ten, `1e-5` is a number), a truth value is `true` or `false`, and anything else
is a text: `1:30`, `0x10`, `yes`, `2024-01-01`. A name stands there once.

A path may have `~` or `$NAME`, of a model, a data set or a folder alike. A relative one begins at the current folder,
also where a file in another folder has it.
"""
OF_EXAMPLES = """\
## SFTConfig

`lowmem-grpo sft` has the settings above of run, model, adapters, data, update, optimizer, evaluation and saving, but
for what is about prompts and completions. These are its own, or have another default.
"""
OF_PAIRS = """\
## RewardConfig

`lowmem-grpo reward` has the settings above of run, model, adapters, data, update, optimizer, evaluation and saving, but
for what is about prompts and completions. These are its own, or have another default.
"""

OF_SAMPLES = """\
## SampleConfig

`lowmem-grpo sample` has the settings above that are about loading a model, prompts, sampling and scoring, and none of
training. These are its own, or have another meaning.
"""
OF_SELECTIONS = """\
## SelectConfig

The rules of `lowmem-grpo select`, in the order in which they are applied.
"""
CONFIGS = (
    (OF_EXAMPLES, SFTConfig), (OF_PAIRS, RewardConfig), (OF_SAMPLES, SampleConfig), (OF_SELECTIONS, SelectConfig)
)  # fmt: skip


def as_text(value: Any) -> str:
    """A default as the command line takes it: `true`, `none`, `1e-05`."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def page() -> str:
    """The whole of settings.md."""
    lines = [HEADER]
    for title, fields in sections(GRPOConfig):
        lines += [f"## {title.capitalize()}\n", *table(fields, GRPOConfig)]
    own = {field.name: described(field) for _, fields in sections(GRPOConfig) for field in fields}
    for header, config in CONFIGS:
        others = [field for _, fields in sections(config) for field in fields]
        lines += [header, *table([one for one in others if own.get(one.name) != described(one)], config)]
    return "\n".join(lines)


def described(field: Field) -> tuple[Any, str]:
    """A field's default and help, in which those of one name differ from training to training."""
    return field.default, field.metadata["help"]


def table(fields: list[Field], config: type) -> list[str]:
    """The lines of a table of fields."""
    lines, types = ["| setting | default | what it does | values |", "|---|---|---|---|"], field_types(config)
    for field in fields:
        cells = [f"`{field.name}`", as_text(field.default), field.metadata["help"], describe(types[field.name])]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


if __name__ == "__main__":
    PLACE.write_text(page(), encoding="utf-8")

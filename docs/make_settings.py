"""Writes docs/settings.md, every setting with its default, from GRPOConfig: `python docs/make_settings.py`."""

from pathlib import Path
from typing import Any

from lowmem_grpo.config.fields import describe, field_types
from lowmem_grpo.config.grpo import GRPOConfig
from lowmem_grpo.config.sections import sections

PLACE = Path(__file__).with_name("settings.md")
HEADER = """\
# Settings

Every field of `GRPOConfig`. In Python `GRPOConfig(max_steps=100)`, on the command line `--max_steps 100`, in a file for
`--config` a line `max_steps: 100`; flags win over the file. Names and defaults are TRL 1.16's where TRL has the field,
but for [stated differences](coming-from-trl.md). This page is made by `python docs/make_settings.py`.

In a file a number is decimal (`010` is ten, `1e-5` is a number), a truth value is `true` or `false`, and anything else
is a text: `1:30`, `0x10`, `yes`, `2024-01-01`. A name stands there once.
"""


def as_text(value: Any) -> str:
    """A default as the command line takes it: `true`, `none`, `1e-05`."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def page() -> str:
    """The whole of settings.md."""
    lines, types = [HEADER], field_types(GRPOConfig)
    for title, fields in sections(GRPOConfig):
        lines += [f"## {title.capitalize()}\n", "| setting | default | what it does | values |", "|---|---|---|---|"]
        for field in fields:
            cells = [f"`{field.name}`", as_text(field.default), field.metadata["help"], describe(types[field.name])]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PLACE.write_text(page(), encoding="utf-8")

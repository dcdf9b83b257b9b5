"""Writes the table of docs/models.md from the models that tests try: `python docs/make_models.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from model_matrix import FAMILIES, Row  # pyright: ignore[reportMissingImports]: in tests/

PLACE = Path(__file__).with_name("models.md")
BEGIN, END = "<!-- made by docs/make_models.py -->\n", "<!-- end -->\n"


def said(row: Row) -> tuple[str, str, str]:
    """How a row is sampled from, how it is trained, and what of it is in 4 bits."""
    if row.refused:
        return "refused at load", "-", "-"
    dense = ", ".join(f"`{name}`" for name in row.dense)
    return (
        "`generate`" if row.generates else "engine",
        "padded" if row.padded else "packed",
        f"yes, but {dense}" if dense else "yes",
    )


def table() -> str:
    """A line for each family and way in which its model types are served."""
    lines = ["| family | transformers' model types | sampled by | rows | in 4 bits |", "|---|---|---|---|---|"]
    for family, rows in FAMILIES.items():
        ways: dict[tuple[str, str, str], list[str]] = {}
        for row in rows:
            ways.setdefault(said(row), []).append(row.name)
        lines += [f"| {family} | {', '.join(names)} | {' | '.join(way)} |" for way, names in ways.items()]
    return "\n".join([*lines, ""])


def page() -> str:
    """The whole of models.md, with its table made anew."""
    before, _, rest = PLACE.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    PLACE.write_text(page(), encoding="utf-8")

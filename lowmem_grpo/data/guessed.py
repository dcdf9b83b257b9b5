"""Types of prompts and gold answers that others guessed: `datasets` makes 7 of a CSV's 007, and pandas 5.0 of 5."""

from math import isnan
from typing import Any

from datasets import Dataset, Features

from lowmem_grpo.data.files import AS_WRITTEN, INT64, TEXTS

# By what reads a file, the first letters of types that it may have guessed wrongly.
GUESSES = {"csv": ("int", "float", "bool"), "json": ("float", "timestamp", "date", "time")}


def guessed_by(rows: Any) -> str | None:
    """The reader, "csv" or "json", that may have guessed the type of a prompt or gold answer, if any."""
    reader, features = rows.info.builder_name, rows.features or Features()
    columns = TEXTS if reader == "csv" else AS_WRITTEN
    types = [str(getattr(features[column], "dtype", "")) for column in columns if column in features]
    return reader if any(one.startswith(GUESSES.get(reader, ())) for one in types) else None


def with_whole_numbers(rows: Dataset) -> Dataset:
    """Rows in which whole numbers that pandas made floats, for one that is missing, are whole again."""
    for column in [one for one in AS_WRITTEN if str(getattr(rows.features.get(one), "dtype", "")).startswith("float")]:
        values = [None if value is None or isnan(value) else value for value in rows[column]]
        if None in values and all(value is None or (value.is_integer() and int(value) in INT64) for value in values):
            whole = [None if value is None else int(value) for value in values]
            rows = rows.remove_columns(column).add_column(column, whole)
    return rows

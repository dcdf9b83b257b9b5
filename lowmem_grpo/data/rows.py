"""Datasets to prompts: a hub id, a local file, or a Dataset becomes a list of tokenized Prompts."""

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset

from lowmem_grpo.config.sections import DataFields
from lowmem_grpo.errors import InputError, cause

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# Hub datasets that need a configuration name, so that nobody has to look it up.
DEFAULT_CONFIGS = {"openai/gsm8k": "main", "gsm8k": "main"}


def load_rows(dataset: Any, config: DataFields, *, name: str = "train_dataset", split: str | None = None) -> Dataset:
    """A Dataset with a `prompt` column, from a hub id, a local file, a Dataset, or a list of rows.

    Without a `prompt`, `question` and `answer` columns (GSM8K), or `problem` and `solution` or `answer` (MATH), become
    a chat `prompt` and a `solution`. Of a streaming dataset the first dataset_take rows are read now.

    Raises:
        InputError: it cannot be found or read, is empty, or has no prompts; one sentence with the remedy.
    """
    dataset = str(dataset) if isinstance(dataset, Path) else dataset
    on_hub = isinstance(dataset, str) and Path(dataset).suffix.lower() not in READERS
    if (
        name == "train_dataset"
        and not on_hub
        and (config.dataset_config is not None or config.dataset_split != "train")
    ):
        raise InputError(
            "dataset_config and dataset_split are for hub datasets, and train_dataset is not one; leave them out"
        )
    rows = _load(dataset, config, name, split or config.dataset_split)
    if isinstance(rows, (DatasetDict, dict)):
        raise InputError(f"{name} has the splits {', '.join(rows)}; pass one of them")
    if config.dataset_streaming and isinstance(rows, Dataset) and name == "train_dataset":
        raise InputError(f"dataset_streaming is for hub datasets and files, and {name} is in memory; leave it out")
    if isinstance(rows, IterableDataset):
        rows = _first(rows, config, name)
    elif config.dataset_take is not None and name == "train_dataset":
        rows = rows.take(min(config.dataset_take, len(rows)))
    if len(rows) == 0:
        raise InputError(f"{name} is empty; it needs at least one row with a prompt")
    rows = rows.with_format(None)  # plain Python values, whatever the caller looks at
    columns = rows.column_names
    if "prompt" not in columns and {"question", "answer"} <= set(columns):
        return rows.map(_from_question_and_answer, desc=None)
    if "prompt" not in columns and "problem" in columns and {"solution", "answer"} & set(columns):
        return rows.map(_from_problem, desc=None)
    if "prompt" not in columns:
        raise InputError(f"{name} has no column named prompt, only {', '.join(columns)}; rename the one that asks")
    return rows


def _load(dataset: Any, config: DataFields, name: str, split: str) -> Any:
    if isinstance(dataset, list):
        try:
            return Dataset.from_list(dataset)
        except Exception as error:
            raise InputError(f"{name} is not a list of rows with the same columns: {cause(error)}") from error
    if not isinstance(dataset, str):
        if not isinstance(dataset, (Dataset, DatasetDict, IterableDataset, dict)):
            raise InputError(
                f"{name} is a {type(dataset).__name__}; pass a hub id, a file, a Dataset or a list of rows"
            )
        return dataset
    streaming: dict[str, Any] = {"streaming": True} if config.dataset_streaming else {}
    path = Path(dataset).expanduser()
    reader = READERS.get(path.suffix.lower())
    if reader is not None:
        if not path.is_file():
            raise InputError(f"{name} {dataset!r} is not a file on this machine")
        if path.stat().st_size == 0:
            raise InputError(f"{name} {dataset!r} is empty; it needs at least one row with a prompt")
        try:
            return load_dataset(reader, data_files=str(path), split="train", **streaming)
        except Exception as error:
            raise InputError(f"{name} {dataset!r} cannot be read as {reader}: {cause(error)}") from error
    try:
        return load_dataset(dataset, config.dataset_config or DEFAULT_CONFIGS.get(dataset), split=split, **streaming)
    except Exception as error:
        raise InputError(
            f"{name} {dataset!r} (dataset_config={config.dataset_config}, split {split!r}) is neither a JSONL, JSON, "
            f"CSV or Parquet file nor a dataset the hub gives: {cause(error)}"
        ) from error


def _first(rows: IterableDataset, config: DataFields, name: str) -> Dataset:
    """The first dataset_take rows. An epoch's order is drawn over all rows, so they have to be known and few."""
    if config.dataset_take is None:
        raise InputError(
            f"{name} is a streaming dataset, of unknown length; set dataset_take to the rows to read of it"
        )
    try:
        return Dataset.from_list(list(rows.take(config.dataset_take)))
    except Exception as error:
        raise InputError(f"{name} cannot be streamed: {cause(error)}") from error


def _from_question_and_answer(row: dict) -> dict:
    prompt = [{"role": "user", "content": row["question"]}]
    return {"prompt": prompt} if "solution" in row else {"prompt": prompt, "solution": row["answer"]}


def _from_problem(row: dict) -> dict:
    """A chat from MATH's columns. A solution that marks no answer is only read, and `answer` is the gold one."""
    prompt = [{"role": "user", "content": row["problem"]}]
    solution, answer = row.get("solution"), row.get("answer")
    marked = solution is not None and ("\\boxed{" in solution or "####" in solution)
    if not marked and answer is not None:
        solution = str(answer) if "\\boxed{" in str(answer) else f"\\boxed{{{answer}}}"
    return {"prompt": prompt, "solution": solution}

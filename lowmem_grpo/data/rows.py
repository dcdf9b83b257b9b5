"""Datasets to prompts: a hub id, a local file, or a Dataset becomes a list of tokenized Prompts."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import (
    Audio,
    Dataset,
    DatasetDict,
    DownloadManager,
    Image,
    IterableDataset,
    ReadInstruction,
    Video,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
)

from lowmem_grpo.config.sections import DataFields, RowFields
from lowmem_grpo.data.chats import is_media
from lowmem_grpo.data.files import TEXTS, read_files, read_parquet, to_dataset
from lowmem_grpo.data.gold import COLUMNS, gold_of, is_marked
from lowmem_grpo.data.guessed import guessed_by, with_whole_numbers
from lowmem_grpo.data.questions import ASKED_WITH, ASKS, CHOICES, KEY, question_of, right_labels
from lowmem_grpo.errors import InputError, cause, shown
from lowmem_grpo.lookup import DATA_FILES, NO_DATASET, TEXT_FILES, look_up_dataset
from lowmem_grpo.paths import expanded

# Hub datasets that need a configuration name, so that nobody has to look it up.
DEFAULT_CONFIGS = {"openai/gsm8k": "main", "gsm8k": "main"}
# What reward functions get from the trainer, beside the columns.
GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
MOST_FILES = 10_000  # of a folder that is a data set; datasets looks at every one, and in /tmp without end


def load_rows(dataset: Any, config: DataFields, *, name: str = "train_dataset", split: str | None = None) -> Dataset:
    """A Dataset with a `prompt` column, from a hub id, a local file, a Dataset, or a list of rows.

    Without a `prompt`, a `question` (GSM8K) or `problem` (MATH) with a `solution` or `answer` becomes a chat `prompt`
    and a `solution`: of several `choices` (MMLU) the right one's letter. Of a streaming dataset the first
    dataset_take rows are read now.

    Raises:
        InputError: it cannot be found or read, is empty, or has no prompts; one sentence with the remedy.
    """
    rows = read_rows(dataset, config, name=name, split=split)
    columns = rows.column_names
    for column in columns:
        if column in GIVEN:
            raise InputError(
                f"{name} has a column named {column}, under which reward functions get the trainer's own; rename or "
                "remove it"
            )
    if "prompt" in columns:
        return rows
    ask = next((column for column in ASKS if column in columns), None)
    if "problem" in columns and not {"answer", KEY} & set(columns):  # MATH's, whatever else is there
        ask = "problem"
    if ask is None or not {"solution", "answer", KEY} & set(columns):
        raise InputError(f"{name} has no column named prompt, only {', '.join(columns)}; rename the one that asks")
    asked: list[Any] = list(rows.select_columns([one for one in (ask, *ASKED_WITH, *COLUMNS, KEY) if one in columns]))
    questions = [question_of(row, ask, f"row {index} of {name}") for index, row in enumerate(asked)]
    if ask == "problem":
        rows = _with_solution(rows)
    elif "solution" not in columns and "answer" in columns:
        copy = rows.select_columns("answer").rename_column("answer", "solution")
        rows = concatenate_datasets([rows, copy], axis=1)
    if set(CHOICES) & set(columns):
        rows = _with_letters(rows, asked, name)
    return rows.add_column("prompt", [[{"role": "user", "content": text}] for text in questions])


def _with_letters(rows: Dataset, asked: list[Any], name: str) -> Dataset:
    r"""Rows with `\boxed{B}` as the solution where B is the right choice, so that it is the gold answer."""
    solutions = rows["solution"] if "solution" in rows.column_names else [None] * len(rows)
    labels = right_labels(asked, name)
    if not any(labels):
        return rows
    texts = [
        f"\\boxed{{{label}}}" if label else solution if solution is None else str(solution)
        for label, solution in zip(labels, solutions, strict=True)
    ]
    rows = rows.remove_columns([column for column in ("solution",) if column in rows.column_names])
    return rows.add_column("solution", texts)


def read_rows(dataset: Any, config: RowFields, *, name: str = "train_dataset", split: str | None = None) -> Dataset:
    """A Dataset from a hub id, a local file, a Dataset, or a list of rows, whatever its columns.

    Of a streaming dataset the first dataset_take rows are read now.

    Raises:
        InputError: it cannot be found or read, is empty, or has media; one sentence with the remedy.
    """
    dataset = expanded(dataset)
    on_hub = isinstance(dataset, str) and Path(dataset).suffix.lower() not in DATA_FILES
    if (
        name == "train_dataset"
        and not on_hub
        and (config.dataset_config is not None or config.dataset_split != "train")
    ):
        raise InputError(
            "dataset_config and dataset_split are for hub datasets, and train_dataset is not one; leave them out"
        )
    rows = _load(dataset, config, name, split or config.dataset_split)
    if isinstance(rows, dict):  # a DatasetDict, say
        if rows and all(isinstance(one, (Dataset, IterableDataset)) for one in rows.values()):
            raise InputError(f"{name} has the splits {', '.join(map(str, rows))}; pass one of them")
        raise InputError(f"{name} is a {type(rows).__name__} of no splits; pass a list of rows, or Dataset.from_dict()")
    if config.dataset_streaming and isinstance(dataset, (Dataset, list)) and name == "train_dataset":
        raise InputError(f"dataset_streaming is for hub datasets and files, and {name} is in memory; leave it out")
    if isinstance(rows, IterableDataset):
        rows = _first(rows, config, name)
    elif config.dataset_take is not None and name == "train_dataset":
        rows = rows.take(min(config.dataset_take, len(rows)))
    if len(rows) == 0:
        where = f"{name} {dataset!r}" if isinstance(dataset, str) else name
        raise InputError(f"{where} is empty; it needs at least one row")
    if rows.format["type"] == "custom":  # which may draw other values each time
        raise InputError(f"{name} has a transform of its own, which would be lost; make its rows with map()")
    rows = rows.with_format(None)  # plain Python values, whatever the caller looks at
    if not (isinstance(dataset, list) or (isinstance(dataset, str) and Path(dataset).suffix.lower() in TEXT_FILES)):
        rows = with_whole_numbers(rows)
    _refuse_media(rows, name)
    return rows


def _load(dataset: Any, config: RowFields, name: str, split: str) -> Any:
    if isinstance(dataset, list):
        for index, row in enumerate(dataset):
            if not isinstance(row, Mapping) or not all(isinstance(key, str) for key in row):
                raise InputError(
                    f"row {index} of {name} is {shown(row)}; a row is a mapping of texts such as "
                    '{"prompt": "1+1=", "solution": "2"}'
                )
        # from_list has the columns of the first row alone, so that one which only later rows have would be lost.
        names = dict.fromkeys(key for row in dataset for key in row)
        return to_dataset({key: [row.get(key) for row in dataset] for key in names}, name)
    if not isinstance(dataset, str):
        if not isinstance(dataset, (Dataset, DatasetDict, IterableDataset, dict)):
            what = "missing" if dataset is None else f"a {type(dataset).__name__}"
            raise InputError(f"{name} is {what}; pass a hub id, a file, a Dataset or a list of rows")
        return dataset
    path = Path(dataset)
    look_up_dataset(dataset, name)
    options: dict[str, Any] = {"streaming": True} if config.dataset_streaming else {}
    if path.suffix.lower() in TEXT_FILES:
        return read_files([path], name, _most(config, name))
    if path.suffix.lower() in DATA_FILES:
        return read_parquet(path, name, **options)
    if os.path.isdir(path):
        dataset = str(path)
        _refuse_huge(dataset, name)
        if (path / "state.json").is_file():
            raise InputError(
                f"{name} {dataset!r} was written by save_to_disk(); write it with to_parquet(), or pass what "
                "load_from_disk() gives"
            )
    try:
        if os.path.isdir(path):
            rows = _of_files(dataset, config, name, split)
            if rows is not None:
                return rows
            # With a card datasets 5.2 has the rows of an earlier run, however the folder changed.
            times = sorted((str(file), file.stat().st_mtime_ns) for file in path.rglob("*") if file.is_file())
            options["description"] = str(times)  # a part of the name under which it keeps rows
        named = dataset, config.dataset_config or DEFAULT_CONFIGS.get(dataset)
        rows = load_dataset(*named, split=split, **options)
        reader = guessed_by(rows)
        if reader == "json" and not config.dataset_streaming:
            return _of_files(dataset, config, name, split) or rows
        if reader == "csv":
            return load_dataset(*named, split=split, converters=dict.fromkeys(TEXTS, str), **options)
        return rows
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{name} {dataset!r} (dataset_config={config.dataset_config}, split {split!r}) {NO_DATASET}: {cause(error)}"
        ) from error


def _of_files(dataset: str, config: RowFields, name: str, split: str) -> Dataset | None:
    """The rows of a split of a data set's JSONL, JSON or CSV files, as they are written.

    `datasets` tells which files are of which split. None where there are files of another kind, or a card that says how
    to read them. Raises what `datasets` raises on files or a split that it does not understand.
    """
    found = load_dataset_builder(dataset, config.dataset_config).config
    by_split = {str(key): [*map(str, files)] for key, files in (found.data_files or {}).items()}
    said = {key for key, value in vars(type(found)()).items() if getattr(found, key) != value}
    if said - {"name", "version", "data_dir", "data_files", "description"} or not all(
        Path(file).suffix.lower() in TEXT_FILES for files in by_split.values() for file in files
    ):
        return None
    if split in by_split:
        return read_files(_here(by_split[split]), name, _most(config, name), folder=dataset)
    rows = {key: read_files(_here(files), name, folder=dataset) for key, files in by_split.items()}
    slices = ReadInstruction.from_spec(split).to_absolute({key: len(of_split) for key, of_split in rows.items()})
    return concatenate_datasets([rows[one.splitname].select(range(one.from_, one.to)) for one in slices])


def _here(files: list[str]) -> list[Path]:
    """Files on this machine; those of the hub as load_dataset has downloaded them."""
    return [Path(file) for file in DownloadManager().download(files)]


def _most(config: RowFields, name: str) -> int | None:
    """How many rows of a file to read, or None for all."""
    return _to_take(config, name) if config.dataset_streaming else None


def _refuse_huge(folder: str, name: str) -> None:
    count = 0
    for _, folders, files in os.walk(folder):
        count += len(folders) + len(files)
        if count > MOST_FILES:
            raise InputError(
                f"{name} {folder!r} is a folder of more than {MOST_FILES} files; name one with the data alone, or a "
                "file of it"
            )


def _to_take(config: RowFields, name: str) -> int:
    """How many rows of a stream to read.

    An epoch's order is drawn over all rows, so they have to be known and few.
    """
    if config.dataset_take is None:
        raise InputError(
            f"{name} is a streaming dataset, of unknown length; set dataset_take to the rows to read of it"
        )
    return config.dataset_take


def _first(rows: IterableDataset, config: RowFields, name: str) -> Dataset:
    count = _to_take(config, name)
    try:
        return Dataset.from_list(list(rows.take(count)))
    except Exception as error:
        raise InputError(f"{name} cannot be streamed: {cause(error)}") from error


def _with_solution(rows: Dataset) -> Dataset:
    r"""MATH's rows with the gold answer as `solution`: as it is where it marks an answer, else `\boxed{answer}`."""
    if "answer" not in rows.column_names:
        return rows
    given = list(rows["solution"]) if "solution" in rows.column_names else [None] * len(rows)
    solutions = [_solution(*both) for both in zip(given, rows["answer"], strict=True)]
    texts = [None if value is None else str(value) for value in solutions]
    rows = rows.remove_columns([name for name in ("solution",) if name in rows.column_names])
    return rows.add_column("solution", solutions if solutions == given else texts)


def _solution(solution: Any, answer: Any) -> Any:
    try:
        gold = gold_of({"solution": solution, "answer": answer})
    except InputError:  # of a form that accuracy_reward would refuse; another reward may read it
        return solution
    if gold is None or gold is solution:
        return solution
    return gold if is_marked(gold) else f"\\boxed{{{gold}}}"


def _refuse_media(rows: Dataset, name: str) -> None:
    """Raise InputError for images, videos or audio, which no prompt here can show."""
    for column, feature in rows.features.items():
        if is_media(column) or isinstance(feature, (Image, Audio, Video)):
            batches = rows.select_columns(column).with_format("arrow").iter(batch_size=64)
            values = (value for batch in batches for value in batch[column].to_pylist())
            if any(values):
                raise InputError(f"{name} has the column {column}, and only text is trained on; remove the column")

"""Datasets to prompts: a hub id, a local file, or a Dataset becomes a list of tokenized Prompts."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset

from lowmem_grpo.config import GRPOConfig
from lowmem_grpo.rollout import Prompt

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# Hub datasets that need a configuration name, so that nobody has to look it up.
DEFAULT_CONFIGS = {"openai/gsm8k": "main", "gsm8k": "main"}


def load_rows(dataset: Any, config: GRPOConfig, *, name: str = "train_dataset", split: str | None = None) -> Dataset:
    """A Dataset with a `prompt` column from a hub id, a JSONL, JSON, CSV or Parquet file, a Dataset, or a list of rows.

    Without a `prompt`, `question` and `answer` columns (GSM8K), or `problem` and `solution` or `answer` (MATH), become
    a chat `prompt` and a `solution`. Of a streaming dataset the first dataset_take rows are read now.

    Raises:
        ValueError: it cannot be found or read, is empty, or has no prompts; one sentence with the remedy.
    """
    dataset = str(dataset) if isinstance(dataset, Path) else dataset
    on_hub = isinstance(dataset, str) and Path(dataset).suffix.lower() not in READERS
    if (
        name == "train_dataset"
        and not on_hub
        and (config.dataset_config is not None or config.dataset_split != "train")
    ):
        raise ValueError(
            "dataset_config and dataset_split are for hub datasets, and train_dataset is not one; leave them out"
        )
    rows = _load(dataset, config, name, split or config.dataset_split)
    if isinstance(rows, (DatasetDict, dict)):
        raise ValueError(f"{name} has the splits {', '.join(rows)}; pass one of them")
    if config.dataset_streaming and isinstance(rows, Dataset) and name == "train_dataset":
        raise ValueError(f"dataset_streaming is for hub datasets and files, and {name} is in memory; leave it out")
    if isinstance(rows, IterableDataset):
        rows = _first(rows, config, name)
    elif config.dataset_take is not None and name == "train_dataset":
        rows = rows.take(min(config.dataset_take, len(rows)))
    if len(rows) == 0:
        raise ValueError(f"{name} is empty; it needs at least one row with a prompt")
    rows = rows.with_format(None)  # plain Python values, whatever the caller looks at
    columns = rows.column_names
    if "prompt" not in columns and {"question", "answer"} <= set(columns):
        return rows.map(_from_question_and_answer, desc=None)
    if "prompt" not in columns and "problem" in columns and {"solution", "answer"} & set(columns):
        return rows.map(_from_problem, desc=None)
    if "prompt" not in columns:
        raise ValueError(f"{name} has no column named prompt, only {', '.join(columns)}; rename the one that asks")
    return rows


def _load(dataset: Any, config: GRPOConfig, name: str, split: str) -> Any:
    if isinstance(dataset, list):
        try:
            return Dataset.from_list(dataset)
        except Exception as error:
            raise ValueError(f"{name} is not a list of rows with the same columns: {_cause(error)}") from error
    if not isinstance(dataset, str):
        if not isinstance(dataset, (Dataset, DatasetDict, IterableDataset, dict)):
            raise ValueError(
                f"{name} is a {type(dataset).__name__}; pass a hub id, a file, a Dataset or a list of rows"
            )
        return dataset
    streaming: dict[str, Any] = {"streaming": True} if config.dataset_streaming else {}
    path = Path(dataset).expanduser()
    reader = READERS.get(path.suffix.lower())
    if reader is not None:
        if not path.is_file():
            raise ValueError(f"{name} {dataset!r} is not a file on this machine")
        if path.stat().st_size == 0:
            raise ValueError(f"{name} {dataset!r} is empty; it needs at least one row with a prompt")
        try:
            return load_dataset(reader, data_files=str(path), split="train", **streaming)
        except Exception as error:
            raise ValueError(f"{name} {dataset!r} cannot be read as {reader}: {_cause(error)}") from error
    try:
        return load_dataset(dataset, config.dataset_config or DEFAULT_CONFIGS.get(dataset), split=split, **streaming)
    except Exception as error:
        raise ValueError(
            f"{name} {dataset!r} (dataset_config={config.dataset_config}, split {split!r}) is neither a JSONL, JSON, "
            f"CSV or Parquet file nor a dataset the hub gives: {_cause(error)}"
        ) from error


def _first(rows: IterableDataset, config: GRPOConfig, name: str) -> Dataset:
    """The first dataset_take rows: every epoch's order is drawn over all of them, so they must be known and few."""
    if config.dataset_take is None:
        raise ValueError(
            f"{name} is a streaming dataset, of unknown length; set dataset_take to the rows to read of it"
        )
    try:
        return Dataset.from_list(list(rows.take(config.dataset_take)))
    except Exception as error:
        raise ValueError(f"{name} cannot be streamed: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _from_question_and_answer(row: dict) -> dict:
    prompt = [{"role": "user", "content": row["question"]}]
    return {"prompt": prompt} if "solution" in row else {"prompt": prompt, "solution": row["answer"]}


def _from_problem(row: dict) -> dict:
    """MATH's columns. A solution that marks no answer is a text to read; then the answer is the gold one."""
    prompt = [{"role": "user", "content": row["problem"]}]
    solution, answer = row.get("solution"), row.get("answer")
    marked = solution is not None and ("\\boxed{" in solution or "####" in solution)
    if not marked and answer is not None:
        solution = str(answer) if "\\boxed{" in str(answer) else f"\\boxed{{{answer}}}"
    return {"prompt": prompt, "solution": solution}


def tokenize_prompts(
    rows: Dataset, tokenizer, config: GRPOConfig, *, name: str = "train_dataset"
) -> tuple[list[Prompt], int]:
    """The rows' prompts, and how many were dropped for having more than max_prompt_length tokens.

    A string is tokenized as it is; a chat goes through the chat template, or, where the tokenizer has none, becomes a
    transcript that ends in `Assistant:`.

    Raises:
        ValueError: a prompt is neither, or none is left.
    """
    limit = config.max_prompt_length
    prompts = [_prompt(row, tokenizer, config, f"row {index} of {name}") for index, row in enumerate(rows)]
    if all(isinstance(p.text, str) for p in prompts) and (config.system_prompt or config.chat_template_kwargs):
        raise ValueError(
            f"system_prompt and chat_template_kwargs are for chats, and every prompt of {name} is a text; "
            'make the prompts lists such as [{"role": "user", "content": ...}], or leave the two out'
        )
    if config.chat_template_kwargs and tokenizer.chat_template is None:
        raise ValueError("chat_template_kwargs is given, but the tokenizer has no chat template; leave it out")
    short = [p for p in prompts if limit is None or len(p.ids) <= limit]
    if not short:
        shortest = min(len(p.ids) for p in prompts)
        raise ValueError(
            f"every prompt of {name} is longer than max_prompt_length={limit}; the shortest has {shortest} tokens"
        )
    return short, len(prompts) - len(short)


def _prompt(row: Any, tokenizer, config: GRPOConfig, where: str) -> Prompt:
    text = row["prompt"]
    columns = {key: value for key, value in row.items() if key != "prompt"}
    if isinstance(text, str):
        return Prompt(text, _not_empty(tokenizer(text)["input_ids"], where), columns)
    if not _is_chat(text):
        raise ValueError(
            f"{where} has the prompt {str(text)[:60]!r}; a prompt is a text, or a list of role and content texts"
        )
    messages: list[dict] = [{"role": m["role"], "content": m["content"]} for m in text]
    if config.system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    if tokenizer.chat_template is None:
        return Prompt(messages, _not_empty(tokenizer(transcript(messages))["input_ids"], where), columns)
    try:
        rendered = tokenizer.apply_chat_template(
            messages, **{**(config.chat_template_kwargs or {}), "add_generation_prompt": True, "tokenize": False}
        )
    except Exception as error:
        raise ValueError(f"the chat template cannot render {where}: {_cause(error)}") from error
    # The template writes its own special tokens.
    return Prompt(messages, _not_empty(tokenizer(rendered, add_special_tokens=False)["input_ids"], where), columns)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )  # fmt: skip


def _not_empty(ids: list[int], where: str) -> list[int]:
    if not ids:
        raise ValueError(f"{where} has a prompt without a single token; leave it out, or check the tokenizer")
    return ids


def transcript(messages: list[dict]) -> str:
    """A chat for a base model without a chat template."""
    return "\n\n".join([f"{m['role'].capitalize()}: {m['content']}" for m in messages] + ["Assistant:"])


def check_budgets(prompts: list[Prompt], config: GRPOConfig) -> None:
    """Raise ValueError if one sequence may have more tokens than a budget, which would then be no bound on memory."""
    longest = max(len(prompt.ids) for prompt in prompts) + config.max_completion_length
    for name in ("token_budget", "rollout_token_budget"):
        if longest > getattr(config, name):
            raise ValueError(
                f"the longest prompt and its completion may have {longest} tokens, more than {name}="
                f"{getattr(config, name)}; raise it, or lower max_prompt_length or max_completion_length"
            )


def prompts_at(prompts: Sequence[Prompt], positions: Iterable[int], config: GRPOConfig) -> list[Prompt]:
    """The prompts at these positions of the endless stream of epochs, each in a random order of its own.

    A function of its arguments alone, so that a resumed run sees the prompts it would have seen.
    """
    return [prompts[index_at(position, len(prompts), config)] for position in positions]


def next_positions(position: int, count: int, dull: set[int], prompts: int, config: GRPOConfig) -> list[int]:
    """The next count positions from `position` on, of which those of dull prompts are passed over by chance.

    A function of its arguments alone, like prompts_at. What is passed over is drawn anew at each position.
    """
    chosen = []
    while len(chosen) < count:
        skips = index_at(position, prompts, config) in dull and _chance(position, config) < config.curriculum_skip
        chosen += [] if skips else [position]
        position += 1
    return chosen


def index_at(position: int, prompts: int, config: GRPOConfig) -> int:
    """Which of the prompts stands at a position of the stream."""
    epoch, place = divmod(position, prompts)
    return _order(prompts, epoch, config)[place]


def _chance(position: int, config: GRPOConfig) -> float:
    return torch.rand((), generator=torch.Generator().manual_seed(config.seed * 2**31 + position)).item()


@lru_cache(maxsize=4)
def _shuffled(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def _order(count: int, epoch: int, config: GRPOConfig) -> Sequence[int]:
    return _shuffled(count, config.seed + epoch) if config.shuffle_dataset else range(count)

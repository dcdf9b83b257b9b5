"""Rows of a dataset to tokenized Prompts."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from lowmem_grpo.config.sections import DataFields
from lowmem_grpo.errors import InputError, cause


@dataclass(frozen=True)
class Prompt:
    """One row of a dataset, tokenized."""

    text: str | list[dict]  # as the dataset has it: a string, or a list of chat messages
    ids: list[int]
    columns: dict  # the row's other columns, which the reward functions get


def tokenize_prompts(
    rows: Dataset, tokenizer, config: DataFields, *, name: str = "train_dataset"
) -> tuple[list[Prompt], int]:
    """The rows' prompts, and how many were dropped for having more than max_prompt_length tokens.

    A string is tokenized as it is; a chat goes through the chat template, or, where the tokenizer has none, becomes a
    transcript that ends in `Assistant:`.

    Raises:
        InputError: a prompt is neither, or none is left.
    """
    limit = config.max_prompt_length
    prompts = [_prompt(row, tokenizer, config, f"row {index} of {name}") for index, row in enumerate(rows)]
    if all(isinstance(p.text, str) for p in prompts) and (config.system_prompt or config.chat_template_kwargs):
        raise InputError(
            f"system_prompt and chat_template_kwargs are for chats, and every prompt of {name} is a text; "
            'make the prompts lists such as [{"role": "user", "content": ...}], or leave the two out'
        )
    if config.chat_template_kwargs and tokenizer.chat_template is None:
        raise InputError("chat_template_kwargs is given, but the tokenizer has no chat template; leave it out")
    short = [p for p in prompts if limit is None or len(p.ids) <= limit]
    if not short:
        shortest = min(len(p.ids) for p in prompts)
        raise InputError(
            f"every prompt of {name} is longer than max_prompt_length={limit}; the shortest has {shortest} tokens"
        )
    return short, len(prompts) - len(short)


def _prompt(row: Any, tokenizer, config: DataFields, where: str) -> Prompt:
    text = row["prompt"]
    columns = {key: value for key, value in row.items() if key != "prompt"}
    if isinstance(text, str):
        return Prompt(text, _not_empty(tokenizer(text)["input_ids"], where), columns)
    if not _is_chat(text):
        raise InputError(
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
        raise InputError(f"the chat template cannot render {where}: {cause(error)}") from error
    # The template writes its own special tokens.
    return Prompt(messages, _not_empty(tokenizer(rendered, add_special_tokens=False)["input_ids"], where), columns)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )  # fmt: skip


def _not_empty(ids: list[int], where: str) -> list[int]:
    if not ids:
        raise InputError(f"{where} has a prompt without a single token; leave it out, or check the tokenizer")
    return ids


def transcript(messages: list[dict]) -> str:
    """A chat as `Role: text` paragraphs, for a base model without a chat template."""
    return "\n\n".join([f"{m['role'].capitalize()}: {m['content']}" for m in messages] + ["Assistant:"])

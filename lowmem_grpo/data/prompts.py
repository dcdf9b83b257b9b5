"""Rows of a dataset to tokenized Prompts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset

from lowmem_grpo.config.sections import DataFields, ReadFields, RowFields
from lowmem_grpo.data.chats import (
    SETTINGS,
    Template,
    is_text,
    read_chat,
    refuse_chat_as_text,
    said_at_end,
    with_system,
    without_nulls,
)
from lowmem_grpo.data.text import text_ids
from lowmem_grpo.errors import InputError


@dataclass(frozen=True)
class Scene:
    """The start of a row's completions in their environments, which are all reset with the same row."""

    row: Mapping[str, Any]  # as the dataset has it
    observation: str | None  # what reset returns, which the last user message ends with
    tools: Sequence[dict]  # descriptions of what may be called


@dataclass(frozen=True)
class Prompt:
    """One row of a dataset, tokenized."""

    text: str | list[dict]  # as the dataset has it: a string, or a list of chat messages; without what is said
    ids: list[int]
    columns: dict  # the row's other columns, which the reward functions get
    said: str = ""  # the end of the prompt that an answer begins with, `<think>` say: rewards read it with a completion
    teacher_ids: list[int] | None = None  # what the teacher reads in place of ids, where that is something else
    scene: Scene | None = None  # where completions have environments

    @property
    def for_teacher(self) -> "Prompt":
        """The prompt as the teacher reads it."""
        return self if self.teacher_ids is None else replace(self, ids=self.teacher_ids)


def tokenize_prompts(
    rows: Dataset, tokenizer, config: DataFields, *, name: str = "train_dataset", teachers: str | None = None,
    tools: Sequence[dict] = (), scenes: Sequence[Scene] | None = None,
) -> tuple[list[Prompt], int]:  # fmt: skip
    """The rows' prompts, and how many were dropped for having more than max_prompt_length tokens.

    A string is tokenized as it is; a chat goes through the chat template with the row's `tools` and
    `chat_template_kwargs`, or, where the tokenizer has none, becomes a transcript that ends in `Assistant:`. A chat
    that ends with the assistant's words is one that the completion continues. `teachers` is a system message that a
    teacher reads in place of the policy's, and `tools` what a run describes its tools by. `scenes` are the rows' own,
    where there are environments: with descriptions in place of `tools`, and a text at the end of the question.

    Raises:
        InputError: a prompt is neither, or none is left.
    """
    limit = config.max_prompt_length
    if config.chat_template_kwargs and tokenizer.chat_template is None:
        raise InputError("chat_template_kwargs is given, but the tokenizer has no chat template; leave it out")
    if teachers is not None and any(map(is_text, rows["prompt"])):
        raise InputError(
            f"teacher_system_prompt is for chats, and {name} has prompts that are texts; make each a list such as "
            '[{"role": "user", "content": ...}], or leave it out'
        )
    if (config.system_prompt or config.chat_template_kwargs) and all(map(is_text, rows["prompt"])):
        raise InputError(
            f"system_prompt and chat_template_kwargs are for chats, and every prompt of {name} is a text; "
            'make the prompts lists such as [{"role": "user", "content": ...}], or leave the two out'
        )
    template = Template(tokenizer)
    template.refuse_unread(config.chat_template_kwargs or {}, "chat_template_kwargs")
    prompts = []
    for index, row in enumerate(rows):
        scene = Scene({}, None, tools) if scenes is None else scenes[index]
        prompt = _prompt(row, template, config, f"row {index} of {name}", scene)
        if scenes is not None:
            prompt = replace(prompt, scene=scene)
        if teachers is not None:
            theirs = _prompt(row, template, config, f"row {index} of {name}, for the teacher,", scene, teachers)
            prompt = replace(prompt, teacher_ids=theirs.ids)
        prompts.append(prompt)
    short = [p for p in prompts if limit is None or len(p.ids) <= limit]
    if not short:
        shortest = min(len(p.ids) for p in prompts)
        raise InputError(
            f"every prompt of {name} is longer than max_prompt_length={limit}; the shortest has {shortest} "
            "tokens; raise it"
        )
    return short, len(prompts) - len(short)


def chat_prompts(rows: Dataset, config: ReadFields) -> list[Prompt]:
    """The rows' prompts for a server that tokenizes them itself: chats, without ids. A text is what a user says.

    Raises:
        InputError: a prompt is neither, is to be continued, or has what goes through a chat template.
    """
    prompts = []
    for index, given_row in enumerate(rows):
        row: Any = given_row
        where, given = f"row {index} of train_dataset", row["prompt"]
        if is_text(given):
            refuse_chat_as_text(str(given), where)
            given = [{"role": "user", "content": str(given)}]
        messages = read_chat(given, where)
        if messages[-1]["role"] == "assistant":
            raise InputError(f"{where} ends with words of the assistant, which no endpoint continues; remove them")
        if not any(str(message.get("content") or "").strip() for message in messages):
            raise InputError(f"{where} has a prompt of white space alone; leave it out")
        for setting in _own_settings(row, where):
            raise InputError(f"{where} has {setting}, which an endpoint is not given; remove the column")
        messages = with_system(messages, row, config.system_prompt)
        columns = {key: value for key, value in row.items() if key != "prompt"}
        prompts.append(Prompt(messages, [], columns))
    return prompts


def _prompt(
    row: Any, template: Template, config: DataFields, where: str, scene: Scene, system: str | None = None
) -> Prompt:
    """A row's prompt; with `system` that is its system message, whatever the row or the configuration has."""
    given = row["prompt"]
    columns = {key: value for key, value in row.items() if key != "prompt"}
    if is_text(given):
        text = str(given)
        refuse_chat_as_text(text, where)
        refuse_settings_of_text(row, where)
        if scene.tools:
            raise InputError(f"{where} is a text, and tools are shown by a chat template; make it a list of messages")
        ids = _not_empty(text_ids(template.tokenizer, text), [text], where)
        said = said_at_end(text)
        return Prompt(text.removesuffix(said), ids, columns, said)
    messages = read_chat(given, where)
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages[messages[0]["role"] == "system" :]]
    else:
        messages = with_system(messages, row, config.system_prompt)
    messages, tools = _observed(messages, scene.observation, where), scene.tools
    settings = template_settings(row, template, config, where)
    if tools and "tools" in settings:
        raise InputError(f"{where} has tools of its own, which nothing calls beside the run's; remove the column")
    rendered, said = template.render(messages, {**settings, **({"tools": tools} if tools else {})}, where)
    ids = template.ids(rendered)
    asked = messages[:-1] if said and messages[-1]["role"] == "assistant" else messages
    words = [str(value) for message in messages for key, value in message.items() if key != "role"]
    return Prompt(asked, _not_empty(ids, words, where), columns, said)


def _observed(messages: list[dict], observation: str | None, where: str) -> list[dict]:
    """Messages whose last one of the user's ends with what an environment said."""
    if observation is None:
        return messages
    place = max((at for at, message in enumerate(messages) if message["role"] == "user"), default=None)
    if place is None:
        raise InputError(f"{where} has no message of the user's, for what its environment says; write one")
    asked = {**messages[place], "content": messages[place]["content"] + observation}
    return [*messages[:place], asked, *messages[place + 1 :]]


def template_settings(row: Any, template: Template, config: RowFields, where: str) -> dict[str, Any]:
    """The arguments of a row's chat template: the configuration's, and over them the row's own."""
    own = _own_settings(row, where)
    if template.tokenizer.chat_template is not None:
        template.refuse_unread(own.get("chat_template_kwargs", {}), f"the chat_template_kwargs of {where}")
    return {**(config.chat_template_kwargs or {}), **own.pop("chat_template_kwargs", {}), **own}


def refuse_settings_of_text(row: Any, where: str) -> None:
    """Raise InputError for tools and settings of a chat template beside a text, which goes through none."""
    for name in _own_settings(row, where):
        raise InputError(
            f"{where} has {name}, and its prompt is a text, which no chat template shows; make it a list of messages, "
            "or remove the column"
        )


def _own_settings(row: Any, where: str) -> dict[str, Any]:
    """The row's `tools` and `chat_template_kwargs`, of which those that are empty are left out."""
    own = {name: without_nulls(_from_json(row.get(name), where)) for name in SETTINGS}
    own = {name: value for name, value in own.items() if value not in (None, [], {})}
    for name, value in own.items():
        kind, words = SETTINGS[name]
        if not isinstance(value, kind):
            raise InputError(f"{where} has the {name} {str(value)[:60]!r}; make it {words}, or remove the column")
    return own


def _from_json(value: Any, where: str) -> Any:
    """A value that a file may have as JSON, since Arrow holds no mappings of many forms."""
    try:
        return json.loads(value.strip() or "null") if isinstance(value, str) else value
    except ValueError as error:
        raise InputError(f"{where} has tools or chat_template_kwargs that are no JSON: {error}") from error


def _not_empty(ids: list[int], words: list[str], where: str) -> list[int]:
    """The ids of a prompt of these words. Raise InputError where there are no ids, or white space alone."""
    if not ids:
        raise InputError(f"{where} has a prompt without a single token; leave it out, or check the tokenizer")
    if not any(map(str.strip, words)):
        raise InputError(f"{where} has a prompt of white space alone; leave it out")
    return ids

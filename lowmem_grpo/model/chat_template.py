"""Chat templates of models that see: found where a processor has them, and made to read contents that are texts."""

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

MARKER = "\ue000"  # stands for words where a template is tried
FILE = "chat_template.json"  # where processors had theirs; a tokenizer of the same folder does not look there
IN_PARTS = (
    "{%- set ns = namespace(messages=[]) -%}{%- for message in messages -%}{%- if message['content'] is string -%}"
    "{%- set parts = [{'type': 'text', 'text': message['content']}] -%}"
    "{%- set ns.messages = ns.messages + [dict(message, content=parts)] -%}"
    "{%- else -%}{%- set ns.messages = ns.messages + [message] -%}{%- endif -%}{%- endfor -%}"
    "{%- set messages = ns.messages %}"
)


def template_of_processor(name: str) -> str | None:
    """The chat template that a processor's file in a folder or on the hub holds, or None."""
    with contextlib.suppress(Exception):  # of no such file, or of no network
        found = cached_file(name, FILE)
        return None if found is None else json.loads(Path(found).read_bytes())["chat_template"]
    return None


def reading_texts(tokenizer: Any) -> Any:
    """The tokenizer, or a copy of it whose chat template shows contents that are texts.

    Some templates of models that see go through a content's parts, and of a text they show nothing: the model would be
    asked nothing. It is then given as one part.
    """
    given = getattr(tokenizer, "chat_template", None)
    if not isinstance(given, str) or _shows(tokenizer, MARKER) or not _shows(tokenizer, [_part(MARKER)]):
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = IN_PARTS + given
    return tokenizer


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _shows(tokenizer: Any, content: Any) -> bool:
    """Tell whether the template renders a chat of one message with this content, and shows MARKER."""
    try:
        return MARKER in tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    except Exception:  # of whatever the template asks for
        return False

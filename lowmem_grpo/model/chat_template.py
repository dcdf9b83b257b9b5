"""Chat templates of models that see: found where a processor has them, and made to read contents that are texts."""

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

MARKER = "\ue000"  # stands for words where a template is tried
FILE = "chat_template.json"  # where processors had theirs; a tokenizer of the same folder does not look there
ROLES = ("user", "system", "assistant")
IN_PARTS = (
    "{%- set ns = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- if message['content'] is string and message['role'] not in AS_TEXTS -%}"
    "{%- set parts = [{'type': 'text', 'text': message['content']}] -%}"
    "{%- set ns.messages = ns.messages + [dict(message, content=parts)] -%}"
    "{%- else -%}{%- set ns.messages = ns.messages + [message] -%}{%- endif -%}{%- endfor -%}"
    "{%- set messages = ns.messages %}"
)


def template_of_processor(name: str, **loading: Any) -> str | None:
    """The chat template that a processor's file in a folder or on the hub holds, or None."""
    with contextlib.suppress(Exception):  # of no such file, or of no network
        found = cached_file(name, FILE, **loading)
        return None if found is None else json.loads(Path(found).read_bytes())["chat_template"]
    return None


def reading_texts(tokenizer: Any) -> Any:
    """The tokenizer, or a copy of it whose chat template shows contents that are texts.

    Some templates of models that see go through a content's parts, and of a text they show nothing: the model would be
    asked nothing. It is then given as one part, but for roles whose text such a template shows as it is: Aya Vision's
    goes through a user's parts, and takes a system message for a text.
    """
    given = getattr(tokenizer, "chat_template", None)
    if not isinstance(given, str):
        return tokenizer
    in_parts: set[str] = set()
    for role in ROLES:
        if not _shows(tokenizer, role, in_parts) and _shows(tokenizer, role, in_parts | {role}):
            in_parts.add(role)
    if not in_parts:
        return tokenizer
    as_texts = [role for role in ROLES if role not in in_parts and _shows(tokenizer, role, in_parts)]
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = IN_PARTS.replace("AS_TEXTS", str(as_texts)) + given
    return tokenizer


def _shows(tokenizer: Any, role: str, in_parts: set[str]) -> bool:
    """Tell whether the template renders a chat with a message of this role, MARKER, and shows that.

    Contents of the roles `in_parts` are given as one part each, and others as texts.
    """
    contents = {"user": "x", role: MARKER}
    chat = [
        {"role": one, "content": [{"type": "text", "text": contents[one]}] if one in in_parts else contents[one]}
        for one in ("system", "user", "assistant")
        if one in contents
    ]
    try:
        return MARKER in tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # of whatever the template asks for
        return False

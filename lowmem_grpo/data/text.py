"""The text of prompts and completions, whether strings or chats, and its token ids."""

import contextlib
import json
from typing import Any

from lowmem_grpo.errors import InputError, shown

PARTS = ("all", "answer")  # of a completion: with its thoughts, and what follows them


def completion_text(completion: str | list[dict]) -> str:
    """A completion's text: the string, or the last message of a chat."""
    return completion if isinstance(completion, str) else _last_content(completion, "completion")


def in_json(value: Any) -> str:
    """A text as it is, anything else as JSON; what UTF-8 lacks is written as a question mark."""
    text = value
    if not isinstance(value, str):
        try:
            text = json.dumps(value, ensure_ascii=False, default=_simpler)
        except (TypeError, ValueError, RecursionError):  # of keys that are no texts, say
            text = str(value)
    return text.encode("utf-8", "replace").decode()


def _simpler(value: Any) -> Any:
    """The lists and numbers of an array, and of anything else the text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def as_logged(messages: Any) -> Any:
    """Messages with tools' results and calls' arguments in JSON, since a table has one type for those of all tools."""
    if not isinstance(messages, list):
        return messages

    def logged(call: Any) -> Any:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or isinstance(function.get("arguments"), str):
            return call
        with contextlib.suppress(TypeError, ValueError, RecursionError):  # of a data set's own, which may be anything
            return {**call, "function": {**function, "arguments": json.dumps(function.get("arguments"), default=str)}}
        return call

    written = []
    for one in messages:
        if isinstance(one, dict) and isinstance(one.get("tool_calls"), list):
            one = {**one, "tool_calls": [logged(call) for call in one["tool_calls"]]}
        if isinstance(one, dict) and one.get("role") == "tool" and isinstance(one.get("content"), list):
            one = {**one, "content": in_json(one["content"])}
        written.append(one)
    return written


def as_read(completion: str | list[dict]) -> str:
    """A completion for a reader: of a conversation all that is said, with calls of tools and results in brackets."""
    if isinstance(completion, str) or len(completion) == 1:
        return completion_text(completion)
    lines = []
    for message in completion:
        content = message.get("content") or ""
        lines += [f"[{message.get('name')}: {in_json(content)}]" if message["role"] == "tool" else content]
        for call in message.get("tool_calls") or []:
            name, given = call["function"]["name"], call["function"]["arguments"]
            given = json.loads(given) if isinstance(given, str) else given
            lines.append(f"[{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})]")
    return "\n".join(filter(None, lines))


def prompt_text(prompt: str | list[dict]) -> str:
    """A prompt's text: the string, or the last message of a chat, which is the question."""
    return prompt if isinstance(prompt, str) else _last_content(prompt, "prompt")


def part_of(completion: str | list[dict], part: str) -> str | list[dict]:
    """A completion, or with part="answer" what follows its last `</think>`: nothing where a thought is never closed.

    Without any thought that is all of it.
    """
    if part == "all":
        return completion
    text = completion_text(completion)
    _, closed, answer = text.rpartition("</think>")
    answer = answer.lstrip() if closed else "" if "<think>" in text else text
    return answer if isinstance(completion, str) else [*completion[:-1], {**completion[-1], "content": answer}]


def refuse_part(part: str) -> None:
    """Raise InputError for what is no part of a completion."""
    if part not in PARTS:
        raise InputError(f"part={shown(part)} is not known; choose {' or '.join(PARTS)}")


def _last_content(chat: list[dict], what: str) -> str:
    """The content of the last message, which is empty where there is none: a tool call needs no words."""
    last = chat[-1] if isinstance(chat, list) and chat else None
    content = (last.get("content") or "") if isinstance(last, dict) else None
    if not isinstance(content, str):
        raise InputError(f"a {what} is {str(chat)[:60]!r}; give a text, or a list of messages whose contents are texts")
    return content


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text to go on from: with the tokenizer's own beginning, once, and without its own end.

    A text that was rendered beforehand has its BOS already, and after an EOS nothing is said.
    """
    ids, bare = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (True, False))
    start = next((i for i in range(len(ids) - len(bare) + 1) if ids[i : i + len(bare)] == bare), 0)
    return bare if bare[:start] == ids[:start] else ids[: start + len(bare)]


def ended(tokenizer: Any, text: str) -> str:
    """A text with the end-of-sequence token behind it, once."""
    end = tokenizer.eos_token or ""
    return text if text.endswith(end) else text + end


def tagged_answer(text: str) -> str | None:
    """The content of the last `<answer>...</answer>`, in time linear in the text; None without one."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return None if end < 0 or start < 0 else text[start + len("<answer>") : end].strip()

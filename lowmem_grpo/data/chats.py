"""Chats: messages as a data set has them, and the texts that chat templates make of them."""

import re
from collections.abc import Mapping
from math import isfinite
from typing import Any

from lowmem_grpo.data.text import text_ids
from lowmem_grpo.errors import InputError, cause, did_you_mean, shown

# Columns that a chat template gets, what they hold, and that in words.
SETTINGS = {
    "tools": (list, "a list of tools"),
    "chat_template_kwargs": (dict, 'an object such as {"enable_thinking": false}'),
}

# Blocks of thoughts, in the notations of DeepSeek, Qwen, Seed, Command, Magistral, Kimi and others.
_THOUGHTS = "(?:think|thinking|thoughts?|reasoning|scratchpad)"
OPENS_THOUGHTS = re.compile(
    rf"<\|?(?:\w+:)?(?:begin_of_|start_)?{_THOUGHTS}\|?>|\[THINK\]|◁think▷", re.IGNORECASE
)  # fmt: skip
CLOSES_THOUGHTS = re.compile(
    rf"</(?:\w+:)?{_THOUGHTS}>|<\|end_(?:of_)?{_THOUGHTS}\|>|\[/THINK\]|◁/think▷", re.IGNORECASE
)  # fmt: skip
OPEN_AT_END = re.compile(
    rf"(?:{OPENS_THOUGHTS.pattern})\s*(?:(?:{CLOSES_THOUGHTS.pattern})\s*)?\Z", re.IGNORECASE
)  # fmt: skip
SYSTEMS = ("system", "system_prompt")  # columns that have the system message beside a chat
FORM = "role and content texts"
# Roles of messages. A template may name others, such as `ipython` or `observation`.
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# Arguments of apply_chat_template that are set here, or would return something else than a text.
OURS = {
    "conversation", "messages", "tokenize", "add_generation_prompt", "continue_final_message", "padding", "truncation",
    "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
}  # fmt: skip
TEXT_PARTS = ("text", "input_text", "output_text")
OPENING = "\n\nAssistant:"  # of an answer to a transcript
MARKER = "\ue000"  # stands for an assistant's words where a template is tried
# A list of messages, or a lone one, as JSON or as Python prints it; and ShareGPT's lists.
CHAT_AS_TEXT = re.compile(
    r"""\s*"?\s*(?:
        \[?\s*\{(?=.*["']role\\?["']\s*:)(?=.*["']content\\?["']\s*:)
        | \[\s*\{(?=.*["']from\\?["']\s*:)(?=.*["']value\\?["']\s*:)
    ).*\}\s*\]?\s*"?\s*""",
    re.DOTALL | re.VERBOSE,
)
# Within a name: `image_urls`, `imageUrl`, `imgs`, `pixel_values`, `multi_modal_data`; not `imaginary` or `picturesque`.
MEDIA = re.compile(
    r"(?<![a-z])(?:image|img|picture|pixel|video|audio|multi_?modal)(?:s|url|path|file|data)*(?![a-z])"
)  # fmt: skip
CAPITAL_INSIDE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def is_text(value: Any) -> bool:
    """Tell whether a value is a text, or a number that is written as one; NaN is what is missing."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    return isinstance(value, str) or is_number


def refuse_missing(value: Any, column: str, where: str) -> None:
    """Raise InputError for a null, and for NaN, which is one to pandas."""
    if value is None or value != value:
        raise InputError(f"{where} has no {column}; fill it, or leave the row out")


def read_text(value: Any, column: str, where: str) -> str:
    """A column's text, or the number that is written as one.

    Raises:
        InputError: it is missing, something else, or a chat written as a text.
    """
    refuse_missing(value, column, where)
    if not is_text(value):
        raise InputError(f"{where} has the {column} {shown(value)}; it has to be a text")
    refuse_chat_as_text(str(value), where)
    return str(value)


def refuse_chat_as_text(text: str, where: str) -> None:
    """Raise InputError for a chat that a file has as JSON, or as what Python prints."""
    if CHAT_AS_TEXT.fullmatch(text):
        raise InputError(
            f"{where} is a chat written as a text, {text[:40]!r}; make it a list of messages, which JSONL and Parquet "
            "hold and CSV does not (json.loads reads it)"
        )


def with_system(messages: list[dict], row: Mapping[str, Any], system_prompt: str | None) -> list[dict]:
    """Messages with a system message before them, the row's own or else the given one, unless they begin with one."""
    own = (row.get(name) for name in SYSTEMS)
    system = next((text for text in own if isinstance(text, str) and text.strip()), system_prompt)
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def read_chat(value: Any, where: str, column: str = "prompt") -> list[dict]:
    """The messages of a chat, whole, but without the nulls that Arrow adds, and with contents that are texts.

    A content in parts is their text. `column` is where the rows have it, for errors.

    Raises:
        InputError: no chat, or one with media.
    """
    refuse_missing(value, column, where)
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in value)
    ):
        form = f"a prompt is a text, or a list of {FORM}" if column == "prompt" else f"a chat is a list of {FORM}"
        raise InputError(f"{where} has the {column} {str(value)[:60]!r}; {form}")
    return [_read_message(without_nulls(message), where, column) for message in value]


def _read_message(message: dict, where: str, column: str) -> dict:
    content = message.get("content")
    _refuse_media(message, f"{where} has a message")
    if isinstance(content, list):
        return {**message, "content": "".join(_text_of(part, where) for part in content)}
    if not isinstance(content, str) and not (content is None and message["role"] == "assistant" and len(message) > 1):
        raise InputError(f"{where} has the {column} {str(message)[:60]!r} in a chat; a chat is a list of {FORM}")
    return message  # a tool call of the assistant's may have no content


def is_media(name: str) -> bool:
    """Tell whether a column or a message's entry of this name holds images, videos or audio."""
    return MEDIA.search(CAPITAL_INSIDE.sub("_", name).lower()) is not None


def _refuse_media(entries: dict, what: str) -> None:
    for name, value in entries.items():
        if is_media(name) and value:
            raise InputError(f"{what} with {name}, and only text is trained on; leave such rows out")


def _text_of(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") in TEXT_PARTS and isinstance(part.get("text"), str):
        _refuse_media(part, f"{where} has a content part")
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise InputError(f"{where} has a content part of type {kind!r}, and only text is trained on; leave such rows out")


def without_nulls(value: Any) -> Any:
    """A value without the null entries of its mappings: Arrow gives every mapping of a column the names of all."""
    if isinstance(value, Mapping):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


class Template:
    """A tokenizer's chat template, or a transcript where it has none."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        given = tokenizer.chat_template or ""
        self.source = given if isinstance(given, str) else "\n".join(given.values())  # of templates by name
        self.openings: dict[str, str] = {}  # ends of prompts, as `<|im_start|>assistant<think>`, to what is said there

    def ids(self, rendered: str) -> list[int]:
        """Ids of a rendered chat, in which a template has written its own special tokens."""
        if self.tokenizer.chat_template is None:
            return text_ids(self.tokenizer, rendered)
        return self.tokenizer(rendered, add_special_tokens=False)["input_ids"]

    def render(self, messages: list[dict], settings: dict[str, Any], where: str) -> tuple[str, str]:
        """A chat as the text that a completion continues, and what the assistant has said at its end.

        That is the last message, where it is the assistant's: it is not closed. Or it is what the template has each
        answer begin with, such as `<think>`. `settings` are the template's: tools, and keyword arguments.

        Raises:
            InputError: the template cannot render the chat, or there is none and the chat needs one.
        """
        self._refuse_unknown_roles(messages, where)
        last = messages[-1]
        if last["role"] == "assistant" and last.get("tool_calls"):
            raise InputError(f"{where} ends with a tool call, which only the tool can answer; leave such rows out")
        words = last.get("content", "") if last["role"] == "assistant" else ""
        if last["role"] == "assistant" and not words.strip() and len(messages) > 1:
            messages, words = messages[:-1], ""
        if self.tokenizer.chat_template is None:
            _refuse_more_than_texts(messages, settings, where)
            return transcript(messages), words
        try:
            rendered = self._continued(messages, words, settings) if words else self._opened(messages, settings)
        except Exception as error:
            raise InputError(f"the chat template cannot render {where}: {cause(error)}") from error
        self._refuse_unseen_tools(messages, settings, where)
        return rendered

    def _refuse_unseen_tools(self, messages: list[dict], settings: dict[str, Any], where: str) -> None:
        """Raise InputError for tools, or calls of tools, that the template leaves out of a chat."""
        if settings.get("tools") and self._shows_alike(messages, settings, messages, {**settings, "tools": None}):
            raise InputError(f"{where} has tools, which the chat template leaves out; remove them, or change it")
        less = [{key: value for key, value in m.items() if key != "tool_calls"} for m in messages]
        if less != messages and self._shows_alike(messages, settings, less, settings):
            raise InputError(f"{where} has tool_calls, which the chat template leaves out; remove them, or change it")

    def _refuse_unknown_roles(self, messages: list[dict], where: str) -> None:
        """Raise InputError for a role that the template does not name, and shows as it shows any word."""
        for role in [message["role"] for message in messages]:
            if role not in ROLES and f"'{role}'" not in self.source and f'"{role}"' not in self.source:
                raise InputError(
                    f"{where} has a message of the role {role!r:.60}, which is none of {', '.join(ROLES)}, and none "
                    "that the chat template names; rename it"
                )

    def refuse_unread(self, settings: Mapping[str, Any], what: str) -> None:
        """Raise InputError for chat_template_kwargs that the template does not read, or that are set here."""
        source = f"{self.source}\n{settings.get('chat_template')}"  # which may be another template
        for name in settings:
            if name in OURS:
                raise InputError(f"{what} has {name!r}, which is set here; leave it out")
            if name != "chat_template" and not (name and re.search(rf"\b{re.escape(str(name))}\b", source)):
                names = set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", source))
                hint = did_you_mean(str(name), names, "leave it out")
                raise InputError(f"{what} has {name!r:.60}, which the chat template does not read; {hint}")

    def whole(self, messages: list[dict], settings: dict[str, Any], where: str) -> str:
        """A chat as a text whose last turn is closed.

        Raises:
            InputError: as render() does.
        """
        self._refuse_unknown_roles(messages, where)
        if self.tokenizer.chat_template is None:
            _refuse_more_than_texts(messages, settings, where)
            return transcript(messages)
        try:
            rendered = self._apply(messages, settings, add_generation_prompt=False)
        except Exception as error:
            raise InputError(f"the chat template cannot render {where}: {cause(error)}") from error
        self._refuse_unseen_tools(messages, settings, where)
        return rendered

    def _shows_alike(self, messages: list[dict], settings: dict, others: list[dict], other_settings: dict) -> bool:
        try:
            return self._apply(messages, settings) == self._apply(others, other_settings)
        except Exception:  # of a message without a content, say
            return False

    def _continued(self, messages: list[dict], words: str, settings: dict[str, Any]) -> tuple[str, str]:
        """A chat whose last message, the assistant's words, is not closed.

        Templates that know thoughts move or delete them, so words with thoughts follow a generation prompt, as those do
        that a model generates. transformers' continue_final_message raises for such words or has two blocks of
        thoughts, and drops the white space that a template trims (https://github.com/huggingface/transformers/pull/
        33198).
        """
        opens, closes = OPENS_THOUGHTS.search(words), CLOSES_THOUGHTS.search(words)
        if not opens and not closes:
            marked = [*messages[:-1], {**messages[-1], "content": MARKER + words}]
            before, found, _ = self._apply(marked, settings, add_generation_prompt=False).rpartition(MARKER)
            if not found:
                raise InputError("it leaves out the last message, which the completion should continue")
            return before + words, said_at_end(before) + words
        text, said = self._opened(messages[:-1], settings)
        if opens and (not closes or opens.start() < closes.start()):
            return text.removesuffix(said) + words, words
        return text + words, said + words

    def _opened(self, messages: list[dict], settings: dict[str, Any]) -> tuple[str, str]:
        """A chat with a generation prompt, and the part of that which the assistant says."""
        text = self._apply(messages, settings, add_generation_prompt=True)
        for opening, said in self.openings.items():
            if text.endswith(opening):
                return text, said
        opening = self._added(text, messages, settings)
        if not any(map(str.isalnum, opening)):
            return text, said_at_end(text)
        tag = OPENS_THOUGHTS.search(opening)
        ends = [len(self._header(opening, settings)) or len(opening), tag.start() if tag else len(opening)]
        self.openings[opening] = opening[min(ends) :]
        return text, self.openings[opening]

    def _added(self, text: str, messages: list[dict], settings: dict[str, Any]) -> str:
        """The generation prompt at the end of a text, or nothing where it cannot be told apart."""
        try:
            bare = self._apply(messages, settings, add_generation_prompt=False)
        except Exception:  # a template may refuse a chat that ends so
            return ""
        return text[len(bare) :] if text.startswith(bare) else ""

    def _header(self, opening: str, settings: dict[str, Any]) -> str:
        """The beginning of a generation prompt that earlier turns of the assistant have, too."""
        ask = {"role": "user", "content": "x"}
        try:
            chat = self._apply(
                [ask, {"role": "assistant", "content": MARKER}, ask], settings, add_generation_prompt=False
            )
        except Exception:
            return ""
        before = chat.partition(MARKER)[0]
        ends = [end for end in range(1, len(opening) + 1) if before.endswith(opening[:end])]
        return opening[: ends[-1]] if ends and any(map(str.isalnum, opening[: ends[-1]])) else ""

    def _apply(self, messages: list[dict], settings: dict[str, Any], **ours: bool) -> str:
        return self.tokenizer.apply_chat_template(messages, **{**settings, "tokenize": False, **ours})


def said_at_end(text: str) -> str:
    """The block of thoughts that is opened at the end of a text which was rendered beforehand, or nothing."""
    found = OPEN_AT_END.search(text, max(0, len(text) - 200))
    return found[0] if found else ""


def closing_of(said: str) -> str:
    """The tag that closes a block of thoughts which a text leaves open, `</think>` say, or nothing."""
    opens, closes = list(OPENS_THOUGHTS.finditer(said)), list(CLOSES_THOUGHTS.finditer(said))
    if not opens or (closes and closes[-1].start() > opens[-1].start()):
        return ""
    tag = opens[-1][0]
    if tag.startswith("<|"):
        return re.sub("begin|start", lambda word: "END" if word[0].isupper() else "end", tag, flags=re.IGNORECASE)
    return f"{tag[0]}/{tag[1:]}"


def transcript(messages: list[dict]) -> str:
    """A chat as `Role: text` paragraphs, for a base model without a chat template; the assistant goes on at its end."""
    turns = [f"{m['role'].capitalize()}: {m['content']}" for m in messages]
    return "\n\n".join(turns) + ("" if messages[-1]["role"] == "assistant" else OPENING)


def _refuse_more_than_texts(messages: list[dict], settings: dict[str, Any], where: str) -> None:
    more = [key for key in settings if settings[key]] + [key for m in messages for key in m]
    more = [key for key in more if key not in ("role", "content")]
    if more:
        raise InputError(
            f"{where} has {more[0]}, and the tokenizer has no chat template to show it by; leave it out, or set "
            "tokenizer.chat_template"
        )

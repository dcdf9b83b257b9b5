"""The token that a chat template ends a turn with, which a base model may have besides its end-of-sequence token."""

from collections.abc import Collection
from typing import Any, NamedTuple

ASK = {"role": "user", "content": "x"}
MARKER = "\ue000"  # stands for the assistant's words


class TurnEnd(NamedTuple):
    text: str  # as `<|im_end|>`
    token_id: int | None  # None where the tokenizer makes several tokens of it


def named_ends(*settings: Any) -> set[Any]:
    """Ids that configurations, generation configs or tokenizers name as the end of a sequence; some name none."""
    given = (getattr(one, "eos_token_id", None) for one in settings)
    return {i for one in given if one is not None for i in (one if isinstance(one, list | tuple) else [one])}


def turn_end(tokenizer: Any, eos_token_ids: Collection[int]) -> TurnEnd | None:
    """How the chat template ends a turn, where that is none of these tokens; None where nothing more is needed.

    Qwen's base models end a text with `<|endoftext|>` and a turn with `<|im_end|>`: sampling that does not stop there
    goes on into turns that the model makes up (https://github.com/QwenLM/Qwen3/issues/927).
    """
    after = _after_words(tokenizer, [])
    if after is None:
        return None
    is_marked = bool(after.strip())
    if not is_marked:  # as in GLM's, where the next turn's beginning ends it
        after = _after_words(tokenizer, [ASK]) or ""
    text = after.strip()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids or set(ids) & set(eos_token_ids):
        return None
    is_one_token = ids[0] in tokenizer.added_tokens_decoder or (is_marked and len(ids) == 1)
    if is_one_token and ids[0] != tokenizer.unk_token_id:
        return TurnEnd(tokenizer.decode(ids[:1]), ids[0])
    return TurnEnd(text, None) if is_marked else None


def with_turn_end(tokenizer: Any, eos_token_ids: set[int]) -> set[int]:
    """Ids that end a sequence, with that of the token by which the chat template ends a turn."""
    of_turn = turn_end(tokenizer, eos_token_ids)
    return eos_token_ids if of_turn is None or of_turn.token_id is None else {*eos_token_ids, of_turn.token_id}


def unseen_turn_end(tokenizer: Any, eos_token_ids: Collection[int], stop_strings: Collection[str]) -> str | None:
    """A sentence where sampling would not stop at the end of a turn; None where it does."""
    of_turn = turn_end(tokenizer, eos_token_ids)
    if of_turn is None or of_turn.token_id is not None or of_turn.text in stop_strings:
        return None
    return (
        f"the chat template ends a turn with {of_turn.text!r}, which is no single token of the tokenizer, so that "
        "sampling goes on into turns that the model makes up; add it to stop_strings"
    )


def _after_words(tokenizer: Any, more: list[dict]) -> str | None:
    """The text that the template writes after a turn of the assistant; None where it cannot be told."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    try:
        chat = [ASK, {"role": "assistant", "content": MARKER}, *more]
        return tokenizer.apply_chat_template(chat, tokenize=False).partition(MARKER)[2]
    except Exception:  # of whatever the template asks for
        return None


def after_the_end(tokenizer: Any, token_id: int) -> list[int]:
    """The ids that the chat template writes after the end of a turn, a line's end say."""
    after = _after_words(tokenizer, [])
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    return ids[ids.index(token_id) + 1 :] if token_id in ids else []

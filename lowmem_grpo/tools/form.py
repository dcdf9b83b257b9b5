"""The form in which a chat template writes calls of tools and their results, learnt from a few.

The template writes a call whose name and arguments are known, and it is seen which form that has,

    object   <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>     as Qwen 2.5 and 3, Llama 3.1
    named    [TOOL_CALLS]add[ARGS]{"a": 1}                                     as DeepSeek V3, gpt-oss
    keyed    <function=add><parameter=a>1</parameter></function>               as Qwen 3.5, GLM 4.5, Nemotron 3
    bare     <|tool_call>call:add{a:1,b:<|"|>one<|"|>}<tool_call|>             as Gemma 4
    python   <|tool_call_start|>[add(a=1)]<|tool_call_end|>                    as LFM 2

and which marks stand around it. What was learnt is tried on other calls before it is used. So there is no list of
models here, and a template of one's own serves as well.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lowmem_grpo.data.chats import CLOSES_THOUGHTS, MARKER, OPENS_THOUGHTS, said_at_end
from lowmem_grpo.data.text import in_json
from lowmem_grpo.errors import InputError, cause
from lowmem_grpo.tools.call_forms import (
    FIRST,
    NUMBER,
    SECOND,
    WORDS,
    Call,
    Learnt,
    Objects,
    Python,
    Read,
    common_end,
    common_start,
    learn,
    loosely,
    typed,
)

ASK = {"role": "user", "content": "a made-up question"}
NAME, OTHER = "made_up_tool_1", "made_up_tool_2"
TYPES = {name: {FIRST: {"type": "string"}, SECOND: {"type": "object"}} for name in (NAME, OTHER)}
# Of thoughts, Gemma 4's too.
OPENS = re.compile(rf"{OPENS_THOUGHTS.pattern}|<\|channel>thought", re.IGNORECASE)
CLOSES = re.compile(rf"{CLOSES_THOUGHTS.pattern}|<channel\|>", re.IGNORECASE)
TRIED = (
    Call(NAME, {FIRST: 'a "b" {c}\n  d', SECOND: {"x": [1, "y"], "z": True}}),
    Call(OTHER, {FIRST: WORDS}),
    Call(NAME, {}),
)
DEEPEST = 32  # values within one another in an argument
PATIENCE = 100  # marks of a text that open no call, after which no more are looked at
REMEDY = "give a tokenizer whose template does, or leave tools out"


class Found(NamedTuple):
    """The calls in a text, and the words around them."""

    calls: list[Call]
    words: str


STANDS_IN = 0xF0000  # where characters begin that nobody uses, for special tokens in what a tool returned


class Place(NamedTuple):
    """A call in a text, or a list of calls, and where it begins and ends."""

    start: int
    stop: int
    calls: list[Call]


class ToolForm:
    """How a tokenizer's chat template writes calls and results: reads the calls of a text, and writes what follows.

    Attributes:
        several: whether a turn may have several calls.
        header: the text of a chat with one question up to where the assistant speaks.
        end_of_turn: the text behind what it says.
        form, opening, closing, closing_mark: how a call is written, and the marks around it, as patterns.
        is_marked: whether it has an opening mark. Else it is all that is said.
        frame: the marks around all calls of a turn.
    """

    def __init__(self, tokenizer: Any, settings: Mapping[str, Any]):
        """Learn it from the template, which is given these settings, tools among them.

        Raises:
            InputError: the template shows no calls or no results, or calls in none of the forms.
        """
        self.tokenizer, self.settings = tokenizer, dict(settings)
        known = [one["function"] for one in settings.get("tools") or ()]
        self.types = {one["name"]: one.get("parameters", {}).get("properties", {}) for one in known} | TYPES
        if tokenizer.chat_template is None:
            raise InputError(f"tools are shown by a chat template, and the tokenizer has none; {REMEDY}")
        reasons = []
        for self.as_text in (False, True):  # a few templates want arguments in JSON
            try:
                self._learn()
                self._try_out()
                return
            except Exception as error:  # of a template, which may raise anything
                reasons.append(cause(error))
        raise InputError(f"the chat template shows no calls of tools and their results: {reasons[0]}; {REMEDY}")

    def calls(self, text: str) -> Found:
        """The calls in what a model said, but for what it thought.

        Where nothing marks a call, it is all that is said, and of a tool that is there.
        """
        places = _outside_of_thoughts(text, self._found(text, self._end_of_thoughts(text)))
        places = places if self.several else places[:1]
        calls = [call for place in places for call in place.calls][: None if self.several else 1]
        if not all(self.is_marked or call.name in self.types for call in calls) or not _is_shallow(calls):
            calls = []
        if not calls:
            return Found([], text)
        edges = [0, *(edge for place in places for edge in place[:2]), len(text)]
        words = [text[start:stop].strip() for start, stop in zip(edges[::2], edges[1::2], strict=True)]
        words[0], words[-1] = (
            words[0].removesuffix(self.frame[0]).rstrip(),
            words[-1].removeprefix(self.frame[1]).lstrip(),
        )
        return Found(calls, "\n".join(filter(None, words)))

    def results(self, calls: Sequence[Call], contents: Sequence[Any], ended_by: str = "") -> tuple[str, str]:
        """The text between a turn with calls and the next one, and what the next is made to begin with.

        A content that is no text is shown as JSON, since templates leave lists out, or take them for parts of a text.
        ended_by is the text of the token that ended the turn; without it, what ends a turn is in the text, too.
        """
        asked = self._message([Call(call.name, {}, call.id) for call in calls])  # the arguments leave no trace
        answers = [
            {"role": "tool", "name": call.name, "content": in_json(content), "tool_call_id": shown["id"]}
            for call, content, shown in zip(calls, contents, asked["tool_calls"], strict=True)
        ]
        turn, after = self._turn(asked), self._shown([ASK, asked, *answers], add_generation_prompt=True)
        places = self._found(turn.removesuffix(self.end_of_turn))
        said = turn[places[0].start : places[-1].stop] if places else ""
        _, shown, following = after[len(self.header) :].partition(said) if said else ("", "", "")
        if not shown:
            raise InputError(f"the chat template shows a call in another way once its result is there; {REMEDY}")
        closing = turn[places[-1].stop :]
        if ended_by in closing:
            ended = closing[: closing.find(ended_by) + len(ended_by)]
        else:  # by another token than the template's, or by one that it has at the beginning of what follows
            ended = closing if closing and closing == self.end_of_turn else ended_by
        return following.removeprefix(ended), said_at_end(after)

    def result_ids(self, calls: Sequence[Call], contents: Sequence[Any], ended_by: str = "") -> tuple[list[int], str]:
        """The token ids of results(). A special token that a tool's result names is text like any other there."""
        texts = [in_json(content) for content in contents]
        special = {str(one) for one in self.tokenizer.added_tokens_decoder.values() if one.special}
        named = sorted((one for one in special if any(one in text for text in texts)), key=len, reverse=True)
        marks = {chr(STANDS_IN + place): one for place, one in enumerate(named)}
        for mark, one in marks.items():
            texts = [text.replace(one, mark) for text in texts]
        text, said = self.results(calls, texts, ended_by)
        ids: list[int] = []
        for piece in re.split(f"([{''.join(marks)}])", text) if marks else [text]:
            shown = self.tokenizer(
                marks.get(piece, piece), add_special_tokens=False, split_special_tokens=piece in marks
            )
            ids += shown["input_ids"]
        return ids, said

    def _end_of_thoughts(self, text: str) -> int:
        """The place where what a model thought ends, which a prompt may have begun: 0 where it did not think."""
        opened, closed = OPENS.match(text, len(text) - len(text.lstrip())), CLOSES.search(text)
        if opened is not None:
            return closed.end() if closed else len(text)
        call = self.opening.search(text) if self.is_marked else None
        return closed.end() if closed and (call is None or closed.start() < call.start()) else 0

    def _message(self, calls: Sequence[Call]) -> dict[str, Any]:
        shown = []
        for number, call in enumerate(calls):
            function = {"name": call.name, "arguments": json.dumps(call.arguments) if self.as_text else call.arguments}
            # Some templates want an id, of nine letters and digits.
            shown.append({"type": "function", "id": call.id or f"call{number:05}", "function": function})
        return {"role": "assistant", "content": "", "tool_calls": shown}

    def _shown(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        given = {**self.settings, "tokenize": False, "add_generation_prompt": add_generation_prompt}
        return self.tokenizer.apply_chat_template(messages, **given)

    def _turn(self, message: dict) -> str:
        """The turn that is such a message, from where the assistant begins to speak."""
        return self._shown([ASK, message])[len(self.header) :]

    def _found(self, text: str, at: int = 0) -> list[Place]:
        """The calls in a text from a place on. One with very many marks and no call is read no further."""
        places, patience = [], PATIENCE
        while at <= len(text) and patience and (opened := self.opening.search(text, at)) is not None:
            at = max(opened.end(), at + 1)
            read = self.form.read(text, opened.end())
            stop = None if read is None else self._closed(text, read)
            if read is None or stop is None:
                patience -= 1
                continue
            at = max(at, stop)
            of = [typed(call, self.types.get(call.name, {}), quoted=self.form.quoted) for call in read.calls]
            places.append(Place(opened.start(), stop, of))
        return places

    def _closed(self, text: str, read: Read) -> int | None:
        """The end of a call that was read, or None; the text's end may cut its closing mark off."""
        closed = self.closing.match(text, read.stop) if self.closing_mark else None
        if closed is not None:
            return closed.end()
        if not self.closing_mark and self.is_marked and self.next.match(text, read.stop):
            return read.stop
        near = read.stop + 2 * len(self.closing_mark) + 100
        rest = "".join(text[read.stop : near].split())
        is_cut_off = "".join(self.closing_mark.split()).startswith(rest) and not text[near:].strip()
        is_bare_name = not self.form.quoted and len(rest) < 2 and not any(call.arguments for call in read.calls)
        return len(text) if is_cut_off and not is_bare_name else None

    def _learn(self) -> None:
        """Learn header, form and marks from a chat without calls, from one with a call, and from one with two."""
        call, other = (Call(name, {FIRST: WORDS, SECOND: NUMBER}) for name in (NAME, OTHER))
        plain = self._shown([ASK, {"role": "assistant", "content": MARKER}])
        text = self._shown([ASK, self._message([call])])
        before, _, self.end_of_turn = plain.partition(MARKER)
        self.header = _to_a_border(common_start(before, text), text)
        tag = OPENS_THOUGHTS.search(self.header)
        self.header = self.header[: tag.start()] if tag else self.header
        start, stop, self.form = self._core(text, NAME, 0)
        opening, closing = text[len(self.header) : start], text[stop:].removesuffix(self.end_of_turn)
        thoughts = [found.end() for found in CLOSES.finditer(opening)]
        opening = opening[thoughts[-1] if thoughts else 0 :]
        whole = opening, closing
        if isinstance(self.form, Objects) and opening.rstrip().endswith("["):  # of a list of calls
            opening, closing = opening.rstrip()[:-1], closing.lstrip()[1:]
        elif not isinstance(self.form, Python):
            try:
                two = self._shown([ASK, self._message([call, other])])
                between = two[stop : self._core(two, OTHER, stop).start]
            except Exception:  # some allow one call a turn
                between = ""
            if between:  # what closes the first, and opens the second
                opening = _from_a_border(opening, common_end(opening, between))
                closing = between.removesuffix(opening)
        if any(words in mark for words in (ASK["content"], NAME, OTHER) for mark in (*whole, opening, closing)):
            raise InputError("the marks around a call have words of the chat in them")
        self.is_marked, self.closing_mark = bool(opening.strip()), closing.strip()
        # Llama's models begin a call by a token that their template does not write.
        self.opening = re.compile((loosely(opening) or r"\A\s*(?:<\|python_tag\|>)?") + r"\s*")
        self.next, self.closing = re.compile(r"\s*" + self.opening.pattern), re.compile(r"\s*" + loosely(closing))
        self.frame = whole[0].removesuffix(opening).strip(), whole[1].strip().removeprefix(self.closing_mark).strip()

    def _core(self, text: str, name: str, after: int) -> Learnt:
        """A call's core and its form. Raise InputError where it has none of those known."""
        found = learn(text, name, max(after, len(self.header)))
        if found is None:
            raise InputError("a call is in none of the forms that are known")
        return found

    def _try_out(self) -> None:
        """Raise InputError where calls are read otherwise than they were written, or results are not shown."""
        for call in TRIED:
            if not self._is_read([call]):
                raise InputError("a call is read otherwise than it was written")
        if MARKER not in self.results(TRIED[:1], [MARKER])[0]:
            raise InputError("the result of a call is left out")
        try:
            answers = self.results(TRIED[:2], [MARKER, MARKER])[0]
            self.several = self._is_read(TRIED[:2]) and answers.count(MARKER) == 2
        except Exception:  # of a template that allows one call a turn
            self.several = False

    def _is_read(self, calls: Sequence[Call]) -> bool:
        places = self._found(self._turn(self._message(calls)).removesuffix(self.end_of_turn))
        return [call for place in places for call in place.calls] == list(calls)


def _outside_of_thoughts(text: str, places: Sequence[Place]) -> list[Place]:
    """The places that are in no block of thoughts which is opened and closed outside of all of them."""

    def outside(pattern: re.Pattern[str]) -> list[int]:
        found = [one.start() for one in pattern.finditer(text)]
        return [at for at in found if not any(place.start <= at < place.stop for place in places)]

    opened, closed = outside(OPENS), outside(CLOSES)
    blocks = [(at, next((end for end in closed if end > at), at)) for at in opened]
    return [one for one in places if not any(begin < one.start < end for begin, end in blocks)]


def _is_shallow(calls: Sequence[Call]) -> bool:
    """Whether no argument holds more within one another than any tool reads, and Python copies."""
    level: list[Any] = [call.arguments for call in calls]
    for _ in range(DEEPEST):
        level = [one for each in level for one in (each.values() if isinstance(each, dict) else each)]
        level = [one for one in level if isinstance(one, (dict, list))]
    return not level


def _to_a_border(start: str, text: str) -> str:
    """A start of a text, up to the last mark or word where it ends within one."""
    within = re.search(r"(?:<[^\s<>]*|\[[^\s\[\]]*)\Z", start)
    if within is not None:
        return start[: within.start()]
    return re.sub(r"\w+\Z", "", start) if re.match(r"\w", text[len(start) :]) else start


def _from_a_border(text: str, end: str) -> str:
    """An end of a text, from behind the mark or word on where it begins within one."""
    before = text.removesuffix(end)
    within = re.match(r"[^\s<>\[\]]*[>\]]|\w+", end) if _to_a_border(before, text) != before else None
    return end[within.end() :] if within else end

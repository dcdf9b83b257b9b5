"""Forms in which calls of tools are written: learnt from a call that is known, and read where one stands.

Of form.py's table they have a call's core, without the marks that open and close it.
"""

import ast
import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Protocol

FIRST, SECOND = "first_key", "second_key"  # of a made-up call
WORDS, NUMBER = "alpha beta", 74
HEADER_END = "<|message|>"
A_NAME = re.compile(r"[\w.-]+")
DECODER = json.JSONDecoder(strict=False)  # which takes a line break within a text


@dataclass(frozen=True)
class Call:
    """A call of a tool, as a model wrote it."""

    name: str
    arguments: dict[str, Any]
    id: str | None = field(default=None, compare=False)  # where a model gives one, by which its result is named

    def as_message(self) -> dict[str, Any]:
        """The call as a message's tool_calls have it."""
        return {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class Read(NamedTuple):
    """Calls that were read, and where their core ends."""

    calls: list[Call]
    stop: int


class Form(Protocol):
    """One of the forms."""

    quoted: ClassVar[bool]  # whether a text has quotation marks, by which it is told from a number

    def read(self, text: str, at: int) -> Read | None:
        """The calls whose core begins there; None where there is none."""
        ...


class Learnt(NamedTuple):
    """A form, and where the core that it was learnt from begins and ends."""

    start: int
    stop: int
    form: Form


def learn(text: str, name: str, start: int) -> Learnt | None:
    """The form of the first call after `start`, of FIRST: WORDS and SECOND: NUMBER; None where it is unknown."""
    forms = (Objects.learn, Python.learn, Bare.learn, Named.learn, Keyed.learn)
    return next(filter(None, (learn_one(text, name, start) for learn_one in forms)), None)


@dataclass(frozen=True)
class Objects:
    """JSON objects with a name and arguments, or a list of them."""

    quoted: ClassVar[bool] = True
    name: str
    arguments: str

    @classmethod
    def learn(cls, text: str, name: str, start: int) -> "Learnt | None":
        for at in [found.start() for found in re.finditer(r"\{", text) if found.start() >= start]:
            value, stop = _decoded(text, at)
            if isinstance(value, dict) and name in value.values():
                keys = {type(one): key for key, one in value.items() if one == name or isinstance(one, dict)}
                return Learnt(at, stop, cls(keys[str], keys[dict])) if set(keys) == {str, dict} else None
        return None

    def read(self, text: str, at: int) -> Read | None:
        value, stop = _decoded(text, at)
        calls = [self._call(one) for one in (value if isinstance(value, list) else [value])]
        return Read([call for call in calls if call], stop) if calls and all(calls) else None

    def _call(self, value: Any) -> Call | None:
        if not isinstance(value, dict) or not _is_name(value.get(self.name)):
            return None
        arguments, own = value.get(self.arguments), value.get("id")
        if isinstance(arguments, str):  # JSON within JSON
            arguments, _ = _decoded(arguments, 0)
        arguments = {} if value.get(self.arguments) is None else arguments
        own = own if isinstance(own, str) and own.isascii() else None  # else a template may write what is no text
        return Call(value[self.name], arguments, own) if isinstance(arguments, dict) else None


@dataclass(frozen=True)
class Named:
    """A name, a mark, and arguments as a JSON object."""

    quoted: ClassVar[bool] = True
    middle: re.Pattern[str]

    @classmethod
    def learn(cls, text: str, name: str, start: int) -> "Learnt | None":
        for place in [found.start() for found in re.finditer(re.escape(name), text) if found.start() >= start][::-1]:
            at = text.find("{", place)
            arguments, stop = _decoded(text, at)
            if isinstance(arguments, dict) and FIRST in arguments:
                middle = text[place + len(name) : at]
                # gpt-oss fills in a message's header in another order than its template does.
                header = rf"(?:(?!<\|(?:end|start)\|>)[^{{])*?{loosely(HEADER_END)}"
                pattern = header if HEADER_END in middle else rf"\s*{loosely(middle)}"
                return Learnt(place, stop, cls(re.compile(rf"{pattern}\s*")))
        return None

    def read(self, text: str, at: int) -> Read | None:
        name = A_NAME.match(text, at)
        middle = name and self.middle.match(text, name.end())
        if not name or not middle:
            return None
        arguments, stop = _decoded(text, middle.end())
        return Read([Call(name[0], arguments)], stop) if isinstance(arguments, dict) else None


@dataclass(frozen=True)
class Keyed:
    """A name, and each argument between marks of its own, without quotation marks."""

    quoted: ClassVar[bool] = False
    head: re.Pattern[str]  # between the name and the first argument's own mark
    argument: re.Pattern[str]  # a key, and its value

    @classmethod
    def learn(cls, text: str, name: str, start: int) -> "Learnt | None":
        parts = re.compile(
            rf"{name}(?P<to_first>[^\w]+(?:(?!{name}).)*?){FIRST}(?P<to_value>.+?){WORDS}(?P<to_second>.+?){SECOND}"
            rf"(?P=to_value){NUMBER}(?P<rest>.*)", re.DOTALL,
        ).search(text, start)  # fmt: skip
        if parts is None:
            return None
        opens = common_end(parts["to_first"], parts["to_second"])
        closes = parts["to_second"].removesuffix(opens)
        if not opens.strip() or not closes.strip() or not parts["rest"].startswith(closes):
            return None
        # A value may have the mark that closes it, as code about such marks: what follows that tells.
        first, *others = re.findall(r"<[^<>]*>|[^\s<]+", parts["rest"].removeprefix(closes)) or [""]
        end = first if first.startswith("<") else " ".join([first, *others[:1]])
        ends = [loosely(end), rf"(?:{loosely(first)}\s*)?\Z", loosely(opens)]
        value = f"{_edge(parts['to_value'], at_end=True)}(?P<value>.*?){_edge(closes, at_end=False)}"
        argument = rf"\s*{loosely(opens)}\s*(?P<key>[\w.-]+){value}(?=\s*(?:{'|'.join(ends)}))"
        head = loosely(parts["to_first"].removesuffix(opens))
        form = cls(re.compile(head), re.compile(argument, re.DOTALL))
        return Learnt(parts.start(), parts.start("rest") + len(closes), form)

    def read(self, text: str, at: int) -> Read | None:
        name = A_NAME.match(text, at)
        head = name and self.head.match(text, name.end())
        if not name or not head:
            return None
        stop, arguments = head.end(), {}
        while (argument := self.argument.match(text, stop)) is not None:
            arguments[argument["key"]] = argument["value"]
            stop = argument.end()
        return Read([Call(name[0], arguments)], stop)


@dataclass(frozen=True)
class Bare:
    """A name and an object whose keys have no quotation marks, and whose texts have a mark of their own."""

    quoted: ClassVar[bool] = True
    quote: str

    @classmethod
    def learn(cls, text: str, name: str, start: int) -> "Learnt | None":
        pattern = rf"{name}\{{{FIRST}:(?P<quote>.+?){WORDS}(?P=quote),{SECOND}:{NUMBER}\}}"
        found = re.compile(pattern).search(text, start)
        return found and Learnt(found.start(), found.end(), cls(found["quote"]))

    def read(self, text: str, at: int) -> Read | None:
        name = A_NAME.match(text, at)
        if not name or not text.startswith("{", name.end()):
            return None
        depth, within, written, begin = 0, False, "", name.end()  # of brackets; a text; as JSON; of what is not yet
        for mark in re.compile(rf"{re.escape(self.quote)}|[{{}}\[\]]").finditer(text, name.end()):
            if mark[0] == self.quote:
                part = text[begin : mark.start()]
                written += json.dumps(part) if within else _quoted_keys(part)
                within, begin = not within, mark.end()
            elif not within:
                depth += 1 if mark[0] in "{[" else -1
                if not depth:
                    value, _ = _decoded(written + _quoted_keys(text[begin : mark.end()]), 0)
                    return Read([Call(name[0], value)], mark.end()) if isinstance(value, dict) else None
        return None


@dataclass(frozen=True)
class Python:
    """Calls as Python writes them, in a list."""

    quoted: ClassVar[bool] = True
    closing: str

    @classmethod
    def learn(cls, text: str, name: str, start: int) -> "Learnt | None":
        arguments = rf"""{FIRST}=(["']){WORDS}\1, {SECOND}={NUMBER}"""
        found = re.compile(rf"\[{name}\({arguments}\)\](?P<closing><\|?\w+\|?>)").search(text, start)
        return found and Learnt(found.start(), found.start("closing"), cls(found["closing"]))

    def read(self, text: str, at: int) -> Read | None:
        stop = text.find(self.closing, at)
        if stop < 0:  # cut off, perhaps within the mark
            stop = len(text) - next(n for n in range(len(self.closing), -1, -1) if text.endswith(self.closing[:n]))
        written = text[at:stop].strip()
        for one in (written, written.replace("\n", r"\n")):  # a line break within a text may be one
            with contextlib.suppress(SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
                listed = _Json().visit(ast.parse(one, mode="eval")).body
                calls = listed.elts if isinstance(listed, ast.List) else [listed]
                return Read([_as_call(each) for each in calls], stop)
        return None


def _as_call(node: ast.expr) -> Call:
    """A call as Python writes it. Raise ValueError for anything else."""
    if not isinstance(node, ast.Call) or node.args or not all(one.arg for one in node.keywords):
        raise ValueError
    name, arguments = ast.unparse(node.func), {str(one.arg): ast.literal_eval(one.value) for one in node.keywords}
    if not _is_name(name):
        raise ValueError
    return Call(name, json.loads(json.dumps(arguments)))  # without what JSON has not, as bytes


class _Json(ast.NodeTransformer):
    """JSON's three words, which templates write among what is Python's."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        words = {"true": True, "false": False, "null": None}
        return ast.Constant(words[node.id]) if node.id in words else node


def typed(call: Call, parameters: Mapping[str, Mapping[str, Any]], *, quoted: bool) -> Call:
    """The call with texts made what the JSON schemas of the tool's parameters say; `quoted` as a Form has it."""
    arguments = {
        name: _as_typed(value, _kinds(parameters.get(name, {})), quoted) if isinstance(value, str) else value
        for name, value in call.arguments.items()
    }
    return replace(call, arguments=arguments)


def _as_typed(text: str, kinds: set[str], quoted: bool) -> Any:
    if not quoted and text.strip() == "null" and "null" in kinds:
        return None
    if "string" in kinds or not kinds:
        return text
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return json.loads(json.dumps(read(text.strip())))  # without what JSON has not, as bytes
    return text


def _kinds(schema: Mapping[str, Any]) -> set[str]:
    """The types that a JSON schema admits; none where it says nothing."""
    kinds = schema.get("type", [])
    found = {kinds} if isinstance(kinds, str) else set(kinds)
    found |= {"null"} if schema.get("nullable") else set()
    return found.union(*map(_kinds, schema.get("anyOf", [])))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and A_NAME.fullmatch(value) is not None


def _decoded(text: str, at: int) -> tuple[Any, int]:
    """The JSON value that begins there, and where it ends; None where there is none."""
    try:
        return DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        return None, at


def _quoted_keys(text: str) -> str:
    return re.sub(r"([{,]\s*)([\w.-]+)(\s*:)", r'\1"\2"\3', text)


def loosely(mark: str) -> str:
    """A pattern of a mark, in which white space is any or none."""
    return r"\s*".join(map(re.escape, mark.split()))


def _edge(mark: str, *, at_end: bool) -> str:
    """A pattern of a mark beside a value, where white space is the mark's own, or missing."""
    inner = mark.rstrip() if at_end else mark.lstrip()
    space = re.escape(mark[len(inner) :] if at_end else mark[: len(mark) - len(inner)])
    space = f"(?:{space})?" if space else ""
    return rf"\s*{loosely(inner)}{space}" if at_end else f"{space}{loosely(inner)}"


def common_start(one: str, other: str) -> str:
    count = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:count]


def common_end(one: str, other: str) -> str:
    return common_start(one[::-1], other[::-1])[::-1]

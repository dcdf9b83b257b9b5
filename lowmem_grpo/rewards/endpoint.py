"""A client of OpenAI-compatible endpoints: chat completions over HTTP, several at once, retried where that may help.

From the standard library. huggingface_hub's AsyncInferenceClient(base_url=...) sends the user's Hugging Face token to
whatever address it is given, changes some addresses, and refuses all of them under HF_HUB_OFFLINE.
"""

import asyncio
import email.utils
import http.client
import json
import logging
import math
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from lowmem_grpo.errors import InputError, in_a_line, printable, shown

log = logging.getLogger(__name__)

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0  # before a retry; each wait is twice the one before
MOST_BYTES = 2**26  # of a reply
LONGEST_TIMEOUT_S = 86400.0  # longer ones overflow the operating system's clock at some point
OURS = ("model", "messages", "stream", "n")  # of the fields of a request: a reply is one whole choice
MOST_CHARACTERS = 300  # of what a server says, within a sentence of ours
WORTH_A_RETRY = (408, 429)  # of HTTP's statuses below 500
PATH = "/chat/completions"

Messages = list[dict[str, str]]


class EndpointError(RuntimeError):
    """A request that got no usable reply, in a sentence."""


class _Passing(EndpointError):
    """A failure that may pass."""

    def __init__(self, sentence: str, wait_s: float | None = None):
        super().__init__(sentence)
        self.wait_s = wait_s  # what the server asks for


class _Unreached(_Passing):
    """A connection that nobody took."""


class Reply(NamedTuple):
    text: str
    reasoning: str  # what the server has cut off of a reasoning model's text, without its tags; often empty
    finish: str  # "stop", "length", or another of the server's words
    num_tokens: int | None  # of the completion, reasoning included, where the server counts them

    @property
    def whole(self) -> str:
        """The text after its reasoning, as the model wrote both: in a <think> block."""
        return f"<think>\n{self.reasoning.strip()}\n</think>\n\n{self.text.lstrip()}" if self.reasoning else self.text


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses to follow: urllib would make a GET of the POST, and hand the key to the other address."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


@dataclass(frozen=True)
class Endpoint:
    """An address, a model there, and how it is asked.

    The key is read from an environment variable each time, and is never kept, logged or saved.

    Raises:
        InputError: an address or a count that cannot be, or a variable that is not set.
    """

    base_url: str  # such as http://localhost:8000/v1
    model: str
    max_concurrent: int = 16
    timeout: float = 120.0  # seconds that one reply may take
    max_retries: int = 5  # of a request that met a busy or failing server, or none
    api_key_variable: str | None = None  # the name of an environment variable; None sends no key
    fields: Mapping[str, Any] = field(default_factory=dict)  # of each request; None leaves one out
    _told: set[str] = field(default_factory=set, init=False, repr=False, compare=False)  # sentences, each said once

    def __post_init__(self) -> None:
        refuse_address(self.base_url)
        if not isinstance(self.model, str) or not self.model:
            raise InputError(f"{self.base_url} needs the name of a model there; give model, as the server lists it")
        for name, least in (("max_concurrent", 1), ("timeout", 0), ("max_retries", 0)):
            value = getattr(self, name)
            if not isinstance(value, int if name != "timeout" else int | float) or value < least or value != value:
                raise InputError(f"{name}={shown(value)} of an endpoint must be a number of at least {least}")
        if not 0 < self.timeout <= LONGEST_TIMEOUT_S:
            raise InputError(
                f"timeout={shown(self.timeout)} must be above 0 and at most {LONGEST_TIMEOUT_S:g} seconds, such as 120"
            )
        refuse_fields(self.fields)
        read_key(self.api_key_variable)

    async def replies(self, conversations: Sequence[Messages]) -> list[Reply | BaseException]:
        """Replies to conversations, max_concurrent at once, with the error in place of one that got none."""
        stop = threading.Event()
        try:
            asked = map(asyncio.wrap_future, self.start(conversations, stop))
            return await asyncio.gather(*asked, return_exceptions=True)
        finally:
            stop.set()

    def start(self, conversations: Sequence[Messages], stop: threading.Event) -> "list[Future[Reply]]":
        """Ask in threads, max_concurrent at once, and return a future of each reply.

        Once stop is set nothing more is sent. The threads keep no process from ending.
        """
        waiting: SimpleQueue[tuple[Future[Reply], Messages]] = SimpleQueue()
        futures: list[Future[Reply]] = []
        for conversation in conversations:
            futures.append(Future())
            waiting.put((futures[-1], conversation))

        def serve() -> None:
            while not stop.is_set():
                try:
                    future, conversation = waiting.get_nowait()
                except Empty:
                    return
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(self.ask(conversation, stop))
                    except BaseException as error:
                        future.set_exception(error)

        for _ in range(min(self.max_concurrent, len(futures))):
            threading.Thread(target=serve, daemon=True).start()
        return futures

    def ask(self, conversation: Messages, stop: threading.Event | None = None) -> Reply:
        """The reply to a conversation, asked again after a failure that may pass.

        Raises:
            EndpointError: there is no reply, or none that can be read.
        """
        stop = stop or threading.Event()
        for attempt in range(self.max_retries + 1):
            try:
                return self._ask_once(conversation)
            except _Passing as error:
                if attempt == self.max_retries or stop.is_set():
                    times = "" if attempt == 0 else f" (asked {attempt + 1} times)"
                    raise EndpointError(f"{error}{times}") from error
                # Requests that failed together come back apart; Python's own generator is the run's.
                if isinstance(error, _Unreached):
                    self._tell(str(error))
                own = FIRST_WAIT_S * 2**attempt * random.Random().uniform(0.75, 1.25)
                stop.wait(min(own if error.wait_s is None else error.wait_s, LONGEST_WAIT_S))
        raise AssertionError("unreachable")

    def _tell(self, why: str) -> None:
        """Say once, and at once, that there is no server, which may be starting or may be looked for elsewhere."""
        if why in self._told:
            return
        self._told.add(why)
        seconds = sum(min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S) for attempt in range(self.max_retries))
        log.warning(f"{why}; it is asked again for about {math.ceil(seconds)} s; start the server, or mend base_url")

    def _ask_once(self, conversation: Messages) -> Reply:
        body = {"model": self.model, "messages": conversation, **self.fields}
        key = read_key(self.api_key_variable)
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        url = self.base_url.rstrip("/").removesuffix(PATH) + PATH
        request = urllib.request.Request(
            url, json.dumps({name: value for name, value in body.items() if value is not None}).encode(), headers
        )
        due = time.monotonic() + self.timeout
        try:
            with urllib.request.build_opener(_NoRedirects).open(request, timeout=self.timeout) as response:
                found = _read(response, due)
        except urllib.error.HTTPError as error:
            said = f"{url} answered {error.code}: {_said(error, key, due)}"
            if error.code in WORTH_A_RETRY or error.code >= 500:
                raise _Passing(said, _wait_s(error.headers.get("Retry-After"))) from error
            raise EndpointError(said) from error
        except TimeoutError as error:
            raise _Passing(f"{url} gave no reply within {self.timeout:g} s") from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _Passing(f"{url} gave no reply within {self.timeout:g} s") from error
            raise _Unreached(f"{url} cannot be reached: {printable(str(error.reason))}") from error
        except (OSError, http.client.HTTPException) as error:
            raise _Passing(f"{url} broke off: {_without(key, in_a_line(error))}") from error
        return read_reply(found, url, key)


def read_key(variable: str | None) -> str:
    """The key that an environment variable holds; without a variable an empty text.

    Raises:
        InputError: it is not set, or holds what no header can, which Python would repeat in its error.
    """
    if variable is None:
        return ""
    key = os.environ.get(variable, "") if isinstance(variable, str) else ""
    if not key:
        # A name that is not written as one is not repeated, since it may be the key itself.
        is_name = isinstance(variable, str) and variable.isidentifier() and variable.isupper()
        raise InputError(
            f"the environment variable {shown(variable) if is_name else 'that api_key_variable names'} is not set, and "
            "api_key_variable is the name of one that holds the key, such as OPENAI_API_KEY; export it, or leave "
            "api_key_variable out"
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise InputError(
            f"the environment variable {shown(variable)} holds a space, the end of a line or another character that "
            "no key has; export the key alone"
        )
    return key


def refuse_fields(fields: Any) -> None:
    """Raise InputError for what cannot be the further fields of a request."""
    if not isinstance(fields, Mapping) or not all(isinstance(name, str) for name in fields):
        raise InputError(f"extra_body={shown(fields)} is no mapping of names; write it as {{'max_tokens': 4096}}")
    for name in OURS:
        if name in fields:
            raise InputError(f"extra_body has {name}, which a request has or cannot have; leave it out")
    try:
        json.dumps(dict(fields), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"extra_body={shown(fields)} cannot be sent as JSON: {in_a_line(error)}; remove it") from error


def refuse_address(base_url: Any) -> None:
    """Raise InputError for what is no address of an endpoint, or holds a secret, since a run's settings are saved."""
    parts = None
    if isinstance(base_url, str) and base_url.isprintable() and " " not in base_url:
        try:
            parts = urlsplit(base_url)
            host = (parts.hostname or "").encode("idna")
            found = host and base_url.isascii() and parts.scheme in ("http", "https") and (parts.port or True)
        except ValueError:  # a port that is no number, or a host with an empty part
            found = False
        if parts is not None and (parts.username or parts.password or parts.query or parts.fragment):
            raise InputError(
                "base_url holds more than an address, and it is saved with the run's settings; export a key in an "
                "environment variable, and name that in api_key_variable"
            )
        if found:
            return
    raise InputError(f"base_url={shown(base_url)} is no address; write it as http://localhost:8000/v1")


def read_reply(body: bytes, url: str, key: str = "") -> Reply:
    """The first choice of a chat completion. Raise EndpointError, without the key, where there is none to be read."""
    try:
        answer = json.loads(body)
        choice = answer["choices"][0]
        message = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        start = printable(_without(key, body.decode(errors="replace"))[:MOST_CHARACTERS])
        raise EndpointError(f"{url} answered with no chat completion: {start}") from error
    if refusal:
        raise EndpointError(f"{url} refused: {printable(_without(key, str(refusal)))[:MOST_CHARACTERS]}")
    if isinstance(content, list):  # parts, of which some are no text
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if not isinstance(content or "", str) or not isinstance(reasoning or "", str):
        raise EndpointError(f"{url} answered with a message whose content is no text")
    if not content and not reasoning:
        why = _without(key, shown(choice.get("finish_reason")))
        raise EndpointError(f"{url} answered with an empty message, finish_reason {why}")
    usage = answer.get("usage")
    counted = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return Reply(
        content or "", reasoning or "", str(choice.get("finish_reason") or "stop"),
        counted if isinstance(counted, int) else None,
    )  # fmt: skip


def _read(response: Any, due: float) -> bytes:
    """A response's body, which a slow server may send byte by byte. Raise TimeoutError when its time is over."""
    parts, size = [], 0
    while part := response.read1(2**16):
        parts.append(part)
        size += len(part)
        if size > MOST_BYTES:
            raise EndpointError(f"{response.url} answered with more than {MOST_BYTES >> 20} MiB")
        if time.monotonic() > due:
            raise TimeoutError
    if getattr(response, "length", None):  # of which read1() says nothing
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


def _without(key: str, words: str) -> str:
    """Words of a server without the key, which some repeat."""
    return words.replace(key, "(the key)") if key else words


def _said(error: urllib.error.HTTPError, key: str, due: float) -> str:
    """A server's words on its error, in a line, without the key that some of them repeat."""
    try:
        body = _read(error, due).decode(errors="replace")
    except (OSError, http.client.HTTPException, EndpointError):
        body = ""
    try:
        found = json.loads(body)
        found = found.get("error", found)
        words = found if isinstance(found, str) else str(found.get("message") or body)
    except (ValueError, RecursionError, AttributeError):
        words = body
    words = " ".join(words.split()) or str(error.reason)
    return printable(_without(key, words)[:MOST_CHARACTERS])


def _wait_s(header: str | None) -> float | None:
    """The seconds of a Retry-After header, which has them or a date; None where it has neither."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None

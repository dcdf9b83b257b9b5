"""The client of OpenAI-compatible endpoints, against a real server in a thread."""

import asyncio
import email.utils
import random
import socket
import threading
import time
from typing import Any

import pytest
from servers import Answer, Server

from lowmem_grpo.errors import InputError
from lowmem_grpo.rewards import endpoint
from lowmem_grpo.rewards.endpoint import Endpoint, EndpointError

HELLO = [{"role": "user", "content": "hello"}]


def in_turn(*answers):
    """Give these answers, one a request, and the last of them from then on."""
    left = list(answers)
    return lambda given: left.pop(0) if len(left) > 1 else left[0]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.01)


def replies(asked, conversations) -> list[Any]:
    return asyncio.run(asked.replies(conversations))


def test_a_request_is_a_chat_completion_and_its_reply_is_read():
    with Server(lambda given: Answer("hi", finish="length")) as server:
        fields = {"temperature": 0, "max_tokens": None, "top_k": 3}
        reply = Endpoint(server.base_url, "m", fields=fields).ask(HELLO)
    assert reply == ("hi", "", "length", 7)
    assert server.requests == [{"model": "m", "messages": HELLO, "temperature": 0, "top_k": 3}]
    assert server.paths == ["/v1/chat/completions"] and server.keys == [None]


@pytest.mark.parametrize("ending", ["/", "/chat/completions", "/chat/completions/"])
def test_an_address_may_end_in_a_slash_or_be_whole(ending):
    with Server(lambda given: Answer("hi")) as server:
        Endpoint(server.base_url + ending, "m").ask(HELLO)
    assert server.paths == ["/v1/chat/completions"]


def test_the_users_hugging_face_token_goes_nowhere_and_offline_mode_forbids_nothing(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with Server(lambda given: Answer("hi")) as server:
        Endpoint(server.base_url, "m").ask(HELLO)
    assert server.keys == [None]


def test_the_key_is_read_from_its_variable_and_stands_in_no_error_and_no_setting(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    wrong = Answer(status=401, body={"error": {"message": "Incorrect API key provided: sk-secret."}})
    with Server(in_turn(wrong)) as server:
        asked = Endpoint(server.base_url, "m", api_key_variable="JUDGE_KEY")
        with pytest.raises(EndpointError, match=r"answered 401: Incorrect API key provided: \(the key\)\.$"):
            asked.ask(HELLO)
    assert server.keys == ["Bearer sk-secret"], "and it is not asked again"
    assert "sk-secret" not in repr(asked)


@pytest.mark.parametrize("key", ["sk-secret\n", "sk-secret\r\nX: y", "sk-sécret", " sk-secret"])
def test_a_key_that_no_header_can_hold_is_refused_without_repeating_it(monkeypatch, key):
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(InputError, match="'JUDGE_KEY' holds a space, the end of a line or another") as refused:
        Endpoint("http://localhost:1", "m", api_key_variable="JUDGE_KEY")
    assert "cret" not in str(refused.value)


@pytest.mark.parametrize("variable", ["sk-secret", "hf_secret", "", 5])
def test_a_key_in_place_of_its_variables_name_is_not_repeated(variable):
    with pytest.raises(InputError, match="variable that api_key_variable names is not set") as refused:
        Endpoint("http://localhost:1", "m", api_key_variable=variable)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(body={"you sent": "Bearer sk-secret"}),
        Answer(body=b"x" * 290 + b"sk-secret"),  # which a cut would leave a part of
        Answer(None, refusal="not with sk-secret"),
        Answer(None, finish="sk-secret"),
        Answer(status=400, body={"error": {"message": {"headers": "sk-secret"}}}),
    ],
)
def test_a_server_that_repeats_the_key_is_quoted_without_it(monkeypatch, answer):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    with Server(lambda given: answer) as server, pytest.raises(EndpointError) as failed:
        Endpoint(server.base_url, "m", api_key_variable="JUDGE_KEY").ask(HELLO)
    assert "sk-" not in str(failed.value)


def test_no_more_than_max_concurrent_requests_are_open_at_once():
    def slowly(given):
        time.sleep(0.02)
        return Answer(given["messages"][0]["content"])

    with Server(slowly) as server:
        found = replies(Endpoint(server.base_url, "m", max_concurrent=3), [[{"role": "user", "content": str(i)}] for i in range(12)])  # fmt: skip
    assert [reply.text for reply in found] == [str(i) for i in range(12)], "each where it was asked"
    assert server.most_at_once == 3


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 529])
def test_a_failure_that_may_pass_is_asked_again(status):
    with Server(in_turn(Answer(status=status, body=b"busy"), Answer("hi"))) as server:
        assert Endpoint(server.base_url, "m").ask(HELLO).text == "hi"
    assert len(server.requests) == 2


@pytest.mark.parametrize("status", [301, 307, 400, 404, 422])
def test_a_failure_that_stays_is_not_asked_again(status):
    elsewhere = Answer(status=status, body={"error": "no such model"}, headers={"Location": "http://127.0.0.1:1/"})
    said = pytest.raises(EndpointError, match=f"answered {status}: no such model")
    with Server(in_turn(elsewhere)) as server, said:
        Endpoint(server.base_url, "m").ask(HELLO)
    assert len(server.requests) == 1


def test_retries_have_an_end():
    said = pytest.raises(EndpointError, match=r"answered 500: CUDA error \(asked 3 times\)$")
    with Server(in_turn(Answer(status=500, body={"error": {"message": "CUDA\nerror"}}))) as server, said:
        Endpoint(server.base_url, "m", max_retries=2).ask(HELLO)
    assert len(server.requests) == 3


def test_that_there_is_no_server_is_said_once_before_it_is_asked_again(monkeypatch, caplog):
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.05)
    with Server(lambda given: Answer("hi")) as server:
        asked = Endpoint(server.base_url, "m", max_retries=3)
    began = time.time()
    found = replies(asked, [HELLO] * 4)
    (said,) = caplog.records
    assert said.getMessage().endswith(" refused; it is asked again for about 1 s; start the server, or mend base_url")
    assert said.created - began < (time.time() - began) / 2
    assert all(str(error).endswith("Connection refused (asked 4 times)") for error in found)


def test_a_server_says_how_long_to_wait_in_seconds_or_by_a_date_and_not_for_ever(monkeypatch):
    for header, waited in (("0.3", 0.3), (email.utils.formatdate(time.time() + 60, usegmt=True), 0.2), ("9999", 0.2)):
        monkeypatch.setattr(endpoint, "LONGEST_WAIT_S", 0.3 if header == "0.3" else 0.2)
        with Server(in_turn(Answer(status=429, headers={"Retry-After": header}, body=b""), Answer("hi"))) as server:
            started = time.monotonic()
            assert Endpoint(server.base_url, "m").ask(HELLO).text == "hi"
            assert waited <= time.monotonic() - started < waited + 2


def test_a_silent_server_is_given_up():
    said = pytest.raises(EndpointError, match=r"gave no reply within 0.1 s \(asked 2 times\)")
    with Server(lambda given: time.sleep(0.5) or Answer("hi")) as server, said:
        Endpoint(server.base_url, "m", timeout=0.1, max_retries=1).ask(HELLO)


@pytest.mark.parametrize(
    "head, said",
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", "gave no reply within 0.2 s"),
        (b"HTTP/1.1 400 Bad\r\n\r\n", "answered 400: Bad$"),
    ],
)
def test_a_server_that_sends_byte_by_byte_is_given_up_and_its_error_said(head, said):
    def drip():
        connection, _ = listening.accept()
        with connection:
            connection.sendall(head)
            for _ in range(40):
                try:
                    connection.sendall(b"a")
                except OSError:
                    return
                time.sleep(0.05)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=drip, daemon=True).start()
        started = time.monotonic()
        with pytest.raises(EndpointError, match=said):
            Endpoint(f"http://127.0.0.1:{listening.getsockname()[1]}", "m", timeout=0.2, max_retries=0).ask(HELLO)
        assert time.monotonic() - started < 1.5


def test_a_reply_that_is_cut_off_within_its_length_is_asked_for_again():
    cut = Answer(body=b'{"choices": [', headers={"Content-Length": "500", "Connection": "close"})
    with Server(in_turn(cut, Answer("hi"))) as server:
        assert Endpoint(server.base_url, "m").ask(HELLO).text == "hi"
    assert len(server.requests) == 2


def test_a_connection_that_is_refused_or_broken_off_is_asked_again():
    listening = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"

    def hang_up():
        for _ in range(2):
            connection, _ = listening.accept()
            connection.recv(100)
            connection.close()

    threading.Thread(target=hang_up, daemon=True).start()
    with pytest.raises(EndpointError, match=r"(broke off|cannot be reached): .*\(asked 2 times\)"):
        Endpoint(address, "m", max_retries=1).ask(HELLO)
    listening.close()
    with pytest.raises(EndpointError, match=r"cannot be reached: .*refused \(asked 2 times\)"):
        Endpoint(address, "m", max_retries=1).ask(HELLO)


@pytest.mark.parametrize(
    "answer, sentence",
    [
        (Answer(body=b"<html>Bad gateway</html>"), "answered with no chat completion: <html>Bad"),
        (Answer(body={"error": "nothing"}), "answered with no chat completion"),
        (Answer(body={"choices": []}), "answered with no chat completion"),
        (Answer(body=b"\xff\x1b[2J"), r"no chat completion: .*\\x1b"),
        (Answer(body=[1]), "answered with no chat completion"),
        (Answer(None, refusal="I cannot help with that."), "refused: I cannot help with that"),
        (Answer(None, finish="content_filter"), "an empty message, finish_reason 'content_filter'"),
        (Answer({"text": 1}), "a message whose content is no text"),
    ],
)
def test_a_reply_that_is_none_costs_its_request_alone(answer, sentence):
    with Server(lambda given: answer if given["messages"][0]["content"] == "bad" else Answer("fine")) as server:
        found = replies(Endpoint(server.base_url, "m"), [HELLO, [{"role": "user", "content": "bad"}], HELLO])
    assert [found[0].text, found[2].text] == ["fine", "fine"]
    assert isinstance(found[1], EndpointError)
    with pytest.raises(EndpointError, match=sentence):
        raise found[1]
    assert len(server.requests) == 3


def test_what_a_server_cut_off_as_reasoning_is_put_back_into_a_think_block():
    for name in ("reasoning_content", "reasoning"):
        with Server(lambda given, name=name: Answer("\n\nIt is 4.", **{name: "2+2\n"})) as server:
            reply = Endpoint(server.base_url, "m").ask(HELLO)
        assert reply.text == "\n\nIt is 4." and reply.reasoning == "2+2\n"
        assert reply.whole == "<think>\n2+2\n</think>\n\nIt is 4."
    with Server(lambda given: Answer([{"type": "text", "text": "a"}, {"type": "image"}, {"text": "b"}])) as server:
        assert Endpoint(server.base_url, "m").ask(HELLO).whole == "ab"


def test_a_cancelled_batch_sends_nothing_more():
    with Server(lambda given: time.sleep(0.1) or Answer(status=500, body=b"")) as server:

        async def cut_off():
            await asyncio.wait_for(Endpoint(server.base_url, "m", max_concurrent=2).replies([HELLO] * 10), 0.05)

        with pytest.raises(TimeoutError):
            asyncio.run(cut_off())
        time.sleep(0.3)
    assert len(server.requests) == 2


def test_waiting_draws_from_no_generator_of_the_run():
    random.seed(0)
    state = random.getstate()
    with Server(in_turn(Answer(status=500, body=b""), Answer("hi"))) as server:
        Endpoint(server.base_url, "m").ask(HELLO)
    assert random.getstate() == state


@pytest.mark.parametrize(
    "address",
    [
        "http://a..b/v1",
        "http://a/ü",
        "localhost:8000",
        "ftp://a/v1",
        "http://",
        "http://a:x/v1",
        "http://a b/",
        "",
        None,
        5,
    ],
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(InputError, match="is no address; write it as http://localhost:8000/v1"):
        Endpoint(address, "m")


@pytest.mark.parametrize("address", ["https://me:secret@a/v1", "https://a/v1?key=secret", "https://sk-secret@a/v1"])
def test_an_address_with_a_secret_is_refused_without_repeating_it(address):
    with pytest.raises(InputError, match="holds more than an address") as refused:
        Endpoint(address, "m")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "setting", [{"max_concurrent": 0}, {"max_concurrent": 1.5}, {"timeout": 0}, {"timeout": "5"}, {"timeout": float("nan")}, {"timeout": float("inf")}, {"fields": "a"}, {"fields": {"a": {1}}}, {"fields": {"stream": True}}, {"fields": {"messages": []}}, {"max_retries": -1}, {"model": ""}]
)  # fmt: skip
def test_a_setting_that_cannot_be_is_refused(setting):
    with pytest.raises(InputError):
        Endpoint(**{"base_url": "http://localhost:1", "model": "m", **setting})


def test_a_variable_that_is_not_set_is_refused_at_once(monkeypatch):
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(InputError, match="the environment variable 'NO_KEY' is not set"):
        Endpoint("http://localhost:1", "m", api_key_variable="NO_KEY")

"""A real OpenAI-compatible server on this machine, in a thread, that answers as a test says."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Answer:
    """One response: a chat completion, or any status, headers and body."""

    def __init__(self, content: Any = None, *, status: int = 200, headers: dict[str, str] | None = None, **of: Any):
        self.status, self.headers = status, headers or {}
        self.finish, self.body, self.message = (
            of.pop("finish", "stop"),
            of.pop("body", None),
            {"content": content, **of},
        )

    def as_bytes(self) -> bytes:
        if self.body is not None:
            return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()
        message = {"role": "assistant", **self.message}
        choice = {"index": 0, "message": message, "finish_reason": self.finish}
        return json.dumps({"choices": [choice], "usage": {"completion_tokens": 7}}).encode()


class Listening(ThreadingHTTPServer):
    request_queue_size = 128  # of connections that wait; beyond 5, its default, the system resets them


class Server:
    """A server whose `answer` gets each request's JSON; use it in a `with`."""

    def __init__(self, answer: Callable[[dict[str, Any]], Answer]):
        self.answer = answer
        self.requests: list[dict[str, Any]] = []  # the JSON of each, in the order of their arrival
        self.paths: list[str] = []
        self.keys: list[str | None] = []  # their Authorization headers
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.requests.append(given)
                    server.paths.append(self.path)
                    server.keys.append(self.headers.get("Authorization"))
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                try:
                    answer = server.answer(given)
                    body = answer.as_bytes()
                finally:
                    with server.lock:
                        server.at_once -= 1
                try:
                    self.send_response(answer.status)
                    for name, value in {"Content-Length": str(len(body)), **answer.headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:  # whoever asked has gone
                    pass

            def log_message(self, *arguments: Any) -> None:
                pass

        self.http = Listening(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self) -> "Server":
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.http.shutdown()
        self.http.server_close()

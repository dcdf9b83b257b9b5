"""A real server on this machine that speaks as much of the hub's protocol as an upload needs."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = 1000  # bytes from which on a file goes as the hub's large ones do
USER = "me"


class Hub:
    """A hub with the repositories of one user; use it in a `with`.

    `refusals` are statuses that it answers the next requests with instead, and `deaf` makes it answer none.
    """

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = {}  # by repository and branch: "me/model@main"
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.tokens: set[str | None] = set()
        self.requests: list[str] = []
        self.refusals: list[int] = []
        self.deaf = threading.Event()
        self.ended = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.answer(self.rfile.read(int(self.headers["Content-Length"] or 0)))

            do_PUT = do_POST

            def answer(self, given: bytes) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                hub.tokens.add(self.headers["Authorization"])
                if hub.deaf.is_set():
                    hub.ended.wait()
                status, reply = (hub.refusals.pop(0), {"error": "refused"}) if hub.refusals else hub.reply(self, given)
                body = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.ended.set()
        self.http.shutdown()
        self.http.server_close()

    def reply(self, request: Any, given: bytes) -> tuple[int, Any]:
        """Status and JSON of the reply to a request."""
        path = request.path
        if path == "/api/repos/create":
            asked = json.loads(given)
            name = f"{asked.get('organization') or USER}/{asked['name']}"
            there = f"{name}@main" in self.files
            self.files.setdefault(f"{name}@main", {})
            self.private.setdefault(name, asked.get("private", asked.get("visibility") == "private"))
            return 409 if there else 200, {"url": f"{self.address}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if path.startswith("/large/"):
            self.large[path.rpartition("/")[2]] = given
            return 200, {}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(given)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{self.address}/large/{one['oid']}"}}
            return 200, {"transfer": "basic", "objects": objects}
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/([^/?]+)", path)
        assert found, path
        name, verb, branch = found.groups()
        if verb == "branch":
            there = f"{name}@{branch}" in self.files
            self.files.setdefault(f"{name}@{branch}", {})
            return 409 if there else 200, {}
        if verb == "preupload":
            files = json.loads(given)["files"]
            mode = {True: "lfs", False: "regular"}
            return 200, {
                "files": [
                    {"path": one["path"], "uploadMode": mode[one["size"] >= LARGE], "shouldIgnore": False}
                    for one in files
                ]
            }
        for line in map(json.loads, given.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[f"{name}@{branch}"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                self.files[f"{name}@{branch}"][value["path"]] = content
        return 200, {"commitUrl": f"{self.address}/{name}/commit/0", "commitOid": "0" * 40}

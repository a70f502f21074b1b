"""A server that answers like the Hugging Face Hub, for the real client."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


class FakeHub:
    """What was asked of the server, and the files that were uploaded."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.files: dict[str, bytes] = {}
        self.created: dict[str, Any] = {}
        self.address = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """The status and the content for a request."""
        self.requests.append((method, path))
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user", "auth": {}}
        if path == "/api/repos/create":
            self.created = json.loads(body)
            return 200, {"url": f"{self.address}/me/dog", "id": "me/dog"}
        if path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if path.endswith("/commit/main"):
            self.keep(body)
            return 200, {"commitOid": "0" * 40, "commitUrl": f"{self.address}/me/dog/commit/0"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        return 404, {"error": "not found"}

    def keep(self, body: bytes) -> None:
        """Keeps the files of a commit."""
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                value = entry["value"]
                self.files[value["path"]] = base64.b64decode(value["content"])


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """The server, in a block. Requests without TOKEN are refused."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            size = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(size)
            status, content = 401, {"error": "Invalid credentials in Authorization header"}
            if self.headers.get("Authorization") == f"Bearer {TOKEN}":
                status, content = hub.answer(self.command, self.path.split("?")[0], body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_HEAD = respond

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()

"""A server of the chat protocol that says what it is told to, as slowly as it is told to: for tests of the page."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from plait.serve.page.assemble import page

Piece = dict[str, Any]
Script = Callable[[dict[str, Any]], Iterator[Piece]]
MODEL = {
    "id": "tiny-hybrid",
    "max_model_len": 4096,
    "plait": {
        "pattern": "M-M*-M-ME",
        "parameters": 45_200_000,
        "state_bytes": 1 << 20,
        "kv_bytes_per_token": 2048,
        "thinking": True,
    },
}


class Fake:
    """Answers with what `script(request)` yields: deltas, or {"status": ...} before any, or {"error": ...}."""

    def __init__(self) -> None:
        self.script: Script = says("Hello.")
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.left = threading.Event()
        """A reader left before the end."""
        self.key = ""
        self.n_prompt: Callable[[dict[str, Any]], int] = lambda request: 20
        """tokens of a request's prompt"""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(fake) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None: ...

            def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def refuse(self, status: int, message: str, **headers: str) -> None:
                body = json.dumps({"error": {"message": message, "type": "x", "param": None, "code": None}}).encode()
                self.reply(status, body, {"Content-Type": "application/json", **headers})

            def is_let_in(self) -> bool:
                if not fake.key or self.headers.get("Authorization") == f"Bearer {fake.key}":
                    return True
                self.refuse(401, "no key")
                return False

            def do_GET(self) -> None:  # noqa: N802
                if self.path == "/":
                    self.reply(200, page().body, page().headers)
                elif self.path == "/v1/models" and self.is_let_in():
                    body = json.dumps({"object": "list", "data": [MODEL]}).encode()
                    self.reply(200, body, {"Content-Type": "application/json"})
                elif self.path != "/v1/models":
                    self.refuse(404, f"there is no {self.path}")

            def do_POST(self) -> None:  # noqa: N802
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if not self.is_let_in():
                    return
                fake.requests.append(request)
                fake.headers.append(dict(self.headers))
                pieces = fake.script(request)
                first = next(pieces)
                if "status" in first:
                    self.refuse(first["status"], first["message"], **first.get("headers", {}))
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                try:
                    self.stream(first, pieces, fake.n_prompt(request))
                except OSError:
                    fake.left.set()

            def stream(self, first: Piece, pieces: Iterator[Piece], n_prompt: int) -> None:
                n = 0
                self.send({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
                for piece in (first, *()), pieces:
                    for delta in piece:
                        if "error" in delta:
                            self.send(delta)
                            return
                        if "cut" in delta:
                            return
                        n += 1
                        self.send({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
                self.send({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
                details = {"cached_tokens": 7}
                usage = {"prompt_tokens": n_prompt, "completion_tokens": n, "prompt_tokens_details": details}
                usage["completion_tokens_details"] = {"reasoning_tokens": 3}
                usage["cache"] = {"state_bytes": 3 << 19, "kv_bytes": 5 << 10}
                self.send({"choices": [], "usage": usage})
                self.wfile.write(b"data: [DONE]\n\n")

            def send(self, data: Piece) -> None:
                # a comment first, as servers send to keep a connection
                self.wfile.write(b": waiting\n\ndata: " + json.dumps(data).encode() + b"\n\n")
                self.wfile.flush()

        return Handler


def says(*texts: str, reasoning: tuple[str, ...] = (), last_after_s: float = 0.0) -> Script:
    """A script that says the same each time; what comes in one piece of the network has no speed."""

    def script(_: dict[str, Any]) -> Iterator[Piece]:
        yield from ({"reasoning_content": text} for text in reasoning)
        yield from ({"content": text} for text in texts[:-1])
        time.sleep(last_after_s)
        yield {"content": texts[-1]}

    return script

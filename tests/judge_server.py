"""An OpenAI-compatible endpoint on loopback whose replies a test writes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

# From the question: a text and the distribution of its only token (None: no log-probabilities), or a status with an
# error message.
Script = Callable[[str], tuple[str, Mapping[str, float] | None] | tuple[int, str]]


@contextmanager
def judge_server(script: Script) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yields the base URL, and the bodies that are asked for."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bodies.append({**body, "key": self.headers["Authorization"]})
            first, second = script(body["messages"][0]["content"])
            if isinstance(first, int):
                self._send(first, {"error": {"message": second}})
                return
            choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
            choice["message"] = {"role": "assistant", "content": first}
            if isinstance(second, Mapping) and body.get("logprobs"):
                top = [{"token": token, "logprob": math.log(share), "bytes": None} for token, share in second.items()]
                choice["logprobs"] = {"content": [{**top[0], "token": first, "top_logprobs": top}]}
            self._send(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})

        def _send(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", bodies
    finally:
        server.shutdown()
        server.server_close()

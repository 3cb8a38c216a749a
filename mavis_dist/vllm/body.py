"""ASGI middleware for vLLM's server, which lets it take the body of this project's own endpoint:
`--middleware mavis_dist.vllm.body.SteeredBody`. No import of vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from mavis_dist.vllm.arguments import FIELDS, FOREIGN, WEIGHTS

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

PATHS = ("/v1/chat/completions", "/v1/completions")
OWN = ("top_k", "seed")  # fields that mean the same in vLLM


class SteeredBody:
    """Moves the steering of a body, such as `objective_weights`, into its `vllm_xargs`; other bodies pass unchanged."""

    def __init__(self, app: App):
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith(PATHS):
            await self._app(scope, receive, send)
            return
        content, messages = b"", []
        while True:
            message = await receive()
            messages.append(message)
            content += message.get("body", b"")
            if message["type"] != "http.request" or not message.get("more_body", False):
                break
        moved = moved_steering(content) if messages[-1]["type"] == "http.request" else content
        if moved is not content:
            length = (b"content-length", str(len(moved)).encode())
            scope["headers"] = [
                length if name == b"content-length" else (name, value) for name, value in scope["headers"]
            ]
            messages = [{"type": "http.request", "body": moved, "more_body": False}]

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, replay, send)


def moved_steering(content: bytes) -> bytes:
    """A body with its steering where vLLM expects it; what holds none, or is no body, as it is."""
    try:
        body = json.loads(content)
    except ValueError:
        return content  # vLLM says what is wrong with it
    if not isinstance(body, dict):
        return content
    names = [name for name in (*FIELDS, *FOREIGN) if name in body and name not in OWN]
    if not names:
        return content
    steering = {name: body.pop(name) for name in names}
    if isinstance(weights := steering.get(WEIGHTS), dict):
        steering[WEIGHTS] = [f"{name}={weight}" for name, weight in weights.items()]
    given = {name: value for name, value in steering.items() if value is not None}
    for name in FOREIGN.keys() & given.keys():
        given[name] = "given"  # refused by name, whatever it is
    body["vllm_xargs"] = given | (body.get("vllm_xargs") or {})
    return json.dumps(body).encode()

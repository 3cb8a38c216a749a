"""Bodies of this project's endpoint, on their way into vLLM's server. Without vLLM."""

from __future__ import annotations

import asyncio
import json

import pytest

from mavis_dist.vllm.body import SteeredBody, moved_steering


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            {"objective_weights": {"brief": 0.7, "kind": 1}, "beta": 4, "top_k": 9, "seed": 1},
            {"top_k": 9, "seed": 1, "vllm_xargs": {"objective_weights": ["brief=0.7", "kind=1"], "beta": 4}},
        ),
        (
            {"objective_weights": {"brief": 1}, "tilt_cap": None, "vllm_xargs": {"session_id": "x"}},
            {"vllm_xargs": {"objective_weights": ["brief=1"], "session_id": "x"}},
        ),
        ({"preferences": [{"text": "Be kind."}]}, {"vllm_xargs": {"preferences": "given"}}),
    ],
)
def test_steering_is_moved_to_where_vllm_reads_it(body, expected):
    assert json.loads(moved_steering(json.dumps(body).encode())) == expected


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"model": "x", "seed": 3}', b"\xff"])
def test_other_bodies_stay_as_they_are(content):
    assert moved_steering(content) is content


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/other/v1/completions", "/v1/embeddings"])
@pytest.mark.parametrize("num_parts", [1, 3])
def test_the_server_receives_one_body_and_what_follows(path, num_parts):
    content = json.dumps({"prompt": "x" * 50, "objective_weights": {"brief": 1}}).encode()
    size = len(content) // num_parts + 1
    parts = [content[i : i + size] for i in range(0, len(content), size)]
    messages = [{"type": "http.request", "body": p, "more_body": i < len(parts) - 1} for i, p in enumerate(parts)]
    messages.append({"type": "http.disconnect"})
    received, headers = [], {}

    async def app(scope, receive, send):
        headers.update(scope["headers"])
        while (message := await receive())["type"] == "http.request":
            received.append(message["body"])

    async def receive():
        return messages.pop(0)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [(b"content-length", b"%d" % len(content))]}
    asyncio.run(SteeredBody(app)(scope, receive, None))
    whole = b"".join(received)
    assert whole == (content if path.endswith("embeddings") else moved_steering(content))
    assert int(headers[b"content-length"]) == len(whole)


def test_a_client_that_leaves_early_is_passed_on():
    messages = [{"type": "http.request", "body": b'{"objective', "more_body": True}, {"type": "http.disconnect"}]
    received = []

    async def app(scope, receive, send):
        received.extend([await receive(), await receive()])

    async def receive():
        return messages.pop(0)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    asyncio.run(SteeredBody(app)(scope, receive, None))
    assert [message["type"] for message in received] == ["http.request", "http.disconnect"]

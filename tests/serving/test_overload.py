"""More requests than two base replicas have room for, over real HTTP."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack, suppress

import httpx
import pytest

CHAT = "/v1/chat/completions"
MOST = 40  # requests of 16 rows, of which two replicas hold a few


@pytest.fixture
def wide(served_config) -> dict:
    messages = [{"role": "user", "content": "Hello there"}]
    return {"model": served_config.base.model, "messages": messages, "max_tokens": 400, "n": 16, "user": "greedy"}


def idle_after_s(http: httpx.Client, url: str) -> float:
    """Seconds until both base replicas, which take turns in answering, are idle."""
    began, idle_since, num_idle = time.monotonic(), 0.0, 0
    while num_idle < 8:
        assert time.monotonic() - began < 20
        load = http.get(f"{url}/health").json()
        if load["running"] + load["waiting"]:
            num_idle = 0
        else:
            idle_since = idle_since if num_idle else time.monotonic() - began
            num_idle += 1
        time.sleep(0.02)
    return idle_since


def test_excess_requests_are_refused_and_cancelled_ones_free_their_rows(http, url, wide):
    with ExitStack() as streams:
        num_accepted = -1
        response = httpx.Response(200)
        while response.status_code == 200 and num_accepted < MOST:
            response = streams.enter_context(http.stream("POST", url + CHAT, json={**wide, "stream": True}))
            num_accepted += 1
        # Two replicas write 16 rows each, and let one user wait for 32.
        assert 4 <= num_accepted < MOST
        assert response.status_code == 429
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert json.loads(response.read())["error"]["code"] == "overloaded"
        # Another user is let in, waits, and leaves: a stream, and an answer as a whole.
        other = {**wide, "user": "modest", "n": 1}
        with http.stream("POST", url + CHAT, json={**other, "stream": True}) as response:
            assert response.status_code == 200
        with suppress(httpx.ReadTimeout):
            http.post(url + CHAT, json=other, timeout=0.3)
    assert idle_after_s(http, url) < 3  # a fraction of what the answers would take if they were written to their ends
    answer = http.post(url + CHAT, json={**wide, "max_tokens": 2, "n": 1})
    assert answer.status_code == 200, answer.text

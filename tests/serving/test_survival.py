"""The death of a replica during an answer changes no token."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest
import ray
from ray.util.state import list_actors

LONG = {
    "messages": [{"role": "user", "content": "Tell me more"}],
    "max_tokens": 100,
    "top_k": 20,
    "objective_weights": {"positive": 1.0, "brief": 1.0},
}


def replica_pids(application: str, deployment: str) -> list[int]:
    actors = list_actors(ray.get_runtime_context().gcs_address, filters=[("state", "=", "ALIVE")])
    return [actor.pid for actor in actors if actor.name and f"{application}#{deployment}#" in actor.name]


def kill_during(http: httpx.Client, url: str, body: dict, pids: list[int]) -> dict:
    """The choice of a streamed answer during which processes die; checks that the stream ends as it should."""
    text, endings = "", []
    with http.stream("POST", f"{url}/v1/chat/completions", json={**body, "stream": True}) as response:
        lines = list(_kill_on_the_way(response, pids))
    assert lines[-1] == "[DONE]"
    for line in lines[:-1]:
        chunk = json.loads(line)
        assert "error" not in chunk, chunk
        [choice] = chunk["choices"]
        text += choice["delta"].get("content", "")
        if choice["finish_reason"]:
            endings.append(choice)
    [ending] = endings
    return {**ending, "text": text}


def _kill_on_the_way(response: httpx.Response, pids: list[int]) -> Iterator[str]:
    for count, line in enumerate(line for line in response.iter_lines() if line):
        if count == 20:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        yield line.removeprefix("data: ")


def whole_text(http: httpx.Client, url: str, body: dict) -> str:
    return http.post(f"{url}/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]


@pytest.fixture
def body(served_config):
    return {**LONG, "model": served_config.base.model, "seed": 11}


def test_killing_the_only_value_replica_of_an_objective_changes_no_token(http, url, body):
    expected = whole_text(http, url, body)
    victims = replica_pids("value-brief", "Value")
    assert len(victims) == 1
    assert kill_during(http, url, body, victims)["text"] == expected


def test_killing_a_base_replica_changes_no_token(http, url, body):
    bodies = [{**body, "seed": seed, "guide_every": 1 + seed % 2} for seed in range(4)]
    # An answer that ends by a stop string looks for it across the move.
    bodies[0]["stop"] = whole_text(http, url, bodies[0])[90:94]
    # One with preferences sums the rewards of its tokens again.
    bodies[2]["preferences"] = bodies[3]["preferences"] = [{"text": "Be brief.", "weight": 2}, {"text": "Be kind."}]
    expected = [whole_text(http, url, body) for body in bodies]
    victims = replica_pids("main", "Base")[:1]
    with ThreadPoolExecutor(len(bodies)) as pool:
        choices = list(pool.map(lambda body: kill_during(http, url, body, victims), bodies))
    assert [choice["text"] for choice in choices] == expected
    # The divergence spent before a death is not known: at least one answer moved, and says so.
    assert None in [choice["mavis"]["divergence"] for choice in choices]

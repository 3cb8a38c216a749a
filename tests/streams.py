"""Answers of a running service, also while processes of it die."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import httpx
import psutil
import ray
from ray.util.state import list_actors

Body = dict[str, Any]
BLOW = 20  # the line of a stream before which the blow falls
LONG: Body = {
    "messages": [{"role": "user", "content": "Tell me more"}],
    "max_tokens": 100,
    "top_k": 20,
    "objective_weights": {"positive": 1.0, "brief": 1.0},
}


def replica_pids(application: str, deployment: str) -> list[int]:
    actors = list_actors(ray.get_runtime_context().gcs_address, filters=[("state", "=", "ALIVE")])
    return [actor.pid for actor in actors if actor.name and f"{application}#{deployment}#" in actor.name]


def whole_text(http: httpx.Client, url: str, body: Body) -> str:
    text: str = http.post(f"{url}/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    return text


def cpu_seconds(pids: Sequence[int]) -> dict[int, float]:
    """What each process that still runs has used so far."""
    used = {}
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            used[pid] = sum(psutil.Process(pid).cpu_times()[:2])
    return used


def kill_busiest(since: dict[int, float]) -> None:
    """Kills that of the processes which has used most CPU since `cpu_seconds`."""
    used = cpu_seconds(list(since))
    _kill([max(used, key=lambda pid: used[pid] - since[pid])])


def kill_during(http: httpx.Client, url: str, body: Body, pids: Sequence[int]) -> Body:
    """As `strike_during`; the processes die."""
    return strike_during(http, url, body, partial(_kill, pids))


def strike_during(http: httpx.Client, url: str, body: Body, strike: Callable[[], None]) -> Body:
    """The choice of a streamed answer with a blow on the way; checks that the stream ends as it should."""
    text, endings = "", []
    with http.stream("POST", f"{url}/v1/chat/completions", json={**body, "stream": True}) as response:
        lines = list(_struck(response, strike))
    assert lines[-1] == "[DONE]"
    assert len(lines) > BLOW
    for line in lines[:-1]:
        chunk = json.loads(line)
        assert "error" not in chunk, chunk
        [choice] = chunk["choices"]
        text += choice["delta"].get("content", "")
        if choice["finish_reason"]:
            endings.append(choice)
    [ending] = endings
    return {**ending, "text": text}


def _struck(response: httpx.Response, strike: Callable[[], None]) -> Iterator[str]:
    for count, line in enumerate(line for line in response.iter_lines() if line):
        if count == BLOW:
            strike()
        yield line.removeprefix("data: ")


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

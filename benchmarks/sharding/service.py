"""A service whose only base replica is a group, one process of which is killed during an answer."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common.command import say
from benchmarks.common.service import processes, service, service_config
from mavis_dist.config import Config

QUESTION = "What are good ways to spend a rainy afternoon?"
TOKENS = 120
KILLED_AT = 20  # tokens of the answer
FOLLOWER = "ray::Follower"  # begins the titles of processes other than the leader


def measure(config: Config, size: int) -> dict[str, Any]:
    """The longest wait between two tokens of a stream that has lost a process, and whether its text is the same."""
    settings = {"placement": "colocated", "cpus_per_replica": 0.1, "base_replicas": 1, "max_tokens": TOKENS}
    served = service_config(config, Path(config.storage) / config.run, **settings)
    base = config.base.model_copy(update={"dtype": "float32", "tensor_parallel": size})
    served = served.model_copy(update={"base": base})
    body = {
        "model": config.base.model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": TOKENS,
        "seed": 1,
        "objective_weights": dict.fromkeys(config.objectives, 1.0),
        "stream": True,
    }
    with service(served) as url, httpx.Client(timeout=300, trust_env=False) as http:
        undisturbed, _ = _read(http, url, body, is_struck=False)
        struck, waits = _read(http, url, body, is_struck=True)
    found = {"is_same": struck == undisturbed, "longest_wait_s": max(waits), "words": len(struck.split())}
    say(str(found))
    return {"lost_process": found}


def _read(http: httpx.Client, url: str, body: dict[str, Any], is_struck: bool) -> tuple[str, list[float]]:
    """The text of a streamed answer, and the seconds between its parts; raises RuntimeError if it fails."""
    parts: list[str] = []
    times: list[float] = []
    with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        for line in filter(None, response.iter_lines()):
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                return "".join(parts), [after - before for before, after in itertools.pairwise(times)]
            chunk = json.loads(data)
            if "error" in chunk:
                raise RuntimeError(f"the stream ends with {chunk['error']}")
            parts.append(chunk["choices"][0]["delta"].get("content", ""))
            times.append(time.monotonic())
            if is_struck and len(parts) == KILLED_AT:
                processes(FOLLOWER)[0].kill()
    raise RuntimeError("the stream ends without [DONE]")

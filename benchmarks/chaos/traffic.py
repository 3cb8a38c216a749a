"""Mixed traffic for a given time: answers, streams, refused requests, and clients that disconnect early.

Imports no Ray.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import aiohttp

from benchmarks.common.http_load import CHAT, COMPLETIONS, RETRY_PAUSE_S

PREFERENCES = [{"text": "Be brief.", "weight": 2}, {"text": "Be kind."}]
TIMEOUT_S = 120.0
MANY = 16  # answers at once for one user: some of them are refused with 429
OK, REFUSED, DISCONNECTED = "ok", "refused", "disconnected"
EXPECTED = (OK, REFUSED, DISCONNECTED)


@dataclass(frozen=True)
class Kind:
    """A kind of request."""

    body: Mapping[str, Any]
    path: str = CHAT
    statuses: tuple[int, ...] = (200, 429)  # that are expected
    disconnects_after: int | None = None  # events of the stream; None: the client reads to the end


WEIGHTS = {"objective_weights": {"positive": 2, "brief": 1}}
KINDS = {
    "stream": Kind({**WEIGHTS, "stream": True}),
    "whole answer": Kind(WEIGHTS),
    "stream with preferences": Kind({**WEIGHTS, "preferences": PREFERENCES, "stream": True}),
    "preferences": Kind({"preferences": PREFERENCES, "n": 2}),
    "base model": Kind({"logprobs": True, "top_logprobs": 5}),
    "text": Kind({**WEIGHTS, "scorer": "full", "logprobs": 2, "stream": True}, COMPLETIONS),
    "many answers": Kind({**WEIGHTS, "n": MANY, "user": "greedy"}),
    "immediate disconnect": Kind({**WEIGHTS, "stream": True, "n": 3}, disconnects_after=0),
    "early disconnect": Kind({**WEIGHTS, "preferences": PREFERENCES, "stream": True}, disconnects_after=4),
    "unknown objective": Kind({"objective_weights": {"fame": 1}}, statuses=(400,)),
    "unknown field": Kind({"frequency": 1}, statuses=(400,)),
    "unknown model": Kind({"model": "none"}, statuses=(404,)),
}


def run_traffic(
    process: ProcessPoolExecutor, url: str, model: str, tokens: int, num_clients: int, seconds: float, seed: int
) -> Future[Counter[tuple[str, str]]]:
    """Clients that send random kinds of requests one after the other; returns how often each (kind, end) occurred.

    An end is one of EXPECTED or describes the failure.
    """
    return process.submit(_run_traffic, url, model, tokens, num_clients, seconds, seed)


def _run_traffic(
    url: str, model: str, tokens: int, num_clients: int, seconds: float, seed: int
) -> Counter[tuple[str, str]]:
    async def client(session: aiohttp.ClientSession, source: random.Random, ends: Counter[tuple[str, str]]) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            name = source.choice(list(KINDS))
            prompt, limit = "Tell me more. " * source.randrange(1, 5), source.randrange(1, tokens + 1)
            body = request_body(KINDS[name], model, prompt, limit, source.randrange(2**32))
            end = await send(session, KINDS[name], body)
            ends[name, end] += 1
            if end == REFUSED:
                await asyncio.sleep(RETRY_PAUSE_S)

    async def run() -> Counter[tuple[str, str]]:
        ends: Counter[tuple[str, str]] = Counter()
        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
            sources = [random.Random(f"{seed}-{number}") for number in range(num_clients)]
            await asyncio.gather(*(client(session, source, ends) for source in sources))
        return ends

    return asyncio.run(run())


def request_body(kind: Kind, model: str, prompt: str, tokens: int, seed: int) -> dict[str, Any]:
    text = {"prompt": prompt} if kind.path == COMPLETIONS else {"messages": [{"role": "user", "content": prompt}]}
    return {"model": model, **text, "max_tokens": tokens, "seed": seed, **kind.body}


async def send(session: aiohttp.ClientSession, kind: Kind, body: Mapping[str, Any]) -> str:
    """Send a request and return how it ended."""
    try:
        async with session.post(kind.path, json=body) as response:
            if response.status not in kind.statuses:
                return f"status {response.status}: {(await response.text())[:200]}"
            if response.status == 429:
                return REFUSED
            if response.status != 200:
                return OK
            if kind.disconnects_after is not None:
                for _ in range(2 * kind.disconnects_after):  # every event is a line and an empty one
                    await response.content.readline()
                response.close()
                return DISCONNECTED
            text = await response.text()
    except (aiohttp.ClientError, asyncio.TimeoutError) as error:
        return f"{type(error).__name__}: {error}"
    if body.get("stream"):
        return OK if text.endswith("data: [DONE]\n\n") else f"truncated: {text[-200:]}"
    return OK if len(json.loads(text)["choices"]) == body.get("n", 1) else f"incomplete: {text[:200]}"

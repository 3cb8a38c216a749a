"""A mixture of all that clients do, for as long as it takes: answers, streams, refusals, and leaving early.

Knows nothing of Ray.
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

from benchmarks.common.http_load import CHAT, TEXTS

SENTENCES = [{"text": "Be brief.", "weight": 2}, {"text": "Be kind."}]
PATIENCE_S = 120.0
MANY = 16  # answers at once, of one user: some of them are refused with 429
PAUSE_S = 0.5  # of who is turned away
RIGHT = ("right", "turned away", "left")


@dataclass(frozen=True)
class Kind:
    """One way to ask. `leaves_after`: events of the stream, after which the client is gone; none: it stays."""

    body: Mapping[str, Any]
    path: str = CHAT
    statuses: tuple[int, ...] = (200, 429)  # that are right
    leaves_after: int | None = None


WEIGHTS = {"objective_weights": {"positive": 2, "brief": 1}}
KINDS = {
    "stream": Kind({**WEIGHTS, "stream": True}),
    "whole answer": Kind(WEIGHTS),
    "stream with sentences": Kind({**WEIGHTS, "preferences": SENTENCES, "stream": True}),
    "sentences": Kind({"preferences": SENTENCES, "n": 2}),
    "the base model": Kind({"logprobs": True, "top_logprobs": 5}),
    "text": Kind({**WEIGHTS, "scorer": "full", "logprobs": 2, "stream": True}, TEXTS),
    "many answers": Kind({**WEIGHTS, "n": MANY, "user": "greedy"}),
    "leaves at once": Kind({**WEIGHTS, "stream": True, "n": 3}, leaves_after=0),
    "leaves early": Kind({**WEIGHTS, "preferences": SENTENCES, "stream": True}, leaves_after=4),
    "no such objective": Kind({"objective_weights": {"fame": 1}}, statuses=(400,)),
    "no such field": Kind({"frequency": 1}, statuses=(400,)),
    "no such model": Kind({"model": "none"}, statuses=(404,)),
}


def mixed(
    process: ProcessPoolExecutor, url: str, model: str, tokens: int, num_clients: int, seconds: float, seed: int
) -> Future[Counter[tuple[str, str]]]:
    """Clients that ask at random, each for what it likes when it has its answer: how many (kind, end) there were.

    Ends are those of RIGHT, or say what went wrong.
    """
    return process.submit(_mixed, url, model, tokens, num_clients, seconds, seed)


def _mixed(url: str, model: str, tokens: int, num_clients: int, seconds: float, seed: int) -> Counter[tuple[str, str]]:
    async def client(session: aiohttp.ClientSession, source: random.Random, ends: Counter[tuple[str, str]]) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            name = source.choice(list(KINDS))
            prompt, limit = "Tell me more. " * source.randrange(1, 5), source.randrange(1, tokens + 1)
            body = question(KINDS[name], model, prompt, limit, source.randrange(2**32))
            ending = await end(session, KINDS[name], body)
            ends[name, ending] += 1
            if ending == "turned away":
                await asyncio.sleep(PAUSE_S)

    async def run() -> Counter[tuple[str, str]]:
        ends: Counter[tuple[str, str]] = Counter()
        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=PATIENCE_S)
        async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
            sources = [random.Random(f"{seed}-{number}") for number in range(num_clients)]
            await asyncio.gather(*(client(session, source, ends) for source in sources))
        return ends

    return asyncio.run(run())


def question(kind: Kind, model: str, prompt: str, tokens: int, seed: int) -> dict[str, Any]:
    """The body of a request."""
    asked = {"prompt": prompt} if kind.path == TEXTS else {"messages": [{"role": "user", "content": prompt}]}
    return {"model": model, **asked, "max_tokens": tokens, "seed": seed, **kind.body}


async def end(session: aiohttp.ClientSession, kind: Kind, body: Mapping[str, Any]) -> str:
    """How a request ended."""
    try:
        async with session.post(kind.path, json=body) as response:
            if response.status not in kind.statuses:
                return f"status {response.status}: {(await response.text())[:200]}"
            if response.status == 429:
                return "turned away"
            if response.status != 200:
                return "right"
            if kind.leaves_after is not None:
                for _ in range(2 * kind.leaves_after):  # every event is a line and an empty one
                    await response.content.readline()
                response.close()
                return "left"
            text = await response.text()
    except (aiohttp.ClientError, asyncio.TimeoutError) as error:
        return f"{type(error).__name__}: {error}"
    if body.get("stream"):
        return "right" if text.endswith("data: [DONE]\n\n") else f"cut: {text[-200:]}"
    return "right" if len(json.loads(text)["choices"]) == body.get("n", 1) else f"not whole: {text[:200]}"

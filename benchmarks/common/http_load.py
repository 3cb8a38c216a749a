"""A load generator: many streams from one event loop, in a separate process. Imports no Ray.

Closed loop: a fixed number of clients, each of which sends its next request when it has its answer. Open loop: requests
arrive at given times whether the service keeps up or not, as those of real users do.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import aiohttp
import numpy as np

Body = dict[str, Any]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PERCENTILES = (50, 95, 99)
RETRY_PAUSE_S = 0.5
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


@dataclass
class Outcome:
    """One request as its client saw it. Times are seconds since the load started."""

    body_index: int
    started: float
    ended: float = 0.0
    first: float | None = None  # time of the first text
    last: float | None = None
    status: int | None = None  # None: no response
    retry_after: str | None = None
    num_tokens: int = 0
    text: str = ""
    finish: str | None = None
    is_done: bool = False  # the stream ended in [DONE]
    error: str | None = None  # an error event in the stream
    broken: str | None = None  # how the connection failed
    timed_out: bool = False  # the client closed the connection

    @property
    def is_whole(self) -> bool:
        return self.is_done and self.finish is not None and self.error is None

    @property
    def is_retryable(self) -> bool:
        """The same request may succeed later."""
        return self.status is None or self.status == 429 or self.status >= 500

    @property
    def time_to_first(self) -> float | None:
        return None if self.first is None else self.first - self.started

    @property
    def time_per_token(self) -> float | None:
        if self.first is None or self.last is None or self.num_tokens < 2:
            return None
        return (self.last - self.first) / (self.num_tokens - 1)


@dataclass(frozen=True)
class Load:
    """All requests of a closed or open loop."""

    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0
    cpu_s: float = 0.0  # CPU time of the client process
    started: float = 0.0  # time.perf_counter(), which all processes of a machine share

    @property
    def num_tokens(self) -> int:
        """Of whole answers."""
        return sum(outcome.num_tokens for outcome in self.outcomes if outcome.is_whole)


@contextmanager
def client_process() -> Iterator[ProcessPoolExecutor]:
    """A process for the clients, which must not share an interpreter with the code under measurement."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        process.submit(time.perf_counter).result()  # waits until it has started
        yield process


def closed_loop(
    process: ProcessPoolExecutor, url: str, bodies: Sequence[Body], num_clients: int, timeout_s: float = 600.0
) -> Future[Load]:
    """Send every body once, and again after a refusal until `timeout_s` has passed."""
    return process.submit(_closed_loop, url, list(bodies), num_clients, timeout_s)


def open_loop(
    process: ProcessPoolExecutor, url: str, bodies: Sequence[Body], times: Sequence[float], window_s: float
) -> Future[Load]:
    """Send a request at each of the times, cycling through the bodies; open requests are closed with the window."""
    return process.submit(_open_loop, url, list(bodies), list(times), window_s)


def arrivals(per_s: float, window_s: float, seed: int) -> list[float]:
    """Arrival times of a Poisson process, in seconds."""
    source, times, now = random.Random(seed), [], 0.0
    while (now := now + source.expovariate(per_s)) < window_s:
        times.append(now)
    return times


def percentiles(seconds: Sequence[float | None]) -> dict[str, float]:
    """In milliseconds; nan without values."""
    known = [s for s in seconds if s is not None]
    figures = np.percentile(known, PERCENTILES).tolist() if known else [float("nan")] * len(PERCENTILES)
    return {f"p{q}": 1000 * figure for q, figure in zip(PERCENTILES, figures, strict=True)}


def summary(load: Load) -> dict[str, Any]:
    """Rates and times of whole answers, and counts of the others."""
    whole = [outcome for outcome in load.outcomes if outcome.is_whole]
    return {
        "requests": len(load.outcomes),
        "whole": len(whole),
        "tokens_per_s": load.num_tokens / load.seconds,
        "requests_per_s": len(whole) / load.seconds,
        "first_token_ms": percentiles([outcome.time_to_first for outcome in whole]),
        "token_ms": percentiles([outcome.time_per_token for outcome in whole]),
        "answer_ms": percentiles([outcome.ended - outcome.started for outcome in whole]),
        **failures(load.outcomes),
    }


def failures(outcomes: Sequence[Outcome]) -> dict[str, int]:
    refused = [outcome for outcome in outcomes if outcome.status == 429]
    return {
        "refused_429": len(refused),
        "refused_429_with_retry_after": sum(outcome.retry_after is not None for outcome in refused),
        "answered_5xx": sum(outcome.status is not None and outcome.status >= 500 for outcome in outcomes),
        "ended_in_error": sum(outcome.error is not None for outcome in outcomes),
        "broken": sum(outcome.broken is not None for outcome in outcomes),
    }


def goodput(load: Load, ramp_s: float, window_s: float) -> float:
    """Tokens/s of whole answers that ended after the ramp and within the window."""
    ended = [o for o in load.outcomes if o.is_whole and ramp_s <= o.ended <= window_s]
    return sum(outcome.num_tokens for outcome in ended) / (window_s - ramp_s)


def _closed_loop(url: str, bodies: list[Body], num_clients: int, timeout_s: float) -> Load:
    async def one_client(session: aiohttp.ClientSession, clock: Clock, indices: Iterator[int]) -> list[Outcome]:
        outcomes = []
        for index in indices:
            deadline = clock() + timeout_s
            outcomes.append(await _ask(session, clock, url, bodies[index], index, timeout_s))
            while outcomes[-1].is_retryable and clock() < deadline:
                await asyncio.sleep(RETRY_PAUSE_S)
                outcomes.append(await _ask(session, clock, url, bodies[index], index, timeout_s))
        return outcomes

    async def load(session: aiohttp.ClientSession, clock: Clock) -> list[Outcome]:
        indices = iter(range(len(bodies)))  # shared: every client takes the next one
        parts = await asyncio.gather(*(one_client(session, clock, indices) for _ in range(num_clients)))
        return [outcome for part in parts for outcome in part]

    return _timed(load)


def _open_loop(url: str, bodies: list[Body], times: list[float], window_s: float) -> Load:
    async def load(session: aiohttp.ClientSession, clock: Clock) -> list[Outcome]:
        tasks = []
        for number, at in enumerate(times):
            await asyncio.sleep(at - clock())
            index = number % len(bodies)
            tasks.append(asyncio.create_task(_ask(session, clock, url, bodies[index], index, window_s - clock())))
        return list(await asyncio.gather(*tasks))

    return _timed(load)


Clock = Callable[[], float]


def _timed(load: Callable[[aiohttp.ClientSession, Clock], Any]) -> Load:
    async def run() -> Load:
        started, cpu_started = time.perf_counter(), time.process_time()
        connector = aiohttp.TCPConnector(limit=0)  # with a limit, clients would wait for each other
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
            outcomes = await load(session, lambda: time.perf_counter() - started)
        return Load(outcomes, time.perf_counter() - started, time.process_time() - cpu_started, started)

    return asyncio.run(run())


async def _ask(
    session: aiohttp.ClientSession, clock: Clock, url: str, body: Body, index: int, timeout_s: float
) -> Outcome:
    outcome = Outcome(index, clock())
    try:
        await asyncio.wait_for(_stream(session, clock, url, body, outcome), max(timeout_s, 0.001))
    except asyncio.TimeoutError:
        outcome.timed_out = True
    except (aiohttp.ClientError, OSError) as error:
        outcome.broken = f"{type(error).__name__}: {error}"
    outcome.ended = clock()
    return outcome


async def _stream(session: aiohttp.ClientSession, clock: Clock, url: str, body: Body, outcome: Outcome) -> None:
    async with session.post(f"{url}{CHAT}", json={**body, **STREAMED}) as response:
        outcome.status, outcome.retry_after = response.status, response.headers.get("Retry-After")
        if response.status != 200:
            await response.read()
            return
        async for line in response.content:
            if line.startswith(b"data: "):
                record(outcome, line[len(b"data: ") :].strip(), clock())


def record(outcome: Outcome, data: bytes, now: float) -> None:
    """Add one event of a stream to the outcome."""
    if data == b"[DONE]":
        outcome.is_done = True
        return
    event = json.loads(data)
    if "error" in event:
        outcome.error = event["error"]["message"]
        return
    if event.get("usage"):
        outcome.num_tokens = event["usage"]["completion_tokens"]
    for choice in event["choices"]:
        text = choice["delta"].get("content")
        if text:
            outcome.text += text
            outcome.first = now if outcome.first is None else outcome.first
            outcome.last = now
        outcome.finish = choice["finish_reason"] or outcome.finish

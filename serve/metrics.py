"""What the service tells Prometheus, through Ray: every node of the cluster offers the figures of its processes.

The engine's thread only adds up plain numbers; a thread of its own hands them to Ray once a second. Sums that have to
be exact are counters: Ray's histograms know their buckets alone.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import httpx
import ray
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, Response
from ray.serve import metrics as ray_metrics
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mavis_dist.decode import Choice, Engine, Guide, Request, Update
from mavis_dist.store.values import objective_of
from serve.answers import OpenStream

REPORT_EVERY_S = 1.0
SCRAPE_LIMIT_S = 3.0
PREFIX = "ray_mavis_"  # Ray puts its own name before ours
NO_OBJECTIVE = "none"


@dataclass(frozen=True)
class Metric:
    """One family of figures. Beside its own labels Ray adds application, deployment and replica."""

    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()  # of a histogram's buckets


METRICS = {
    # The gateway's
    "mavis_requests": Metric("counter", "HTTP requests answered, by route and status", ("route", "status")),
    "mavis_answers": Metric("counter", "answers that ended, but for those whose client left", ("finish",)),
    "mavis_failovers": Metric("counter", "answers that another base replica went on with after their first token"),
    "mavis_first_token_seconds": Metric(
        "histogram",
        "from asking a base replica to the first token, waiting for a row included",
        bounds=(0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 20, 40, 80),
    ),
    "mavis_token_seconds": Metric(
        "histogram",
        "time per token of an answer after its first one",
        bounds=(0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.35, 0.5, 1, 2, 5),
    ),
    # The base replica's
    "mavis_tokens": Metric("counter", "tokens written"),
    "mavis_rows_in_use": Metric("gauge", "rows of the base model in use: one per answer, one more per sentence"),
    "mavis_rows_waiting": Metric("gauge", "rows that requests wait for"),
    "mavis_cached_tokens": Metric("gauge", "tokens whose keys and values the base model holds"),
    "mavis_step_seconds": Metric("counter", "time in steps of the engine"),
    "mavis_guide_seconds": Metric("counter", "time of it that the engine spent on value models, or waiting for them"),
    # Of finished answers, as far as this base replica wrote them
    "mavis_guided_tokens": Metric("counter", "tokens that value models had a say in"),
    "mavis_candidates": Metric("counter", "candidates that value models were asked about"),
    "mavis_objective_tokens": Metric("counter", "tokens of answers that use an objective", ("objective",)),
    "mavis_divergence_nats": Metric(
        "histogram",
        "divergence an answer spent; one that uses several objectives counts for each",
        ("objective",),
        (0.1, 0.25, 0.5, 1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 128),
    ),
}


class Record(Protocol):
    """Adds to a counter, sets a gauge, or puts one figure into a histogram."""

    def __call__(self, name: str, value: float, **labels: str) -> None: ...


class RayRecord:
    """Record of a process that Ray runs."""

    def __init__(self) -> None:
        self._metrics = {name: _create(name, metric) for name, metric in METRICS.items()}

    def __call__(self, name: str, value: float, **labels: str) -> None:
        metric = self._metrics[name]
        if isinstance(metric, ray_metrics.Histogram):
            metric.observe(value, labels)
        elif isinstance(metric, ray_metrics.Gauge):
            metric.set(value, labels)
        elif value > 0:
            metric.inc(value, labels)


def _create(name: str, metric: Metric) -> ray_metrics.Counter | ray_metrics.Gauge | ray_metrics.Histogram:
    labels: Any = metric.labels  # Ray's annotation allows for one label only
    if metric.kind == "histogram":
        return ray_metrics.Histogram(name, metric.meaning, list(metric.bounds), labels)
    kind = ray_metrics.Gauge if metric.kind == "gauge" else ray_metrics.Counter
    return kind(name, metric.meaning, labels)


# --- the base replica ---------------------------------------------------------------------------------------------


class TimedGuide:
    """A guide that knows how long its callers have waited for it."""

    CALLS = frozenset({"open", "extend", "score", "keep", "close"})

    def __init__(self, guide: Guide):
        self._guide = guide
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._guide, name)
        if name not in self.CALLS:
            return attribute

        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return attribute(*arguments)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


class WatchedEngine(Engine):
    """An engine that adds up what it does; `take` may be called from any thread."""

    def __init__(self, base: Any, guide: Guide | None = None, *arguments: Any, **settings: Any):
        self._timed = TimedGuide(guide) if guide else None
        super().__init__(base, self._timed, *arguments, **settings)
        self._lock = threading.Lock()
        self._sums: dict[tuple[str, str], float] = defaultdict(float)  # (name, objective or "") -> amount
        self._divergences: list[tuple[str, float]] = []  # (objective, nats)

    def step(self) -> list[Update]:
        began, guide_began = time.perf_counter(), self._guide_seconds
        updates = super().step()
        seconds, guide_seconds = time.perf_counter() - began, self._guide_seconds - guide_began
        with self._lock:
            self._sums["mavis_step_seconds", ""] += seconds
            self._sums["mavis_guide_seconds", ""] += guide_seconds
            self._sums["mavis_tokens", ""] += sum(len(update.tokens) for update in updates)
            for update in updates:
                if update.finished is not None:
                    self._add(update.finished)
        return updates

    def take(self, record: Record) -> None:
        """Hand over what was added up since the last time."""
        with self._lock:
            sums, divergences = self._sums, self._divergences
            self._sums, self._divergences = defaultdict(float), []
        for (name, objective), amount in sums.items():
            record(name, amount, **({"objective": objective} if objective else {}))
        for objective, nats in divergences:
            record("mavis_divergence_nats", nats, objective=objective)

    @property
    def _guide_seconds(self) -> float:
        return self._timed.seconds if self._timed else 0.0

    def _add(self, choice: Choice) -> None:
        self._sums["mavis_candidates", ""] += sum(choice.num_scored)
        self._sums["mavis_guided_tokens", ""] += sum(count > 0 for count in choice.num_scored)
        objectives = [objective_of(version) for version in choice.values]
        for objective, values in zip(objectives, choice.values.values(), strict=True):
            self._sums["mavis_objective_tokens", objective] += len(values)
        if math.isfinite(choice.divergence):  # at temperature 0 there is none
            self._divergences += [(objective, choice.divergence) for objective in objectives or (NO_OBJECTIVE,)]


class Loaded(Protocol):
    @property
    def load(self) -> tuple[int, int]:
        """Rows in use and rows waited for."""
        ...


def report(engine: WatchedEngine, loop: Loaded, record: Record | None = None) -> None:
    """Hand over what an engine does, every second, as long as the process lives."""
    threading.Thread(target=_report_forever, args=(engine, loop, record or RayRecord()), daemon=True).start()


def _report_forever(engine: WatchedEngine, loop: Loaded, record: Record) -> None:
    while True:
        time.sleep(REPORT_EVERY_S)
        report_once(engine, loop, record)


def report_once(engine: WatchedEngine, loop: Loaded, record: Record) -> None:
    in_use, waiting = loop.load
    record("mavis_rows_in_use", in_use)
    record("mavis_rows_waiting", waiting)
    record("mavis_cached_tokens", engine.num_cached_tokens)
    engine.take(record)


# --- the gateway --------------------------------------------------------------------------------------------------


def watched_streams(open_stream: OpenStream, record: Record) -> OpenStream:
    """The same streams, with times and ends told."""

    async def watched(request: Request, *rest: Any) -> AsyncGenerator[Any, None]:
        began, first, last, num_tokens = time.perf_counter(), 0.0, 0.0, 0
        if request.answer:
            record("mavis_failovers", 1)
        source = open_stream(request, *rest)
        try:
            async for message in source:
                for update in message if isinstance(message, list) else ():
                    last = time.perf_counter()
                    if update.tokens and not num_tokens:
                        first = last
                        if not request.answer:
                            record("mavis_first_token_seconds", first - began)
                    num_tokens += len(update.tokens)
                    if update.finished is not None and update.finished.finish is not None:
                        record("mavis_answers", 1, finish=update.finished.finish.value)
                yield message
        finally:
            await source.aclose()
            if num_tokens > 1:
                record("mavis_token_seconds", (last - first) / (num_tokens - 1))

    return watched


def watched_api(api: FastAPI, record: Record) -> FastAPI:
    """The same routes, counted, and GET /metrics."""
    api.add_middleware(_CountRequests, record=record)

    @api.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        addresses = await asyncio.to_thread(_node_addresses)
        pages = await asyncio.gather(*map(_page, addresses))
        return PlainTextResponse(merged(pages), media_type="text/plain; version=0.0.4")

    return api


class _CountRequests:
    def __init__(self, app: ASGIApp, record: Record):
        self._app, self._record = app, record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = "left"  # before there was an answer

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except Exception:
            status = "500" if status == "left" else status
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")  # the template: paths may be anything
            self._record("mavis_requests", 1, route=route, status=status)


def _node_addresses() -> list[str]:
    return [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes() if node["Alive"]]


async def _page(address: str) -> str:
    """What a node tells Prometheus; a comment that says so where it does not."""
    try:
        async with httpx.AsyncClient(timeout=SCRAPE_LIMIT_S, trust_env=False) as client:
            return (await client.get(f"http://{address}/metrics")).raise_for_status().text
    except httpx.HTTPError as error:
        return f"# {address} does not answer: {type(error).__name__}\n"


def merged(pages: Sequence[str]) -> str:
    """One page of this service's families; a family's figures of all nodes stand together, as the format wants it."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    complaints = []
    for page in pages:
        family = ""
        for line in page.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = line.split(maxsplit=3)[2]
                if line not in heads.setdefault(family, []):
                    heads[family].append(line)
            elif line.startswith("#"):
                complaints.append(line)
            elif line:
                samples.setdefault(family, []).append(line)
    ours = [line for name in sorted(samples) if name.startswith(PREFIX) for line in (*heads[name], *samples[name])]
    return "".join(f"{line}\n" for line in (*complaints, *ours))

"""The service's metrics: the engine's sums, the gateway's times, one page, and a dashboard of it."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import aclosing
from functools import partial

import httpx
import pytest
from fastapi import FastAPI, HTTPException

from mavis_dist.decode import Engine, LocalGuide, Request, SamplingParams
from serve.base import watched_engine
from serve.base.engine_loop import EngineLoop, stream
from serve.base.watched_engine import WatchedEngine, report_once
from serve.gateway import watched
from serve.gateway.streams import watched_streams
from serve.gateway.watched import merged, watched_api
from serve.messages import ANYBODY, Admission, BaseLost
from serve.metrics import METRICS, NO_OBJECTIVE
from tests.fakes import tiny_base, tiny_value
from tests.root import ROOT

DASHBOARD = ROOT / "k8s" / "grafana-dashboard.json"


class Figures:
    """A Record that keeps what it is given, and refuses what Ray would refuse."""

    def __init__(self) -> None:
        self.all: list[tuple[str, float, dict[str, str]]] = []

    def __call__(self, name: str, value: float, **labels: str) -> None:
        assert tuple(labels) == METRICS[name].labels
        self.all.append((name, value, labels))

    def of(self, name: str, **labels: str) -> list[float]:
        return [value for n, value, given in self.all if n == name and given == labels]


def make_engine(rows: int = 4) -> WatchedEngine:
    return WatchedEngine(tiny_base(), LocalGuide({"a": tiny_value(1), "b": tiny_value(2)}), rows)


def make_request(id: str, weights: dict[str, float], max_tokens: int = 8, **fields) -> Request:
    return Request(id, (5, 6, 7), weights, beta=2.0, params=SamplingParams(max_tokens, seed=3), **fields)


REQUESTS = [make_request("1", {"a": 1.0}), make_request("2", {"a": 1.0, "b": 3.0}), make_request("3", {})]


def test_watching_an_engine_changes_no_token() -> None:
    plain = Engine(tiny_base(), LocalGuide({"a": tiny_value(1), "b": tiny_value(2)}), 4).generate(REQUESTS)
    assert [[c.tokens for c in choices] for choices in make_engine().generate(REQUESTS)] == [
        [c.tokens for c in choices] for choices in plain
    ]


def test_an_engine_adds_up_what_it_did() -> None:
    engine, figures = make_engine(), Figures()
    [[one], [two], [three]] = engine.generate(REQUESTS)
    report_once(engine, engine, figures)
    assert figures.of("mavis_tokens") == [sum(len(choice.tokens) for choice in (one, two, three))]
    assert figures.of("mavis_objective_tokens", objective="a") == [len(one.tokens) + len(two.tokens)]
    assert figures.of("mavis_objective_tokens", objective="b") == [len(two.tokens)]
    assert figures.of("mavis_candidates") == [sum(one.num_scored) + sum(two.num_scored)]
    assert figures.of("mavis_guided_tokens") == [len(one.tokens) + len(two.tokens)]
    assert figures.of("mavis_divergence_nats", objective="b") == [two.divergence]
    assert figures.of("mavis_divergence_nats", objective=NO_OBJECTIVE) == [0.0]
    [guide_s], [step_s] = figures.of("mavis_guide_seconds"), figures.of("mavis_step_seconds")
    assert 0 < guide_s < step_s


def test_nothing_is_recorded_twice() -> None:
    engine, figures = make_engine(), Figures()
    engine.generate(REQUESTS)
    engine.take(figures)
    figures.all.clear()
    engine.take(figures)
    assert figures.all == []


def test_gauges_have_the_current_values() -> None:
    engine, figures = make_engine(rows=2), Figures()
    for request in REQUESTS:
        engine.submit(request)
    engine.step()
    report_once(engine, engine, figures)
    # Two rows hold the prompt and are about to be given their second token.
    assert (figures.of("mavis_rows_in_use"), figures.of("mavis_rows_waiting")) == ([2], [1])
    assert figures.of("mavis_cached_tokens") == [2 * len(REQUESTS[0].prompt)]


def test_a_guide_is_timed_also_when_it_fails() -> None:
    class Broken(LocalGuide):
        def score(self, *_):
            raise ZeroDivisionError

    guide = watched_engine.TimedGuide(Broken({"a": tiny_value(1)}))
    assert guide.objectives == ("a",)
    assert guide.seconds == 0
    with pytest.raises(ZeroDivisionError):
        guide.score([1], [1], None)
    assert guide.seconds > 0


async def _read(open_stream, request: Request, num_messages: int | None = None) -> list[int]:
    tokens: list[int] = []
    async with aclosing(open_stream(request, ANYBODY)) as messages:
        async for message in messages:
            for update in message if isinstance(message, list) else ():
                tokens += update.tokens
            if num_messages is not None and len(tokens) >= num_messages:
                break
    return tokens


def test_times_ends_and_failovers_of_streams_are_recorded() -> None:
    loop, figures = EngineLoop(make_engine()), Figures()
    watched = watched_streams(partial(stream, loop), figures)
    request = make_request("r", {"a": 1.0}, max_tokens=20)
    begun = asyncio.run(_read(watched, request, 5))
    assert figures.of("mavis_answers", finish="length") == []
    assert len(figures.of("mavis_first_token_seconds")) == 1
    rest = asyncio.run(_read(watched, make_request("again", {"a": 1.0}, max_tokens=20, answer=tuple(begun))))
    assert len(begun) + len(rest) == 20
    assert figures.of("mavis_answers", finish="length") == [1]
    assert figures.of("mavis_failovers") == [1]
    assert len(figures.of("mavis_first_token_seconds")) == 1, "a resumed answer had its first token long ago"
    assert all(seconds > 0 for seconds in figures.of("mavis_token_seconds"))
    assert len(figures.of("mavis_token_seconds")) == 2
    loop.stop()


def test_the_loss_of_a_base_replica_passes_through() -> None:
    async def lost(request: Request, _: Admission):
        yield request
        raise BaseLost("killed")

    with pytest.raises(BaseLost, match="killed"):
        asyncio.run(_read(watched_streams(lost, Figures()), REQUESTS[0]))


NODE = """\
# HELP ray_mavis_tokens_total tokens written
# TYPE ray_mavis_tokens_total counter
ray_mavis_tokens_total{{replica="{0}"}} 5.0
# HELP ray_node_mem_used Memory
# TYPE ray_node_mem_used gauge
ray_node_mem_used 1.0
# HELP ray_mavis_token_seconds time per token
# TYPE ray_mavis_token_seconds histogram
ray_mavis_token_seconds_bucket{{le="0.1",replica="{0}"}} 1.0
ray_mavis_token_seconds_count{{replica="{0}"}} 1.0
"""


def test_nodes_make_one_page() -> None:
    page = merged([NODE.format("x"), "# 10.0.0.7:1 does not answer: ConnectError\n", NODE.format("y")])
    assert page.splitlines() == [
        "# 10.0.0.7:1 does not answer: ConnectError",
        "# HELP ray_mavis_token_seconds time per token",
        "# TYPE ray_mavis_token_seconds histogram",
        'ray_mavis_token_seconds_bucket{le="0.1",replica="x"} 1.0',
        'ray_mavis_token_seconds_count{replica="x"} 1.0',
        'ray_mavis_token_seconds_bucket{le="0.1",replica="y"} 1.0',
        'ray_mavis_token_seconds_count{replica="y"} 1.0',
        "# HELP ray_mavis_tokens_total tokens written",
        "# TYPE ray_mavis_tokens_total counter",
        'ray_mavis_tokens_total{replica="x"} 5.0',
        'ray_mavis_tokens_total{replica="y"} 5.0',
    ]


def test_requests_are_counted_by_route_and_status(monkeypatch: pytest.MonkeyPatch) -> None:
    api, figures = FastAPI(), Figures()

    @api.get("/models/{name}")
    async def model(name: str) -> str:
        if name == "broken":
            raise RuntimeError
        if name == "missing":
            raise HTTPException(404)
        return name

    watched_api(api, figures)
    monkeypatch.setattr(watched, "_node_addresses", lambda: ["127.0.0.1:1"])

    async def ask() -> str:
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            for path in ("/models/a", "/models/b", "/models/missing", "/models/broken", "/secret/path"):
                await client.get(path)
            return (await client.get("/metrics")).text

    assert asyncio.run(ask()).startswith("# 127.0.0.1:1 does not answer")
    counted = [tuple(labels.values()) for name, _, labels in figures.all if name == "mavis_requests"]
    route = "/models/{name}"
    assert counted == [
        (route, "200"),
        (route, "200"),
        (route, "404"),
        (route, "500"),
        ("other", "404"),
        ("/metrics", "200"),
    ]


SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
EXPORTED = {f"ray_{name}{suffix}" for name, metric in METRICS.items() for suffix in SUFFIXES[metric.kind]}


def test_the_dashboard_knows_every_metric_and_no_other() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    used = {name for query in queries for name in re.findall(r"\bray_\w+", query)}
    assert used <= EXPORTED
    assert {name for name in METRICS if not any(u.startswith(f"ray_{name}") for u in used)} == set()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_labels_in_the_dashboard_exist() -> None:
    known = {"le", "application", "deployment", "replica"} | {n for m in METRICS.values() for n in m.labels}
    text = DASHBOARD.read_text()
    used = {label.strip() for group in re.findall(r"by ?\(([^)]*)\)", text) for label in group.split(",")}
    assert used <= known

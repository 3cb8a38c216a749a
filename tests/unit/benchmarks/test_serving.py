"""The load generator records what happened, the arithmetic is right, and no failed stream counts as a whole one."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import cast

import pytest
from aiohttp import web

from benchmarks.chaos import killer as killer_module
from benchmarks.chaos import kills
from benchmarks.chaos.killer import CONTROL_STORE, NODE, WEIGHTS, Killer
from benchmarks.chaos.stream_outcomes import StreamOutcome, classify, count_outcomes, is_kept
from benchmarks.common import http_load
from benchmarks.common.http_load import Load, Outcome, arrivals, failures, goodput, percentiles, record, summary
from benchmarks.common.interleave import Speeds
from benchmarks.serving import __main__ as serving
from benchmarks.serving import vllm_server
from benchmarks.serving.__main__ import Cost, Measured, headlines
from mavis_dist.config import Config
from mavis_dist.sections import Base
from mavis_dist.types import UserError

TEXT = "one two three"
WHOLE = Outcome(0, 1.0, 3.0, 1.5, 2.5, 200, num_tokens=5, text=TEXT, finish="stop", is_done=True)
CUT = replace(WHOLE, text="one t", finish=None, is_done=False)


# --- arithmetic ---------------------------------------------------------------------------------------------------


def test_times_of_one_answer() -> None:
    assert WHOLE.time_to_first == 0.5
    assert WHOLE.time_per_token == 0.25
    assert replace(WHOLE, num_tokens=1).time_per_token is None
    assert Outcome(0, 1.0).time_to_first is None


def test_percentiles_are_of_what_is_known_in_milliseconds() -> None:
    figures = percentiles([i / 1000 for i in range(101)] + [None])
    assert figures == pytest.approx({"p50": 50.0, "p95": 95.0, "p99": 99.0})
    assert all(figure != figure for figure in percentiles([None]).values())


def test_requests_arrive_at_the_rate_asked_for_and_at_random() -> None:
    times = arrivals(50.0, 100.0, seed=1)
    assert len(times) == pytest.approx(5000, rel=0.05)  # 3.5 standard deviations
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] < 100.0
    gaps = [b - a for a, b in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance == pytest.approx(mean**2, rel=0.15), "exponential gaps"
    assert times == arrivals(50.0, 100.0, seed=1) != arrivals(50.0, 100.0, seed=2)


def test_only_whole_answers_count() -> None:
    refused = Outcome(0, 0.0, status=429, retry_after="1")
    load = Load([WHOLE, CUT, replace(CUT, error="no"), refused, Outcome(0, 0.0, status=503)], seconds=2.0)
    figures = summary(load)
    assert (figures["requests"], figures["whole"], figures["tokens_per_s"]) == (5, 1, 2.5)
    assert figures["answer_ms"]["p50"] == 2000
    assert failures(load.outcomes) == {
        "refused_429": 1,
        "refused_429_with_retry_after": 1,
        "answered_5xx": 1,
        "ended_in_error": 1,
        "broken": 0,
    }


def test_goodput_leaves_out_the_ramp_the_unfinished_and_the_late() -> None:
    ended = [replace(WHOLE, ended=at) for at in (1.0, 2.0, 9.0, 10.0, 11.0)]
    assert goodput(Load([*ended, replace(CUT, ended=5.0)], 12.0), ramp_s=2.0, window_s=10.0) == 3 * 5 / 8


def test_headlines_compare_the_placements_by_the_engine() -> None:
    def measured(http: float, engine: float) -> Measured:
        return Measured(Speeds({"http": [http], "engine": [engine]}), Cost(100, 0.5, 0.1))

    figures = headlines(
        {"colocated": measured(80, 100), "replicas": measured(30, 50)}, {"1x": {"goodput": 40}, "10x": {"goodput": 38}}
    )
    assert figures["http_vs_engine"] == pytest.approx(0.8)
    assert figures["replicas_vs_colocated"] == pytest.approx(0.75)
    assert figures["goodput_kept"] == pytest.approx({"1x": 1.0, "10x": 0.95})
    assert figures["cpu_ms_per_token"] == pytest.approx({"service": 5.0, "clients": 1.0})


def test_servers_are_compared_by_medians_and_with_the_better_vllm() -> None:
    times = {"p50": 200.0, "p95": 300.0, "p99": 400.0}
    loads = {
        name: [{"tokens_per_s": float(t), "first_token_ms": times, "token_ms": times} for t in speeds]
        for name, speeds in {"this service": (300, 500), "vllm": (100, 300), "vllm_all_cores": (400, 100)}.items()
    }
    assert serving.server_headlines(loads) == {"http_vs_vllm_server": 400 / 250}
    assert serving.server_rows(loads)[1] == ("vllm", [200.0, 200.0, 400.0, 200.0, 400.0])
    assert serving.server_headlines({}) == {}


def test_every_server_runs_alone_and_in_reverse_order_the_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    @contextmanager
    def server(name: str) -> Iterator[str]:
        events.append(f"{name} starts")
        yield name
        events.append(f"{name} ends")

    def load(process: object, url: str, bodies: list[dict], clients: int) -> Future[Load]:
        events.append(f"{len(bodies)} to {url}")
        answered: Future[Load] = Future()
        answered.set_result(Load(seconds=1.0))
        return answered

    monkeypatch.setattr(vllm_server, "service", lambda config: server("ours"))
    monkeypatch.setattr(vllm_server, "vllm", lambda model, python, settings, rows: server(f"vllm {len(settings)}"))
    monkeypatch.setattr(vllm_server, "closed_loop", load)
    process, python = cast(ProcessPoolExecutor, None), Path("python")
    found = vllm_server.compare(
        process, Config.model_construct(base=Base(model="tiny")), python, 2, [{}] * 6, clients=2, repetitions=2
    )
    assert {name: len(loads) for name, loads in found.items()} == {"this service": 2, "vllm": 2, "vllm_all_cores": 2}
    order = ["ours", "vllm 3", "vllm 5"]
    assert events == [
        event
        for name in [*order, *reversed(order)]
        for event in (f"{name} starts", f"2 to {name}", f"6 to {name}", f"{name} ends")
    ]


def test_an_unguided_request_is_the_same_to_every_server() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "seed": 1}
    assert serving.unguided({**body, "objective_weights": {"a": 1.0}}, "Be brief.") == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "max_tokens": 8,
        "temperature": 1.0,
        "top_k": 40,
        "top_p": 1.0,
    }


def test_a_missing_run_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        serving.main(["--run", "runs/no-such-run"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: runs/no-such-run is not a finished run")


# --- streams ------------------------------------------------------------------------------------------------------


def chunk(text: str, finish: str | None = None) -> dict:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}


USAGE = {"choices": [], "usage": {"completion_tokens": 3}}
BEGINNING = [chunk("one "), chunk("two ")]
ENDING = [chunk("three", "stop"), USAGE, "[DONE]"]


def test_events_add_up_to_an_answer() -> None:
    outcome = Outcome(0, 0.0)
    for now, event in enumerate([chunk(""), *BEGINNING, *ENDING]):
        record(outcome, event.encode() if isinstance(event, str) else json.dumps(event).encode(), float(now))
    assert (outcome.text, outcome.finish, outcome.num_tokens, outcome.is_done) == (TEXT, "stop", 3, True)
    assert (outcome.first, outcome.last) == (1.0, 3.0)


async def answer(request: web.Request) -> web.StreamResponse:
    """The body names the fault."""
    trouble = (await request.json())["trouble"]
    if trouble == "full":
        return web.json_response({}, status=429, headers={"Retry-After": "2"})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    events = {
        "none": [*BEGINNING, *ENDING],
        "cut": BEGINNING,
        "short": [chunk("one ", "stop"), USAGE, "[DONE]"],
        "endless": BEGINNING,
        "broken": BEGINNING,
        "error": [*BEGINNING, {"error": {"message": "gave up"}}],
        "wrong": [chunk("one "), chunk("four"), *ENDING],
    }
    for event in events[trouble]:
        text = event if isinstance(event, str) else json.dumps(event)
        await response.write(f"data: {text}\n\n".encode())
    if trouble == "endless":
        await asyncio.sleep(60)
    if trouble == "broken":
        await asyncio.sleep(0.1)  # until the events are sent
        assert request.transport is not None
        request.transport.abort()
    return response


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server in a thread whose streams end in every possible way."""
    loop = asyncio.new_event_loop()

    async def start() -> tuple[web.AppRunner, str]:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        return runner, f"http://{host}:{port}"

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runner, address = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    yield address
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


ENDS = {
    "none": StreamOutcome.WHOLE,
    "cut": StreamOutcome.TRUNCATED,
    "short": StreamOutcome.TRUNCATED,
    "endless": StreamOutcome.HUNG,
    "broken": StreamOutcome.BROKEN,
    "error": StreamOutcome.ERROR,
    "wrong": StreamOutcome.WRONG,
    "full": StreamOutcome.REFUSED,
}


def test_every_end_of_a_stream_is_classified(url: str) -> None:
    load = http_load._closed_loop(url, [{"trouble": trouble} for trouble in ENDS], num_clients=8, timeout_s=1.0)
    seen = {list(ENDS)[o.body_index]: classify(o, TEXT) for o in load.outcomes}
    assert seen == ENDS
    full = [o for o in load.outcomes if o.status == 429]
    assert {o.retry_after for o in full} == {"2"}
    assert 2 <= len(full) <= 4, "refused requests are retried"
    assert load.num_tokens == 9, "the load generator trusts [DONE]; only classify compares texts"


def test_a_missing_service_counts_as_a_refusal() -> None:
    outcomes = http_load._closed_loop("http://127.0.0.1:1", [{"trouble": "none"}], 1, timeout_s=0.1).outcomes
    assert {(o.status, classify(o, TEXT)) for o in outcomes} == {(None, StreamOutcome.REFUSED)}


def test_open_loop_sends_on_time_and_disconnects_at_the_end(url: str) -> None:
    bodies = [{"trouble": "none"}, {"trouble": "endless"}]
    load = http_load._open_loop(url, bodies, [0.0, 0.1, 0.2, 0.3], window_s=0.6)
    assert [outcome.body_index for outcome in load.outcomes] == [0, 1, 0, 1]
    assert [outcome.is_whole for outcome in load.outcomes] == [True, False, True, False]
    assert [outcome.timed_out for outcome in load.outcomes] == [False, True, False, True]
    for outcome, at in zip(load.outcomes, (0.0, 0.1, 0.2, 0.3), strict=True):
        assert at <= outcome.started < at + 0.1
    assert 0.5 < load.seconds < 5


# --- outcomes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (WHOLE, StreamOutcome.WHOLE),
        (CUT, StreamOutcome.TRUNCATED),
        (replace(CUT, is_done=True), StreamOutcome.TRUNCATED),
        (replace(CUT, is_done=True, finish="stop"), StreamOutcome.TRUNCATED),
        (replace(CUT, text=""), StreamOutcome.TRUNCATED),
        (replace(CUT, broken="reset"), StreamOutcome.BROKEN),
        (replace(CUT, error="gave up"), StreamOutcome.ERROR),
        (replace(CUT, timed_out=True), StreamOutcome.HUNG),
        (replace(WHOLE, text=TEXT + "!"), StreamOutcome.WRONG),
        (replace(CUT, text="two", broken="reset"), StreamOutcome.WRONG),
        (replace(CUT, text="two", error="gave up"), StreamOutcome.WRONG),
        (Outcome(0, 0.0), StreamOutcome.REFUSED),
        (Outcome(0, 0.0, status=503), StreamOutcome.REFUSED),
        (Outcome(0, 0.0, timed_out=True), StreamOutcome.HUNG),
    ],
)
def test_classify(outcome: Outcome, expected: StreamOutcome) -> None:
    assert classify(outcome, TEXT) is expected


def test_one_silent_failure_fails_the_part() -> None:
    other = replace(WHOLE, body_index=1, text="other")
    assert is_kept(count_outcomes([WHOLE, other, replace(CUT, broken="reset")], [TEXT, "other"]))
    assert not is_kept(count_outcomes([WHOLE, other, CUT], [TEXT, "other"]))
    assert not is_kept(count_outcomes([WHOLE, other], [TEXT, TEXT]))


def test_every_stream_is_counted_once() -> None:
    outcomes = [WHOLE, WHOLE, CUT, replace(CUT, broken="reset"), Outcome(0, 0.0, status=503)]
    results = kills.summarise(outcomes, [TEXT], {"base replica": 2, NODE: 1}, unexplained=0)
    assert (results["kills"], results["streams_opened"], results["turned_away"]) == (3, 4, 1)
    assert (results["silent_truncations"], results["broken_connections"], results["wrong_tokens"]) == (1, 1, 0)
    assert sum(results["outcomes"].values()) == len(outcomes)
    assert results["whole_share"] == 0.5
    assert not results["is_kept"]


def test_expected_answers_must_be_whole() -> None:
    assert kills.texts([WHOLE], 1) == [TEXT]
    with pytest.raises(UserError, match="1 of 1 answers failed before anything was killed"):
        kills.texts([CUT], 1)


class Victim:
    def __init__(self, pid: int, dead: list[int]):
        self.pid, self._dead = pid, dead

    def kill(self) -> None:
        self._dead.append(self.pid)


class FakeHead:
    def __init__(self) -> None:
        self.is_down, self.num_restarts = False, 0

    def kill_gcs_server(self, check_alive: bool) -> None:
        self.is_down = True

    def start_gcs_server(self) -> None:
        assert self.is_down
        self.is_down = False
        self.num_restarts += 1


class FakeCluster:
    def __init__(self) -> None:
        self.head_node = FakeHead()
        self.worker_nodes = {Victim(0, [])}
        self.num_lost = self.num_new = 0
        next(iter(self.worker_nodes)).node_id = "a"

    def remove_node(self, node, allow_graceful: bool) -> None:
        assert not allow_graceful
        self.num_lost += 1

    def add_node(self, num_cpus: float) -> None:
        self.num_new += 1


@pytest.mark.parametrize(
    ("kind", "at", "num"),
    [("gateway", 101, 0), ("proxy", 90, 0), (NODE, 102.9, 0), ("base replica", 102, 1), ("gateway", 104, 1)],
)
def test_a_broken_connection_is_explained_by_the_death_of_its_holder(kind: str, at: float, num: int) -> None:
    broken = replace(CUT, broken="reset", ended=3.0)
    load = Load([broken, WHOLE, replace(broken, status=None)], started=100.0)
    assert kills.num_unexplained(load, [(1.0, "gateway"), (at, kind)]) == num
    assert not kills.summarise([broken], [TEXT], {}, unexplained=1)["is_kept"]


@pytest.mark.parametrize("keeps_state", [False, True])
def test_a_seed_determines_the_kills_and_every_kind_occurs(monkeypatch: pytest.MonkeyPatch, keeps_state: bool) -> None:
    def run_killer() -> tuple[list[int], Killer, FakeCluster]:
        dead: list[int] = []
        pids = {title: 10 * number for number, title in enumerate(killer_module.TITLES.values())}
        monkeypatch.setattr(killer_module, "processes", lambda title: [Victim(pids[title] + i, dead) for i in range(3)])
        cluster = FakeCluster()
        killer = Killer(cluster, cpus_per_node=1, seed=4, keeps_state=keeps_state)
        killer.run(lambda: False, pause_s=0.0, limit=60)
        return dead, killer, cluster

    dead, killer, cluster = run_killer()
    assert killer.num_kills == 60
    assert {kind for _, kind in killer.kills} == WEIGHTS.keys() - (set() if keeps_state else {CONTROL_STORE})
    assert cluster.head_node.num_restarts == sum(kind == CONTROL_STORE for _, kind in killer.kills)
    assert len(dead) + cluster.num_lost + cluster.head_node.num_restarts == 60
    assert cluster.num_new == cluster.num_lost == sum(kind == NODE for _, kind in killer.kills)
    assert dead == run_killer()[0]


def test_a_kill_waits_for_the_recovery_from_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    dead: list[int] = []
    polls = iter(range(1000))
    kill_times: list[int] = []

    def processes(title: str) -> list[Victim]:
        now = next(polls)
        is_missing = bool(dead) and now < kill_times[-1] + 40
        return [] if is_missing else [Victim(1, dead)]

    def kill(self: Killer, title: str) -> bool:
        kill_times.append(next(polls))
        dead.append(1)
        return True

    monkeypatch.setattr(killer_module, "processes", processes)
    monkeypatch.setattr(killer_module, "POLL_S", 0.0)
    monkeypatch.setattr(killer_module, "WEIGHTS", {"proxy": 1})
    monkeypatch.setattr(Killer, "_kill", kill)
    Killer(FakeCluster(), 1).run(lambda: False, pause_s=0.0, limit=3)
    assert len(kill_times) == 3
    assert all(later - earlier >= 40 for earlier, later in pairwise(kill_times))


def test_the_wait_for_recovery_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    dead: list[int] = []
    monkeypatch.setattr(killer_module, "processes", lambda title: [] if dead else [Victim(1, dead)])
    monkeypatch.setattr(killer_module, "RECOVERY_S", 0.0)
    monkeypatch.setattr(killer_module, "WEIGHTS", {"proxy": 5, NODE: 5})
    killer = Killer(FakeCluster(), 1, seed=1)
    killer.run(lambda: False, pause_s=0.0, limit=3)
    assert killer.num_kills == 3


def test_no_kill_is_counted_if_nothing_was_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(killer_module, "processes", lambda title: [])
    monkeypatch.setattr(killer_module, "WEIGHTS", {"proxy": 1})
    killer = Killer(FakeCluster(), 1)
    assert killer.kill_one() is None
    assert killer.num_kills == 0

"""The load generator sees what happened, the arithmetic is right, and no bad stream is counted as a good one."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
from aiohttp import web

from benchmarks.chaos import killer, kills
from benchmarks.chaos.killer import MACHINE, WEIGHTS, Storm
from benchmarks.chaos.stream_outcomes import Verdict, is_kept, judge, tally
from benchmarks.common import http_load
from benchmarks.common.http_load import Load, Outcome, arrivals, failures, goodput, note, percentiles, summary
from benchmarks.common.interleave import Speeds
from benchmarks.serving import __main__ as serving
from benchmarks.serving.__main__ import Cost, Measured, headlines
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


def test_a_missing_run_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        serving.main(["--run", "runs/no-such-run"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: runs/no-such-run is no finished run")


# --- what a client sees -------------------------------------------------------------------------------------------


def chunk(text: str, finish: str | None = None) -> dict:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}


USAGE = {"choices": [], "usage": {"completion_tokens": 3}}
BEGINNING = [chunk("one "), chunk("two ")]
ENDING = [chunk("three", "stop"), USAGE, "[DONE]"]


def test_events_add_up_to_an_answer() -> None:
    outcome = Outcome(0, 0.0)
    for now, event in enumerate([chunk(""), *BEGINNING, *ENDING]):
        note(outcome, event.encode() if isinstance(event, str) else json.dumps(event).encode(), float(now))
    assert (outcome.text, outcome.finish, outcome.num_tokens, outcome.is_done) == (TEXT, "stop", 3, True)
    assert (outcome.first, outcome.last) == (1.0, 3.0)


async def answer(request: web.Request) -> web.StreamResponse:
    """What goes wrong is the question."""
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
        await asyncio.sleep(0.1)  # until what was written has left
        assert request.transport is not None
        request.transport.abort()
    return response


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server in a thread, whose answers end in all the ways there are."""
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
    "none": Verdict.WHOLE,
    "cut": Verdict.TRUNCATED,
    "short": Verdict.TRUNCATED,
    "endless": Verdict.HUNG,
    "broken": Verdict.BROKEN,
    "error": Verdict.ERROR,
    "wrong": Verdict.WRONG,
    "full": Verdict.REFUSED,
}


def test_every_end_of_a_stream_is_seen_for_what_it_is(url: str) -> None:
    load = http_load._closed_loop(url, [{"trouble": trouble} for trouble in ENDS], num_clients=8, patience_s=1.0)
    seen = {list(ENDS)[o.asked]: judge(o, TEXT) for o in load.outcomes}
    assert seen == ENDS
    full = [o for o in load.outcomes if o.status == 429]
    assert {o.retry_after for o in full} == {"2"}
    assert 2 <= len(full) <= 4, "who is turned away asks again"
    assert load.num_tokens == 9, "who says that it is done is believed, but for the judge"


def test_a_service_that_is_not_there_turns_clients_away() -> None:
    outcomes = http_load._closed_loop("http://127.0.0.1:1", [{"trouble": "none"}], 1, patience_s=0.1).outcomes
    assert {(o.status, judge(o, TEXT)) for o in outcomes} == {(None, Verdict.REFUSED)}


def test_open_loop_asks_when_it_is_time_and_leaves_at_the_end(url: str) -> None:
    bodies = [{"trouble": "none"}, {"trouble": "endless"}]
    load = http_load._open_loop(url, bodies, [0.0, 0.1, 0.2, 0.3], window_s=0.6)
    assert [outcome.asked for outcome in load.outcomes] == [0, 1, 0, 1]
    assert [outcome.is_whole for outcome in load.outcomes] == [True, False, True, False]
    assert [outcome.has_left for outcome in load.outcomes] == [False, True, False, True]
    for outcome, at in zip(load.outcomes, (0.0, 0.1, 0.2, 0.3), strict=True):
        assert at <= outcome.began < at + 0.1
    assert 0.5 < load.seconds < 5


# --- what became of it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "verdict"),
    [
        (WHOLE, Verdict.WHOLE),
        (CUT, Verdict.TRUNCATED),
        (replace(CUT, is_done=True), Verdict.TRUNCATED),
        (replace(CUT, is_done=True, finish="stop"), Verdict.TRUNCATED),
        (replace(CUT, text=""), Verdict.TRUNCATED),
        (replace(CUT, broken="reset"), Verdict.BROKEN),
        (replace(CUT, error="gave up"), Verdict.ERROR),
        (replace(CUT, has_left=True), Verdict.HUNG),
        (replace(WHOLE, text=TEXT + "!"), Verdict.WRONG),
        (replace(CUT, text="two", broken="reset"), Verdict.WRONG),
        (replace(CUT, text="two", error="gave up"), Verdict.WRONG),
        (Outcome(0, 0.0), Verdict.REFUSED),
        (Outcome(0, 0.0, status=503), Verdict.REFUSED),
        (Outcome(0, 0.0, has_left=True), Verdict.HUNG),
    ],
)
def test_verdicts(outcome: Outcome, verdict: Verdict) -> None:
    assert judge(outcome, TEXT) is verdict


def test_one_misled_client_is_enough() -> None:
    other = replace(WHOLE, asked=1, text="other")
    assert is_kept(tally([WHOLE, other, replace(CUT, broken="reset")], [TEXT, "other"]))
    assert not is_kept(tally([WHOLE, other, CUT], [TEXT, "other"]))
    assert not is_kept(tally([WHOLE, other], [TEXT, TEXT]))


def test_conclusions_count_every_stream_once() -> None:
    outcomes = [WHOLE, WHOLE, CUT, replace(CUT, broken="reset"), Outcome(0, 0.0, status=503)]
    results = kills.conclude(outcomes, [TEXT], {"base replica": 2, MACHINE: 1}, unexplained=0)
    assert (results["kills"], results["streams_opened"], results["turned_away"]) == (3, 4, 1)
    assert (results["silent_truncations"], results["broken_connections"], results["wrong_tokens"]) == (1, 1, 0)
    assert sum(results["verdicts"].values()) == len(outcomes)
    assert results["whole_share"] == 0.5
    assert not results["is_kept"]


def test_answers_to_compare_with_have_to_be_whole() -> None:
    assert kills.texts([WHOLE], 1) == [TEXT]
    with pytest.raises(UserError, match="1 of 1 answers failed before anything was killed"):
        kills.texts([CUT], 1)


class Victim:
    def __init__(self, pid: int, dead: list[int]):
        self.pid, self._dead = pid, dead

    def kill(self) -> None:
        self._dead.append(self.pid)


class Machines:
    def __init__(self) -> None:
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
    [("gateway", 101, 0), ("proxy", 90, 0), (MACHINE, 102.9, 0), ("base replica", 102, 1), ("gateway", 104, 1)],
)
def test_a_connection_breaks_because_of_who_held_it(kind: str, at: float, num: int) -> None:
    broken = replace(CUT, broken="reset", ended=3.0)
    load = Load([broken, WHOLE, replace(broken, status=None)], began=100.0)
    assert kills.num_unexplained(load, [(1.0, "gateway"), (at, kind)]) == num
    assert not kills.conclude([broken], [TEXT], {}, unexplained=1)["is_kept"]


def test_a_seed_decides_who_dies_and_every_kind_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def rage() -> tuple[list[int], Storm, Machines]:
        dead: list[int] = []
        pids = {title: 10 * number for number, title in enumerate(killer.TITLES.values())}
        monkeypatch.setattr(killer, "processes", lambda title: [Victim(pids[title] + i, dead) for i in range(3)])
        machines = Machines()
        raging = Storm(machines, cpus_per_machine=1, seed=4)
        raging.rage(lambda: False, pause_s=0.0, limit=60)
        return dead, raging, machines

    dead, raging, machines = rage()
    assert raging.num_kills == 60
    assert raging.kills.keys() == WEIGHTS.keys()
    assert len(dead) + machines.num_lost == 60
    assert machines.num_new == machines.num_lost == raging.kills[MACHINE]
    assert dead == rage()[0]


def test_a_storm_waits_until_the_dead_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    dead: list[int] = []
    polls = iter(range(1000))
    looks: list[int] = []  # when a strike chose its victim

    def processes(title: str) -> list[Victim]:
        now = next(polls)
        is_missing = bool(dead) and now < looks[-1] + 40
        return [] if is_missing else [Victim(1, dead)]

    def kill(self: Storm, title: str) -> bool:
        looks.append(next(polls))
        dead.append(1)
        return True

    monkeypatch.setattr(killer, "processes", processes)
    monkeypatch.setattr(killer, "POLL_S", 0.0)
    monkeypatch.setattr(killer, "WEIGHTS", {"proxy": 1})
    monkeypatch.setattr(Storm, "_kill", kill)
    Storm(Machines(), 1).rage(lambda: False, pause_s=0.0, limit=3)
    assert len(looks) == 3
    assert all(later - earlier >= 40 for earlier, later in pairwise(looks))


def test_a_storm_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    dead: list[int] = []
    monkeypatch.setattr(killer, "processes", lambda title: [] if dead else [Victim(1, dead)])
    monkeypatch.setattr(killer, "RECOVERY_S", 0.0)
    monkeypatch.setattr(killer, "WEIGHTS", {"proxy": 5, MACHINE: 5})
    raging = Storm(Machines(), 1, seed=1)
    raging.rage(lambda: False, pause_s=0.0, limit=3)
    assert raging.num_kills == 3


def test_nothing_is_counted_where_nothing_was_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(killer, "processes", lambda title: [])
    monkeypatch.setattr(killer, "WEIGHTS", {"proxy": 1})
    raging = Storm(Machines(), 1)
    assert raging.strike() is None
    assert raging.num_kills == 0

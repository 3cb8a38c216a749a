"""Those who judge the service do so rightly: memory that grows, answers that fail, requests that end as they should."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Iterator

import aiohttp
import httpx
import pytest
from hypothesis import strategies as st

from benchmarks.chaos import __main__ as chaos
from benchmarks.chaos import fuzz, soak, traffic
from benchmarks.chaos.fuzz import Answered, drawn, fault_of
from benchmarks.chaos.killer import TITLES
from benchmarks.chaos.memory import growth
from benchmarks.chaos.soak import left_held, total
from benchmarks.chaos.traffic import Kind
from serve.gateway.middleware import Edge
from tests.local import NAME, listening

LIMIT = 0.02
TIMES = [5.0 * i for i in range(360)]  # half an hour


def noisy(size_mb: float, per_hour_mb: float, warm_up_mb: float = 0.0) -> list[float]:
    """Garbage comes and goes, now and then a lot of it."""
    source = random.Random(0)
    peaks = [50.0 if source.random() < 0.05 else 0.0 for _ in TIMES]
    return [
        size_mb + per_hour_mb * at / 3600 - warm_up_mb * math.exp(-at / 60) + source.gauss(0, 2) + peak
        for at, peak in zip(TIMES, peaks, strict=True)
    ]


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "is_growing"),
    [
        (noisy(400, 0), False),
        (noisy(400, 0, warm_up_mb=80), False),
        (noisy(400, -60), False),
        (noisy(400, 12), False),  # 1 % in twenty minutes
        (noisy(400, 60), True),
        (noisy(100, 12), True),
    ],
)
def test_growth_is_told_from_noise_peaks_and_warming_up(sizes, is_growing):
    assert growth("base replica", TIMES, sizes).is_growing(LIMIT) is is_growing


def test_the_slope_is_that_of_the_line():
    line = growth("proxy", TIMES, [100 + at / 100 for at in TIMES])
    assert (line.per_hour_mb, line.low_mb, line.high_mb) == pytest.approx((36, 36, 36))
    assert line.share == pytest.approx(0.01 * (TIMES[-1] - TIMES[120]) / line.first_mb)


# --- soak ---------------------------------------------------------------------------------------------------------

SIZES = {(kind, pid): [100.0] * len(TIMES) for pid, kind in enumerate(TITLES)}
ENDS = {("stream", "right"): 90, ("leaves early", "left"): 9, ("many answers", "turned away"): 1}
IDLE = dict.fromkeys(soak.HELD, 0.0)


@pytest.mark.parametrize(
    ("sizes", "ends", "held", "is_kept"),
    [
        (SIZES, ENDS, IDLE, True),
        ({**SIZES, ("base replica", 99): noisy(400, 60)}, ENDS, IDLE, False),
        ({**SIZES, ("base replica", 99): [100.0]}, ENDS, IDLE, False),  # died, or was born
        (dict(list(SIZES.items())[1:]), ENDS, IDLE, False),  # a kind was never seen
        (SIZES, {**ENDS, ("stream", "cut: "): 1}, IDLE, False),
        (SIZES, ENDS, {**IDLE, "cached_tokens": 7.0}, False),
        (SIZES, ENDS, {**IDLE, "rows_in_use": math.nan}, False),  # not known
    ],
)
def test_a_soak_is_passed_by_what_is_steady_right_and_empty_in_the_end(sizes, ends, held, is_kept):
    results = soak.conclude(TIMES, sizes, ends, held, LIMIT)
    assert results["is_kept"] is is_kept
    assert results["requests"] == sum(ends.values())
    assert isinstance(soak.page({**results, "seed": 0, "scale": {"minutes": 30, "every_s": 5, "limit": 0.02}}), str)


def test_what_is_held_is_summed_over_replicas_and_unknown_where_nobody_tells():
    page = 'ray_a_rows{replica="1"} 2.0\nray_a_rows{replica="2"} 3\nray_a_rows_waiting{replica="1"} 9\n'
    assert total(page, "ray_a_rows") == 5
    assert math.isnan(total(page, "ray_b"))


def test_the_last_rows_may_take_a_moment():
    figures = iter([{"rows": 2.0}, {"rows": 0.0}, {"rows": 5.0}])
    assert left_held(lambda: next(figures), limit_s=60) == {"rows": 0.0}
    assert left_held(lambda: {"rows": 1.0}, limit_s=0) == {"rows": 1.0}


@pytest.fixture(scope="module")
def url(service) -> Iterator[str]:
    with listening(service.app(Edge(log_access=False))) as url:
        yield url


@pytest.mark.parametrize("name", traffic.KINDS.keys() - {"many answers"})  # more than a service this small writes
def test_all_kinds_of_requests_end_as_they_should(url, name):
    assert end_of(url, traffic.KINDS[name]) == ("right" if traffic.KINDS[name].leaves_after is None else "left")


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        (Kind({"n": traffic.MANY}), "status 400"),
        (Kind({}, statuses=(400,)), "status 200"),
        (Kind({}, path="/v1/nothing"), "status 404"),
    ],
)
def test_requests_that_do_not_end_as_they_should_are_seen(url, kind, end):
    assert end_of(url, kind).startswith(end)


def end_of(url: str, kind: Kind) -> str:
    async def ask() -> str:
        async with aiohttp.ClientSession(url) as session:
            return await traffic.end(session, kind, traffic.question(kind, NAME, "Hi", 8, 1))

    return asyncio.run(ask())


# --- fuzz ---------------------------------------------------------------------------------------------------------


def test_every_answer_is_counted_and_one_failure_is_enough():
    good = [Answered("description", "GET /", status) for status in (200, 200, 400)]
    results = fuzz.conclude(good, 200)
    assert results["statuses"] == {"description": {"200": 2, "400": 1}}
    assert (results["requests"], results["failures_5xx"], results["is_kept"]) == (3, 0, True)
    for status in (500, 503, None):
        worse = fuzz.conclude([*good, Answered("steering fields", "/v1", status, "{}", "")], 200)
        assert (worse["failures_5xx"], worse["is_kept"], len(worse["faults"])) == (1, False, 1)
    odd = fuzz.conclude([*good, Answered("description", "GET /", 200, "curl", "not as described")], 200)
    assert (odd["failures_5xx"], odd["not_as_described"], odd["is_kept"]) == (0, 1, False)
    assert not fuzz.conclude(good, 503)["is_kept"], "the service did not survive"


ERROR = {"error": {"message": "no", "type": "invalid_request_error", "param": None, "code": None}}
EVENTS = {"content-type": "text/event-stream; charset=utf-8"}


@pytest.mark.parametrize(
    ("response", "is_right"),
    [
        (httpx.Response(200, json={"choices": [{}]}), True),
        (httpx.Response(200, text="data: {}\n\ndata: [DONE]\n\n", headers=EVENTS), True),
        (httpx.Response(400, json=ERROR), True),
        (httpx.Response(200, json={"choices": []}), False),
        (httpx.Response(200, text="data: {}\n\n", headers=EVENTS), False),
        (httpx.Response(404, json={"detail": "Not Found"}), False),
        (httpx.Response(408, text="timeout"), False),
        (httpx.Response(500, json=ERROR), False),
    ],
)
def test_what_is_wrong_with_an_answer_is_seen(response, is_right):
    assert (fault_of(response) == "") is is_right


def test_a_seed_decides_what_is_asked():
    numbers = drawn(st.integers(), 50, 3)
    assert len(numbers) == 50
    assert numbers == drawn(st.integers(), 50, 3) != drawn(st.integers(), 50, 4)
    assert drawn(st.just(1), 50, 3) == [1], "where there are no more"


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("is_kept", "is_quick"), [(True, False), (False, False), (True, True), (False, True)])
def test_every_part_has_its_part_of_the_page_and_one_failure_fails(monkeypatch, tmp_path, is_kept, is_quick):
    page = tmp_path / "reliability.md"
    monkeypatch.setattr(chaos, "PAGE", page)
    for module, kept in ((fuzz, True), (soak, is_kept)):
        monkeypatch.setattr(module, "measure", lambda scale, seed, kept=kept: {"is_kept": kept, "scale": scale})
        monkeypatch.setattr(module, "page", lambda results: f"## {results['scale']}")
    asked = ["--parts", "fuzz,soak", "--minutes", "7", *(["--quick"] if is_quick else [])]
    if is_kept:
        chaos.main(asked)
    else:
        with pytest.raises(SystemExit) as end:
            chaos.main(asked)
        assert end.value.code == 1
    assert page.exists() is not is_quick
    if not is_quick:
        assert "minutes=7" in page.read_text()
        assert page.read_text().index("part: fuzz") < page.read_text().index("part: soak")


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        chaos.main(["--parts", "kills,floods"])
    assert end.value.code == 2
    assert "no such part: floods" in capsys.readouterr().err

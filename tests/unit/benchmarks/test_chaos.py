"""Growing memory, failed responses and unexpected ends of requests are recognised, and the pages show the figures."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import aiohttp
import httpx
import pytest
from hypothesis import strategies as st

from benchmarks.chaos import __main__ as chaos
from benchmarks.chaos import fuzz, kills, soak, traffic
from benchmarks.chaos.fuzz import FuzzResult, draw_examples, fault_of
from benchmarks.chaos.killer import TITLES
from benchmarks.chaos.memory import growth
from benchmarks.chaos.soak import total, wait_until_released
from benchmarks.chaos.traffic import Kind
from benchmarks.common import figures
from benchmarks.common.http_load import Outcome
from tests.local import NAME, listening

LIMIT = 0.02
TIMES = [5.0 * i for i in range(360)]  # half an hour


def noisy(size_mb: float, per_hour_mb: float, warm_up_mb: float = 0.0) -> list[float]:
    """Memory of a process with Gaussian noise and rare peaks."""
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
def test_growth_is_distinguished_from_noise_peaks_and_warm_up(sizes, is_growing):
    assert growth("base replica", TIMES, sizes).is_growing(LIMIT) is is_growing


def test_the_slope_is_that_of_the_line():
    line = growth("proxy", TIMES, [100 + at / 100 for at in TIMES])
    assert (line.per_hour_mb, line.low_mb, line.high_mb) == pytest.approx((36, 36, 36))
    assert line.share == pytest.approx(0.01 * (TIMES[-1] - TIMES[120]) / line.first_mb)


# --- soak ---------------------------------------------------------------------------------------------------------

SIZES = {(kind, pid): [100.0] * len(TIMES) for pid, kind in enumerate(TITLES)}
ENDS = {("stream", "ok"): 90, ("early disconnect", "disconnected"): 9, ("many answers", "refused"): 1}
IDLE = dict.fromkeys(soak.HELD, 0.0)


@pytest.mark.parametrize(
    ("sizes", "ends", "held", "is_kept"),
    [
        (SIZES, ENDS, IDLE, True),
        ({**SIZES, ("base replica", 99): noisy(400, 60)}, ENDS, IDLE, False),
        ({**SIZES, ("base replica", 99): [100.0]}, ENDS, IDLE, False),  # died or started in between
        (dict(list(SIZES.items())[1:]), ENDS, IDLE, False),  # a kind is missing
        (SIZES, {**ENDS, ("stream", "truncated: "): 1}, IDLE, False),
        (SIZES, ENDS, {**IDLE, "cached_tokens": 7.0}, False),
        (SIZES, ENDS, {**IDLE, "rows_in_use": math.nan}, False),  # unknown
    ],
)
def test_a_soak_passes_if_memory_is_steady_ends_are_expected_and_nothing_is_held(sizes, ends, held, is_kept):
    results = soak.summarise(TIMES, sizes, ends, held, LIMIT)
    assert results["is_kept"] is is_kept
    assert results["requests"] == sum(ends.values())


def test_held_resources_are_summed_over_replicas_and_nan_if_the_metric_is_missing():
    page = 'ray_a_rows{replica="1"} 2.0\nray_a_rows{replica="2"} 3\nray_a_rows_waiting{replica="1"} 9\n'
    assert total(page, "ray_a_rows") == 5
    assert math.isnan(total(page, "ray_b"))


def test_the_soak_waits_until_rows_are_released():
    figures = iter([{"rows": 2.0}, {"rows": 0.0}, {"rows": 5.0}])
    assert wait_until_released(lambda: next(figures), limit_s=60) == {"rows": 0.0}
    assert wait_until_released(lambda: {"rows": 1.0}, limit_s=0) == {"rows": 1.0}


@pytest.fixture(scope="module")
def url(service) -> Iterator[str]:
    with listening(service.app(log_access=False)) as url:
        yield url


@pytest.mark.parametrize("name", traffic.KINDS.keys() - {"many answers"})  # exceeds the limits of this small service
def test_all_kinds_of_requests_end_as_expected(url, name):
    assert end_of(url, traffic.KINDS[name]) == (
        "ok" if traffic.KINDS[name].disconnects_after is None else "disconnected"
    )


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        (Kind({"n": traffic.MANY}), "status 400"),
        (Kind({}, statuses=(400,)), "status 200"),
        (Kind({}, path="/v1/nothing"), "status 404"),
    ],
)
def test_unexpected_ends_of_requests_are_reported(url, kind, end):
    assert end_of(url, kind).startswith(end)


def end_of(url: str, kind: Kind) -> str:
    async def send() -> str:
        async with aiohttp.ClientSession(url) as session:
            return await traffic.send(session, kind, traffic.request_body(kind, NAME, "Hi", 8, 1))

    return asyncio.run(send())


# --- fuzz ---------------------------------------------------------------------------------------------------------


def test_every_response_is_counted_and_one_failure_fails_the_part():
    good = [FuzzResult("description", "GET /", status) for status in (200, 200, 400)]
    results = fuzz.summarise(good, 200)
    assert results["statuses"] == {"description": {"200": 2, "400": 1}}
    assert (results["requests"], results["failures_5xx"], results["is_kept"]) == (3, 0, True)
    for status in (500, 503, None):
        worse = fuzz.summarise([*good, FuzzResult("steering fields", "/v1", status, "{}", "")], 200)
        assert (worse["failures_5xx"], worse["is_kept"], len(worse["faults"])) == (1, False, 1)
    odd = fuzz.summarise([*good, FuzzResult("description", "GET /", 200, "curl", "not as described")], 200)
    assert (odd["failures_5xx"], odd["not_as_described"], odd["is_kept"]) == (0, 1, False)
    assert not fuzz.summarise(good, 503)["is_kept"], "the service is unhealthy afterwards"


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
def test_faulty_responses_are_recognised(response, is_right):
    assert (fault_of(response) == "") is is_right


def test_a_seed_determines_the_requests():
    numbers = draw_examples(st.integers(), 50, 3)
    assert len(numbers) == 50
    assert numbers == draw_examples(st.integers(), 50, 3) != draw_examples(st.integers(), 50, 4)
    assert draw_examples(st.just(1), 50, 3) == [1], "there are no more"


# --- the command --------------------------------------------------------------------------------------------------

MEASURED = {
    "kills": {
        **kills.summarise([Outcome(0, 0.0, status=503)], ["a"], {"proxy": 2}, unexplained=0),
        "seed": 0,
        "nodes": 4,
        "scale": asdict(kills.QUICK),
    },
    "fuzz": {**fuzz.summarise([FuzzResult("description", "GET /", 200)], 200), "seed": 0, "scale": asdict(fuzz.QUICK)},
    "soak": {**soak.summarise(TIMES, SIZES, ENDS, IDLE, LIMIT), "seed": 0, "scale": asdict(soak.FULL)},
}
ALL = ",".join(MEASURED)


@pytest.fixture
def docs(monkeypatch, tmp_path) -> Path:
    """A folder in place of docs/, and parts that return MEASURED at once."""
    monkeypatch.setattr(chaos, "PAGE", tmp_path / "reliability.md")
    monkeypatch.setattr(figures, "FOLDER", tmp_path / "figures")
    for module, found in ((kills, "kills"), (fuzz, "fuzz"), (soak, "soak")):
        monkeypatch.setattr(module, "measure", lambda scale, seed, found=found: {**MEASURED[found], "seed": seed})
    return tmp_path


def test_every_part_writes_its_figures_and_its_part_of_the_page(docs):
    chaos.main(["--parts", ALL, "--seed", "7"])
    page = (docs / "reliability.md").read_text()
    places = [page.index(f"<!-- part: {part} -->") for part in MEASURED]
    assert places == sorted(places)
    assert page.count(" seed 7") == 3
    assert page.count(f"`python -m benchmarks.chaos --parts {ALL} --seed 7`") == 3
    for part in MEASURED:
        assert figures.read(docs / "figures" / f"chaos-{part}.json")["versions"]["ray"]


@pytest.mark.parametrize("where", [[], ["--json", "all.json"]])
def test_the_page_is_rendered_again_from_the_figures(docs, monkeypatch, where):
    monkeypatch.chdir(docs)
    chaos.main(["--parts", ALL, *where])
    page = (docs / "reliability.md").read_text()
    assert (docs / "figures").exists() is not bool(where)
    (docs / "reliability.md").unlink()
    for module in (kills, fuzz, soak):
        monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("measured again"))
    chaos.main(["--page-only", "--parts", ALL, *where])
    assert (docs / "reliability.md").read_text() == page


@pytest.mark.parametrize("quick", [[], ["--quick"]])
def test_one_failed_part_fails_the_command(docs, monkeypatch, quick):
    monkeypatch.setattr(soak, "measure", lambda scale, seed: {**MEASURED["soak"], "seed": seed, "is_kept": False})
    with pytest.raises(SystemExit) as end:
        chaos.main(["--parts", "fuzz,soak", *quick])
    assert end.value.code == 1
    assert list(docs.iterdir()) == [] if quick else (docs / "reliability.md").exists()


def test_figures_that_were_never_measured_are_refused(docs, capsys):
    with pytest.raises(SystemExit) as end:
        chaos.main(["--page-only", "--parts", "fuzz"])
    assert end.value.code == 2
    assert "chaos-fuzz.json does not exist" in capsys.readouterr().err
    figures.write(docs / "all.json", {"soak": MEASURED["soak"]})
    with pytest.raises(SystemExit):
        chaos.main(["--page-only", "--parts", "fuzz", "--json", str(docs / "all.json")])
    assert "all.json has no part fuzz" in capsys.readouterr().err


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        chaos.main(["--parts", "kills,floods"])
    assert end.value.code == 2
    assert "unknown part: floods" in capsys.readouterr().err

"""Mixed requests for a long time: memory must stay constant, and in the end no row or cached token may be held."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from benchmarks.chaos.cluster import tiny_service
from benchmarks.chaos.killer import TITLES
from benchmarks.chaos.memory import Growth, Process, growth, watch
from benchmarks.chaos.traffic import EXPECTED, run_traffic
from benchmarks.common.command import headline_table, say
from benchmarks.common.figures import machine_line
from benchmarks.common.http_load import client_process
from benchmarks.common.markdown import table

NUM_CLIENTS = 8
IDLE_LIMIT_S = 60.0  # Ray's processes report their metrics every ten seconds
OF_RAY = {"controller", "proxy"}
HELD = ("rows_in_use", "rows_waiting", "cached_tokens")


@dataclass(frozen=True)
class Scale:
    minutes: float
    tokens: int  # longest answer
    every_s: float  # between two memory samples
    limit: float  # share by which a process may grow over the last two thirds


# The smallest leak per request that this finds depends on the number of requests: the page shows both.
FULL = Scale(30, 64, 5.0, 0.02)
QUICK = Scale(1, 32, 1.0, 0.15)  # processes are still warming up


def measure(scale: Scale, seed: int) -> dict[str, Any]:
    with client_process() as process, tiny_service(scale.tokens) as service:
        load = run_traffic(process, service.url, service.model, scale.tokens, NUM_CLIENTS, 60 * scale.minutes, seed)
        times, sizes = watch(TITLES, scale.every_s, load.done)
        ends = load.result()
        held = wait_until_released(lambda: held_now(service.url), IDLE_LIMIT_S)
    results = summarise(times, sizes, ends, held, scale.limit)
    say(headline_table({key: figure for key, figure in results.items() if key not in ("processes", "ends")}))
    slopes = {f"{i}: {one['kind']}, MB per hour": one["per_hour_mb"] for i, one in enumerate(results["processes"])}
    say(headline_table(slopes))
    say(headline_table(results["ends"]))
    return {**results, "seed": seed, "scale": asdict(scale), "times": times, "sizes": _by_name(sizes)}


def summarise(
    times: Sequence[float],
    sizes: Mapping[Process, Sequence[float]],
    ends: Mapping[tuple[str, str], int],
    held: Mapping[str, float],
    limit: float,
) -> dict[str, Any]:
    """The figures. A process that did not live the whole time fails the test: the state is not steady."""
    steady = {process: found for process, found in sizes.items() if len(found) == len(times)}
    growths = [growth(kind, times, found) for (kind, _), found in sorted(steady.items())]
    wrong = Counter({f"{kind}: {end}": count for (kind, end), count in ends.items() if end not in EXPECTED})
    num_requests = sum(ends.values())
    has_all = {kind for kind, _ in steady} == set(TITLES)
    growing = sum(one.is_growing(limit) for one in growths)
    return {
        "requests": num_requests,
        "requests_per_s": num_requests / times[-1],
        "went_wrong": sum(wrong.values()),
        "processes_that_came_or_went": len(sizes) - len(steady),
        "processes_that_grow": growing,
        "most_growth": max((one.share for one in growths), default=math.nan),
        "held_in_the_end": dict(held),
        "is_kept": has_all and len(sizes) == len(steady) and not (growing or wrong or any(held.values())),
        "processes": [_with_growth_per_request(one, num_requests / times[-1]) for one in growths],
        "ends": {f"{kind}: {end}": count for (kind, end), count in sorted(ends.items())},
    }


def _with_growth_per_request(one: Growth, requests_per_s: float) -> dict[str, Any]:
    return {**asdict(one), "bytes_per_request": one.per_hour_mb * 1e6 / 3600 / requests_per_s}


def wait_until_released(held: Callable[[], Mapping[str, float]], limit_s: float) -> Mapping[str, float]:
    """Wait until nothing is held, for at most `limit_s`; returns what is held then."""
    deadline = time.monotonic() + limit_s
    while any((now := held()).values()) and time.monotonic() < deadline:
        time.sleep(1)
    return now


def held_now(url: str) -> dict[str, float]:
    """Sums over base replicas from /metrics; nan if a metric is missing."""
    page = httpx.get(f"{url}/metrics", timeout=10, trust_env=False).text
    return {name: total(page, f"ray_mavis_{name}") for name in HELD}


def total(page: str, family: str) -> float:
    """Sum of all samples of a metric in Prometheus text; nan without samples."""
    samples = [float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(f"{family}{{")]
    return sum(samples) if samples else math.nan


def _by_name(sizes: Mapping[Process, Sequence[float]]) -> dict[str, Sequence[float]]:
    return {f"{kind} {pid}": found for (kind, pid), found in sizes.items()}


def page(results: Mapping[str, Any]) -> str:
    scale = results["scale"]
    rows = [
        [
            one["kind"],
            f"{one['first_mb']:.0f}",
            f"{one['per_hour_mb']:+.1f} [{one['low_mb']:+.1f}, {one['high_mb']:+.1f}]",
            f"{one['bytes_per_request']:+.0f}",
            f"{100 * one['share']:+.2f} %",
        ]
        for one in results["processes"]
    ]
    limit = scale["limit"]
    growing = [one["kind"] for one in results["processes"] if one["share"] > limit]
    verdict = f"counts as growing: {', '.join(growing) or 'none'}"
    if OF_RAY.issuperset(growing) and growing:
        verdict += " (Ray Serve's own, without code of this project)"
    held = ", ".join(f"{name.replace('_', ' ')} {count:g}" for name, count in results["held_in_the_end"].items())
    return (
        f"## {scale['minutes']:g} minutes of mixed requests\n\n"
        f"{NUM_CLIENTS} clients sent {results['requests']} requests ({results['requests_per_s']:.1f} per second, seed "
        f"{results['seed']}) to the service with a tiny random model: streams, whole answers, preferences, "
        "log-probabilities, many answers at once, early disconnects, and requests that are refused. "
        f"{results['went_wrong']} did not end as expected.\n\n"
        f"The unique set size of every process was sampled every {scale['every_s']:g} s. The slope is the median over "
        f"all pairs of samples of the last two thirds (Theil-Sen, 95 % interval). A process that grows by more than "
        f"{100 * limit:g} % there {verdict}.\n\n"
        f"{table(['process', 'MB', 'MB per hour', 'bytes per request', 'growth'], rows)}\n\n"
        f"At the end: {held}.\n\n"
        f"Measured with `{results['command']}` on {machine_line(results)}."
    )

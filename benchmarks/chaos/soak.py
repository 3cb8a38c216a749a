"""A mixture of requests for a long time: memory has to stay as it is, and in the end nothing may be held."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from benchmarks.chaos.cluster import deployment
from benchmarks.chaos.killer import TITLES
from benchmarks.chaos.memory import Growth, Process, growth, watch
from benchmarks.chaos.traffic import RIGHT, mixed
from benchmarks.common.command import headline_table, say
from benchmarks.common.http_load import clients
from benchmarks.common.markdown import table

NUM_CLIENTS = 8
IDLE_LIMIT_S = 60.0  # Ray's processes report their figures every ten seconds
HELD = ("rows_in_use", "rows_waiting", "cached_tokens")


@dataclass(frozen=True)
class Scale:
    minutes: float
    tokens: int  # of an answer, at most
    every_s: float  # between two looks at memory
    limit: float  # share by which a process may grow over the last two thirds


# How small a leak per request this finds depends on how many requests there were: the page says both.
FULL = Scale(30, 64, 5.0, 0.02)
# Processes still warm up.
QUICK = Scale(1, 32, 1.0, 0.15)


def measure(scale: Scale, seed: int) -> dict[str, Any]:
    with clients() as process, deployment(scale.tokens) as served:
        load = mixed(process, served.url, served.model, scale.tokens, NUM_CLIENTS, 60 * scale.minutes, seed)
        times, sizes = watch(TITLES, scale.every_s, load.done)
        ends = load.result()
        held = left_held(lambda: figures_held(served.url), IDLE_LIMIT_S)
    results = conclude(times, sizes, ends, held, scale.limit)
    say(headline_table({key: figure for key, figure in results.items() if key not in ("processes", "ends")}))
    slopes = {f"{i}: {one['kind']}, MB per hour": one["per_hour_mb"] for i, one in enumerate(results["processes"])}
    say(headline_table(slopes))
    say(headline_table(results["ends"]))
    return {**results, "seed": seed, "scale": asdict(scale), "times": times, "sizes": _by_name(sizes)}


def conclude(
    times: Sequence[float],
    sizes: Mapping[Process, Sequence[float]],
    ends: Mapping[tuple[str, str], int],
    held: Mapping[str, float],
    limit: float,
) -> dict[str, Any]:
    """The figures; a process that was not there all the time has died or was born, which is no steady state."""
    steady = {process: found for process, found in sizes.items() if len(found) == len(times)}
    growths = [growth(kind, times, found) for (kind, _), found in sorted(steady.items())]
    wrong = Counter({f"{kind}: {end}": count for (kind, end), count in ends.items() if end not in RIGHT})
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
        "processes": [_described(one, num_requests / times[-1]) for one in growths],
        "ends": {f"{kind}: {end}": count for (kind, end), count in sorted(ends.items())},
    }


def _described(one: Growth, requests_per_s: float) -> dict[str, Any]:
    return {**asdict(one), "bytes_per_request": one.per_hour_mb * 1e6 / 3600 / requests_per_s}


def left_held(held: Callable[[], Mapping[str, float]], limit_s: float) -> Mapping[str, float]:
    """What is held when clients are gone: all zeros as soon as that is so, else how it is after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while any((now := held()).values()) and time.monotonic() < deadline:
        time.sleep(1)
    return now


def figures_held(url: str) -> dict[str, float]:
    """Sums over base replicas, from the service's page of metrics; nan where it does not tell."""
    page = httpx.get(f"{url}/metrics", timeout=10, trust_env=False).text
    return {name: total(page, f"ray_mavis_{name}") for name in HELD}


def total(page: str, family: str) -> float:
    """Of all samples of a family on a page for Prometheus; nan where there are none."""
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
    held = ", ".join(f"{name.replace('_', ' ')} {count:g}" for name, count in results["held_in_the_end"].items())
    return (
        f"## {scale['minutes']:g} minutes of everything\n\n"
        f"{NUM_CLIENTS} clients sent {results['requests']} requests ({results['requests_per_s']:.1f} a second, seed "
        f"{results['seed']}) to the service with a tiny random model: streams, whole answers, sentences, "
        "log-probabilities, many answers at once, clients that leave, and requests that are refused. "
        f"{results['went_wrong']} ended otherwise than they should.\n\n"
        f"Memory that belongs to a process alone was read every {scale['every_s']:g} s. The slope is the median over "
        f"all pairs of samples of the last two thirds (Theil-Sen, 95 % interval); a process that gains more than "
        f"{100 * scale['limit']:g} % there counts as growing: {results['processes_that_grow']} did.\n\n"
        f"{table(['process', 'MB', 'MB per hour', 'bytes per request', 'growth'], rows)}\n\n"
        f"In the end: {held}.\n\n"
        "Repeat with `python -m benchmarks.chaos --parts soak`."
    )

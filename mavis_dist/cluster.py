"""Ray, for the driver: connecting, and waits that have a name, a limit and a voice."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from mavis_dist.environment import ENVIRONMENT  # isort: split

import ray
from ray.util.actor_pool import ActorPool

from mavis_dist.plan import Node

POLL_S = 1.0


def connect() -> None:
    """Join the cluster at RAY_ADDRESS, or start a local one that ends with this process."""
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
    forwarded = {name: os.environ[name] for name in (*ENVIRONMENT, "MAVIS_CACHE", "HF_HOME") if name in os.environ}
    if "RAY_ADDRESS" not in os.environ:
        options["dashboard_host"] = "127.0.0.1"
    ray.init(runtime_env={"env_vars": forwarded}, **options)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def nodes() -> list[Node]:
    """The machines of the cluster that are alive."""
    return [Node(n["Resources"].get("CPU", 0.0), n["Resources"].get("GPU", 0.0)) for n in ray.nodes() if n["Alive"]]


class Meter:
    """Says on stderr how far a stage is: done/total, rate, time left."""

    def __init__(self, stage: str, unit: str, every_s: float = 5.0):
        self._stage, self._unit, self._every_s = stage, unit, every_s
        self._started = self._last = time.monotonic()

    def show(self, done: int, total: int, text: str = "", final: bool = False) -> None:
        now = time.monotonic()
        if not final and now - self._last < self._every_s:
            return
        self._last = now
        elapsed = now - self._started
        rate = done / elapsed if elapsed > 0 else 0.0
        time_left = f"{(total - done) / rate:.0f} s left" if rate > 0 and not final else f"{elapsed:.0f} s"
        line = f"{self._stage:<24} {done}/{total} {self._unit}, {rate:.2f}/s, {time_left}"
        print(f"{line}  {text}".rstrip(), file=sys.stderr, flush=True)


@ray.remote(num_cpus=0)
class Board:
    """Where workers write how far they are; the driver reads it."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[str, tuple[int, int, str]]] = {}

    def post(self, stage: str, part: str, done: int, total: int, text: str = "") -> None:
        self._parts.setdefault(stage, {})[part] = (done, total, text)

    def read(self, stage: str) -> dict[str, tuple[int, int, str]]:
        return dict(self._parts.get(stage, {}))


def make_board() -> Any:
    return Board.remote()  # type: ignore[attr-defined]


class Watch:
    """Shows the progress that workers post for one stage; `total` defaults to the sum of what they say."""

    def __init__(self, board: Any, stage: str, unit: str, total: int | None = None):
        self._board, self._stage, self._total = board, stage, total
        self._meter = Meter(stage, unit)

    def look(self, final: bool = False) -> None:
        parts = ray.get(self._board.read.remote(self._stage), timeout=60)
        total = self._total or sum(part[1] for part in parts.values())
        if total:
            text = ", ".join(f"{name} {part[2]}" for name, part in parts.items() if part[2])
            self._meter.show(sum(part[0] for part in parts.values()), total, text, final)


def map_on_actors(
    actors: Sequence[Any], call: Callable[[Any, Any], Any], items: Iterable[Any], watch: Watch
) -> list[Any]:
    """`call(actor, item)` for every item on whichever actor is free; results in the order in which they come."""
    pool = ActorPool(list(actors))
    for item in items:
        pool.submit(call, item)
    results = []
    while pool.has_next():
        with suppress(TimeoutError):
            results.append(pool.get_next_unordered(timeout=POLL_S))
        watch.look()
    watch.look(final=True)
    return results


def map_tasks(function: Callable[..., Any], items: Sequence[tuple[Any, ...]], stage: str, unit: str) -> list[Any]:
    """`function(*item)` for every item as a Ray task of one core; results in the order of the items."""
    meter = Meter(stage, unit)
    task = ray.remote(function)
    refs = [task.options(num_cpus=1).remote(*item) for item in items]
    left = refs
    while left:
        _, left = ray.wait(left, num_returns=len(left), timeout=POLL_S)
        meter.show(len(refs) - len(left), len(refs))
    meter.show(len(refs), len(refs), final=True)
    return ray.get(refs)


def wait_for(futures: Sequence[Future[Any]], watch: Watch) -> None:
    """Wait for threads of the driver; the first failure is raised once all have ended."""
    while not all(future.done() for future in futures):
        time.sleep(POLL_S)
        watch.look()
    for future in futures:
        future.result()
    watch.look(final=True)


def release(actors: Iterable[Any]) -> None:
    """End actors, so that the next stage finds their cores free."""
    for actor in actors:
        ray.kill(actor)

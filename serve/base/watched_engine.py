"""An engine that counts its work, and the thread that reports the counts once a second.

The engine's own thread only adds up plain numbers.
"""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from typing import Any, Protocol

from mavis_dist.decode import Choice, Engine, Guide, Update
from mavis_dist.store.values import objective_of
from serve.metrics import NO_OBJECTIVE, RayRecord, Record

REPORT_EVERY_S = 1.0


class TimedGuide:
    """A guide that sums the time its callers have waited for it."""

    CALLS = frozenset({"open", "extend", "observe", "predict", "score", "keep", "close"})

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
    """An engine that sums its work; `take` may be called from any thread."""

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
        """Record the sums since the last call."""
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
        """Rows in use and rows waiting."""
        ...


def report(engine: WatchedEngine, loop: Loaded, record: Record | None = None) -> None:
    """Record the work of an engine every second, as long as the process lives."""
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

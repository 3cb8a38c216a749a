"""The service's Prometheus metrics and their recorder. Ray exports them from every node of the cluster.

Sums that must be exact are counters: Ray's histograms keep bucket counts only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ray.serve import metrics as ray_metrics

PREFIX = "ray_mavis_"  # Ray puts its own name before ours
NO_OBJECTIVE = "none"


@dataclass(frozen=True)
class Metric:
    """One metric family. Ray adds the labels application, deployment and replica."""

    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()  # of a histogram's buckets


METRICS = {
    # The gateway's
    "mavis_requests": Metric("counter", "HTTP requests answered, by route and status", ("route", "status")),
    "mavis_answers": Metric("counter", "answers that ended, except those whose client left", ("finish",)),
    "mavis_failovers": Metric("counter", "answers that another base replica resumed after their first token"),
    "mavis_first_token_seconds": Metric(
        "histogram",
        "time from the request to a base replica to the first token, queueing included",
        bounds=(0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 20, 40, 80),
    ),
    "mavis_token_seconds": Metric(
        "histogram",
        "time per token of an answer after the first one",
        bounds=(0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.35, 0.5, 1, 2, 5),
    ),
    # The base replica's
    "mavis_tokens": Metric("counter", "tokens generated"),
    "mavis_rows_in_use": Metric("gauge", "rows of the base model in use: one per answer, one more per preference"),
    "mavis_rows_waiting": Metric("gauge", "rows that waiting requests need"),
    "mavis_cached_tokens": Metric("gauge", "tokens whose keys and values the base model holds"),
    "mavis_step_seconds": Metric("counter", "time in steps of the engine"),
    "mavis_guide_seconds": Metric("counter", "part of it spent on value models, or waiting for them"),
    # Of finished answers, as far as this base replica generated them
    "mavis_guided_tokens": Metric("counter", "tokens chosen with value models"),
    "mavis_candidates": Metric("counter", "candidates scored by value models"),
    "mavis_objective_tokens": Metric("counter", "tokens of answers that use an objective", ("objective",)),
    "mavis_divergence_nats": Metric(
        "histogram",
        "divergence of an answer; one with several objectives counts for each",
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

"""Variants measured in turns: what slows the machine down slows all of them down."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Rates = dict[str, list[float]]  # variant -> units of work per second in every repetition


@dataclass(frozen=True)
class Speeds:
    """How fast every variant was in every repetition."""

    per_s: Rates = field(default_factory=dict)
    per_cpu_s: Rates = field(default_factory=dict)  # of this process, all threads: other load takes no part in it


def take_turns(variants: Mapping[str, Callable[[int], float]], repetitions: int) -> Speeds:
    """`variants[name](repetition)` does some work and returns how much; every second repetition in reverse order."""
    speeds = Speeds({name: [] for name in variants}, {name: [] for name in variants})
    for repetition in range(repetitions):
        for name in variants if repetition % 2 == 0 else reversed(list(variants)):
            started, cpu_started = time.perf_counter(), time.process_time()
            amount = variants[name](repetition)
            speeds.per_s[name].append(amount / (time.perf_counter() - started))
            speeds.per_cpu_s[name].append(amount / (time.process_time() - cpu_started))
    return speeds


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Of every repetition, then the median."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))

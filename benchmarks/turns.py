"""Variants measured in turns: what slows the machine down slows all of them down."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Rates = dict[str, list[float]]  # variant -> units of work per second in every repetition


def take_turns(variants: Mapping[str, Callable[[int], float]], repetitions: int) -> Rates:
    """`variants[name](repetition)` does some work and returns how much; every second repetition in reverse order."""
    rates: Rates = {name: [] for name in variants}
    for repetition in range(repetitions):
        for name in variants if repetition % 2 == 0 else reversed(list(variants)):
            started = time.perf_counter()
            amount = variants[name](repetition)
            rates[name].append(amount / (time.perf_counter() - started))
    return rates


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Of every repetition, then the median."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))

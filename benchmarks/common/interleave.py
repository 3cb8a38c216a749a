"""Measures variants in alternation, so that a slow phase of the machine affects all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

Turn = TypeVar("Turn")

Rates = dict[str, list[float]]  # variant -> units of work per second in every repetition


@dataclass(frozen=True)
class Speeds:
    """The speed of every variant in every repetition."""

    per_s: Rates = field(default_factory=dict)
    per_cpu_s: Rates = field(default_factory=dict)  # CPU time of this process, all threads: excludes other load


def take_turns(variants: Mapping[str, Callable[[int], float]], repetitions: int) -> Speeds:
    """`variants[name](repetition)` returns the amount of work it did; every second repetition runs in reverse order."""
    speeds = Speeds({name: [] for name in variants}, {name: [] for name in variants})
    for repetition, name in in_turn(list(variants), repetitions):
        started, cpu_started = time.perf_counter(), time.process_time()
        amount = variants[name](repetition)
        speeds.per_s[name].append(amount / (time.perf_counter() - started))
        speeds.per_cpu_s[name].append(amount / (time.process_time() - cpu_started))
    return speeds


def in_turn(turns: Sequence[Turn], repetitions: int) -> Iterator[tuple[int, Turn]]:
    """All turns of every repetition, with its number; every second repetition in reverse order."""
    for repetition in range(repetitions):
        for turn in turns if repetition % 2 == 0 else reversed(turns):
            yield repetition, turn


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median over repetitions of the ratio within a repetition."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))

"""Memory of the service's processes over time, and whether it grows."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import psutil
from scipy.stats import theilslopes

from benchmarks.common.service import processes

Process = tuple[str, int]  # kind, process id
MB = 1e6


@dataclass(frozen=True)
class Growth:
    """Memory growth of one process after its warm-up. MB are 10^6 bytes."""

    kind: str
    first_mb: float  # median of the first tenth of the samples after the warm-up
    per_hour_mb: float
    low_mb: float  # 95 % interval of the slope, per hour
    high_mb: float
    share: float  # growth over these samples, relative to first_mb

    def is_growing(self, limit: float) -> bool:
        return self.share > limit


def growth(kind: str, seconds: Sequence[float], sizes_mb: Sequence[float], warm_up: float = 1 / 3) -> Growth:
    """The median slope of all pairs of samples (Theil-Sen), which bursts and single peaks do not affect.

    The first `warm_up` of the samples is left out: caches fill up, and libraries load lazily.
    """
    begin = int(len(seconds) * warm_up)
    times, sizes = np.asarray(seconds[begin:]), np.asarray(sizes_mb[begin:])
    slope, _, low, high = theilslopes(sizes, times)
    first = float(np.median(sizes[: max(len(sizes) // 10, 1)]))
    share = slope * (times[-1] - times[0]) / first
    return Growth(kind, first, 3600 * slope, 3600 * low, 3600 * high, float(share))


def watch(
    titles: Mapping[str, str], every_s: float, until: Callable[[], bool]
) -> tuple[list[float], dict[Process, list[float]]]:
    """Sample times in s, and the unique set size in MB of every process at each of them.

    A process that did not live the whole time has fewer samples than there are times.
    """
    started = time.monotonic()
    times: list[float] = []
    sizes: dict[Process, list[float]] = defaultdict(list)
    while not until():
        times.append(time.monotonic() - started)
        for process, size in sample(titles).items():
            sizes[process].append(size)
        time.sleep(every_s)
    return times, dict(sizes)


def sample(titles: Mapping[str, str]) -> dict[Process, float]:
    """MB of every process whose command line starts with one of these titles."""
    found = {}
    for kind, title in titles.items():
        for process in processes(title):
            try:
                found[kind, process.pid] = process.memory_full_info().uss / MB
            except psutil.Error:  # gone
                continue
    return found

"""Peak memory of a run's processes, beside what `jobs.plan` says they need."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mavis_dist.config import Config
    from mavis_dist.sizing.workload import Lengths

EVERY_S = 2.0
TITLES = {"rollout actor": "ray::Worker", "training worker": "ray::RayTrainWorker"}  # kinds as `jobs.plan` calls them


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """By kind, the largest resident set so far of any of this process's descendants, in bytes."""
    from benchmarks.common.service import processes

    peaks, is_over = dict.fromkeys(TITLES, 0), Event()

    def watch() -> None:
        while not is_over.wait(EVERY_S):
            for kind, title in TITLES.items():
                peaks[kind] = max([peaks[kind], *(peak_of(process.pid) for process in processes(title))])

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            yield peaks
        finally:
            is_over.set()
            watching.result()


def peak_of(pid: int) -> int:
    """The largest resident set that a process has had, in bytes; 0: it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def estimated(config: Config, lengths: Lengths) -> dict[str, float]:
    """By kind, the bytes that `jobs.plan` says a process needs."""
    from mavis_dist.sizing.memory import Models, needs
    from mavis_dist.sizing.sizes import read_size

    base = read_size(config.base.model)
    models = Models(base, base.backbone(config.value.layers))
    return {need.process: need.total for need in needs(config, models, lengths) if need.process in TITLES}

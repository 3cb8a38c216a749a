"""Processes and machines that die while clients are answered, in an order that a seed decides."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

from benchmarks.common.service import processes

# Victims and how often each is chosen. Titles are those that Ray gives to its actors' processes.
TITLES = {
    "base replica": "ray::ServeReplica:main:Base",
    "value replica": "ray::ServeReplica:value-",
    "gateway": "ray::ServeReplica:main:Gateway",
    "controller": "ray::ServeController",
    "proxy": "ray::ProxyActor",
}
MACHINE = "machine"
RECOVERY_S = 60.0
POLL_S = 0.2
WEIGHTS = {"base replica": 5, "value replica": 5, "controller": 2, "gateway": 1, "proxy": 1, MACHINE: 1}


@dataclass
class Storm:
    """Kills with signal 9, one at a time; `machines` is a ray.cluster_utils.Cluster whose workers may be lost."""

    machines: Any
    cpus_per_machine: float
    seed: int = 0
    strikes: list[tuple[float, str]] = field(default_factory=list)  # time.perf_counter() and what died

    def __post_init__(self) -> None:
        self._source = random.Random(self.seed)
        self._whole = _alive()

    @property
    def num_kills(self) -> int:
        return len(self.strikes)

    @property
    def kills(self) -> Counter[str]:
        """How many of every kind."""
        return Counter(kind for _, kind in self.strikes)

    def strike(self) -> str | None:
        """Kill something; what it was, or None where nothing of the chosen kind was alive."""
        kind = self._source.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        now = time.perf_counter()
        is_killed = self._lose_machine() if kind == MACHINE else self._kill(TITLES[kind])
        if not is_killed:
            return None
        self.strikes.append((now, kind))
        return kind

    def rage(self, until: Callable[[], bool], pause_s: float, limit: int) -> None:
        """Strike again and again, with pauses around `pause_s`, until told or until there were `limit` kills.

        Half of the processes of every kind have to be there again before the next pause, though they may still load
        their models: where nothing is up, no stream is open that could be harmed.
        """
        while not until() and self.num_kills < limit:
            self._recover(until)
            time.sleep(pause_s * self._source.uniform(0.5, 1.5))
            if not until():
                self.strike()

    def _recover(self, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + RECOVERY_S
        while not self._is_half_there() and not until() and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def _is_half_there(self) -> bool:
        alive = _alive()
        return all(2 * alive[kind] >= count for kind, count in self._whole.items())

    def _kill(self, title: str) -> bool:
        alive = processes(title)
        if not alive:
            return False
        with suppress(psutil.NoSuchProcess):
            self._source.choice(sorted(alive, key=lambda process: process.pid)).kill()
            return True
        return False

    def _lose_machine(self) -> bool:
        """One machine goes, with all that runs there, and an empty one comes."""
        nodes = sorted(self.machines.worker_nodes, key=lambda node: node.node_id)
        if not nodes:
            return False
        self.machines.remove_node(self._source.choice(nodes), allow_graceful=False)
        self.machines.add_node(num_cpus=self.cpus_per_machine)
        return True


def _alive() -> Counter[str]:
    """How many processes there are of every kind."""
    return Counter({kind: len(processes(title)) for kind, title in TITLES.items()})

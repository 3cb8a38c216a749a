"""Kills processes of the service, Ray nodes and the control store, in an order that depends on a seed."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

from benchmarks.common.nodes import restart_control_store
from benchmarks.common.service import processes

# Command lines of Ray's actors, by kind.
TITLES = {
    "base replica": "ray::ServeReplica:main:Base",
    "value replica": "ray::ServeReplica:value-",
    "gateway": "ray::ServeReplica:main:Gateway",
    "controller": "ray::ServeController",
    "proxy": "ray::ProxyActor",
}
NODE, CONTROL_STORE = "node", "control store"
RECOVERY_S = 60.0
POLL_S = 0.2
WEIGHTS = {"base replica": 5, "value replica": 5, "controller": 2, "gateway": 1, "proxy": 1, NODE: 1, CONTROL_STORE: 1}


@dataclass
class Killer:
    """Kills with signal 9, one process or node at a time.

    The head node of `cluster` (ray.cluster_utils) stays; its control store is restarted if the cluster `keeps_state`.
    """

    cluster: Any
    cpus_per_node: float
    seed: int = 0
    keeps_state: bool = False
    kills: list[tuple[float, str]] = field(default_factory=list)  # time.perf_counter() and kind

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._initial = _count_processes()
        self._weights = {kind: weight for kind, weight in WEIGHTS.items() if self.keeps_state or kind != CONTROL_STORE}

    @property
    def num_kills(self) -> int:
        return len(self.kills)

    def kill_one(self) -> str | None:
        """Kill something and return its kind; None if nothing of the drawn kind was alive."""
        kind = self._random.choices(list(self._weights), list(self._weights.values()))[0]
        now = time.perf_counter()
        if kind == CONTROL_STORE:
            restart_control_store(self.cluster)
        elif not (self._replace_node() if kind == NODE else self._kill(TITLES[kind])):
            return None
        self.kills.append((now, kind))
        return kind

    def run(self, until: Callable[[], bool], pause_s: float, limit: int) -> None:
        """Kill repeatedly, with pauses around `pause_s`, until `until()` or `limit` kills.

        Before each pause, half of the processes of every kind must be up again, though they may still be loading their
        models: while nothing is up, no stream is open that a kill could break.
        """
        while not until() and self.num_kills < limit:
            self._wait_for_recovery(until)
            time.sleep(pause_s * self._random.uniform(0.5, 1.5))
            if not until():
                self.kill_one()

    def _wait_for_recovery(self, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + RECOVERY_S
        while not self._is_half_up() and not until() and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def _is_half_up(self) -> bool:
        alive = _count_processes()
        return all(2 * alive[kind] >= count for kind, count in self._initial.items())

    def _kill(self, title: str) -> bool:
        alive = processes(title)
        if not alive:
            return False
        with suppress(psutil.NoSuchProcess):
            self._random.choice(sorted(alive, key=lambda process: process.pid)).kill()
            return True
        return False

    def _replace_node(self) -> bool:
        """Kill a node with everything on it, and add an empty one."""
        nodes = sorted(self.cluster.worker_nodes, key=lambda node: node.node_id)
        if not nodes:
            return False
        self.cluster.remove_node(self._random.choice(nodes), allow_graceful=False)
        self.cluster.add_node(num_cpus=self.cpus_per_node)
        return True


def _count_processes() -> Counter[str]:
    """Live processes by kind."""
    return Counter({kind: len(processes(title)) for kind, title in TITLES.items()})

"""What happens to the machines during a run, and when."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common.nodes import drain, restart_control_store
from mavis_dist.store.files import MARKER, Store

CPUS_PER_NODE = 1
# Begin the titles of processes: actors while they work, and at any time; tasks; training workers.
DECODING, ACTOR, LABELLING, TRAINING = "ray::Worker.work", "ray::Worker", "ray::label_shards", "ray::RayTrainWorker"


@dataclass(frozen=True)
class Scenario:
    """One disturbance of a run, once a file is there and a machine, other than the head, has such a process."""

    name: str
    nodes: int  # at the start
    pattern: str  # of the file, in the run's folder
    title: str  # of the process; empty: none
    act: Callable[[Any, Any], None]  # on a ray.cluster_utils.Cluster, and that machine
    keeps_state: bool = False  # the head's, for whoever restarts it

    def is_due(self, store: Store) -> bool:
        return any(Path(store.root).glob(self.pattern))

    def victim(self, cluster: Any) -> Any:
        """The machine; None: there is none yet."""
        return next((node for node in cluster.worker_nodes if not self.title or has_process(node, self.title)), None)


def scenarios() -> list[Scenario]:
    """On four machines; those that join late find one."""
    checkpoint = "train/*/i0/checkpoints/step-*"
    return [
        Scenario("lost: rollouts", 4, "run.yaml", DECODING, lose),
        Scenario("lost: labels", 4, f"rollouts/base/{MARKER}", LABELLING, lose),
        Scenario("lost: training", 4, checkpoint, TRAINING, lose),
        Scenario("lost: rollouts of the second iteration", 4, f"values/*/i0/{MARKER}", DECODING, lose),
        Scenario("lost: gate", 4, f"values/*/i1/{MARKER}", ACTOR, lose),
        Scenario("lost: evaluation", 4, f"gate/*/i1/{MARKER}", ACTOR, lose),
        Scenario("drained: training", 4, checkpoint, TRAINING, drain),
        Scenario("three join late", 1, "run.yaml", "", join),
        Scenario("head's state restarted", 4, checkpoint, TRAINING, restart_head, keeps_state=True),
    ]


def lose(cluster: Any, node: Any) -> None:
    cluster.remove_node(node, allow_graceful=False)


def join(cluster: Any, node: Any) -> None:
    for _ in range(3):
        cluster.add_node(num_cpus=CPUS_PER_NODE)


def restart_head(cluster: Any, node: Any) -> None:
    restart_control_store(cluster)


def has_process(node: Any, title: str | tuple[str, ...]) -> bool:
    """Whether a machine runs a process whose title begins so, or in one of these ways."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for process in raylet.children(recursive=True):
        with suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(title):
                return True
    return False

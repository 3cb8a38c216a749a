"""What happens to the machines during a run, and when."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil

from mavis_dist.store.files import MARKER, Store

CPUS_PER_NODE = 1
DRAINED_S = 10  # between the notice and the end of a machine
ROLLOUT, TRAINING = "ray::Worker", "ray::RayTrainWorker"  # begin the titles of processes


@dataclass(frozen=True)
class Scenario:
    """One disturbance of a run."""

    name: str
    nodes: int  # at the start
    is_due: Callable[[Store], object]
    act: Callable[[Any], None]  # on a ray.cluster_utils.Cluster
    has_redis: bool = False


def scenarios() -> list[Scenario]:
    """On four machines; one that joins late begins with one."""
    lost = {
        "rollouts": (has("rollouts/base/*.parquet"), ROLLOUT),
        "labels": (has(f"rollouts/base/{MARKER}"), "ray::label"),
        "training": (has("train/*/i0/checkpoints/step-*"), TRAINING),
        "rollouts of the second iteration": (has("rollouts/brief-i1/*.parquet"), ROLLOUT),
        "gate": (has(f"values/*/i1/{MARKER}"), ROLLOUT),
        "evaluation": (has("eval/limit/**/*.json"), ROLLOUT),
    }
    return [
        *(Scenario(f"lost: {stage}", 4, due, lose(title)) for stage, (due, title) in lost.items()),
        Scenario("three join late", 1, has("rollouts/base/*.parquet"), join),
        Scenario("drained: training", 4, has("train/*/i0/checkpoints/step-*"), drain),
        Scenario("head's state restarted", 4, has("train/*/i0/checkpoints/step-*"), restart_head, has_redis=True),
    ]


def has(pattern: str) -> Callable[[Store], bool]:
    """Whether the run has such a file."""
    from pathlib import Path

    return lambda store: any(Path(store.root).glob(pattern))


def lose(title: str) -> Callable[[Any], None]:
    """Lose a machine, if possible one with such a process."""

    def act(cluster: Any) -> None:
        cluster.remove_node(_node_with(cluster, title), allow_graceful=False)

    return act


def join(cluster: Any) -> None:
    for _ in range(3):
        cluster.add_node(num_cpus=CPUS_PER_NODE)


def drain(cluster: Any) -> None:
    """As a cloud announces the end of a preempted machine, and then ends it."""
    node, deadline = _node_with(cluster, TRAINING), time.monotonic() + DRAINED_S
    subprocess.run(
        [
            "ray",
            "drain-node",
            f"--address={cluster.address}",
            f"--node-id={node.node_id}",
            "--reason=DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message=spot instance reclaimed",
            f"--deadline-remaining-seconds={DRAINED_S}",
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    time.sleep(max(0.0, deadline - time.monotonic()))
    cluster.remove_node(node, allow_graceful=False)


def restart_head(cluster: Any) -> None:
    """The control store dies and comes back with its state, which Redis has."""
    cluster.head_node.kill_gcs_server(check_alive=False)
    cluster.head_node.start_gcs_server()


@contextmanager
def redis() -> Iterator[str]:
    """The address of a Redis server on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--daemonize", "no"]
    server = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def _node_with(cluster: Any, title: str) -> Any:
    """A machine other than the head, which runs such a process if any of them does."""
    for node in cluster.worker_nodes:
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in raylet.children(recursive=True):
            with suppress(psutil.Error):
                if title in " ".join(process.cmdline()):
                    return node
    return next(iter(cluster.worker_nodes))

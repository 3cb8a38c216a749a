"""Ray nodes of one computer in place of machines, and how long the stages of a run took on them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from shutil import which
from typing import Any

from benchmarks.common.service import free_port

REDIS = "redis-server"
DRAINED_S = 10  # between the notice and the end of a machine
REDIS_ADDRESS = "RAY_REDIS_ADDRESS"  # where Ray's control store keeps its state, if anywhere


@contextmanager
def ray_nodes(count: int, cpus: int, keeps_state: bool = False) -> Iterator[Any]:
    """A ray.cluster_utils.Cluster of so many nodes, the head among them.

    `keeps_state`: the control store keeps its state in Redis, for `restart_control_store`; needs `has_redis`.
    """
    from ray.cluster_utils import Cluster

    with ExitStack() as stack:
        if keeps_state:
            os.environ[REDIS_ADDRESS] = stack.enter_context(_redis())
            stack.callback(os.environ.pop, REDIS_ADDRESS)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, "dashboard_port": free_port()})
        stack.callback(cluster.shutdown)
        for _ in range(count - 1):
            cluster.add_node(num_cpus=cpus)
        yield cluster


def has_redis() -> bool:
    return which(REDIS) is not None


def restart_control_store(cluster: Any) -> None:
    """The head's control store dies, and comes back with the state that Redis has."""
    cluster.head_node.kill_gcs_server(check_alive=False)
    cluster.head_node.start_gcs_server()


def drain(cluster: Any, node: Any) -> None:
    """As a cloud announces the end of a preempted machine, and then ends it."""
    deadline = time.monotonic() + DRAINED_S
    subprocess.run(
        [
            *(sys.executable, "-m", "ray.scripts.scripts"),  # the command ray, which may not be on PATH
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


@contextmanager
def _redis() -> Iterator[str]:
    """The address of a Redis server on loopback."""
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--daemonize", "no"]
    server = subprocess.Popen([REDIS, *options], stdout=subprocess.DEVNULL)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()

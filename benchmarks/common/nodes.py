"""Ray nodes of one computer in place of machines, and how long the stages of a run took on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def ray_nodes(count: int, cpus: int) -> Iterator[Any]:
    """A ray.cluster_utils.Cluster of so many nodes, the head among them."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus})
    try:
        for _ in range(count - 1):
            cluster.add_node(num_cpus=cpus)
        yield cluster
    finally:
        cluster.shutdown()


def stage_seconds(store: Any) -> dict[str, float]:
    """By stage, as the run in a store recorded them."""
    from mavis_dist.evaluate.collect import stages_of

    return {stage.name: stage.seconds or 0.0 for stage in stages_of(store)}

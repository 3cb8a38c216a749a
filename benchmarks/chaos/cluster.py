"""A tiny random model, served with all that a real one has, on two machines of this one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mavis_dist.environment  # noqa: F401  ray reads it
from mavis_dist.config import Config

RUN, OBJECTIVES = "chaos", ("positive", "brief")
CPUS_PER_MACHINE = 4  # gateway, two base replicas and four value replicas do not fit on one


@dataclass(frozen=True)
class Deployment:
    url: str
    model: str
    machines: Any  # a ray.cluster_utils.Cluster


@contextmanager
def deployment(tokens: int) -> Iterator[Deployment]:
    """The service until the end of the block; `tokens`: the longest answer."""
    with tempfile.TemporaryDirectory(prefix="mavis-chaos-") as folder:
        config = tiny_service(Path(folder), tokens)
        with machines() as cluster, served_on(cluster, config) as url:
            yield Deployment(url, config.base.model, cluster)


def tiny_service(folder: Path, tokens: int) -> Config:
    """A random model and its value models, and two replicas of each."""
    from benchmarks.common.service import served
    from mavis_dist import config as config_module
    from tests.tiny import MODEL, write_models

    write_models(folder, RUN, OBJECTIVES)
    config = config_module.parse(
        {
            "run": RUN,
            "storage": str(folder / "runs"),
            "objectives": {"positive": {"reward": "sentiment"}, "brief": {"reward": "brevity"}},
            "base": {"model": str(folder / MODEL), "dtype": "float32"},
            "steer": {"beta": 1.0},
        }
    )
    settings = {"base_replicas": 2, "value_replicas": 2, "cpus_per_replica": 1, "max_tokens": tokens}
    return served(config, folder / "runs" / RUN, **settings)


@contextmanager
def machines() -> Iterator[Any]:
    """Two machines; the one that has Ray's head stays."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS_PER_MACHINE})
    try:
        cluster.add_node(num_cpus=CPUS_PER_MACHINE)
        yield cluster
    finally:
        cluster.shutdown()


@contextmanager
def served_on(cluster: Any, config: Config) -> Iterator[str]:
    """The service ends with its cluster: after a storm there may be nobody to take it down in order."""
    import ray

    from mavis_dist.cluster import connect
    from serve.app import deploy

    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        connect()
        yield deploy(config)
    finally:
        ray.shutdown()
        del os.environ["RAY_ADDRESS"]

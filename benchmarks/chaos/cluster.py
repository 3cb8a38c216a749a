"""A tiny random model, served with two replicas of everything except the gateway on several Ray nodes of a computer."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mavis_dist.environment  # noqa: F401  ray reads it
from benchmarks.common.nodes import ray_nodes
from mavis_dist.config import Config

RUN, OBJECTIVES = "chaos", ("positive", "brief")
NUM_NODES = 4  # of which the head is never killed
CPUS_PER_NODE = 2  # gateway, two base replicas and four value replicas, of one each, need all nodes


@dataclass(frozen=True)
class TinyService:
    url: str
    model: str
    cluster: Any  # a ray.cluster_utils.Cluster


@contextmanager
def tiny_service(tokens: int, keeps_state: bool = False) -> Iterator[TinyService]:
    """The service, which runs until the end of the block; `tokens`: longest answer; `keeps_state`: of `ray_nodes`."""
    with tempfile.TemporaryDirectory(prefix="mavis-chaos-") as folder:
        config = tiny_config(Path(folder), tokens)
        with ray_nodes(NUM_NODES, CPUS_PER_NODE, keeps_state) as cluster, deployed_on(cluster, config) as url:
            yield TinyService(url, config.base.model, cluster)


def tiny_config(folder: Path, tokens: int) -> Config:
    """The config of a service with two replicas; writes a random model and its value models."""
    from benchmarks.common.service import service_config
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
    return service_config(config, folder / "runs" / RUN, **settings)


@contextmanager
def deployed_on(cluster: Any, config: Config) -> Iterator[str]:
    """The URL of the service. It ends with its cluster: after kills, an orderly undeploy may be impossible."""
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

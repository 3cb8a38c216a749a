"""One small service for all tests: random models, real HTTP on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.common.service import free_port
from mavis_dist import config
from tests.tiny import MODEL, write_models

RUN = "served"


@pytest.fixture(scope="session")
def served_config(tmp_path_factory: pytest.TempPathFactory) -> config.Config:
    folder: Path = tmp_path_factory.mktemp("serving")
    write_models(folder, RUN, ("positive", "brief"))
    return config.parse(
        {
            "run": RUN,
            "storage": str(folder / "runs"),
            "objectives": {"positive": {"reward": "sentiment"}, "brief": {"reward": "brevity"}},
            "base": {"model": str(folder / MODEL), "dtype": "float32"},
            "steer": {"beta": 1.0},
            "serve": {"port": free_port(), "base_replicas": 2, "cpus_per_replica": 0.1, "max_tokens": 400},
        }
    )


@pytest.fixture(scope="session")
def url(served_config: config.Config, ray_address: str) -> Iterator[str]:
    """Two base replicas and one value replica per objective."""
    from serve.app import deploy, undeploy

    yield deploy(served_config, limit_s=180)
    undeploy()


@pytest.fixture(scope="session")
def http() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=60, trust_env=False) as client:
        yield client

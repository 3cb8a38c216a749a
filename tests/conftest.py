"""One Ray cluster for all tests that need one: two cores, token mode, loopback."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

os.environ["RAY_AUTH_MODE"] = "token"
os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny models on shared cores: more threads only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
# Clusters of other sessions on this machine have another one: a submitted job joins the newest cluster of its folder.
os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray-")
atexit.register(shutil.rmtree, os.environ["RAY_TMPDIR"], ignore_errors=True)

import mavis_dist.environment  # noqa: E402, F401  before libraries that need a home folder


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """The address of a cluster that ends with the session."""
    os.environ.pop("RAY_ADDRESS", None)
    from mavis_dist import cluster

    cluster.connect()
    import ray

    yield ray.get_runtime_context().gcs_address
    ray.shutdown()

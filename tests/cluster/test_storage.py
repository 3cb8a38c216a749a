"""A run on an object store: killed, resumed, served; its results are those of a local run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from mavis_dist.store.files import MARKER, Store
from tests.cluster.jobs import LIMIT_S, finish, hashes, start
from tests.machines import free_port
from tests.root import ROOT
from tests.s3 import S3Server, s3_server


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


def test_a_run_in_a_bucket_gives_the_same_bytes_and_is_served(
    undisturbed: Store, config_file: Path, ray_address: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As `ray job submit --runtime-env-json` does: the cluster was started without.
    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, json.dumps({"runtime_env": {"env_vars": s3.environment}}))
    arguments = (f"storage=s3://{s3.bucket}/runs", "run=remote", "iterations=1")
    store = Store(f"s3://{s3.bucket}/runs", "remote")

    job = start(config_file, ray_address, *arguments)
    deadline = time.monotonic() + LIMIT_S
    checkpoints = "train/brief/i0/checkpoints"
    while not any(store.exists(f"{checkpoints}/{name}/{MARKER}") for name in store.list(checkpoints)):
        assert job.poll() is None, job.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    job.kill()
    job.communicate()

    _, err = finish(start(config_file, ray_address, *arguments))
    assert err.count("finished before, skipped") == 1 + 2
    local = store.download("")
    stored, expected = hashes(Store(str(local.parent), local.name)), hashes(undisturbed)
    assert len(stored) == 2 + 2 * 2 + 2 + 2 + (1 + 2) + 1
    assert {path for path in stored if stored[path] != expected[path]} == {"eval/sweep/sweep.json"}  # of iteration 1
    assert list(local.glob("train/*/i0/tensorboard/events.*"))
    assert not list(local.glob("train/.ray/*/*"))

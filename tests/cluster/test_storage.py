"""Runs in a bucket: one that is killed and resumed gives the results of a local run, and its models can be served."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from threading import Lock
from typing import Any

import httpx
import pytest
import yaml
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from benchmarks.common.nodes import ray_nodes
from benchmarks.common.service import free_port
from mavis_dist.store.files import MARKER, Store
from tests.cluster.jobs import LIMIT_S, finish, hashes, start, url_of
from tests.root import ROOT
from tests.s3 import Answer, S3Server, refusal, s3_server
from tests.tiny import MODEL, write_models


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def submitted(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives jobs the credentials as `ray job submit --runtime-env-json` does: the cluster was started without."""
    submit_with(s3.environment, monkeypatch)


def submit_with(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, json.dumps({"runtime_env": {"env_vars": variables}}))


@pytest.mark.long
def test_a_killed_run_in_a_bucket_gives_the_same_bytes(
    undisturbed: Store, config_file: Path, ray_address: str, s3: S3Server, submitted: None
) -> None:
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
    second = ("gate/", "eval/sweep/")  # what a second iteration adds to
    assert {path for path in stored if stored[path] != expected[path] and not path.startswith(second)} == set()
    assert list(local.glob("train/*/i0/tensorboard/events.*"))
    shutil.rmtree(local)


SHARE = 0.05  # of requests with each of two faults
BUSY = refusal(503, "SlowDown", "Please reduce your request rate.")
DOWN = refusal(503, "ServiceUnavailable", "Please try again later.")


class Faulty:
    """A server that is busy for some requests, breaks some answers off, and goes down once training stores a file."""

    def __init__(self, broken_off: Answer) -> None:
        self._broken_off = broken_off
        self._random, self._lock = Random(0), Lock()  # requests come in threads
        self.is_down, self.num_busy, self.num_broken_off = False, 0, 0
        self.goes_down = True

    def __call__(self, request: dict[str, Any]) -> Answer | None:
        with self._lock:
            method, drawn = request["REQUEST_METHOD"], self._random.random()
            self.is_down |= self.goes_down and method == "PUT" and "/train/" in request["PATH_INFO"]
            if self.is_down:
                return DOWN
            if drawn < SHARE:
                self.num_busy += 1
                return BUSY
            if drawn < 2 * SHARE and method == "GET":
                self.num_broken_off += 1
                return self._broken_off
        return None

    def recover(self) -> None:
        self.is_down = self.goes_down = False


@pytest.fixture
def faulty(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    attempts = "5"  # the default of botocore, which the other tests do without
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", attempts)
    submit_with({**s3.environment, "AWS_MAX_ATTEMPTS": attempts}, monkeypatch)
    s3.fault = faulty = Faulty(s3.broken_off)
    yield faulty
    s3.fault = lambda _: None


@pytest.mark.long
def test_a_run_and_a_service_on_storage_that_is_busy_breaks_off_and_goes_down(
    undisturbed: Store, config_file: Path, ray_address: str, s3: S3Server, faulty: Faulty
) -> None:
    arguments = (f"storage=s3://{s3.bucket}/runs", "run=busy")
    _, err = finish(start(config_file, ray_address, *arguments), code=2)
    assert faulty.is_down
    assert re.search(r"s3://bucket/runs/busy/\S+ cannot be \w+ \(.*\): check the storage", err.splitlines()[-1])

    faulty.recover()
    finish(start(config_file, ray_address, *arguments))
    serve = (f"serve.port={free_port()}", "serve.cpus_per_replica=0.1")
    check_service(
        start(config_file, ray_address, *arguments, *serve, job="serve"),
        yaml.safe_load(config_file.read_text())["base"]["model"],
    )
    assert min(faulty.num_busy, faulty.num_broken_off) > 20
    s3.fault = lambda _: None
    local = Store(f"s3://{s3.bucket}/runs", "busy").download("")
    assert hashes(Store(str(local.parent), local.name)) == hashes(undisturbed)
    shutil.rmtree(local)


@pytest.fixture
def late_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str, Path]]:
    """A folder, the address of two machines whose processes see files of others late there, and a file for each process
    that has looked for one in vain.
    """
    mount, seen = tmp_path / "mount", tmp_path / "seen"
    mount.mkdir()
    seen.mkdir()
    paths = [str(ROOT / "tests/late_mount"), *filter(None, [os.environ.get("PYTHONPATH")])]
    for name, value in {"PYTHONPATH": ":".join(paths), "LATE_ROOT": mount, "LATE_SEEN": seen, "LATE_S": 2}.items():
        monkeypatch.setenv(name, str(value))
    with ray_nodes(2, 1) as cluster:
        yield mount, cluster.address, seen


@pytest.mark.long
def test_a_run_and_a_service_on_a_mount_that_shows_files_late(
    undisturbed: Store, config_file: Path, late_mount: tuple[Path, str, Path]
) -> None:
    mount, address, seen = late_mount
    arguments = (f"storage={mount}", "run=late")
    finish(start(config_file, address, *arguments))
    assert list(seen.iterdir()), "no process has looked for a file too early"
    assert hashes(Store(str(mount), "late")) == hashes(undisturbed)

    serve = (f"serve.port={free_port()}", "serve.cpus_per_replica=0.1")
    check_service(
        start(config_file, address, *arguments, *serve, job="serve"),
        yaml.safe_load(config_file.read_text())["base"]["model"],
    )


def test_a_service_loads_its_models_from_a_bucket(
    ray_address: str, s3: S3Server, submitted: None, tmp_path: Path
) -> None:
    write_models(tmp_path, "served", ("brief",))
    store, run = Store(f"s3://{s3.bucket}/runs", "served"), tmp_path / "runs" / "served"
    for file in run.rglob("*.*"):
        store.write_bytes(str(file.relative_to(run)), file.read_bytes())
    settings = {
        "run": "served",
        "storage": store.storage,
        "objectives": {"brief": {"reward": "brevity"}},
        "base": {"model": str(tmp_path / MODEL), "dtype": "float32"},
        "serve": {"port": free_port(), "cpus_per_replica": 0.1},
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    check_service(start(config, ray_address, job="serve"), settings["base"]["model"])


def check_service(job: subprocess.Popen[str], model: str) -> None:
    """A job that serves answers a request that is steered, and ends."""
    try:
        url = url_of(job)
        asked = {"model": model, "prompt": "a", "objective_weights": {"brief": 1.0}, "max_tokens": 3}
        answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 3
    finally:
        job.terminate()
        _, err = job.communicate(timeout=LIMIT_S)
    assert job.returncode in (0, 143), err[-3000:]

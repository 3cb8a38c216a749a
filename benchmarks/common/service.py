"""The service on a Ray cluster of this machine, as benchmarks deploy it, and what it takes of the processor."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil

from mavis_dist.config import Config


def served(config: Config, run: Path, **settings: object) -> Config:
    """A run's config for a service on a free port of loopback."""
    serve = config.serve.model_copy(update={"host": "127.0.0.1", "port": _free_port(), **settings})
    return config.model_copy(update={"storage": str(run.parent.absolute()), "run": run.name, "serve": serve})


@contextmanager
def service(config: Config) -> Iterator[str]:
    """The URL of a running service."""
    from mavis_dist import cluster
    from serve.app import deploy, undeploy

    cluster.connect()
    try:
        yield deploy(config)
    finally:
        undeploy()


def processes(title: str = "") -> list[psutil.Process]:
    """Processes of the cluster, all of which this one has started; `title` begins that of an actor."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
        except psutil.Error:  # gone
            continue
    return found


def cpu_s() -> float:
    """That replicas, proxy, controller and Ray itself have used so far."""
    total = 0.0
    for process in processes():
        try:
            if "spawn_main" not in " ".join(process.cmdline()):  # the clients
                times = process.cpu_times()
                total += times.user + times.system
        except psutil.Error:
            continue
    return total


@cache
def _free_port() -> int:
    """One for all: Serve keeps the port that it was started with."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

"""Deploys the service on a Ray cluster of this machine, and measures its processes' CPU time."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil

from mavis_dist.config import Config


def service_config(config: Config, run: Path, **settings: object) -> Config:
    """The config of a run, for a service on a free port of loopback; `settings` replace those of `serve`."""
    serve = config.serve.model_copy(update={"host": "127.0.0.1", "port": _port(), "keys": None, **settings})
    return config.model_copy(update={"storage": str(run.parent.absolute()), "run": run.name, "serve": serve})


@contextmanager
def service(config: Config) -> Iterator[str]:
    """The URL of the service, which runs until the end of the block."""
    from mavis_dist import cluster
    from serve.app import deploy, undeploy

    cluster.connect()
    url = deploy(config)
    try:
        yield url
    finally:
        undeploy()


def processes(title: str = "") -> list[psutil.Process]:
    """Processes of the cluster, all of them descendants of this one, whose command line starts with `title`."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
        except psutil.Error:  # gone
            continue
    return found


def cpu_s() -> float:
    """CPU time used so far by replicas, proxy, controller and Ray itself."""
    total = 0.0
    for process in processes():
        try:
            if "spawn_main" not in " ".join(process.cmdline()):  # the client process
                times = process.cpu_times()
                total += times.user + times.system
        except psutil.Error:
            continue
    return total


@cache
def _port() -> int:
    """The same one for all services: Serve keeps the port that it was started with."""
    return free_port()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

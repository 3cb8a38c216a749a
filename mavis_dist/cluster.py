"""The driver's connection to Ray: joining a cluster, listing its machines, and stopping on signals."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mavis_dist.environment import ENVIRONMENT  # isort: split

import ray
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from mavis_dist.plan import Node
from mavis_dist.types import Stopped

_is_stopping = threading.Event()


def connect() -> None:
    """Join the cluster at RAY_ADDRESS, or start a local one that ends with this process."""
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
    if "RAY_ADDRESS" not in os.environ:
        # Without an address Ray would join the cluster that was started last on this machine.
        options |= {"address": "local", "dashboard_host": "127.0.0.1"}
    ray.init(runtime_env={"env_vars": forwarded_variables()}, **options)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def forwarded_variables() -> dict[str, str]:
    """Environment variables of this process that the processes on all machines get."""
    # Ray forwards those that the job was submitted with, and refuses to get a variable twice.
    submitted = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}")).get("runtime_env", {}).get("env_vars", {})
    names = (*ENVIRONMENT, "MAVIS_CACHE", "HF_HOME")
    return {name: os.environ[name] for name in names if name in os.environ and name not in submitted}


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Inside this context, SIGTERM and SIGINT make `check_stop` raise, so that work is saved and stops; a second signal
    ends the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        _is_stopping.set()
        # Not the handler before this one: Ray's waits for all threads.
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _is_stopping.clear()


def is_stopping() -> bool:
    """Whether a signal has asked this process to stop."""
    return _is_stopping.is_set()


def check_stop() -> None:
    """Raises Stopped if a signal has asked for a stop."""
    if _is_stopping.is_set():
        raise Stopped


def nodes() -> list[Node]:
    """The machines of the cluster that are alive."""
    return [Node(n["Resources"].get("CPU", 0.0), n["Resources"].get("GPU", 0.0)) for n in ray.nodes() if n["Alive"]]


def cores_here() -> float:
    """The CPU cores of this process's machine, as Ray counts them: in a container no more than it may use."""
    here = ray.get_runtime_context().get_node_id()
    return next(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["NodeID"] == here)

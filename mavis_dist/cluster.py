"""The driver's connection to Ray: joining a cluster, listing its machines, and stopping on signals."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mavis_dist import environment  # isort: split

import grpc
import ray
from ray._private.authentication.authentication_utils import get_authentication_mode_name
from ray._private.grpc_utils import init_grpc_channel
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import get_authentication_mode  # type: ignore[attr-defined]

from mavis_dist.failures import last_words
from mavis_dist.plan import Node
from mavis_dist.types import Stopped, UserError

CONNECT_S = 20.0  # that a cluster has to answer; Ray itself waits for many minutes

_is_stopping = threading.Event()


class ClusterError(UserError):
    """A cluster that cannot be joined or started."""


def connect() -> None:
    """Join the cluster at RAY_ADDRESS, or start a local one that ends with this process; raises UserError."""
    if ray.is_initialized():
        return
    environment.check()
    _check_mode()
    address = environment.variable("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
    if is_local():
        # Without an address Ray would join the cluster that was started last on this machine.
        options |= {"address": "local", "dashboard_host": "127.0.0.1"}
    else:
        address = _resolved(str(address))
        _check_answers(address)
        options |= {"address": address}
    try:
        ray.init(runtime_env={"env_vars": forwarded_variables()}, **options)
    except (RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        where = "a local cluster cannot be started" if is_local() else f"RAY_ADDRESS={address} cannot be joined"
        raise ClusterError(f"{where} ({last_words(error)}): {_remedy()}") from error
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def _check_mode() -> None:
    """Raises ClusterError where Ray was imported before its mode of authentication was set, which it reads once."""
    mode = os.environ["RAY_AUTH_MODE"]
    if get_authentication_mode_name(get_authentication_mode()) != mode.strip().lower():
        raise ClusterError(
            f"RAY_AUTH_MODE={mode} came after the import of Ray, which reads it once: export it before Python starts"
        )


def is_local() -> bool:
    """Whether `connect` starts a cluster of its own."""
    return environment.variable("RAY_ADDRESS") in (None, "local")


def _remedy() -> str:
    if is_local():
        return "check the memory, the disk and the limits of processes of this machine"
    return (
        "set RAY_ADDRESS to HOST:6379 of a cluster that has a Ray process on this machine, `ray start` with the same "
        "versions and token, or unset it to start a local one"
    )


def check_port(host: str, port: int) -> None:
    """Raises ClusterError unless a program of this machine may listen there."""
    if problem := bind_problem(host, port):
        raise ClusterError(
            f"serve.host={host} serve.port={port} cannot be listened on ({problem}): end the program that listens "
            "there, or choose another serve.port"
        )


def bind_problem(host: str, port: int) -> str:
    """Why no socket can be bound on this machine to the addresses of a host; empty: one can."""
    missing, num_bound = "", 0
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            try:
                with socket.socket(family, kind, protocol) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(address)
                    num_bound += 1
            except OSError as error:
                # A name may have addresses of a family that this machine does not have.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error.strerror or str(error)
    except OSError as error:
        return error.strerror or str(error)
    return "" if num_bound else missing


def _resolved(address: str) -> str:
    """HOST:PORT of the cluster that runs on this machine, or was started last on it, for `auto`; else the address.

    Ray would try for minutes to join one that has ended.
    """
    if address != "auto":
        return address
    try:
        return str(canonicalize_bootstrap_address(address))
    except (ConnectionError, ValueError):
        raise ClusterError(f"RAY_ADDRESS={address} finds no Ray cluster on this machine: {_remedy()}") from None


def _check_answers(address: str) -> None:
    """Raises ClusterError unless something answers at an address as Ray does."""
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"RAY_ADDRESS={address} is the address of a dashboard, which only `ray job` uses: set it to HOST:6379 of "
            "the cluster's head, or unset it to start a local one"
        )
    channel = init_grpc_channel(address.removeprefix("ray://"), [("grpc.enable_http_proxy", 0)])
    try:
        grpc.channel_ready_future(channel).result(CONNECT_S)
    except grpc.FutureTimeoutError:
        raise ClusterError(
            f"RAY_ADDRESS={address} does not answer as a Ray cluster within {CONNECT_S:g} s: {_remedy()}"
        ) from None
    finally:
        channel.close()


def forwarded_variables() -> dict[str, str]:
    """Environment variables of this process that the processes on all machines get."""
    # Ray forwards those that the job was submitted with, and refuses to get a variable twice.
    submitted = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}")).get("runtime_env", {}).get("env_vars", {})
    return {name: value for name, value in environment.forwarded().items() if name not in submitted}


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

"""vLLM's server and this project's service at the same work over HTTP, unguided, each alone on the machine."""

from __future__ import annotations

import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from benchmarks.common import peers
from benchmarks.common.http_load import Body, closed_loop, summary
from benchmarks.common.interleave import in_turn
from benchmarks.common.service import free_port, service
from mavis_dist.config import Config
from mavis_dist.models.fetch import fetch
from mavis_dist.types import UserError

START_S = 900.0  # the first compilation takes minutes
POLL_S = 0.5
LOG_CHARACTERS = 2000
MAX_LENGTH = 1024

Server = Callable[[], AbstractContextManager[str]]  # runs while its URL is used


def compare(
    process: ProcessPoolExecutor,
    config: Config,
    python: Path,
    threads: int,
    bodies: Sequence[Body],
    clients: int,
    repetitions: int,
) -> dict[str, list[dict[str, Any]]]:
    """Summaries of the load of every repetition, by server: first each once, then in reverse order, and so on."""
    servers: dict[str, Server] = {"this service": lambda: service(config)}
    for name, settings in peers.vllm_settings(threads).items():
        servers[name] = lambda settings=settings: vllm(config.base.model, python, settings, clients)  # type: ignore[misc]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
    for _, name in in_turn(list(servers), repetitions):
        with servers[name]() as url:
            closed_loop(process, url, bodies[:clients], clients).result()  # warm-up
            found[name].append(summary(closed_loop(process, url, bodies, clients).result()))
    return found


@contextmanager
def vllm(model: str, python: Path, settings: dict[str, str], rows: int) -> Iterator[str]:
    """The URL of vLLM's server, which runs until the end of the block.

    Raises:
        UserError: it has ended, or does not answer within START_S.
    """
    port = free_port()
    options = {"host": "127.0.0.1", "port": port, "model": fetch(model), "served-model-name": model}
    options |= {"dtype": "bfloat16", "max-model-len": MAX_LENGTH, "max-num-seqs": rows}
    flags = [f"--{name}={value}" for name, value in options.items()]
    command: list[str | Path] = [python, "-m", "vllm.entrypoints.openai.api_server", *flags]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    with TemporaryFile("w+") as log, peers.running(command, settings, log, **pipes) as process:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_S
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                raise UserError(f"vLLM's server does not answer: {log.read()[-LOG_CHARACTERS:]}")
            time.sleep(POLL_S)
        yield url


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=POLL_S):
            return True
    except (urllib.error.URLError, OSError):
        return False

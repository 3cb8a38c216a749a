"""Other engines to compare with: where they are installed, what suits them best, processes of their own.

Hugging Face transformers runs in this project's environment. vLLM and llama.cpp need packages of their own, so each has
an environment with its name in one folder; `make peers` makes both.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from benchmarks.common import figures
from mavis_dist.environment import ENVIRONMENT
from mavis_dist.types import UserError

ROOT = figures.DOCS.parent
FOLDER = Path(".peers")
VLLM, LLAMACPP = "vllm", "llamacpp"  # folders of their environments
LABELS = {"vllm": "vLLM for CPU, as it comes", "vllm_all_cores": "vLLM for CPU, on all cores"}  # of its settings
END_S = 20.0  # for a process to end by itself
# A process group, but not a session, of its own: should this process be killed, the system ends even a stopped group.
IN_GROUP = "import os, sys; os.setpgrp(); os.execv(sys.argv[1], sys.argv[1:])"


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peers",
        type=Path,
        nargs="?",
        const=FOLDER,
        metavar="FOLDER",
        help=f"also measure vLLM and llama.cpp, where this folder has their environments (default: {FOLDER})",
    )


def interpreters(folder: Path | None) -> dict[str, Path]:
    """The Python interpreter of every peer with an environment in the folder; none if there is no folder.

    Raises:
        UserError: the folder has no environment of a peer.
    """
    if folder is None:
        return {}
    pythons = {name: folder.absolute() / name / "bin" / "python" for name in (VLLM, LLAMACPP)}
    found = {name: python for name, python in pythons.items() if python.exists()}
    if not found:
        raise UserError(f"--peers: {folder} has no environment {VLLM} or {LLAMACPP}: run `make peers` first")
    return found


def vllm_settings(threads: int) -> dict[str, dict[str, str]]:
    """Environment variables of vLLM as it comes, which keeps a core free, and with all cores in one process."""
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    cores = ",".join(map(str, range(threads)))
    bound = {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return {"vllm": offline, "vllm_all_cores": {**offline, **bound}}


def variables(settings: Mapping[str, str]) -> dict[str, str]:
    """The environment variables of this process, less those of this project, and with `settings`."""
    return {name: value for name, value in os.environ.items() if name not in ENVIRONMENT} | dict(settings)


@contextmanager
def running(
    command: Sequence[str | Path], settings: Mapping[str, str], log: IO[str], **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """A process with `variables(settings)`.

    Its standard input is closed at the end of the block, or SIGTERM is sent if it has none; what is left of its process
    group is killed.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", IN_GROUP, *command],
        env=variables(settings),
        cwd=ROOT,
        stderr=log,
        text=True,
        **options,
    )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError, BrokenPipeError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGCONT)
        if process.stdin:
            process.stdin.close()
        else:
            process.terminate()
        process.wait(END_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

"""How threads should wait: decoding and training under several OpenMP settings, alone and on shared cores.

    python -m benchmarks.threads [--json FILE]

Every setting runs in processes of its own, since OpenMP reads its variables once: one with all cores, then two at the
same time on the same cores. Intel's runtime is measured where the package intel-openmp is installed.
Prints a table, writes all figures to docs/figures/threads.json and the table to docs/threads.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from benchmarks.common import command, figures, peers
from benchmarks.common.command import say, table
from benchmarks.common.markdown import table as markdown_table
from benchmarks.common.markdown import write_part
from mavis_dist.environment import ENVIRONMENT

PAGE = figures.DOCS / "threads.md"
WORKS = ("native decoder", "fused decoder", "training")
OURS = {name: ENVIRONMENT[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
SETTINGS: dict[str, dict[str, str]] = {
    "this project's": OURS,
    "libgomp's defaults": {},
    "always spinning": {"OMP_WAIT_POLICY": "ACTIVE"},
    "sleeping at once": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"},
}
INTEL = "Intel's, 1 ms of spinning"
LIMIT_S = 300.0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.threads", description="Measure waiting policies.")
    command.add_json(parser, "threads")
    file = command.file_of("threads", parser.parse_args(argv))
    figures.write(file, {**measure(), **figures.provenance(command.line("threads", argv))})
    write_part(PAGE, "threads", render(figures.read(file)))


def measure() -> dict[str, Any]:
    """Steps per second of every work under every setting: of one process, and of two together."""
    settings = SETTINGS | intel()
    speeds = {
        work: {name: {"alone": sum(run(work, own, 1)), "two": sum(run(work, own, 2))} for name, own in settings.items()}
        for work in WORKS
    }
    say(table(["steps/s", *(f"{work}{load}" for work in WORKS for load in ("", ", two"))], rows(speeds)))
    return {"steps_per_s": speeds}


def rows(speeds: Mapping[str, Any]) -> list[list[Any]]:
    loads = [(work, load) for work in WORKS for load in ("alone", "two")]
    return [[name, *(speeds[work][name][load] for work, load in loads)] for name in speeds[WORKS[0]]]


def render(found: Mapping[str, Any]) -> str:
    head = ["setting", *(f"{work}{load}" for work in WORKS for load in ("", ", two"))]
    cells = ([name, *(f"{speed:.1f}" for speed in speeds)] for name, *speeds in rows(found["steps_per_s"]))
    origin = f"`{found['command']}`: {figures.machine_line(found)}"
    return f"{markdown_table(head, cells)}\n\nSteps per second, of two processes their sum. {origin}."


def intel() -> dict[str, dict[str, str]]:
    """The settings of Intel's runtime, where it is installed."""
    try:
        files = metadata.files("intel-openmp") or []
    except metadata.PackageNotFoundError:
        return {}
    library = next(str(file.locate()) for file in files if file.name == "libiomp5.so")
    return {INTEL: {"LD_PRELOAD": library, "KMP_BLOCKTIME": "1"}}


def run(work: str, settings: Mapping[str, str], count: int) -> list[float]:
    """Steps per second of each of `count` processes at the same time."""
    arguments = [sys.executable, "-m", "benchmarks.threads.work", work]
    processes = [
        subprocess.Popen(
            arguments, env=peers.variables(settings), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(count)
    ]
    for process in processes:  # all have loaded before any starts
        assert process.stdout
        process.stdout.readline()
    for process in processes:
        assert process.stdin
        print("start", file=process.stdin, flush=True)
    return [float(json.loads(process.communicate(timeout=LIMIT_S)[0])) for process in processes]


if __name__ == "__main__":
    main()

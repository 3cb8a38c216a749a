"""Plans of hh_rlhf.yaml with base models of 7, 13 and 70 billion parameters on machines of 8 H100, as a page.

    python -m benchmarks.sizing [--page-only]

Nothing is run: `jobs.plan` estimates. Writes docs/figures/plan-SHAPE.json and its part of docs/clusters.md.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from benchmarks.common import command, figures
from benchmarks.common.markdown import table, write_part

NAME = "sizing"
PAGE = figures.DOCS / "clusters.md"
SHAPES = {"7b": 1, "13b": 1, "70b": 4}  # and processes that share the base model
COUNTS = (1, 4, 16, 64, 1000)  # machines that the page shows
PLAN = ["--config", "jobs/configs/hh_rlhf.yaml", "--machines", "4x8xH100", "--value-shape", "1b"]
PLAN += ["--price-per-hour", "24", "--answers-per-second", "1000"]
GIB = 2**30


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description="Plans for large base models.")
    command.add_page_only(parser)
    if not parser.parse_args(argv).page_only:
        for shape, size in SHAPES.items():
            plan(shape, size)
    plans = {shape: figures.read(figures.default_file(f"plan-{shape}")) for shape in SHAPES}
    write_part(PAGE, NAME, render(plans))


def plan(shape: str, size: int) -> None:
    """Write the file of figures of one shape."""
    from jobs import plan as job

    file = os.path.relpath(figures.default_file(f"plan-{shape}"))
    with suppress(SystemExit):  # its exit code says whether everything fits, as does the page
        job.main([*PLAN, "--shape", shape, "--json", file, f"base.tensor_parallel={size}"])


def render(plans: Mapping[str, Any]) -> str:
    names = [f"{shape.upper()}, groups of {size}" if size > 1 else shape.upper() for shape, size in SHAPES.items()]
    found = {shape: plans[shape]["plan"] for shape in SHAPES}
    return (
        f"Estimates of `{plans['70b']['command']}`, and the same for the other two; no run of this kind was made. The "
        "price is an example, and 1,000 answers per second stand for cheap rewards.\n\n"
        + table(["GiB of a process", *names], memory(found))
        + "\n\nWith as many actors as fit, 2 % slow machines and a failure per machine in 5,000 hours: time of all "
        "stages (of the rollouts), cost, and what holds the run up.\n\n"
        + table(["machines of 8 H100", *names], times(found))
    )


def memory(plans: Mapping[str, Any]) -> list[list[str]]:
    """A row for every kind of process of any plan."""
    needs = {shape: {need["process"]: need for need in plan["memory"]} for shape, plan in plans.items()}
    kinds = list(dict.fromkeys(kind for of_shape in needs.values() for kind in of_shape))
    return [[kind, *(_need(needs[shape].get(kind)) for shape in plans)] for kind in kinds]


def _need(need: Mapping[str, Any] | None) -> str:
    if need is None:
        return "–"
    return f"{sum(need['bytes'].values()) / GIB:.1f}" + ("" if need["fits"] else f" (too much: {need['remedy']})")


def times(plans: Mapping[str, Any]) -> list[list[str]]:
    runs = {shape: {run["machines"]: run for run in plan["by_machines"]} for shape, plan in plans.items()}
    return [[f"{count:,}", *(_run(runs[shape][count]) for shape in plans)] for count in COUNTS]


def _run(run: Mapping[str, Any]) -> str:
    rollouts = sum(seconds for name, seconds in run["seconds"].items() if name.startswith("rollouts"))
    total = sum(run["seconds"].values())
    stage = run["bottleneck"].partition(":")[0]
    return f"{total / 60:.0f} min ({rollouts / 60:.0f}), {run['cost']:,.0f}, {stage}"


if __name__ == "__main__":
    main()

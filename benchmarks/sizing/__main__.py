"""Plans of hh_rlhf.yaml with base models of 7, 13 and 70 billion parameters on machines of 8 H100, as a page.

    python -m benchmarks.sizing [--page-only]

Nothing is run: `jobs.plan` estimates, with the rewards of the config and with fast ones. Writes
docs/figures/plan-SHAPE.json, plan-SHAPE-fast-rewards.json, and its part of docs/clusters.md.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from benchmarks.common import command, figures
from benchmarks.common.markdown import table, write_part
from mavis_dist.sizing.report import duration

NAME = "sizing"
PAGE = figures.DOCS / "clusters.md"
SHAPES = {"7b": 1, "13b": 1, "70b": 4}  # and processes that share the base model
COUNTS = (1, 4, 16, 64, 1000)  # machines that the page shows
PLAN = ["--config", "jobs/configs/hh_rlhf.yaml", "--machines", "4x8xH100", "--value-shape", "1b"]
PLAN += ["--price-per-hour", "24"]
REWARDS = {"": [], "-fast-rewards": ["--answers-per-second", "1000"]}  # ends of the files' names, and the options
GIB = 2**30


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description="Plans for large base models.")
    command.add_page_only(parser)
    if not parser.parse_args(argv).page_only:
        for shape, size in SHAPES.items():
            for rewards in REWARDS:
                plan(shape, size, rewards)
    write_part(PAGE, NAME, render(read()))


def plan(shape: str, size: int, rewards: str) -> None:
    """Write the file of figures of one shape."""
    from jobs import plan as job

    file = os.path.relpath(figures.default_file(f"plan-{shape}{rewards}"))
    with suppress(SystemExit):  # its exit code says whether everything fits, as does the page
        job.main([*PLAN, *REWARDS[rewards], "--shape", shape, "--json", file, f"base.tensor_parallel={size}"])


def read() -> dict[str, dict[str, Any]]:
    """All figures, by rewards and shape."""
    return {
        rewards: {shape: figures.read(figures.default_file(f"plan-{shape}{rewards}")) for shape in SHAPES}
        for rewards in REWARDS
    }


def render(plans: Mapping[str, Mapping[str, Any]]) -> str:
    names = [f"{shape.upper()}, groups of {size}" if size > 1 else shape.upper() for shape, size in SHAPES.items()]
    own, fast = ({shape: plans[rewards][shape]["plan"] for shape in SHAPES} for rewards in REWARDS)
    return (
        f"Estimates of `{plans['']['70b']['command']}`, and the same for the other two; no run of this kind was made. "
        "The price is an example.\n\n"
        + table(["GiB of a process", *names], memory(own))
        + "\n\nWith as many actors as fit, 2 % slow machines and a failure per machine in 5,000 hours: time of all "
        "stages (of the rollouts), cost, and what holds the run up. The rewards of this config are classifiers, of "
        "which a core scores about one answer per second (an estimate).\n\n"
        + table(["machines of 8 H100", *names], times(own))
        + "\n\nThe same with rewards that score 1,000 answers per second and core, such as `sentiment` or a small "
        "function (`--answers-per-second 1000`).\n\n" + table(["machines of 8 H100", *names], times(fast))
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
    return f"{duration(total)} ({duration(rollouts)}), {run['cost']:,.0f}, {stage}"


if __name__ == "__main__":
    main()

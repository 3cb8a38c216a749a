"""Training on packed trees against one sequence per node, and all objectives at once against one after the other.

    python -m benchmarks.training [--quick] [--json FILE] [--run runs/quickstart]

Needs the trees and value models of a finished run. Prints tables and writes all figures to docs/figures/training.json.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import command
from benchmarks.common.command import say, table
from benchmarks.common.interleave import ratio

PARTS = ("forward", "backward", "optimiser")


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    repetitions: int
    trees: int  # of the run, per repetition
    paper_trees: int  # grown in the published shape
    shards: int  # of trees, for the training stage
    epochs: int  # of the training stage
    stages: int  # repetitions of the training stage


FULL = Scale(repetitions=3, trees=16, paper_trees=4, shards=3, epochs=2, stages=2)
QUICK = Scale(repetitions=1, trees=8, paper_trees=4, shards=1, epochs=1, stages=1)


def main(argv: Sequence[str] | None = None) -> None:
    command.run("training", "Measure training.", "three minutes instead of twenty", (QUICK, FULL), measure, argv)


def measure(run: Path, scale: Scale) -> dict[str, Any]:
    import torch

    from benchmarks.common import stages, workload
    from benchmarks.training import packed_trees

    config, store = workload.open_run(run)
    threads = max(1, int(config.train.cpus_per_worker))
    torch.set_num_threads(threads)
    conditions = {
        "model": config.base.model,
        "layers": config.value.layers,
        "dtype": config.train.dtype,
        "threads": threads,
        "load_before": os.getloadavg()[0],
        **asdict(scale),
    }
    command.say_conditions(conditions)
    sets = {
        "run": (packed_trees.trees_of_run(config, store), scale.trees),
        "paper": (packed_trees.trees_of_paper(config, scale.paper_trees), scale.paper_trees),
    }
    with packed_trees.process_group():
        packing = {
            name: packed_trees.measure(trees, config, store, num_trees, scale.repetitions)
            for name, (trees, num_trees) in sets.items()
        }
    say(packing_table(packing))
    fit_seconds = stages.fit_seconds(config, store, scale.shards, scale.epochs, scale.stages)
    headline = {**packing_headlines(packing), **stage_headlines(fit_seconds)}
    say(command.headline_table(headline))
    return {**headline, "conditions": conditions, "packing": packing, "fit_walls_s": fit_seconds}


def packing_headlines(packing: dict[str, Any]) -> dict[str, Any]:
    """Ratios of wall time, and of CPU time, which other load on the cores does not affect."""
    headline: dict[str, Any] = {}
    for name, figures in packing.items():
        tokens, ending = figures["token_forwards"], "" if name == "run" else f"_{name}_trees"
        for clock, rates in (("", figures["nodes_per_s"]), ("_cpu", figures["nodes_per_cpu_s"])):
            for variant in ("packed", "packed_singly"):
                headline[f"{variant}_vs_per_node{ending}{clock}"] = ratio(rates[variant], rates["per_node"])
        headline[f"packed_token_ratio{ending}"] = tokens["per_node"] / tokens["packed"]
        headline[f"packed_token_ratio_padded{ending}"] = tokens["per_node_padded"] / tokens["packed_padded"]
    return headline


def stage_headlines(fit_seconds: dict[str, list[float]]) -> dict[str, float]:
    return {
        "objectives_in_parallel": ratio(fit_seconds["at_once"], fit_seconds["in_turn"]),
        "objectives_in_parallel_vs_all_cores": ratio(fit_seconds["at_once"], fit_seconds["in_turn_all_cores"]),
    }


def packing_table(packing: dict[str, Any]) -> str:
    head = ["trees, variant", "nodes/s", "per CPU s", "tokens/node", "padded", *PARTS]
    rows: list[list[str | float]] = []
    for name, figures in packing.items():
        tokens, num_nodes = figures["token_forwards"], figures["nodes"]
        for variant, rates in figures["nodes_per_s"].items():
            seconds, cpu_rates = figures["seconds"][variant], figures["nodes_per_cpu_s"][variant]
            shares = [median(parts[part] / sum(parts.values()) for parts in seconds) for part in PARTS]
            sizes = [tokens[variant] / num_nodes, tokens[f"{variant}_padded"] / num_nodes]
            rows.append([f"{name}, {variant}", median(rates), median(cpu_rates), *sizes, *shares])
    return table(head, rows) + "\nthe last three columns are shares of the time"


if __name__ == "__main__":
    main()

"""Training on packed trees against one sequence per node, and all objectives at once against one after the other.

    python -m benchmarks.training [--quick] [--json FILE] [--run runs/quickstart]

Needs the trees and value models of a finished run. Prints tables and, with --json, writes every number.
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
    trees: int  # of the run, trained on in a repetition
    paper_trees: int  # of the published shape; grown for the purpose
    shards: int  # of trees, where objectives are trained at once
    epochs: int  # over them
    stages: int  # repetitions of that


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
    say(f"{conditions}\nOther load on these cores spoils the figures, and leaves the ratios rough.")
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
    walls = stages.fit_walls(config, store, scale.shards, scale.epochs, scale.stages)
    headline = {**packing_headlines(packing), **stage_headlines(walls)}
    say(command.headline_table(headline))
    return {**headline, "conditions": conditions, "packing": packing, "fit_walls_s": walls}


def packing_headlines(packing: dict[str, Any]) -> dict[str, Any]:
    """Ratios of wall time, and of processor time, which other load on the cores leaves alone."""
    headline: dict[str, Any] = {}
    for name, figures in packing.items():
        tokens, ending = figures["token_forwards"], "" if name == "run" else f"_{name}_trees"
        for clock, rates in (("", figures["nodes_per_s"]), ("_cpu", figures["nodes_per_cpu_s"])):
            for way in ("packed", "packed_singly"):
                headline[f"{way}_vs_per_node{ending}{clock}"] = ratio(rates[way], rates["per_node"])
        headline[f"packed_token_ratio{ending}"] = tokens["per_node"] / tokens["packed"]
        headline[f"packed_token_ratio_padded{ending}"] = tokens["per_node_padded"] / tokens["packed_padded"]
    return headline


def stage_headlines(walls: dict[str, list[float]]) -> dict[str, float]:
    return {
        "objectives_in_parallel": ratio(walls["at_once"], walls["in_turn"]),
        "objectives_in_parallel_vs_all_cores": ratio(walls["at_once"], walls["in_turn_all_cores"]),
    }


def packing_table(packing: dict[str, Any]) -> str:
    head = ["trees, way", "nodes/s", "per CPU s", "tokens/node", "padded", *PARTS]
    rows: list[list[str | float]] = []
    for name, figures in packing.items():
        tokens, num_nodes = figures["token_forwards"], figures["nodes"]
        for way, rates in figures["nodes_per_s"].items():
            shares = [median(parts[part] / sum(parts.values()) for parts in figures["seconds"][way]) for part in PARTS]
            sizes = [tokens[way] / num_nodes, tokens[f"{way}_padded"] / num_nodes]
            rows.append([f"{name}, {way}", median(rates), median(figures["nodes_per_cpu_s"][way]), *sizes, *shares])
    return table(head, rows, first=24) + "\nthe last three columns are shares of the time"


if __name__ == "__main__":
    main()

"""Training on packed trees against one sequence per node, and all objectives at once against one after the other.

    python -m benchmarks.training [--quick] [--json FILE] [--run runs/quickstart]

Needs the trees and value models of a finished run. Prints tables and, with --json, writes every number.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.command import say, table
from benchmarks.turns import ratio


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    repetitions: int
    trees: int  # of the run, trained on in a repetition
    paper_trees: int  # of the published shape; grown for the purpose
    shards: int  # of trees, where objectives are trained at once
    epochs: int  # over them
    stages: int  # repetitions of that


FULL = Scale(repetitions=5, trees=16, paper_trees=4, shards=3, epochs=2, stages=3)
QUICK = Scale(repetitions=1, trees=8, paper_trees=4, shards=1, epochs=1, stages=1)


def main(argv: Sequence[str] | None = None) -> None:
    command.run("training", "Measure training.", "three minutes instead of twenty", (QUICK, FULL), measure, argv)


def measure(run: Path, scale: Scale) -> dict[str, Any]:
    import torch

    from benchmarks import fitting, stages, workload

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
    sets = {"run": fitting.trees_of_run(config, store), "paper": fitting.trees_of_paper(config, scale.paper_trees)}
    packing: dict[str, Any] = {}
    with fitting.process_group():
        for name, trees in sets.items():
            num_trees = scale.trees if name == "run" else scale.paper_trees
            race = fitting.Race(trees, config, store, num_trees)
            check = list(range(min(4, len(trees))))
            difference = fitting.loss_difference(fitting.make_model(config, store), trees, check)
            rates, parts = race.measure(scale.repetitions)
            packing[name] = {
                "trees": len(trees),
                "nodes": fitting.num_nodes(trees, range(len(trees))),
                "nodes_per_s": rates,
                "seconds": parts,
                "token_forwards": fitting.token_forwards(trees, config.train.trees_per_step, config.seed),
                "loss_difference": difference,
            }
    say(packing_table(packing))
    walls = stages.fit_walls(config, store, scale.shards, scale.epochs, scale.stages)
    headline = {**packing_headlines(packing), **stage_headlines(walls)}
    say(command.headline_table(headline))
    return {**headline, "conditions": conditions, "packing": packing, "fit_walls_s": walls}


def packing_headlines(packing: dict[str, Any]) -> dict[str, Any]:
    headline: dict[str, Any] = {}
    for name, figures in packing.items():
        rates, tokens = figures["nodes_per_s"], figures["token_forwards"]
        ending = "" if name == "run" else f"_{name}_trees"
        headline[f"packed_vs_per_node{ending}"] = ratio(rates["packed"], rates["per_node"])
        headline[f"packed_token_ratio{ending}"] = tokens["per_node"] / tokens["packed"]
        headline[f"packed_token_ratio_padded{ending}"] = tokens["per_node_padded"] / tokens["packed_padded"]
    return headline


def stage_headlines(walls: dict[str, list[float]]) -> dict[str, float]:
    return {
        "objectives_in_parallel": ratio(walls["at_once"], walls["in_turn"]),
        "objectives_in_parallel_vs_all_cores": ratio(walls["at_once"], walls["in_turn_all_cores"]),
    }


def packing_table(packing: dict[str, Any]) -> str:
    from statistics import median

    head = ["trees, way", "nodes/tree", "nodes/s", "tokens/node", "padded", "forward", "backward", "optimiser"]
    rows: list[list[str | float]] = []
    for name, figures in packing.items():
        tokens, num_nodes = figures["token_forwards"], figures["nodes"]
        for way, rates in figures["nodes_per_s"].items():
            seconds = figures["seconds"][way]
            shares = [
                median(parts[part] / sum(parts.values()) for parts in seconds)
                for part in ("forward", "backward", "optimiser")
            ]
            rows.append(
                [
                    f"{name}, {way}",
                    num_nodes / figures["trees"],
                    median(rates),
                    tokens[way] / num_nodes,
                    tokens[f"{way}_padded"] / num_nodes,
                    *shares,
                ]
            )
    return table(head, rows, first=20, width=11) + "\nthe last three columns are shares of the time"


if __name__ == "__main__":
    main()

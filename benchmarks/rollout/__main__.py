"""Growing trees on one engine against Hugging Face generate for every node, and two rollout actors against one.

    python -m benchmarks.rollout [--quick] [--json FILE] [--run runs/quickstart]

Needs the value models of a finished run. Prints tables and writes all figures to docs/figures/rollout.json.
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
from benchmarks.common.interleave import Rates, Speeds, ratio

THREADS = 2


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    repetitions: int
    prompts: int  # trees that the engine grows concurrently, per repetition
    plain_prompts: int  # trees that the reference grows one after the other
    actor_prompts: int  # trees of the rollout stage
    stages: int  # repetitions of the rollout stage


FULL = Scale(repetitions=3, prompts=24, plain_prompts=2, actor_prompts=24, stages=2)
QUICK = Scale(repetitions=1, prompts=8, plain_prompts=1, actor_prompts=8, stages=1)


def main(argv: Sequence[str] | None = None) -> None:
    command.run("rollout", "Measure growing trees.", "five minutes instead of twenty", (QUICK, FULL), measure, argv)


def measure(run: Path, scale: Scale) -> dict[str, Any]:
    import torch

    from benchmarks.common import stages, workload
    from benchmarks.common.trees import shape_of
    from benchmarks.rollout import engine_trees
    from mavis_dist.models.load import load_base

    torch.set_num_threads(THREADS)
    config, store = workload.open_run(run)
    base = load_base(config.base.model, config.base.dtype)
    conditions = {
        "model": base.name,
        "dtype": config.base.dtype,
        "threads": THREADS,
        "rows": config.rollout.rows,
        "load_before": os.getloadavg()[0],
        **asdict(scale),
    }
    command.say_conditions(conditions)
    prefixes = engine_trees.prefix_tokens(config, base, shape_of(config.rollout.first, config.rollout), scale.prompts)
    speeds = engine_trees.measure(config, store, base, scale.prompts, scale.plain_prompts, scale.repetitions)
    say(rate_table("answer tokens/s", speeds.per_s))
    say(rate_table("answer tokens per CPU second", speeds.per_cpu_s))
    actors = stages.growth_rates(config, scale.actor_prompts, scale.stages)
    say(rate_table("answer tokens/s", actors))
    headline = headlines(speeds, actors, prefixes)
    say(command.headline_table(headline))
    details = {
        "tokens_per_s": speeds.per_s,
        "tokens_per_cpu_s": speeds.per_cpu_s,
        "actor_tokens_per_s": actors,
        "prefix_tokens": prefixes,
    }
    return {**headline, "conditions": conditions, **details}


def headlines(speeds: Speeds, actors: Rates, prefixes: dict[str, int]) -> dict[str, Any]:
    rates, cpu_rates = speeds.per_s, speeds.per_cpu_s
    return {
        "trees_vs_reference": ratio(rates["trees"], rates["reference"]),
        "trees_vs_reference_cpu": ratio(cpu_rates["trees"], cpu_rates["reference"]),
        "trees_vs_reference_per_child": ratio(rates["trees"], rates["reference_per_child"]),
        "prefix_tokens_saved": 1 - prefixes["computed"] / prefixes["all"],
        "tilted_tokens_per_s": {
            name.removeprefix("tilted_"): median(found) for name, found in rates.items() if name.startswith("tilted_")
        },
        "actor_scaling": ratio(actors["2 actors"], actors["1 actor"]),
    }


def rate_table(unit: str, rates: Rates) -> str:
    rows: list[list[str | float]] = [[name, median(found), min(found), max(found)] for name, found in rates.items()]
    return table([unit, "median", "minimum", "maximum"], rows)


if __name__ == "__main__":
    main()

"""The pipeline with a real model on 1, 2 and 4 Ray nodes of one computer, beside what `jobs.plan` simulates.

    python -m benchmarks.scaling [--json FILE]

The simulation knows two runs on one node, of which one has few prompts, and how much slower processes are that compute
beside others: nodes of one computer share its cores. Takes half an hour, writes docs/figures/scaling.json and its part
of docs/clusters.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import command, figures
from benchmarks.common.command import say
from benchmarks.common.figures import machine_line
from benchmarks.common.markdown import table, write_part
from benchmarks.common.nodes import ray_nodes

if TYPE_CHECKING:
    from benchmarks.scaling.rates import Run, Slowdown
    from mavis_dist.config import Config
    from mavis_dist.sizing.workload import Lengths

NAME = "scaling"
PAGE = figures.DOCS / "clusters.md"
COUNTS = (1, 2, 4)  # nodes
CPUS_PER_NODE = 1
LITTLE = ("prompts.train=8", "prompts.validation=4", "prompts.evaluation=8", "train.epochs=1")  # mostly starting
LIMIT_S = 1800.0
AIM = 0.2  # of the measured time, above or below
GIB = 2**30
SETTINGS: dict[str, Any] = {
    "iterations": 1,
    "objectives": {"positive": {"reward": "sentiment"}, "brief": {"reward": "brevity"}},
    "base": {"model": "smollm2-135m-instruct", "system": "Answer in one short sentence."},
    "prompts": {"train": 120, "validation": 8, "evaluation": 24},
    "rollout": {
        "first": {"root": 4, "children": 2, "layers": 2},
        "max_tokens": 32,
        "actors": max(COUNTS),
        "cpus_per_actor": 1,
        "prompts_per_shard": 6,
    },
    "value": {"layers": 4},
    "train": {"epochs": 3, "trees_per_step": 4, "cpus_per_worker": 1},
    "evaluate": {"limit_answers": 8},
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description="Predicted and measured times.")
    command.add_json(parser, NAME)
    command.add_page_only(parser)
    arguments = parser.parse_args(argv)
    file = command.file_of(NAME, arguments)
    if not arguments.page_only:
        from jobs.arguments import refusing

        figures.write(file, {**refusing(measure), **figures.provenance(command.line(NAME, argv))})
    write_part(PAGE, NAME, render(figures.read(file)))


def measure() -> dict[str, Any]:
    """Seconds by stage on every number of nodes, predicted and measured; raises UserError."""
    from benchmarks.scaling.memory import estimated
    from benchmarks.scaling.rates import predicted, rates_of

    with tempfile.TemporaryDirectory(prefix="mavis-scaling-") as folder:
        little = run(Path(folder), "little", 1, LITTLE)
        runs = {count: run(Path(folder), f"nodes-{count}", count) for count in COUNTS}
    slowdown = slowdowns()
    rates = rates_of(little, runs[1])
    found = {}
    for count, one in runs.items():
        seconds = predicted(one.config, count, rates, runs[1].lengths, slowdown[count])
        needed = estimated(one.config, one.lengths)
        found[str(count)] = {
            "measured": dict(one.seconds),
            "predicted": {name: seconds[name] for name in one.seconds},
            "slowdown": vars(slowdown[count]),
            "memory": {kind: {"peak": peak, "estimated": needed[kind]} for kind, peak in one.peaks.items()},
        }
    return {"rates": vars(rates), "little": dict(little.seconds), "nodes": found}


def run(folder: Path, name: str, count: int, overrides: Sequence[str] = ()) -> Run:
    """The pipeline on so many nodes; raises RuntimeError if it fails."""
    from benchmarks.scaling.memory import watched
    from benchmarks.scaling.rates import Run
    from mavis_dist import config as config_module
    from mavis_dist.evaluate.collect import stage_seconds
    from mavis_dist.store.files import Store
    from tests.cluster.jobs import start

    file = write_config(folder, name)
    with ray_nodes(count, CPUS_PER_NODE) as cluster, watched() as peaks:
        job = start(file, cluster.address, *overrides)
        try:
            _, err = job.communicate(timeout=LIMIT_S)
        finally:
            job.kill()
        if job.returncode:
            raise RuntimeError(f"{name} ends with {job.returncode}: {err[-2000:]}")
    config = config_module.load(file, overrides)
    store = Store(config.storage, name)
    seconds = {stage: took for stage, took in stage_seconds(store).items() if took}
    say(f"{name}: {sum(seconds.values()):.0f} s, {', '.join(f'{stage} {took:.0f}' for stage, took in seconds.items())}")
    return Run(config, lengths_of(config, store), seconds, peaks)


def write_config(folder: Path, name: str) -> Path:
    """The config of a run."""
    import yaml

    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({**SETTINGS, "run": name, "storage": str(folder / "runs")}))
    return file


def lengths_of(config: Config, store: Any) -> Lengths:
    """Mean tokens of prompts and answers in the base model's trees."""
    from statistics import fmean

    from mavis_dist.sizing.workload import Lengths, num_nodes
    from mavis_dist.store.layout import rollout_folder
    from mavis_dist.store.shards import read_trees, shard_names
    from mavis_dist.types import Policy

    folder, shape = rollout_folder(Policy()), config.rollout.first
    trees = [tree for name in shard_names(store, folder) for tree in read_trees(store, f"{folder}/{name}")]
    segment = fmean(len(tree.tokens) for tree in trees) / num_nodes(shape)
    return Lengths(round(fmean(len(tree.prompt_tokens) for tree in trees)), segment * shape.layers)


def slowdowns() -> dict[int, Slowdown]:
    """By number of nodes, from processes that compute beside so many idle nodes."""
    from benchmarks.scaling.contention import passes_per_s, steps_per_s
    from benchmarks.scaling.rates import Slowdown

    model, layers, fits = SETTINGS["base"]["model"], SETTINGS["value"]["layers"], len(SETTINGS["objectives"])
    speeds = {}
    for count in COUNTS:
        with ray_nodes(count, CPUS_PER_NODE):
            speeds[count] = passes_per_s(model, count), steps_per_s(model, layers, min(count, fits))
    passes, steps = speeds[1]
    return {count: Slowdown(passes / speed[0], steps / speed[1]) for count, speed in speeds.items()}


def render(found: Mapping[str, Any]) -> str:
    nodes = found["nodes"]
    rows = [
        [name, *(f"{one['measured'][name]:.0f} ({one['predicted'][name]:.0f})" for one in nodes.values())]
        for name in nodes["1"]["measured"]
    ]
    totals = [(sum(one["measured"].values()), sum(one["predicted"].values())) for one in nodes.values()]
    rows.append(["all", *(f"{measured:.0f} ({predicted:.0f})" for measured, predicted in totals)])
    rows.append(["simulated over measured", *(f"{predicted / measured:.2f}" for measured, predicted in totals)])
    slowest = "; ".join(
        f"on {count} nodes a pass {one['slowdown']['decoding']:.1f} and a step {one['slowdown']['training']:.1f} times"
        for count, one in nodes.items()
        if count != "1"
    )
    memory = [
        [kind, *(f"{one['memory'][kind]['peak'] / GIB:.2f} ({found['estimated'] / GIB:.2f})" for one in nodes.values())]
        for kind, found in nodes["1"]["memory"].items()
    ]
    heads = [f"{count} node{'s' if count != '1' else ''}" for count in nodes]
    return (
        f"Measured by `{found['command']}`: the pipeline with SmolLM2-135M and two objectives on Ray nodes of one "
        "computer, seconds and in brackets what the simulation says. It knows two runs on one node, of which one has "
        f"few prompts, and how much longer a forward pass of all actors, and a training step of all fits, take beside "
        f"each other on the same cores ({slowest} as long as alone). Aim: {1 - AIM:.2f} to "
        f"{1 + AIM:.2f} of the measured time. {machine_line(found)}.\n\n"
        + table(["stage", *heads], rows)
        + "\n\nPeak memory of a process (its resident set, libraries included), and in brackets what `jobs.plan` "
        "says it needs, in GiB.\n\n" + table(["process", *heads], memory)
    )


if __name__ == "__main__":
    main()

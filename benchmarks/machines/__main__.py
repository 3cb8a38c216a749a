"""The pipeline on several Ray nodes of one computer: the time on 1, 2 and 4, and the same results whatever is lost.

    python -m benchmarks.machines [--model NAME] [--only NAME] [--json FILE]

With a tiny random model in float32, or the one that is named; nodes of one core each. Nodes that are lost in every
stage, join late or are drained, and a head whose state is restarted (needs redis-server), must not change a byte of the
results. Writes docs/figures/machines.json and its part of docs/clusters.md, both of other names with --model. The same
command continues one that was killed.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import command, figures
from benchmarks.common.command import say
from benchmarks.common.figures import machine_line
from benchmarks.common.markdown import table, write_part
from benchmarks.common.nodes import REDIS, has_redis, ray_nodes
from mavis_dist.store.files import digest

NAME = "machines"
OF_MODEL = "machines-model"  # the name where a model is named
PAGE = figures.DOCS / "clusters.md"
TIMED = (1, 2, 4)  # machines of undisturbed runs
LIMIT_S = 900.0
POLL_S = 0.05


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description="The pipeline on several nodes.")
    parser.add_argument("--model", metavar="NAME", help="base model (default: a tiny random one)")
    parser.add_argument("--only", default="", metavar="NAME", help="scenarios whose names begin so; writes no page")
    command.add_json(parser, NAME)
    command.add_page_only(parser)
    arguments = parser.parse_args(argv)
    name = OF_MODEL if arguments.model else NAME
    file = command.file_of(name, arguments)
    if not arguments.page_only:
        unfinished = file.with_suffix(".unfinished.json")
        found = measure(arguments.model, arguments.only, unfinished)
        if arguments.only:
            return
        figures.write(file, {**found, **figures.provenance(command.line(NAME, argv))})
        unfinished.unlink()
    write_part(PAGE, name, render(figures.read(file)))


def measure(model: str | None, only: str, unfinished: Path) -> dict[str, Any]:
    """Seconds of undisturbed runs by number of machines, and the scenarios' outcomes.

    Those in `unfinished`, of an attempt that ended before, are not measured again; it is written after every run.
    """
    from benchmarks.machines.scenarios import scenarios
    from mavis_dist.evaluate.collect import stage_seconds
    from tests.cluster.jobs import hashes, write_config

    found: dict[str, Any] = figures.read(unfinished) if unfinished.exists() else {}
    if not found or found["model"] != model:
        found = {"model": model, "undisturbed": {}, "scenarios": []}
    undisturbed, outcomes = found["undisturbed"], found["scenarios"]
    with tempfile.TemporaryDirectory(prefix="mavis-machines-") as folder:
        config = write_config(Path(folder), model)
        for nodes in TIMED:
            if str(nodes) not in undisturbed:
                store, seconds, _ = run(config, f"undisturbed-{nodes}", nodes)
                results = digest(hashes(store))
                undisturbed[str(nodes)] = {"seconds": seconds, "stages": stage_seconds(store), "results": results}
                figures.write(unfinished, found)
                say(f"{nodes} machines: {seconds:.0f} s")
        expected, known = undisturbed["4"]["results"], {one["name"] for one in outcomes}
        for number, scenario in enumerate(scenarios()):
            if scenario.name in known or not scenario.name.startswith(only):
                continue
            if scenario.keeps_state and not has_redis():
                say(f"{scenario.name}: left out, {REDIS} is not installed")
                continue
            store, seconds, lines = run(config, f"disturbed-{number}", scenario.nodes, scenario)
            is_same = digest(hashes(store)) == expected
            outcomes.append({"name": scenario.name, "same": is_same, "seconds": seconds, "lines": lines})
            figures.write(unfinished, found)
            say(f"{scenario.name}: {'same' if is_same else 'OTHER'} results, {seconds:.0f} s")
    return {**found, "same_on_all_counts": all(one["results"] == expected for one in undisturbed.values())}


def run(config: Path, name: str, nodes: int, scenario: Any = None) -> tuple[Any, float, list[str]]:
    """The store of a run on so many machines, its seconds, and its lines about losses."""
    from benchmarks.machines.scenarios import CPUS_PER_NODE
    from mavis_dist.store.files import Store
    from tests.cluster.jobs import start

    with ray_nodes(nodes, CPUS_PER_NODE, scenario is not None and scenario.keeps_state) as cluster:
        began = time.monotonic()
        job = start(config, cluster.address, f"run={name}", "rollout.actors=4")
        store = Store(str(config.parent / "runs"), name)
        try:
            if scenario is not None:
                scenario.act(cluster, wait_until_due(job, store, scenario, cluster))
            _, err = job.communicate(timeout=LIMIT_S)
        finally:
            job.kill()
        if job.returncode:
            raise RuntimeError(f"{name} ends with {job.returncode}: {err[-2000:]}")
        told = [line for line in err.splitlines() if "died" in line or "lost" in line]
        return store, time.monotonic() - began, told


def wait_until_due(job: subprocess.Popen[str], store: Any, scenario: Any, cluster: Any) -> Any:
    """The machine that the scenario is about; raises RuntimeError if the run ends before."""
    deadline = time.monotonic() + LIMIT_S
    while not scenario.is_due(store) or (scenario.nodes > 1 and (node := scenario.victim(cluster)) is None):
        if job.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{scenario.name}: the run ends before: {job.communicate()[1][-2000:]}")
        time.sleep(POLL_S)
    return node if scenario.nodes > 1 else None


def render(found: Mapping[str, Any]) -> str:
    def results(is_same: bool) -> str:
        return "same bytes" if is_same else "other results"

    counts = [
        [f"undisturbed, {nodes}", results(found["same_on_all_counts"]), "–", f"{one['seconds']:.0f}"]
        for nodes, one in found["undisturbed"].items()
    ]
    scenarios = [
        [one["name"], results(one["same"]), "yes" if one["lines"] else "no", f"{one['seconds']:.0f}"]
        for one in found["scenarios"]
    ]
    model = found.get("model") or "a tiny random model"
    return (
        f"Measured by `{found['command']}`: the pipeline with two objectives and iterations, {model} in "
        "float32, on Ray nodes of one core each on one computer: nodes beyond its cores make nothing faster. "
        f"{machine_line(found)}. Where the run reports no repeated work, the lost node was starting or idle, or ran a "
        "task, which Ray repeats without a word.\n\n"
        + table(["machines", "results", "repeated work reported", "seconds"], [*counts, *scenarios])
    )


if __name__ == "__main__":
    main()

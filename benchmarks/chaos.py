"""Kill -9 under load: what becomes of every stream that was open.

    python -m benchmarks.chaos [--quick] [--json FILE] [--kills N] [--seed N]

Serves a tiny random model in float32 on two machines of this one, asks every question once undisturbed, and then again
and again while base replicas, value replicas, gateway, controller, proxy and machines are killed. A stream has to end
with the very text it would have had, or visibly not to end. Ends with exit code 1 where one did neither, and writes
its part of docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mavis_dist.environment  # noqa: F401  ray reads it
from benchmarks.command import headline_table, say
from jobs.arguments import refusing

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

    from benchmarks.clients import Body, Outcome
    from benchmarks.storm import Storm
    from benchmarks.verdicts import Verdict
    from mavis_dist.config import Config

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
RUN, OBJECTIVES = "chaos", ("positive", "brief")
SENTENCES = [{"text": "Be brief.", "weight": 2}, {"text": "Be kind."}]
NUM_CLIENTS = 8
PATIENCE_S = 180.0
CPUS_PER_MACHINE = 4  # gateway, two base replicas and four value replicas do not fit on one
PAUSE_S = 5.0


@dataclass(frozen=True)
class Scale:
    """How much is asked and killed."""

    kills: int
    streams: int  # of a round; rounds follow each other until enough was killed
    tokens: int  # of an answer


FULL = Scale(200, 24, 400)
QUICK = Scale(10, 16, 150)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description="Kill processes under load.")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK.kills} kills, and no page is written")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where every number is written")
    parser.add_argument("--kills", type=int, help=f"how many (default: {FULL.kills})")
    parser.add_argument("--seed", type=int, default=0, help="of victims and pauses (default: %(default)s)")
    arguments = parser.parse_args(argv)
    scale = QUICK if arguments.quick else FULL
    scale = replace(scale, kills=arguments.kills or scale.kills)
    results = refusing(lambda: measure(scale, arguments.seed))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    if not arguments.quick:
        write_page(results)
    if not results["is_kept"]:
        sys.exit(1)


def measure(scale: Scale, seed: int) -> dict[str, Any]:
    from benchmarks.clients import clients, closed_loop
    from benchmarks.service import give_threads
    from benchmarks.storm import Storm
    from benchmarks.verdicts import Verdict, judge

    give_threads(1)
    with tempfile.TemporaryDirectory(prefix="mavis-chaos-") as folder, clients() as process:
        config = tiny_service(Path(folder), scale.tokens)
        bodies = make_bodies(config.base.model, scale)
        with machines() as cluster, served_on(cluster, config) as url:
            calm = closed_loop(process, url, bodies, NUM_CLIENTS).result()
            expected = texts(calm.outcomes, len(bodies))
            storm, outcomes = Storm(cluster, CPUS_PER_MACHINE, seed), []
            while storm.num_kills < scale.kills:
                outcomes += _round(process, url, bodies, storm, scale.kills)
                say(f"{storm.num_kills} kills, {len(outcomes)} streams: {_counts(outcomes, expected)}")
    misled = [asdict(o) for o in outcomes if judge(o, expected[o.asked]) in (Verdict.TRUNCATED, Verdict.WRONG)]
    results = conclude(outcomes, expected, storm.kills)
    say(headline_table({key: figure for key, figure in results.items() if key != "verdicts"}))
    return {**results, "seed": seed, "scale": asdict(scale), "misled": misled}


def _round(
    process: ProcessPoolExecutor, url: str, bodies: Sequence[Body], storm: Storm, num_kills: int
) -> list[Outcome]:
    """Every question until it is answered, while things are killed."""
    from benchmarks.clients import closed_loop

    load = closed_loop(process, url, bodies, NUM_CLIENTS, PATIENCE_S)
    storm.rage(load.done, PAUSE_S, num_kills)
    return load.result().outcomes


def conclude(outcomes: Sequence[Outcome], expected: Sequence[str], kills: Mapping[str, int]) -> dict[str, Any]:
    """The figures of a storm."""
    from benchmarks.verdicts import Verdict, is_kept, tally

    verdicts = tally(outcomes, expected)
    opened = sum(verdicts.values()) - verdicts[Verdict.REFUSED]
    return {
        "kills": sum(kills.values()),
        "killed": dict(kills),
        "streams_opened": opened,
        "silent_truncations": verdicts[Verdict.TRUNCATED],
        "wrong_tokens": verdicts[Verdict.WRONG],
        "hung": verdicts[Verdict.HUNG],
        "broken_connections": verdicts[Verdict.BROKEN],
        "error_events": verdicts[Verdict.ERROR],
        "turned_away": verdicts[Verdict.REFUSED],
        "whole_share": verdicts[Verdict.WHOLE] / opened if opened else float("nan"),
        "is_kept": is_kept(verdicts),
        "verdicts": {verdict.value: count for verdict, count in verdicts.items()},
    }


def texts(outcomes: Sequence[Outcome], count: int) -> list[str]:
    """The whole answer to every body, from a load without trouble."""
    from mavis_dist.types import UserError

    found = {outcome.asked: outcome.text for outcome in outcomes if outcome.is_whole}
    if len(found) < count:
        troubles = Counter(f"status {o.status} {o.error or o.broken or ''}".strip() for o in outcomes if not o.is_whole)
        raise UserError(f"{count - len(found)} of {count} answers failed before anything was killed: {dict(troubles)}")
    return [found[index] for index in range(count)]


def make_bodies(model: str, scale: Scale) -> list[Body]:
    """Objectives, sentences, stop strings and rare guidance: all that has to be picked up again by another replica."""
    bodies: list[Body] = []
    for seed in range(scale.streams):
        body = {
            "model": model,
            "messages": [{"role": "user", "content": f"Tell me more, number {seed}"}],
            "max_tokens": scale.tokens,
            "top_k": 20,
            "seed": seed,
            "guide_every": 1 + seed % 2,
            "objective_weights": {"positive": 1.0 + seed % 3, "brief": 1.0},
        }
        if seed % 4 == 2:
            body["preferences"] = SENTENCES
        if seed % 4 == 3:
            body["stop"] = ["never written, always looked for"]
        bodies.append(body)
    return bodies


def tiny_service(folder: Path, tokens: int) -> Config:
    """A random model and its value models, and two replicas of each."""
    from benchmarks.service import served
    from mavis_dist import config as config_module
    from tests.tiny import MODEL, write_models

    write_models(folder, RUN, OBJECTIVES)
    config = config_module.parse(
        {
            "run": RUN,
            "storage": str(folder / "runs"),
            "objectives": {"positive": {"reward": "sentiment"}, "brief": {"reward": "brevity"}},
            "base": {"model": str(folder / MODEL), "dtype": "float32"},
            "steer": {"beta": 1.0},
        }
    )
    settings = {"base_replicas": 2, "value_replicas": 2, "cpus_per_replica": 1, "max_tokens": tokens}
    return served(config, folder / "runs" / RUN, **settings)


@contextmanager
def machines() -> Iterator[Any]:
    """Two machines; the one that has Ray's head stays."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS_PER_MACHINE})
    try:
        cluster.add_node(num_cpus=CPUS_PER_MACHINE)
        yield cluster
    finally:
        cluster.shutdown()


@contextmanager
def served_on(cluster: Any, config: Config) -> Iterator[str]:
    """The service ends with its cluster: after a storm there may be nobody to take it down in order."""
    import ray

    from mavis_dist.cluster import connect
    from serve.app import deploy

    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        connect()
        yield deploy(config)
    finally:
        ray.shutdown()
        del os.environ["RAY_ADDRESS"]


def write_page(results: Mapping[str, Any]) -> None:
    from benchmarks.markdown import table, write_part

    killed = ", ".join(f"{count} × {kind}" for kind, count in sorted(results["killed"].items()))
    rows = [[verdict, str(count)] for verdict, count in sorted(results["verdicts"].items())]
    text = (
        "## Kill -9 under load\n\n"
        f"{results['kills']} kills with seed {results['seed']} ({killed}), while {NUM_CLIENTS} clients read streams of "
        f"up to {results['scale']['tokens']} tokens from a tiny random model in float32. There are two replicas of "
        "everything but the gateway, on two machines (Ray nodes) of one computer. Every text is compared with the one "
        "that the same request had before anything was killed.\n\n"
        f"{table(['what became of a stream', 'streams'], rows)}\n\n"
        "Repeat with `python -m benchmarks.chaos`."
    )
    write_part(PAGE, "chaos", text)


def _counts(outcomes: Sequence[Outcome], expected: Sequence[str]) -> dict[str, int]:
    from benchmarks.verdicts import tally

    counts: Counter[Verdict] = tally(outcomes, expected)
    return {verdict.value: count for verdict, count in counts.items()}


if __name__ == "__main__":
    main()

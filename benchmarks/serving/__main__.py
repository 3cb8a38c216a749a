"""The service under load, through its real HTTP endpoint, and against the bare engine.

    python -m benchmarks.serving [--peers [FOLDER]] [--quick] [--json FILE] [--run runs/quickstart]

Needs the value models of a finished run. Deploys the service on loopback, with the value models inside the base replica
and then in their own replicas, and takes it down again. Prints tables and writes all figures to
docs/figures/serving.json. Service, clients and bare engine share the machine's cores. With --peers, vLLM's server and
the service also answer the same unguided requests, one after the other.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import command, peers
from benchmarks.common.command import headline_table, say, table
from benchmarks.common.figures import DOCS, read

if TYPE_CHECKING:
    from benchmarks.common.http_load import Body
    from benchmarks.common.interleave import Speeds
    from mavis_dist.config import Config

# The bare engine has the machine to itself; Ray gives a replica as many threads as it reserves cores.
ENGINE_THREADS = 2
ROWS = 16
PLACEMENTS = ("colocated", "replicas")
SETTINGS = {"rows": ROWS, "base_replicas": 1, "value_replicas": 1, "cpus_per_replica": 0.25}
RAMP = 0.25  # of a window
SERVER_HEAD = (f"unguided, {ROWS} streams", "tokens/s", "first: p50", "p99 ms", "token: p50", "p99 ms")
RELEASE_S = 2.0  # until the rows of disconnected clients are released


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    clients: tuple[int, ...]  # concurrent streams, closed loop
    rounds: int  # answers per client
    repetitions: int  # of service and bare engine in alternation, each with all rounds
    tokens: int  # longest answer
    overload: tuple[float, ...]  # arriving requests over those that can be answered
    window_s: float  # per overload
    peer_repetitions: int  # of the service and vLLM's server in alternation, each started anew


FULL = Scale((1, 4, 16, 32), 3, 4, 64, (1, 2, 5, 10), 60.0, 2)
QUICK = Scale((1, 16), 1, 1, 16, (1, 2, 5, 10), 8.0, 1)


@dataclass
class Cost:
    """CPU time of the service while it was compared with the engine."""

    num_tokens: int = 0
    service_cpu_s: float = 0.0
    clients_cpu_s: float = 0.0

    def per_token_ms(self) -> dict[str, float]:
        return {
            "service": 1000 * self.service_cpu_s / self.num_tokens,
            "clients": 1000 * self.clients_cpu_s / self.num_tokens,
        }


@dataclass
class Measured:
    """The measurements of one placement."""

    speeds: Speeds
    cost: Cost
    closed: dict[int, dict[str, Any]] = field(default_factory=dict)  # clients -> summary


def main(argv: Sequence[str] | None = None) -> None:
    parser = command.make_parser("serving", "Measure the service.", "three minutes instead of twelve")
    peers.add_option(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="serve.threads (default: the service's own)")
    arguments = parser.parse_args(argv)
    scale = QUICK if arguments.quick else FULL
    found = partial(measure, arguments.run, scale, arguments.peers, arguments.threads)
    command.record("serving", arguments, found, argv)
    if arguments.peers and not arguments.quick and arguments.threads is None:
        write_page(read(command.file_of("serving", arguments))["servers"])


def measure(run: Path, scale: Scale, peers_folder: Path | None, threads: int | None = None) -> dict[str, Any]:
    import torch

    from benchmarks.common.workload import open_run, without_distilled

    config, _ = open_run(run)
    vllm = peers.interpreters(peers_folder).get(peers.VLLM)
    torch.set_num_threads(ENGINE_THREADS)
    settings = {**SETTINGS, "threads": threads}
    conditions = {"model": config.base.model, "load_before": os.getloadavg()[0], **settings, **asdict(scale)}
    command.say_conditions(conditions)
    with without_distilled(run) as copy:
        measured, overloads = _measure(config, copy, scale, settings)
        servers = _against_vllm(config, copy, scale, vllm, settings) if vllm else {}
    say(closed_table(measured))
    say(overload_table(overloads))
    if servers:
        say(table(SERVER_HEAD, [[name, *figures] for name, figures in server_rows(servers)]))
    headline = {**headlines(measured, overloads), **server_headlines(servers)}
    say(headline_table(headline))
    details = {name: asdict(placement) for name, placement in measured.items()}
    return {**headline, "conditions": conditions, **details, "overload": overloads, "servers": servers}


def _measure(
    config: Config, run: Path, scale: Scale, settings: dict[str, Any]
) -> tuple[dict[str, Measured], dict[str, dict[str, Any]]]:
    """Both placements against the engine, and overload with value models in their own replicas."""
    from benchmarks.common.http_load import client_process
    from benchmarks.common.service import service, service_config

    bodies = {count: make_bodies(config, count * scale.rounds, scale.tokens) for count in {ROWS, *scale.clients}}
    engine = bare_engine(service_config(config, run, **settings, placement="colocated"), bodies[ROWS])
    measured: dict[str, Measured] = {}
    with client_process() as process:
        for placement in PLACEMENTS:
            with service(service_config(config, run, **settings, placement=placement)) as url:
                measured[placement] = _against_engine(process, url, bodies[ROWS], engine, scale.repetitions)
                for count in scale.clients:
                    measured[placement].closed[count] = _closed(process, url, bodies[count], count)
                if placement == PLACEMENTS[-1]:
                    capacity = measured[placement].closed[ROWS]["requests_per_s"]
                    overloads = _overloads(process, url, make_bodies(config, 200, scale.tokens), capacity, scale)
    return measured, overloads


def _against_vllm(
    config: Config, run: Path, scale: Scale, python: Path, settings: dict[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """Unguided requests to the service and to vLLM's server, as it comes and with all cores."""
    from benchmarks.common.http_load import client_process
    from benchmarks.common.service import service_config
    from benchmarks.serving.vllm_server import compare

    served = service_config(config, run, **settings, placement="colocated")
    bodies = [unguided(body, config.base.system) for body in make_bodies(config, ROWS * scale.rounds, scale.tokens)]
    with client_process() as process:
        return compare(process, served, python, ENGINE_THREADS, bodies, ROWS, scale.peer_repetitions)


def unguided(body: Body, system: str) -> Body:
    """The request without weights and seed, and with what servers choose differently unless they are told."""
    messages = [{"role": "system", "content": system}, *body["messages"]]
    told = {"messages": messages, "temperature": 1.0, "top_k": 40, "top_p": 1.0}
    return {**{key: body[key] for key in ("model", "max_tokens")}, **told}


def make_bodies(config: Config, count: int, tokens: int) -> list[Body]:
    """Bodies with different questions, seeds and weights."""
    from benchmarks.common.workload import weight_settings
    from mavis_dist.prompts import load_prompts

    _, prompts = load_prompts(config.prompts, config.seed)
    weights = weight_settings([*config.objectives][:2])
    return [
        {
            "model": config.base.model,
            "messages": prompts[i % len(prompts)].messages,
            "max_tokens": tokens,
            "seed": i,
            "objective_weights": weights[i % len(weights)],
        }
        for i in range(count)
    ]


def bare_engine(config: Config, bodies: Sequence[Body]) -> Callable[[int], float]:
    """A function that answers the same requests with the engine of a base replica, in this process; returns tokens."""
    import torch

    from mavis_dist.decode import Engine, Request, SamplingParams
    from mavis_dist.decode.load_guide import fetch_published, load_guide
    from mavis_dist.models.load import load_base
    from mavis_dist.store.files import Store
    from serve.settings import main_args

    args = main_args(config)
    base = load_base(args.base, args.dtype, args.device)
    folders = fetch_published(Store(args.storage, args.run))
    guide = load_guide(folders, getattr(torch, args.dtype), args.device, base)
    engine = Engine(base, guide, args.rows)
    requests = [
        Request(
            id=str(i),
            prompt=base.chat(body["messages"][0]["content"], args.system),
            weights=body["objective_weights"],
            beta=args.beta,
            tilt_cap=args.tilt_cap,
            params=SamplingParams(body["max_tokens"], seed=body["seed"]),
        )
        for i, body in enumerate(bodies)
    ]

    def generate(repetition: int) -> float:
        return sum(len(choice.tokens) for choices in engine.generate(requests) for choice in choices)

    return generate


def _against_engine(
    process: ProcessPoolExecutor, url: str, bodies: list[Body], engine: Callable[[int], float], repetitions: int
) -> Measured:
    from benchmarks.common.http_load import closed_loop
    from benchmarks.common.interleave import take_turns
    from benchmarks.common.service import cpu_s

    cost = Cost()

    def over_http(repetition: int) -> float:
        started = cpu_s()
        load = closed_loop(process, url, bodies, ROWS).result()
        cost.service_cpu_s += cpu_s() - started
        cost.clients_cpu_s += load.cpu_s
        cost.num_tokens += load.num_tokens
        return load.num_tokens

    closed_loop(process, url, bodies[:ROWS], ROWS).result()  # warm-up
    engine(0)
    cost.num_tokens, cost.service_cpu_s, cost.clients_cpu_s = 0, 0.0, 0.0
    return Measured(take_turns({"engine": engine, "http": over_http}, repetitions), cost)


def _closed(process: ProcessPoolExecutor, url: str, bodies: list[Body], count: int) -> dict[str, Any]:
    from benchmarks.common.http_load import closed_loop, summary

    return summary(closed_loop(process, url, bodies, count).result())


def _overloads(
    process: ProcessPoolExecutor, url: str, bodies: list[Body], capacity: float, scale: Scale
) -> dict[str, dict[str, Any]]:
    """By factor: tokens/s of whole answers, and how the other requests ended."""
    from benchmarks.common.http_load import arrivals, failures, goodput, open_loop, percentiles

    window = scale.window_s
    figures = {}
    for factor in scale.overload:
        times = arrivals(factor * capacity, window, seed=0)
        load = open_loop(process, url, bodies, times, window).result()
        whole = [outcome for outcome in load.outcomes if outcome.is_whole]
        figures[f"{factor:g}x"] = {
            "goodput": goodput(load, RAMP * window, window),
            "requests": len(load.outcomes),
            "whole": len(whole),
            "left": sum(outcome.timed_out for outcome in load.outcomes),
            "first_token_ms": percentiles([outcome.time_to_first for outcome in whole]),
            **failures(load.outcomes),
        }
        time.sleep(RELEASE_S)
    return figures


def headlines(measured: dict[str, Measured], overloads: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Both placements are compared through the bare engine, which was measured in alternation with each."""
    from benchmarks.common.interleave import ratio

    ratios = {name: ratio(m.speeds.per_s["http"], m.speeds.per_s["engine"]) for name, m in measured.items()}
    goodputs = {name: figures["goodput"] for name, figures in overloads.items()}
    first = next(iter(goodputs.values()))
    return {
        "http_vs_engine": ratios["colocated"],
        "http_vs_engine_replicas": ratios["replicas"],
        "replicas_vs_colocated": ratios["replicas"] / ratios["colocated"],
        "cpu_ms_per_token": measured["colocated"].cost.per_token_ms(),
        "cpu_ms_per_token_replicas": measured["replicas"].cost.per_token_ms(),
        "goodput_tokens_per_s": goodputs,
        "goodput_kept": {name: figure / first if first else float("nan") for name, figure in goodputs.items()},
    }


def server_headlines(servers: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """The service's throughput over that of vLLM's server at its better setting."""
    if not servers:
        return {}
    ours, *others = (statistics.median(load["tokens_per_s"] for load in loads) for loads in servers.values())
    return {"http_vs_vllm_server": ours / max(others)}


def write_page(servers: dict[str, list[dict[str, Any]]]) -> None:
    """The part of docs/benchmarks.md that has the servers side by side, if there was one beside the service."""
    from benchmarks.common import markdown

    rows = [[peers.LABELS.get(name, name), *(f"{figure:.0f}" for figure in row)] for name, row in server_rows(servers)]
    if rows:
        markdown.write_part(DOCS / "benchmarks.md", "servers", markdown.table(SERVER_HEAD, rows))


def server_rows(servers: dict[str, list[dict[str, Any]]]) -> list[tuple[str, list[float]]]:
    """Medians over the repetitions of the figures in SERVER_HEAD."""
    times = [(name, p) for name in ("first_token_ms", "token_ms") for p in ("p50", "p99")]
    return [
        (
            name,
            [
                statistics.median(load["tokens_per_s"] for load in loads),
                *(statistics.median(load[name][p] for load in loads) for name, p in times),
            ],
        )
        for name, loads in servers.items()
    ]


def closed_table(measured: dict[str, Measured]) -> str:
    head = ["concurrent streams", "tokens/s", "first: p50", "p95", "p99 ms", "token: p50", "p95", "p99 ms"]
    rows = [
        [
            f"{placement}, {count}",
            figures["tokens_per_s"],
            *(figures[name][p] for name in ("first_token_ms", "token_ms") for p in ("p50", "p95", "p99")),
        ]
        for placement, m in measured.items()
        for count, figures in m.closed.items()
    ]
    return table(head, rows)


def overload_table(overloads: dict[str, dict[str, Any]]) -> str:
    columns = {"goodput": "tokens/s", "requests": "requests", "whole": "whole", "left": "left", "refused_429": "429"}
    columns |= {"refused_429_with_retry_after": "retry after", "answered_5xx": "5xx", "broken": "broken"}
    rows = [[name, *(figures[key] for key in columns)] for name, figures in overloads.items()]
    return table(["load over capacity", *columns.values()], rows)


if __name__ == "__main__":
    main()

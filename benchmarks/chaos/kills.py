"""Kill -9 under load: how every open stream ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.chaos.cluster import CPUS_PER_NODE, NUM_NODES, tiny_service
from benchmarks.chaos.killer import CONTROL_STORE, NODE, Killer
from benchmarks.chaos.stream_outcomes import FORBIDDEN, StreamOutcome, classify, count_outcomes, is_kept
from benchmarks.chaos.traffic import PREFERENCES
from benchmarks.common.command import headline_table, say
from benchmarks.common.figures import machine_line
from benchmarks.common.http_load import Body, Load, Outcome, client_process, closed_loop
from benchmarks.common.markdown import table
from benchmarks.common.nodes import REDIS, has_redis
from mavis_dist.types import UserError

NUM_CLIENTS = 8
TIMEOUT_S = 180.0
PAUSE_S = 3.0
# A client's connection may break shortly after one of these dies (the node may be the gateway's).
CONNECTION_HOLDERS = {"gateway", "proxy", NODE}
BREAK_S = 20.0
KEPT = " Ray's control store starts again at once, with the state that Redis kept."


@dataclass(frozen=True)
class Scale:
    """How much is requested and killed."""

    kills: int
    streams: int  # per round; rounds are repeated until there are enough kills
    tokens: int  # per answer


FULL = Scale(200, 48, 100)
QUICK = Scale(10, 16, 100)


def measure(scale: Scale, seed: int) -> dict[str, Any]:
    keeps_state = has_redis()
    if not keeps_state:
        say(f"the control store is not killed: {REDIS} is not installed")
    with client_process() as process, tiny_service(scale.tokens, keeps_state) as service:
        bodies = make_bodies(service.model, scale)
        undisturbed = closed_loop(process, service.url, bodies, NUM_CLIENTS).result()
        expected = texts(undisturbed.outcomes, len(bodies))
        outcomes: list[Outcome] = []
        unexplained = 0
        killer = Killer(service.cluster, CPUS_PER_NODE, seed, keeps_state)
        while killer.num_kills < scale.kills:
            load = closed_loop(process, service.url, bodies, NUM_CLIENTS, TIMEOUT_S)
            killer.run(load.done, PAUSE_S, scale.kills)
            outcomes += load.result().outcomes
            unexplained += num_unexplained(load.result(), killer.kills)
            counts = {outcome.value: count for outcome, count in count_outcomes(outcomes, expected).items()}
            say(f"{killer.num_kills} kills, {len(outcomes)} requests: {counts}, broken without a cause: {unexplained}")
    failures = [asdict(o) for o in outcomes if classify(o, expected[o.body_index]) in FORBIDDEN]
    results = summarise(outcomes, expected, Counter(kind for _, kind in killer.kills), unexplained)
    say(headline_table({key: figure for key, figure in results.items() if key != "outcomes"}))
    return {**results, "seed": seed, "nodes": NUM_NODES, "scale": asdict(scale), "failures": failures}


def num_unexplained(load: Load, kills: Sequence[tuple[float, str]]) -> int:
    """Broken streams without the death of a process that held the connection in the `BREAK_S` before."""
    deaths = [time for time, kind in kills if kind in CONNECTION_HOLDERS]
    ends = [load.started + outcome.ended for outcome in load.outcomes if outcome.broken and outcome.status == 200]
    return sum(not any(0 <= end - death <= BREAK_S for death in deaths) for end in ends)


def summarise(
    outcomes: Sequence[Outcome], expected: Sequence[str], kills: Mapping[str, int], unexplained: int
) -> dict[str, Any]:
    """The figures; `kills` by kind."""
    counts = count_outcomes(outcomes, expected)
    opened = sum(counts.values()) - counts[StreamOutcome.REFUSED]
    return {
        "kills": sum(kills.values()),
        "killed": dict(kills),
        "streams_opened": opened,
        "silent_truncations": counts[StreamOutcome.TRUNCATED],
        "wrong_tokens": counts[StreamOutcome.WRONG],
        "hung": counts[StreamOutcome.HUNG],
        "broken_connections": counts[StreamOutcome.BROKEN],
        "broken_without_a_reason": unexplained,
        "error_events": counts[StreamOutcome.ERROR],
        "turned_away": counts[StreamOutcome.REFUSED],
        "whole_share": counts[StreamOutcome.WHOLE] / opened if opened else float("nan"),
        "is_kept": is_kept(counts) and not unexplained,
        "outcomes": {outcome.value: count for outcome, count in counts.items()},
    }


def texts(outcomes: Sequence[Outcome], count: int) -> list[str]:
    """The whole answer to every body, from a load without kills.

    Raises:
        UserError: an answer is missing.
    """
    found = {outcome.body_index: outcome.text for outcome in outcomes if outcome.is_whole}
    if len(found) < count:
        causes = Counter(f"status {o.status} {o.error or o.broken or ''}".strip() for o in outcomes if not o.is_whole)
        raise UserError(f"{count - len(found)} of {count} answers failed before anything was killed: {dict(causes)}")
    return [found[index] for index in range(count)]


def make_bodies(model: str, scale: Scale) -> list[Body]:
    """Objectives, preferences, stop strings and guide_every: all state that another replica has to resume."""
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
            body["preferences"] = PREFERENCES
        if seed % 4 == 3:
            body["stop"] = ["never generated, always searched for"]
        bodies.append(body)
    return bodies


def page(results: Mapping[str, Any]) -> str:
    killed = ", ".join(f"{count} × {kind}" for kind, count in sorted(results["killed"].items()))
    rows = [[outcome, str(count)] for outcome, count in sorted(results["outcomes"].items())]
    unexplained = results["broken_without_a_reason"]
    return (
        "## Kill -9 under load\n\n"
        f"{results['kills']} kills with seed {results['seed']} ({killed}), while {NUM_CLIENTS} clients read streams of "
        f"up to {results['scale']['tokens']} tokens from a tiny random model in float32. Everything except the gateway "
        f"has two replicas, on {results['nodes']} Ray nodes of one computer. The next kill follows a few seconds after "
        "half of the processes of every kind are up again, though they may still be loading their models. Every text "
        "is compared with that of the same request before any kill."
        f"{KEPT if CONTROL_STORE in results['killed'] else ''}\n\n"
        f"{table(['outcome', 'requests'], rows)}\n\n"
        "Refused: the connection was refused, or the service answered with a status for being unavailable; the client "
        f"retries. Visibly broken: the connection failed; {unexplained} of these without the death of the gateway, the "
        f"proxy or a node in the {BREAK_S:g} s before.\n\n"
        f"Measured with `{results['command']}` on {machine_line(results)}."
    )

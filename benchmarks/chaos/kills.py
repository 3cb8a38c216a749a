"""Kill -9 under load: what becomes of every stream that was open."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.chaos.cluster import CPUS_PER_MACHINE, deployment
from benchmarks.chaos.killer import MACHINE, Storm
from benchmarks.chaos.stream_outcomes import NEVER, Verdict, is_kept, judge, tally
from benchmarks.chaos.traffic import SENTENCES
from benchmarks.common.command import headline_table, say
from benchmarks.common.http_load import Body, Load, Outcome, clients, closed_loop
from benchmarks.common.markdown import table
from mavis_dist.types import UserError

NUM_CLIENTS = 8
PATIENCE_S = 180.0
PAUSE_S = 3.0
# A client's connection may break when one of these dies (the machine may be the gateway's), and soon.
HOLDERS = {"gateway", "proxy", MACHINE}
BREAK_S = 20.0


@dataclass(frozen=True)
class Scale:
    """How much is asked and killed."""

    kills: int
    streams: int  # of a round; rounds follow each other until enough was killed
    tokens: int  # of an answer


FULL = Scale(200, 48, 100)
QUICK = Scale(10, 16, 100)


def measure(scale: Scale, seed: int) -> dict[str, Any]:
    with clients() as process, deployment(scale.tokens) as served:
        bodies = make_bodies(served.model, scale)
        calm = closed_loop(process, served.url, bodies, NUM_CLIENTS).result()
        expected = texts(calm.outcomes, len(bodies))
        outcomes: list[Outcome] = []
        unexplained = 0
        storm = Storm(served.machines, CPUS_PER_MACHINE, seed)
        while storm.num_kills < scale.kills:
            load = _round(process, served.url, bodies, storm, scale.kills)
            outcomes += load.outcomes
            unexplained += num_unexplained(load, storm.strikes)
            counts = {verdict.value: count for verdict, count in tally(outcomes, expected).items()}
            say(f"{storm.num_kills} kills, {len(outcomes)} requests: {counts}, broken without a reason: {unexplained}")
    misled = [asdict(outcome) for outcome in outcomes if judge(outcome, expected[outcome.asked]) in NEVER]
    results = conclude(outcomes, expected, storm.kills, unexplained)
    say(headline_table({key: figure for key, figure in results.items() if key != "verdicts"}))
    return {**results, "seed": seed, "scale": asdict(scale), "misled": misled}


def _round(process: ProcessPoolExecutor, url: str, bodies: Sequence[Body], storm: Storm, num_kills: int) -> Load:
    """Every question until it is answered, while things are killed."""
    load = closed_loop(process, url, bodies, NUM_CLIENTS, PATIENCE_S)
    storm.rage(load.done, PAUSE_S, num_kills)
    return load.result()


def num_unexplained(load: Load, strikes: Sequence[tuple[float, str]]) -> int:
    """Broken streams before whose end nothing had died that held the client's socket."""
    deaths = [time for time, kind in strikes if kind in HOLDERS]
    ends = [load.began + outcome.ended for outcome in load.outcomes if outcome.broken and outcome.status == 200]
    return sum(not any(0 <= end - death <= BREAK_S for death in deaths) for end in ends)


def conclude(
    outcomes: Sequence[Outcome], expected: Sequence[str], kills: Mapping[str, int], unexplained: int
) -> dict[str, Any]:
    """The figures of a storm."""
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
        "broken_without_a_reason": unexplained,
        "error_events": verdicts[Verdict.ERROR],
        "turned_away": verdicts[Verdict.REFUSED],
        "whole_share": verdicts[Verdict.WHOLE] / opened if opened else float("nan"),
        "is_kept": is_kept(verdicts) and not unexplained,
        "verdicts": {verdict.value: count for verdict, count in verdicts.items()},
    }


def texts(outcomes: Sequence[Outcome], count: int) -> list[str]:
    """The whole answer to every body, from a load without trouble."""
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


def page(results: Mapping[str, Any]) -> str:
    killed = ", ".join(f"{count} × {kind}" for kind, count in sorted(results["killed"].items()))
    rows = [[verdict, str(count)] for verdict, count in sorted(results["verdicts"].items())]
    unexplained = results["broken_without_a_reason"]
    return (
        "## Kill -9 under load\n\n"
        f"{results['kills']} kills with seed {results['seed']} ({killed}), while {NUM_CLIENTS} clients read streams of "
        f"up to {results['scale']['tokens']} tokens from a tiny random model in float32. There are two replicas of "
        "everything but the gateway, on two machines (Ray nodes) of one computer. The next kill comes some seconds "
        "after half of the processes of every kind are there again, though they may still load their models. Every "
        "text is compared with the one that the same request had before anything was killed.\n\n"
        f"{table(['what became of a request', 'requests'], rows)}\n\n"
        "Turned away: nothing listened, or the service said that it cannot answer now; the client asks again. Visibly "
        f"broken: the connection failed; {unexplained} did so without the death of gateway, proxy or a machine in the "
        f"{BREAK_S:g} s before.\n\n"
        "Repeat with `python -m benchmarks.chaos --parts kills`."
    )

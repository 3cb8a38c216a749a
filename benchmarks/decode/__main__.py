"""The decoder compared with other engines, a plain implementation of the paper, and its own variants.

    python -m benchmarks.decode [--peers [FOLDER]] [--quick] [--json FILE] [--run runs/quickstart]
    python -m benchmarks.decode --page-only [--json FILE]

Needs the value models of a finished run. Prints tables and writes all figures to docs/figures/decode.json. With --peers
it also measures vLLM and llama.cpp, and writes its part of docs/benchmarks.md.

Speeds are measured in a process for each engine, which runs with the environment that suits it best and is stopped
while another one is measured; all other figures in this process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import command, figures, peers
from benchmarks.common.command import headline_table, say, table
from jobs.arguments import refusing

if TYPE_CHECKING:
    from benchmarks.decode.speed import Speeds

THREADS = 2
PAGE = figures.DOCS / "benchmarks.md"
MAX_TV = 0.01  # total variation per step


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    sizes: tuple[int, ...]  # concurrent requests
    repetitions: int
    lengths: tuple[int, ...]  # tokens per answer, for speed
    steps: int  # of the engine, for their parts
    caps: tuple[float, ...]  # nats, for quality
    residual_caps: tuple[float, ...]  # nats, for quality
    prompts: int  # for quality
    soak: tuple[int, int]  # requests before the first and the last memory sample
    answers: int  # together and alone


FULL = Scale((1, 4, 16, 32), 2, (64, 24), 24, (1.5, 2.0, 2.5, 3.0, 4.0), (0.5, 1.0, 2.0), 16, (1000, 10000), 1000)
QUICK = Scale((1, 16), 1, (8,), 8, (3.0,), (1.0,), 4, (100, 1000), 16)


def main(argv: Sequence[str] | None = None) -> None:
    parser = command.make_parser("decode", "Measure the decoder.", "two minutes instead of eighteen")
    peers.add_option(parser)
    command.add_page_only(parser)
    arguments = parser.parse_args(argv)
    if not arguments.page_only:
        scale = QUICK if arguments.quick else FULL
        command.record("decode", arguments, lambda: measure(arguments.run, scale, arguments.peers), argv)
    if arguments.page_only or (arguments.peers and not arguments.quick):
        write_page(refusing(lambda: figures.read(command.file_of("decode", arguments))))


def measure(run: Path, scale: Scale, peers_folder: Path | None) -> dict[str, Any]:
    import torch

    from benchmarks.common import workload
    from benchmarks.decode import (
        memory,
        neighbours,
        preference_cost,
        qhead_quality,
        residual_cap,
        speed,
        step_time,
        tilt_cap,
    )
    from mavis_dist.types import TILT_CAP

    pythons = peers.interpreters(peers_folder)
    torch.set_num_threads(THREADS)
    work = workload.load(run)
    conditions = {"model": work.base.name, "threads": THREADS, "load_before": os.getloadavg()[0], **asdict(scale)}
    command.say_conditions(conditions)
    rss_mb = memory.measure(scale.soak)
    contest = speed.Work(work.prompts, scale.sizes, scale.lengths, scale.repetitions)
    speeds, engines = speed.measure(run, work.base.name, contest, THREADS, pythons)
    for length in scale.lengths:
        say(speed_table(speeds[length], scale.sizes, length))
    preference_step_ms = preference_cost.measure(work, scale.repetitions, scale.steps)
    steps = step_time.measure(work, scale.sizes, scale.repetitions, scale.steps)
    qualities = tilt_cap.measure(work, scale.caps, scale.prompts)
    say(quality_table(qualities))
    predictions = qhead_quality.measure(work, TILT_CAP, scale.prompts)
    checked = residual_cap.measure(work, TILT_CAP, scale.residual_caps, scale.prompts)
    independence = neighbours.measure(work, scale.answers)
    say(students_table(predictions, checked))
    headline = {
        **speed.headlines(speeds, scale.sizes),
        **quality_headlines([q for q in qualities if q["weights"] in work.objectives]),
        **step_headlines(steps),
        "worded_vs_plain_rows": preference_cost.rows_ratio(preference_step_ms),
        "answers_that_notice_neighbours": independence["different"],
        "soak_rss_growth_mb": rss_mb[str(scale.soak[1])] - rss_mb[str(scale.soak[0])],
    }
    say(headline_table(headline))
    details = {
        "conditions": {**conditions, "engines": engines},
        "tokens_per_s": speeds,
        "steps": steps,
        "rows_with_sentences_step_ms": preference_step_ms,
        "quality": qualities,
        "students": predictions,
        "checked_predictions": checked,
        "neighbours": independence,
        "soak": rss_mb,
    }
    return {**headline, **details}


def write_page(found: dict[str, Any]) -> None:
    from benchmarks.common.markdown import write_part
    from benchmarks.decode.page import render

    page = render(found)
    write_part(PAGE, "decode", page)
    print(page)


def quality_headlines(qualities: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Figures of each objective alone, at the smallest cap whose distributions differ by at most MAX_TV, else the
    largest cap.
    """
    chosen: dict[str, dict[str, Any]] = {}
    for q in sorted(qualities, key=lambda q: -q["cap"]):
        if q["weights"] not in chosen or max(q["tv"], q["tv_eos"]) <= MAX_TV:
            chosen[q["weights"]] = q
    figures = {
        "lazy_cap": "cap",
        "lazy_candidates_per_token": "candidates_per_token",
        "lazy_tv": "tv",
        "lazy_tv_eos": "tv_eos",
        "lazy_divergence_ratio": "divergence_ratio",
    }
    return {key: {name: q[figure] for name, q in chosen.items()} for key, figure in figures.items()}


def step_headlines(steps: dict[str, Any]) -> dict[str, Any]:
    fractions = {
        f"roofline_fraction_{size}": minimum / sum(steps["unguided_step_ms"][size].values())
        for size, minimum in steps["roofline_ms"].items()
    }
    return {**fractions, "step_ms": steps["step_ms"]}


def speed_table(speeds: Speeds, sizes: Sequence[int], length: int) -> str:
    from benchmarks.decode.speed import median

    rows = [
        [name, *(median(speeds, name, size) if size in by_size else "" for size in sizes)]
        for name, by_size in speeds.items()
    ]
    return (
        f"{table([f'tokens/s, {length} per answer, concurrent requests', *map(str, sizes)], rows)}\n"
        "names end in the number of objectives, each with its own value model; heads share one model\n"
        "reference (2 objectives) answers one request after the other"
    )


def quality_table(qualities: list[dict[str, Any]]) -> str:
    columns = {"cap": "cap", "candidates_per_token": "candidates/token", "tv": "TV", "tv_eos": "TV of end"}
    columns |= {"divergence_ratio": "KL / exact", "steps": "steps"}
    return _weights_table("lazy scorer, weights", columns, qualities)


def students_table(predictions: list[dict[str, Any]], checked: list[dict[str, Any]]) -> str:
    if not predictions:
        return "predicted and qhead are left out: this run has published no distilled model (python -m jobs.distill)"
    columns = {"tv": "TV", "tv_eos": "TV of end", "correlation": "correlation", "divergence_ratio": "KL / exact"}
    columns |= {"soft_value_ratio": "soft value / exact", "steps": "steps"}
    checked_columns = {"residual_cap": "residual cap", "candidates_per_token": "candidates/token"}
    checked_columns |= {"lazy_candidates_per_token": "of lazy", "tv": "TV", "divergence_ratio": "KL / exact"}
    return (
        f"{_weights_table('qhead scorer, weights', columns, predictions)}\n"
        f"{_weights_table('predicted scorer, weights', checked_columns, checked)}"
    )


def _weights_table(name: str, columns: dict[str, str], entries: list[dict[str, Any]]) -> str:
    return table([name, *columns.values()], [[e["weights"], *(e[key] for key in columns)] for e in entries])


if __name__ == "__main__":
    main()

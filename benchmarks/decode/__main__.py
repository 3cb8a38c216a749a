"""The decoder against Hugging Face generate, against the plain procedure of the paper, and against itself.

    python -m benchmarks.decode [--quick] [--json FILE] [--run runs/quickstart]

Needs the value models of a finished run. Prints tables and, with --json, writes every number.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import command
from benchmarks.common.command import headline_table, say

if TYPE_CHECKING:
    from benchmarks.decode.speed import Speeds

THREADS = 2
HEADLINE_SIZES = (1, 16)  # concurrent requests
SAME_LAW = 0.01  # total variation per step


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    sizes: tuple[int, ...]  # concurrent requests
    repetitions: int
    tokens: int  # per answer, where speed is measured
    caps: tuple[float, ...]  # nats, where quality is measured
    prompts: int
    soak: tuple[int, int]  # requests before the first and before the last look at the memory


FULL = Scale((1, 4, 16, 32), 3, 24, (1.5, 2.0, 2.5, 3.0, 4.0), 16, (1000, 10000))
QUICK = Scale((1, 16), 1, 8, (3.0,), 4, (100, 1000))


def main(argv: Sequence[str] | None = None) -> None:
    command.run("decode", "Measure the decoder.", "two minutes instead of twenty", (QUICK, FULL), measure, argv)


def measure(run: Path, scale: Scale) -> dict[str, Any]:
    import torch

    from benchmarks.common import workload
    from benchmarks.decode import memory, preference_cost, qhead_quality, speed, step_time, tilt_cap
    from mavis_dist.types import TILT_CAP

    torch.set_num_threads(THREADS)
    work = workload.load(run)
    conditions = {"model": work.base.name, "threads": THREADS, "load_before": os.getloadavg()[0], **asdict(scale)}
    say(f"{conditions}\nOther load on these cores spoils the figures, and leaves the ratios rough.")
    rss_mb = memory.measure(scale.soak)
    speeds = speed.measure(work, scale.sizes, scale.repetitions, scale.tokens)
    say(speed_table(speeds, scale.sizes))
    worded = preference_cost.measure(work, scale.repetitions, scale.tokens)
    stepping = step_time.measure(work, HEADLINE_SIZES, scale.repetitions, scale.tokens)
    qualities = tilt_cap.measure(work, scale.caps, scale.prompts)
    say(quality_table(qualities))
    predictions = qhead_quality.measure(work, TILT_CAP, scale.prompts)
    say(students_table(predictions))
    headline = {
        **speed_headlines(speeds),
        **quality_headlines([q for q in qualities if q["weights"] in work.objectives]),
        **step_headlines(stepping),
        "worded_vs_plain_rows": preference_cost.rows_ratio(worded),
        "soak_rss_growth_mb": rss_mb[str(scale.soak[1])] - rss_mb[str(scale.soak[0])],
    }
    say(headline_table(headline))
    details = {
        "conditions": conditions,
        "tokens_per_s": speeds,
        "steps": stepping,
        "rows_with_sentences_step_ms": worded,
        "quality": qualities,
        "students": predictions,
        "soak": rss_mb,
    }
    return {**headline, **details}


def speed_headlines(speeds: Speeds) -> dict[str, float]:
    from benchmarks.decode.speed import ratio

    predicting = [name for name in speeds if name.startswith("qhead")]
    qhead = {
        f"qhead_vs_unguided_b{size}": ratio(speeds, name, "unguided", size)
        for name in predicting
        for size in HEADLINE_SIZES
    }
    return {
        "engine_vs_hf_b1": ratio(speeds, "unguided", "hf", 1),
        "engine_vs_hf_b16": ratio(speeds, "unguided", "hf", 16),
        "lazy_vs_unguided_b1": ratio(speeds, "lazy_2", "unguided", 1),
        "lazy_vs_unguided_b16": ratio(speeds, "lazy_2", "unguided", 16),
        "full_vs_unguided_b16": ratio(speeds, "full_2", "unguided", 16),
        "lazy_heads_vs_unguided_b16": ratio(speeds, "lazy_2_heads", "unguided", 16),
        **qhead,
        "guided_vs_reference_16": ratio(speeds, "lazy_2", "reference", 16, 1),
        "full_vs_reference_16": ratio(speeds, "full_2", "reference", 16, 1),
    }


def quality_headlines(qualities: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Figures of each objective alone, under the smallest cap that leaves the law as it is, or else the largest."""
    chosen: dict[str, dict[str, Any]] = {}
    for q in sorted(qualities, key=lambda q: -q["cap"]):
        if q["weights"] not in chosen or max(q["tv"], q["tv_eos"]) <= SAME_LAW:
            chosen[q["weights"]] = q
    figures = {
        "lazy_cap": "cap",
        "lazy_candidates_per_token": "candidates_per_token",
        "lazy_tv": "tv",
        "lazy_tv_eos": "tv_eos",
        "lazy_divergence_ratio": "divergence_ratio",
    }
    return {key: {name: q[figure] for name, q in chosen.items()} for key, figure in figures.items()}


def step_headlines(stepping: dict[str, Any]) -> dict[str, Any]:
    fractions = {
        f"roofline_fraction_{size}": least / sum(stepping["unguided_step_ms"][size].values())
        for size, least in stepping["roofline_ms"].items()
    }
    return {**fractions, "step_ms": stepping["step_ms"]}


def speed_table(speeds: Speeds, sizes: Sequence[int]) -> str:
    from benchmarks.decode.speed import median

    head = f"{'tokens/s with concurrent requests':<36}" + "".join(f"{size:>9}" for size in sizes)
    lines = [head, "-" * len(head)]
    for name, by_size in speeds.items():
        lines.append(f"{name:<36}" + "".join(f"{median(speeds, name, size):>9.1f}" for size in by_size))
    lines.append("names end in the number of objectives, each with a value model of its own; heads share one model")
    lines.append("reference (2 objectives) answers one request after the other")
    return "\n".join(lines)


def quality_table(qualities: list[dict[str, Any]]) -> str:
    columns = (("cap", 6), ("candidates/token", 18), ("TV", 9), ("TV of end", 11), ("KL / exact", 12), ("steps", 8))
    head = f"{'lazy scorer, weights':<28}" + "".join(f"{name:>{width}}" for name, width in columns)
    lines = [head, "-" * len(head)]
    lines += [
        f"{q['weights']:<28}{q['cap']:>6}{q['candidates_per_token']:>18.2f}{q['tv']:>9.4f}{q['tv_eos']:>11.4f}"
        f"{q['divergence_ratio']:>12.3f}{q['steps']:>8}"
        for q in qualities
    ]
    return "\n".join(lines)


def students_table(predictions: list[dict[str, Any]]) -> str:
    if not predictions:
        return "qhead is left out: no distilled model is published in this run (python -m jobs.distill makes one)"
    columns = {"tv": "TV", "tv_eos": "TV of end", "correlation": "correlation", "divergence_ratio": "KL / exact"}
    columns |= {"soft_value_ratio": "soft value / exact", "steps": "steps"}
    head = f"{'qhead scorer, weights':<28}" + "".join(f"{name:>20}" for name in columns.values())
    lines = [f"{p['weights']:<28}" + "".join(f"{p[key]:>20.4g}" for key in columns) for p in predictions]
    return "\n".join([head, "-" * len(head), *lines])


if __name__ == "__main__":
    main()

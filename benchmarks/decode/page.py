"""The part of docs/benchmarks.md about the decoder's speed, from the file of figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import figures, markdown, peers

LABELS = {  # of variants; the others are named as in the file of figures
    "unguided": "**this engine**, unguided",
    "lazy_1": "`lazy`, 1 objective",
    "lazy_2": "`lazy`, 2 objectives (two value models)",
    "lazy_2_heads": "`lazy`, 2 objectives as heads of one model",
    "lazy_4": "`lazy`, 4 objectives",
    "full_2": "`full`, 2 objectives",
    "predicted_2": "`predicted`, 2 objectives (a distilled model and its student)",
    "qhead_2": "`qhead`, 2 objectives (a distilled model and its student)",
    "hf": "Hugging Face `generate`",
    **peers.LABELS,
    "llamacpp_bf16": "llama.cpp, bf16",
    "llamacpp_q8_0": "llama.cpp, q8_0",
    "reference": "the paper's procedure written plainly, 2 objectives, one request after the other",
}
AIMS = {
    "engine_vs_best_peer_b1": 1.1,
    **{f"engine_vs_best_peer_b{size}": 1.2 for size in (4, 16, 32)},
    "lazy_vs_unguided_b16": 0.6,
    "lazy_heads_vs_unguided_b16": 0.75,
    "guided_vs_reference_16": 40,
}
Cells = list[list[str]]


def render(found: Mapping[str, Any]) -> str:
    conditions = found["conditions"]
    sizes = [str(size) for size in conditions["sizes"]]
    head = ["concurrent requests", *sizes]
    parts = [
        f"Measured by `{found['command']}` with {conditions['model']} in bfloat16 and {conditions['threads']} threads. "
        f"{figures.machine_line(found)}. Peers: {', '.join(conditions['engines'][1:])}. All figures are medians of "
        f"{conditions['repetitions']}."
    ]
    for length, speeds in found["tokens_per_s"].items():
        parts += [f"Tokens per second, answers of {length} tokens:", markdown.table(head, speed_rows(speeds, sizes))]
    parts += [
        "Milliseconds of an unguided step, and the least possible: every weight is read once, and multiplied once for "
        "every request.",
        markdown.table(head, step_rows(found["steps"], sizes)),
        "Ratios of speeds within a repetition. The best peer is the fastest one with this engine's weights.",
        ratio_table(found),
    ]
    return "\n\n".join(parts)


def speed_rows(by_variant: Mapping[str, Mapping[str, Sequence[float]]], sizes: Sequence[str]) -> Cells:
    names = [name for name in LABELS if name in by_variant] + [name for name in by_variant if name not in LABELS]
    return [
        [
            LABELS.get(name, name),
            *(number(statistics.median(by_variant[name][size])) if size in by_variant[name] else "" for size in sizes),
        ]
        for name in names
    ]


def step_rows(steps: Mapping[str, Any], sizes: Sequence[str]) -> Cells:
    parts = [steps["unguided_step_ms"][f"b{size}"] for size in sizes]
    least = [steps["roofline_ms"][f"b{size}"] for size in sizes]
    whole = [sum(part.values()) for part in parts]
    rates = f"{steps['read_gb_per_s']:.0f} GB/s, {steps['matmul_gflops'] / 1000:.2g} TFLOP/s"
    return [
        ["this engine", *map(number, whole)],
        ["of these, the forward pass", *(number(part["base"]) for part in parts)],
        [f"least possible at {rates}", *map(number, least)],
        ["least possible over this engine (aim .8)", *(f"{a / b:.2f}" for a, b in zip(least, whole, strict=True))],
    ]


def ratio_table(found: Mapping[str, Any]) -> str:
    lengths = list(found["tokens_per_s"])
    ratios = {name: figure for name, figure in found.items() if "_vs_" in name and isinstance(figure, dict)}
    return markdown.table(
        ["ratio", *(f"{length} tokens" for length in lengths), "aim"],
        [
            [f"`{name}`", *(f"{figure[length]:.2f}" for length in lengths), f"{AIMS[name]:g}" if name in AIMS else ""]
            for name, figure in ratios.items()
        ],
    )


def number(figure: float) -> str:
    """Three digits, or all before the decimal point."""
    return f"{figure:.0f}" if figure >= 100 else f"{figure:.3g}"

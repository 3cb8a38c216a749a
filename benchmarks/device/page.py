"""The part of docs/benchmarks.md about a GPU, from the file of figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.common import figures, markdown

LABELS = {
    "unguided": "**this engine**, unguided",
    "lazy_2": "`lazy`, 2 objectives (two value models)",
    "lazy_2_heads": "`lazy`, 2 objectives as heads of one model",
    "hf": "Hugging Face `generate`",
}
TRAINED = {
    "packed": "packed trees",
    "packed_split": "packed trees, split at the prompt",
    "branches": "one sequence per branch",
}
Cells = list[list[str]]


def render(found: Mapping[str, Any]) -> str:
    conditions = found["conditions"]
    head = ["rows", *map(str, conditions["rows"])]
    shortest, longest = conditions["prompt_tokens"]
    parts = [
        f"Measured by `{found['command']}` with random weights in bfloat16. {figures.machine_line(found)}. Prompts "
        f"have {shortest} to {longest} random tokens, answers {conditions['tokens']}, drawn at temperature 1 from the "
        f"40 most likely; times include the prompts, all of which are encoded in the first step. All figures are of "
        f"one run after a warm-up.",
        "Tokens per second:",
        markdown.table(head, speed_rows(found)),
        f"Milliseconds of a step in which all rows generate, the median. The least possible: every weight is read once "
        f"and multiplied once for every row, and the keys and values of every row, of mean length, are read, at the "
        f"rates that this card was measured to reach: {found['read_gb_per_s']:.0f} GB/s and "
        f"{found['matmul_tflops']:.3g} TFLOP/s.",
        markdown.table(head, step_rows(found)),
        "How much `lazy` evaluates depends on how peaked the distributions are. Of random models that is set: entropy "
        "among the candidates, candidates evaluated per row and token, divergence per token; and the most memory in "
        "tensors.",
        markdown.table(head, other_rows(found)),
        "Ratios of speeds, and of the least possible time to the measured one:",
        markdown.table(["ratio", *found["shapes"]], ratio_rows(found)),
    ]
    if "training" in found:
        parts += training_parts(found["training"])
    return "\n\n".join(parts)


def speed_rows(found: Mapping[str, Any]) -> Cells:
    return [row for kind in LABELS for row in _rows(found, LABELS[kind], "tokens_per_s", kind)]


def step_rows(found: Mapping[str, Any]) -> Cells:
    kinds = [kind for kind in LABELS if kind != "hf"]
    rows = [row for kind in kinds for row in _rows(found, LABELS[kind], "step_ms", kind)]
    return rows + _rows(found, "least possible, unguided", "limit_ms")


def other_rows(found: Mapping[str, Any]) -> Cells:
    rows = _rows(found, "entropy, nats", "entropy")
    for kind in ("lazy_2", "lazy_2_heads"):
        rows += _rows(found, f"{LABELS[kind]}: candidates", "candidates", kind)
        rows += _rows(found, f"{LABELS[kind]}: nats per token", "nats", kind)
    for kind in LABELS:
        rows += _rows(found, f"{LABELS[kind]}: GiB", "peak_gib", kind)
    return rows


def ratio_rows(found: Mapping[str, Any]) -> Cells:
    ratios = {name: figure for name, figure in found.items() if name.rpartition("_b")[2].isdecimal()}
    return [
        [f"`{name}`", *(f"{figure[shape]:.2f}" if shape in figure else "" for shape in found["shapes"])]
        for name, figure in ratios.items()
    ]


def training_parts(trained: Mapping[str, Any]) -> list[str]:
    head = ["training", "tokens/s", "over branches", "tokens computed per token", "ms of packing", "GiB"]
    speeds = trained["tokens_per_s"]
    rows = [
        [
            TRAINED[name],
            number(speed),
            f"{speed / speeds['branches']:.2f}",
            f"{trained['computed_per_token'][name]:.2f}",
            number(trained["packing_ms"][name]),
            number(trained["peak_gib"][name]),
        ]
        for name, speed in speeds.items()
    ]
    return [
        f"Forward, backward and AdamW step of a value model of four layers, {trained['shape']}: parameters in float32, "
        f"products in bfloat16, torch's optimiser without DeepSpeed. {trained['trees']} random trees 4/2/3 with "
        f"{trained['tokens']} tokens and a target at each; tokens are counted once per tree. The processor packs a "
        f"step's trees in the time given, which is not part of the speed.",
        markdown.table(head, rows),
    ]


def number(figure: float) -> str:
    """Three digits, or all before the decimal point."""
    return f"{figure:.0f}" if figure >= 100 else f"{figure:.3g}"


def _rows(found: Mapping[str, Any], label: str, name: str, kind: str | None = None) -> Cells:
    """A line per shape, with a cell for every number of rows; empty where a run was cut off."""
    lines = []
    for shape, figures_ in found["shapes"].items():
        cells = []
        for rows in map(str, found["conditions"]["rows"]):
            figure = figures_["rows"].get(rows)
            cells.append("" if figure is None else number(figure[name] if kind is None else figure[name][kind]))
        lines.append([f"{shape}, {label}", *cells])
    return lines

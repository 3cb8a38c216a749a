"""Gain against divergence of every value model, with the limit of steering."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.study.figures import Results, Row

RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "study",
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}
REFERENCE_COLOUR, LIMIT_COLOUR = "#1f4e9c", "#222222"
COLOURS = ("#d1622b", "#3a8f3a", "#8a5bb5", "#b58a1f", "#c04070", "#4a9aa8")  # of the variants
WIDTH, HEIGHT = 3.2, 3.4  # of a panel, inches


def write(results: Results, file: Path) -> None:
    """One panel per objective, as SVG: the line of every value model goes through its strengths."""
    import matplotlib
    from matplotlib.figure import Figure

    names = list(results.limits)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(WIDTH * len(names), HEIGHT), layout="constrained")
        panels = figure.subplots(1, len(names), squeeze=False)[0]
        for axes, name in zip(panels, names, strict=True):
            limit = results.limits[name]
            axes.plot(limit.divergence, limit.gain, "--", color=LIMIT_COLOUR, label="limit")
            axes.axvline(results.kl, color="#aaaaaa", linewidth=0.8)
            variants = [row for row in results.variants if row.name == name]
            for row, colour in zip(variants, COLOURS * len(variants), strict=False):
                _line(axes, row, colour, 1.0)
            _line(axes, next(row for row in results.points if row.name == name), REFERENCE_COLOUR, 2.0)
            axes.set(title=name, xlabel="KL, nats per answer", xlim=(0, 2.5 * results.kl))
        panels[0].set_ylabel("gain, sd")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, format="svg", metadata={"Date": None})


def _line(axes: Any, row: Row, colour: str, width: float) -> None:
    kl = [0.0, *(strength.divergence for strength in row.strengths)]
    gain = [0.0, *(strength.weighted_gain.mean for strength in row.strengths)]
    axes.plot(kl, gain, ".-", color=colour, linewidth=width, label=row.label)

"""The report's plots: Matplotlib figures as SVG in the colours of the page's theme."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from mavis_dist.evaluate.metadata import ModelMetadata
from mavis_dist.evaluate.sweep import PointResult, Sweep
from mavis_dist.evaluate.words import number, signed

CURVE_POINTS = 200
NUM_SERIES = 6

# Matplotlib needs fixed colours but the page has two themes: themed_svg replaces each of these by a CSS variable.
INK, MUTED, GRID, PAPER, MIX = (f"#0000{index:02x}" for index in range(1, 6))
SERIES = tuple(f"#0001{index:02x}" for index in range(NUM_SERIES))
THEME = {INK: "ink", MUTED: "muted", GRID: "line", PAPER: "card", MIX: "mix"} | {
    colour: f"s{index}" for index, colour in enumerate(SERIES)
}
RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "figure.facecolor": "none",
    "legend.frameon": False,
}
DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Plot:
    """One plot with its texts; `alt` describes it for screen readers."""

    title: str
    caption: str
    alt: str
    svg: Markup


def steered(point: PointResult) -> dict[str, float]:
    """The positive weights."""
    return {name: weight for name, weight in point.weights.items() if weight > 0}


def alone(point: PointResult) -> str | None:
    """The objective of a corner: a point that steers towards one objective only."""
    names = list(steered(point))
    return names[0] if len(names) == 1 else None


def trade_offs(sweep: Sweep, objectives: Sequence[str]) -> list[Plot]:
    """Rewards against each other for every pair of objectives; with one objective, its gain."""
    if len(objectives) == 1:
        return [_gain_bars(sweep, objectives[0])]
    return [_front(sweep, objectives, first, second) for first, second in combinations(objectives, 2)]


def _front(sweep: Sweep, objectives: Sequence[str], first: str, second: str) -> Plot:
    """Mean reward of two objectives, one marker per point."""
    figure, axes = canvas(f"mean reward: {first}, sd", f"mean reward: {second}, sd")
    axes.margins(0.16)
    between = [point for point in sweep.points if steered(point) and steered(point).keys() <= {first, second}]
    between.sort(key=lambda point: point.weights.get(second, 0.0))
    axes.plot(
        [point.reward[first].mean for point in between],
        [point.reward[second].mean for point in between],
        color=MIX,
        linewidth=1.2,
        alpha=0.5,
        zorder=2,
    )
    labels = []
    for point in sweep.points:
        x, y = point.reward[first], point.reward[second]
        corner = alone(point)
        colour = series(objectives.index(corner)) if corner else MIX
        if not steered(point):
            colour = INK
            axes.axvline(x.mean, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
            axes.axhline(y.mean, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
        axes.hlines(y.mean, x.low, x.high, color=colour, linewidth=1.4, alpha=0.45, zorder=3)
        axes.vlines(x.mean, y.low, y.high, color=colour, linewidth=1.4, alpha=0.45, zorder=3)
        marker, size = ("D", 7.5) if not steered(point) else ("o", 9)
        axes.plot(x.mean, y.mean, marker, markersize=size, color=colour, markeredgecolor=PAPER, zorder=4)
        labels.append((x.mean, y.mean, point.name, colour))
    _label(axes, labels)
    spots = "; ".join(
        f"{point.name} {signed(point.reward[first].mean)}, {signed(point.reward[second].mean)}"
        for point in sweep.points
    )
    return Plot(
        title=f"Front: {first} against {second}",
        caption="Each marker is one setting of the weights; further right and further up is better. The diamond is the "
        "base model, with dotted lines through it; bars are 95 % intervals.",
        alt=f"Scatter plot of the mean reward of {first} and of {second}, in sd. {spots}.",
        svg=themed_svg(figure, f"front-{objectives.index(first)}-{objectives.index(second)}"),
    )


def _gain_bars(sweep: Sweep, name: str) -> Plot:
    """Gain of the only objective, one bar per point."""
    figure, axes = canvas(f"gain in {name}, sd", "")
    axes.grid(False, axis="y")
    axes.axvline(0, color=MUTED, linewidth=1)
    for row, point in enumerate(sweep.points):
        gain = point.gain[name]
        axes.barh(row, gain.mean, height=0.5, color=series(0) if steered(point) else INK)
        axes.hlines(row, gain.low, gain.high, color=INK, linewidth=2)
    axes.set_yticks(range(len(sweep.points)), [_folded(point.name) for point in sweep.points], color=INK)
    axes.set_ylim(len(sweep.points) - 0.4, -0.6)
    bars = "; ".join(f"{point.name} {signed(point.gain[name].mean)}" for point in sweep.points)
    return Plot(
        title=f"Gain in {name}",
        caption="How much better the answers score than the base model's answers to the same prompts; "
        "lines are 95 % intervals.",
        alt=f"Bars of the gain in {name}, in sd. {bars}.",
        svg=themed_svg(figure, "gain"),
    )


def gain_per_nat(sweep: Sweep, objectives: Sequence[str]) -> list[Plot]:
    """Gain against divergence; nothing where the divergence is undefined (greedy decoding)."""
    points = [point for point in sweep.points if math.isfinite(point.divergence)]
    if not any(steered(point) for point in points):
        return []
    figure, axes = canvas("KL divergence from the base model, nats per answer", "gain, sd")
    axes.margins(0.12)
    axes.axhline(0, color=MUTED, linewidth=1)
    for index, name in enumerate(objectives):
        colour = series(index)
        for point in points:
            gain, weight = point.gain[name], point.weights.get(name, 0.0)
            axes.vlines(point.divergence, gain.low, gain.high, color=colour, linewidth=1.4, alpha=0.45, zorder=3)
            axes.plot(
                point.divergence,
                gain.mean,
                "o",
                markersize=5 + 6 * math.sqrt(max(weight, 0.0) / max(sum(point.weights.values()), 1e-9)),
                color=colour,
                markeredgecolor=PAPER,
                zorder=4,
            )
        axes.plot([], [], "o", color=colour, label=name)
        if name in sweep.limits:
            limit = sweep.limits[name]
            axes.plot(limit.divergence, limit.gain, "--", color=colour, linewidth=1.4, zorder=2)
    figure.legend(loc="outside upper center", ncols=3, handletextpad=0.2)
    # Mixtures get no labels: these would overlap, and the sizes of the markers show the weights.
    corners = [(point, corner) for point in points if (corner := alone(point))]
    _label(
        axes,
        [(point.divergence, 0.0, point.name, INK) for point in points if not steered(point)]
        + [(p.divergence, p.gain[name].mean, p.name, series(objectives.index(name))) for p, name in corners],
        [(point.divergence, gain.mean) for point in points for gain in point.gain.values()],
    )
    limits = "".join(
        f" Limit of {name}: {signed(limit.gain[-1])} at {number(limit.divergence[-1])} nats."
        for name, limit in sweep.limits.items()
    )
    spots = "; ".join(
        f"{point.name}: {number(point.divergence)} nats, "
        + ", ".join(f"{name} {signed(gain.mean)}" for name, gain in point.gain.items())
        for point in points
    )
    return [
        Plot(
            title="Gain per nat",
            caption="The cost of a gain: further right, the policy has moved further from the base model. "
            "Larger markers show greater weights of that objective."
            + (" Dashed lines are limits: no method gains more at that divergence." if sweep.limits else ""),
            alt=f"Scatter plot of the gain of each objective, in sd, against KL divergence, in nats. {spots}.{limits}",
            svg=themed_svg(figure, "nats"),
        )
    ]


def learning(objective: str, colour: str, models: Sequence[ModelMetadata]) -> list[Plot]:
    """Training curves of one objective, one per iteration; nothing without any."""
    trained = [model for model in models if model.objective == objective and model.losses]
    if not trained:
        return []
    figure, axes = canvas("optimiser step", "training loss, sd²")
    curves = []
    for order, model in enumerate(trained):
        steps, curve = smooth(model.losses)
        style = DASHES[order % len(DASHES)]
        axes.plot(
            steps,
            curve,
            style if len(curve) > 1 else "o",
            color=colour,
            linewidth=2,
            label=f"iteration {model.iteration}, {_r2(model)}",
        )
        curves.append(f"iteration {model.iteration} from {curve[0]:.3g} to {curve[-1]:.3g}, {_r2(model)}")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside upper center", handlelength=3)
    return [
        Plot(
            title=f"Training of {objective}",
            caption="Squared error of the value model's predictions during training; lower is better.",
            alt=f"Training loss of {objective} over the steps: {'; '.join(curves)}.",
            svg=themed_svg(figure, f"loss-{THEME[colour]}-{objective}"),
        )
    ]


def _r2(model: ModelMetadata) -> str:
    if model.r2 is None:
        return "no validation"
    return f"R² {number(model.r2)}"


def smooth(losses: Sequence[float]) -> tuple[list[float], list[float]]:
    """Running mean over a twelfth of the steps, thinned to CURVE_POINTS: (steps, losses)."""
    if not losses:
        return [], []
    window = max(1, len(losses) // 12)
    curve = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    kept = np.unique(np.linspace(0, len(curve) - 1, min(len(curve), CURVE_POINTS)).round().astype(int))
    return [float(step) for step in kept + (window + 1) / 2], [float(loss) for loss in curve[kept]]


def series(index: int) -> str:
    return SERIES[index % NUM_SERIES]


def canvas(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """A figure with one pair of axes; within `matplotlib.rc_context(RC)`."""
    # Narrow, so that text stays readable on a phone.
    figure = Figure(figsize=(5, 3.9), dpi=72, layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    axes.tick_params(length=0)
    return figure, axes


def _folded(name: str) -> str:
    return name.replace(" + ", "\n+ ")


def _label(
    axes: Axes, labels: Sequence[tuple[float, float, str, str]], others: Sequence[tuple[float, float]] = ()
) -> None:
    """Place each (x, y, text, colour) beside its marker where it overlaps markers, labels and edges the least."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    # The extent of a label depends on the layout; Agg measures it without drawing.
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    markers = axes.transData.transform([(x, y) for x, y, *_ in labels] + list(others))
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in markers]
    inside = axes.get_window_extent(renderer)

    def hidden(box: Bbox) -> float:
        cut = Bbox.intersection(box, inside)
        outside = box.width * box.height - (cut.width * cut.height if cut else 0.0)
        overlaps = (Bbox.intersection(box, other) for other in taken)
        return 3 * outside + sum(overlap.width * overlap.height for overlap in overlaps if overlap)

    places = [
        (dx * reach, dy * reach)
        for reach in (8, 16, 28)
        for dx, dy in ((1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1.2), (0, -1.2), (1.2, 0), (-1.2, 0))
    ]
    for x, y, text, colour in labels:
        note = axes.annotate(
            _folded(text), (x, y), xytext=places[0], textcoords="offset points", color=colour, fontsize=9, zorder=5
        )
        note.set_in_layout(False)
        costs = []
        for dx, dy in places:
            _place(note, dx, dy)
            costs.append(hidden(note.get_window_extent(renderer)))
        _place(note, *places[int(np.argmin(costs))])
        taken.append(note.get_window_extent(renderer))


def _place(note: Any, dx: float, dy: float) -> None:
    note.set(
        position=(dx, dy),
        horizontalalignment="left" if dx > 0 else "right" if dx < 0 else "center",
        verticalalignment="bottom" if dy > 0 else "top" if dy < 0 else "center",
    )


def themed_svg(figure: Figure, name: str) -> Markup:
    """The figure as an SVG element in the colours of the theme; `name` makes its ids unique in the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    prefix = re.sub(r"[^\w-]", "", name)
    text = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{prefix}-", text)
    for colour, variable in THEME.items():
        text = text.replace(colour, f"var(--{variable})")
    # Matplotlib escapes the labels and generates everything else.
    return Markup(text)

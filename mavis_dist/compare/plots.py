"""The plots of a comparison: for the page in the colours of its theme, and as files of their own."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from mavis_dist.compare.method import BASE
from mavis_dist.compare.results import AtStrength, Comparison, WeightsResult
from mavis_dist.evaluate.plots import NUM_SERIES, RC, THEME, canvas, themed_svg
from mavis_dist.evaluate.report import STYLE
from mavis_dist.evaluate.sweep import Estimate
from mavis_dist.evaluate.words import number, signed

MARKERS = "os^Dv<>ph*XP"
PNG_DPI = 150
PLAIN = FuncFormatter(lambda x, _: f"{x:g}")  # numbers without powers of ten
# The light colours of the page, for files that have no theme: those of its first rule.
LIGHT = dict(re.findall(r"--(\w+): (#\w+);", STYLE.partition("@media")[0]))
PLACEHOLDER = {name: colour for colour, name in THEME.items()}  # name in the theme -> what the page replaces


@dataclass(frozen=True)
class Drawing:
    """One plot: `svg` for the page, and whole files."""

    name: str  # of its files
    title: str
    caption: str
    alt: str
    svg: Markup
    svg_file: bytes
    png_file: bytes


@dataclass(frozen=True)
class Style:
    """How a method looks in all plots."""

    colour: str  # name in the theme
    marker: str
    is_reference: bool


def styles(comparison: Comparison) -> dict[str, Style]:
    """The reference has the first colour; from the seventh method on colours return, each time with another marker."""
    steered = [row.method for row in comparison.methods if row.method != BASE]
    order = sorted(steered, key=lambda name: name != comparison.reference)
    return {BASE: Style("ink", "D", False)} | {
        name: Style(f"s{index % NUM_SERIES}", _marker(index), name == comparison.reference)
        for index, name in enumerate(order)
    }


def _marker(index: int) -> str:
    """Markers in turn, moved on by one whenever they would meet the same colours again."""
    return MARKERS[(index + index // math.lcm(NUM_SERIES, len(MARKERS))) % len(MARKERS)]


def drawings(comparison: Comparison) -> Iterator[Drawing]:
    """A front per pair, gain against divergence, and cost against gain."""
    for first, second in combinations(comparison.objectives, 2):
        yield _front(comparison, first, second)
    yield _divergence(comparison)
    yield _cost(comparison)


def _front(comparison: Comparison, first: str, second: str) -> Drawing:
    fronts = {
        row.method: sorted(
            (s for s in comparison.settings if s.method == row.method and s.weights.keys() <= {first, second}),
            key=lambda s: s.weights.get(second, 0.0),
        )
        for row in comparison.methods
    }
    known = {name: points for name, points in fronts.items() if points and all(s.weighted is not None for s in points)}

    def draw(axes: Axes, colour: Callable[[str], str]) -> None:
        axes.axvline(0, color=colour("muted"), linewidth=0.8, linestyle=(0, (2, 3)))
        axes.axhline(0, color=colour("muted"), linewidth=0.8, linestyle=(0, (2, 3)))
        for name, points in known.items():
            x, y = ([_certain(s.gain[objective]) for s in points] for objective in (first, second))
            _line(axes, name, x, y, styles(comparison)[name], colour)

    def spot(s: WeightsResult) -> str:
        return f"{signed(_certain(s.gain[first]).mean)} {signed(_certain(s.gain[second]).mean)}"

    spots = "; ".join(f"{name}: {', '.join(map(spot, points))}" for name, points in known.items())
    return _drawing(
        f"front-{first}-{second}",
        f"Front: {first} against {second}, at {comparison.kl:g} nats",
        "Each line is one method over the weights; further right and further up is better. Dotted lines cross at the "
        "base model's mean; bars are 95 % intervals. A method that spends less is shown at its largest divergence.",
        f"Fronts of {first} and {second}, gains in sd. {spots}.",
        (f"gain in {first}, sd", f"gain in {second}, sd"),
        draw,
    )


def _divergence(comparison: Comparison) -> Drawing:
    rows = [row for row in comparison.methods if all(s.divergence is not None for s in row.strengths)]

    def spot(s: AtStrength) -> str:
        return f"{signed(s.weighted.mean)} at {number(s.divergence or 0.0)}"

    spots = "; ".join(f"{row.method}: {', '.join(map(spot, row.strengths))}" for row in rows)

    def draw(axes: Axes, colour: Callable[[str], str]) -> None:
        limit = comparison.limit
        axes.plot(limit.divergence, limit.gain, "--", color=colour("ink"), linewidth=1.4, label="limit")
        axes.axvline(comparison.kl, color=colour("muted"), linewidth=0.8, linestyle=(0, (2, 3)))
        for row in rows:
            x = [_exactly(s.divergence) for s in row.strengths]
            _line(axes, row.method, x, [s.weighted for s in row.strengths], styles(comparison)[row.method], colour)
        axes.set_xscale("function", functions=(_root, np.square))  # limits are almost lines
        axes.set_xlim(left=0.0)

    return _drawing(
        "gain-by-divergence",
        "Weighted gain against divergence",
        "The mean weighted gain over a method's weights at every strength. Dashed: the limit, more than which no "
        "method gains at that divergence, as far as it is known. Dotted: where methods are compared.",
        f"Weighted gain, in sd, against divergence, in nats. {spots}.",
        ("KL divergence from the base model, nats per answer", "weighted gain, sd"),
        draw,
    )


def _cost(comparison: Comparison) -> Drawing:
    rows = [(row, row.weighted) for row in comparison.methods if row.weighted is not None]

    def draw(axes: Axes, colour: Callable[[str], str]) -> None:
        axes.set_xscale("log")
        for row, weighted in rows:
            _line(axes, row.method, [_exactly(row.cost.generated)], [weighted], styles(comparison)[row.method], colour)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(PLAIN)
        axes.xaxis.set_minor_formatter(NullFormatter())

    spots = "; ".join(f"{row.method}: {signed(gain.mean)} for {number(row.cost.generated, 0)}" for row, gain in rows)
    return _drawing(
        "cost",
        f"Cost and weighted gain at {comparison.kl:g} nats",
        "All tokens that were generated for an answer, those of discarded answers included, and what they bring. "
        "Further left and further up is better; bars are 95 % intervals.",
        f"Weighted gain, in sd, and tokens generated per answer. {spots}.",
        ("tokens generated per answer", "weighted gain, sd"),
        draw,
    )


def _line(
    axes: Axes,
    label: str,
    x: Sequence[Estimate],
    y: Sequence[Estimate],
    style: Style,
    colour: Callable[[str], str],
) -> None:
    """Connected markers with whiskers; the reference is drawn bold, on top of the others."""
    axes.errorbar(
        [e.mean for e in x],
        [e.mean for e in y],
        xerr=_whiskers(x),
        yerr=_whiskers(y),
        fmt=f"{style.marker}-",
        markersize=6 if style.is_reference else 4.5,
        linewidth=2.2 if style.is_reference else 1.1,
        elinewidth=0.7,
        label=label,
        color=colour(style.colour),
        zorder=4 if style.is_reference else 3,
    )


def _exactly(number: float | None) -> Estimate:
    """A figure without an interval."""
    return Estimate(number or 0.0, -math.inf, math.inf)


def _root(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(x, 0.0))


def _certain(estimate: Estimate | None) -> Estimate:
    assert estimate is not None
    return estimate


def _whiskers(estimates: Sequence[Estimate]) -> np.ndarray:
    """Lengths below and above the means; none where there is no interval."""
    below = [e.mean - e.low if math.isfinite(e.low) else 0.0 for e in estimates]
    above = [e.high - e.mean if math.isfinite(e.high) else 0.0 for e in estimates]
    return np.maximum([below, above], 0.0)


def _drawing(
    name: str,
    title: str,
    caption: str,
    alt: str,
    labels: tuple[str, str],
    draw: Callable[[Axes, Callable[[str], str]], None],
) -> Drawing:
    themed = _figure(labels, draw, PLACEHOLDER)
    with matplotlib.rc_context(RC):
        svg = themed_svg(themed, name)
    file = str(svg)
    for variable, colour in LIGHT.items():
        file = file.replace(f"var(--{variable})", colour)
    png = io.BytesIO()
    plain = _figure(labels, draw, LIGHT)
    FigureCanvasAgg(plain)
    plain.savefig(png, format="png", dpi=PNG_DPI, facecolor="white", metadata={"Software": None})
    return Drawing(name, title, caption, alt, svg, file.encode(), png.getvalue())


def _figure(
    labels: tuple[str, str], draw: Callable[[Axes, Callable[[str], str]], None], palette: dict[str, str]
) -> Figure:
    rc = {key: palette[THEME[value]] if value in THEME else value for key, value in RC.items()}
    with matplotlib.rc_context(rc):
        figure, axes = canvas(*labels)
        draw(axes, palette.__getitem__)
        figure.legend(loc="outside upper center", ncols=3, fontsize=8, handlelength=1.6, columnspacing=1.0)
    return figure

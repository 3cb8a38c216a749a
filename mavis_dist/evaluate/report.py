"""The report: one HTML page that shows the effect of the weights, its cost and example answers. No Ray, no network.

The page is self-contained: styles and plots are inline, and the same input gives the same bytes. Prompts and answers
are untrusted, so all text is escaped, and a content security policy in the page forbids scripts and requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup

from mavis_dist.evaluate.metadata import ModelMetadata, StageMetadata
from mavis_dist.evaluate.plots import NUM_SERIES, RC, alone, gain_per_nat, learning, series, smooth, steered, trade_offs
from mavis_dist.evaluate.sweep import Sweep, unknown_shares
from mavis_dist.evaluate.words import bounds, duration, number, plain, share_words, signed, verdict

NUM_EXAMPLES = 6
STYLE = files(__package__).joinpath("page.css").read_text(encoding="utf-8")  # of this page and that of comparisons


def environment() -> jinja2.Environment:
    """Templates of pages: what pages share (`page.html`, `parts.html`), and the number formats as filters."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("mavis_dist", "evaluate"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        signed=signed, number=number, bounds=bounds, verdict=verdict, duration=duration, plain=plain, share=share_words
    )
    made.globals["style"] = Markup(STYLE)
    return made


def render(
    run: str,
    sweep: Sweep,
    models: Sequence[ModelMetadata],
    stages: Sequence[StageMetadata],
    settings: Mapping[str, Any],
) -> str:
    """The whole report as one HTML page.

    Args:
        run: name of the run, the title of the page.
        sweep: points of the sweep, the base model (no weights) among them.
        models: value models in display order; may be empty.
        stages: stages in execution order; may be empty.
        settings: dotted key -> plain value.
    """
    objectives = list(sweep.points[0].gain)
    with matplotlib.rc_context(RC):
        plots = [*trade_offs(sweep, objectives), *gain_per_nat(sweep, objectives)]
        losses = [plot for index, name in enumerate(objectives) for plot in learning(name, series(index), models)]
    colours = {name: f"var(--s{index % NUM_SERIES})" for index, name in enumerate(objectives)}
    corners = {name: point for point in sweep.points if (name := alone(point))}
    base = [(point.name, "var(--mix)") for point in sweep.points if not steered(point)]
    return (
        environment()
        .get_template("report.html")
        .render(
            run=run,
            sweep=sweep,
            objectives=objectives,
            colours=colours,
            corners=corners,
            shown=base + [(point.name, colours[name]) for name, point in corners.items()],
            examples=sweep.examples[:NUM_EXAMPLES],
            plots=plots,
            models=[(model, smooth(model.losses)[1]) for model in models],
            losses=losses,
            stages=stages,
            longest=max((stage.seconds or 0 for stage in stages), default=0),
            total=sum(stage.seconds or 0 for stage in stages),
            settings=settings,
            unknown_shares=unknown_shares(sweep),
        )
    )

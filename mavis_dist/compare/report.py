"""The page of a comparison: one HTML file that works offline, with its plots as files beside it. No Ray, no network.

Prompts and answers are untrusted: the page's only script is pinned by its hash and puts them in as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import TypedDict

from markupsafe import Markup

from mavis_dist import config as config_module
from mavis_dist.compare.cells import weights_name
from mavis_dist.compare.measured import Measured, nearest_answers
from mavis_dist.compare.plots import drawings, styles
from mavis_dist.compare.results import Comparison, Group, where_measured
from mavis_dist.config import Config
from mavis_dist.evaluate.report import environment
from mavis_dist.store import layout
from mavis_dist.store.files import Store
from mavis_dist.types import Prompt


class Shown(TypedDict):
    """Answers to look through: one per prompt, of every method and its weights."""

    prompts: list[str]
    weights: list[str]
    methods: dict[str, dict[str, list[str]]]  # method -> weights -> answers, in the order of the prompts


def examples_of(measured: Measured, prompts: Sequence[Prompt]) -> Shown:
    """The answers with the first seed, at the strength nearest to the KL of the comparison."""
    found: dict[str, dict[str, list[str]]] = {}
    for method in measured.methods:
        for weights in measured.common(method):
            first_seed = nearest_answers(measured, method, weights)[0]
            found.setdefault(method, {})[weights_name(weights)] = first_seed.text
    return {
        "prompts": [prompt.text for prompt in prompts],
        "weights": [weights_name(weights) for weights in measured.vectors],
        "methods": found,
    }


def write_report(config: Config, store: Store, comparison: Comparison, shown: Shown) -> str:
    """Write the page and its plots; returns the path of the page."""
    plots = list(drawings(comparison))
    for plot in plots:
        store.write_bytes(layout.comparison_plot(plot.name, "svg"), plot.svg_file)
        store.write_bytes(layout.comparison_plot(plot.name, "png"), plot.png_file)
    source = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    template = environment().from_string(source)
    page = template.render(
        run=config.run,
        comparison=comparison,
        colours={name: f"var(--{style.colour})" for name, style in styles(comparison).items()},
        groups=_by_objectives(comparison.groups),
        plots=plots,
        measured=where_measured(comparison),
        shown=_as_script_data(shown),
        script_hash=_hash_of_script(source),
        settings=config_module.flatten(config),
    )
    store.write_bytes(layout.COMPARISON_REPORT, page.encode())
    return f"{store.root}/{layout.COMPARISON_REPORT}"


def _by_objectives(groups: Sequence[Group]) -> dict[tuple[str, ...], dict[str, Group]]:
    """The groups of every pair or triple by method."""
    found: dict[tuple[str, ...], dict[str, Group]] = {}
    for group in groups:
        found.setdefault(tuple(group.objectives), {})[group.method] = group
    return found


def _as_script_data(shown: Shown) -> Markup:
    """JSON that cannot end the element that holds it."""
    return Markup(json.dumps(shown, ensure_ascii=False).replace("<", "\\u003c").replace(">", "\\u003e"))


def _hash_of_script(source: str) -> str:
    """Of the template's script, which has nothing filled in; for the content security policy."""
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.DOTALL)
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

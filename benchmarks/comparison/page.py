"""The part of docs/comparison.md that is rendered from the figures: conditions, tables, plots, counts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.common.figures import machine_line
from benchmarks.common.markdown import listed, minus, signed, table
from mavis_dist.compare.method import BASE
from mavis_dist.compare.plots import Drawing
from mavis_dist.compare.results import UNKNOWN, Comparison, MethodResult, where_measured
from mavis_dist.evaluate.sweep import Estimate

# Method -> the least ratio of the reference's hypervolume to its own that was aimed at before measuring.
AIMS = {"soups": 1.10, "soups_long": 1.10, "mod": 1.10, "morlhf": 0.95, "morlhf_long": 0.95}


def render(comparison: Comparison, found: Mapping[str, Any], images: Mapping[Drawing, str]) -> str:
    """The whole part; `found`: the file of figures, `images`: where the page finds the plots."""
    rows = comparison.methods
    parts = [
        table(("setting", "value"), _conditions(comparison, found)),
        f"## At {comparison.kl:g} nats",
        table(MAIN, (_main_row(comparison, row) for row in rows)),
        "Gains are in standard deviations (sd) of the reward above the base model, with 95 % intervals over prompts; "
        "**bold**: significantly ahead of every other method. Ratio and difference compare "
        f"{comparison.reference} with the method on the weights that both have.",
        "\n\n".join(f"![{drawing.alt}]({path})\n\n{drawing.caption}" for drawing, path in images.items()),
        "## Pairs and triples",
        table(*_groups(comparison)),
        "Hypervolume of every front at this divergence, and in brackets the ratio of "
        f"{comparison.reference}'s to it on common weights.",
        "## Text and cost",
        table(COST, (_cost_row(row) for row in rows)),
        "Means over all weights and seeds, at the strengths nearest to this divergence. Speeds are those of a full "
        "batch; fine-tuned policies and prompts have the base model beside them, which measures their divergence. "
        "Tokens are those that models generate to learn from, of the trees or by the policy in training. "
        + " ".join(where_measured(comparison)),
        "## Counts",
        "\n".join(f"- {sentence}" for sentence in findings(comparison)),
    ]
    return "\n\n".join(parts)


MAIN = ("method", "weights", "weighted gain, sd", "difference", "hypervolume, sd²", "ratio", "share of the limit")
COST = (
    "method",
    "Spearman",
    "distinct pairs of words",
    "repetition",
    "perplexity",
    "tokens per answer",
    "reward calls",
    "tokens/s",
    "training, s",
    "tokens for it",
    "for one weight vector, s",
    "tokens for it",
)


def _conditions(comparison: Comparison, found: Mapping[str, Any]) -> list[tuple[str, str]]:
    topics = [(topic, line) for topic, line in comparison.conditions.items() if topic != "versions"]
    return [("command", f"`{found['command']}`"), *topics, ("machine", machine_line(found))]


def _main_row(comparison: Comparison, row: MethodResult) -> tuple[str, ...]:
    return (
        row.method,
        str(row.num_weights),
        _figure(row.weighted, comparison.winners["weighted"] == row.method),
        UNKNOWN if row.behind is None else signed(row.behind),
        _figure(row.hypervolume, comparison.winners["hypervolume"] == row.method),
        _figure(row.hypervolume_ratio),
        _figure(row.share, comparison.winners["share"] == row.method),
    )


def _groups(comparison: Comparison) -> tuple[tuple[str, ...], Iterable[tuple[str, ...]]]:
    names = list(dict.fromkeys(", ".join(group.objectives) for group in comparison.groups))
    by_method = {method.method: [UNKNOWN] * len(names) for method in comparison.methods}
    for group in comparison.groups:
        ratio = "" if group.ratio is None else f" ({_figure(group.ratio)})"
        by_method[group.method][names.index(", ".join(group.objectives))] = f"{_figure(group.hypervolume)}{ratio}"
    return ("method", *names), ((method, *cells) for method, cells in by_method.items())


def _cost_row(row: MethodResult) -> tuple[str, ...]:
    text, cost = row.text, row.cost
    return (
        row.method,
        UNKNOWN if row.spearman is None else _plain(row.spearman),
        _plain(text.distinct_2),
        f"{text.repetition:.3f}",
        f"{text.perplexity:.1f}",
        f"{cost.generated:.0f}",
        f"{cost.reward_calls:.0f}",
        UNKNOWN if cost.tokens_per_s is None else f"{cost.tokens_per_s:.0f}",
        f"{cost.training.seconds:.0f}",
        f"{cost.training.tokens:,.0f}",
        f"{cost.training.seconds_per_weights:.0f}",
        f"{cost.training.tokens_per_weights:,.0f}",
    )


def findings(comparison: Comparison) -> list[str]:
    """What the intervals say, counted."""
    others = [row for row in comparison.methods if row.method not in (comparison.reference, BASE)]
    single = [row for row in others if is_one_answer(row)]
    sentences = []
    for topic, figure_of in (
        ("weighted gain", lambda row: row.behind),
        ("share of the limit", lambda row: row.share_behind),
    ):
        known = [(row.method, figure) for row in others if (figure := figure_of(row)) is not None]
        above = [name for name, figure in known if figure.low > 0]
        below = [name for name, figure in known if figure.high < 0]
        undecided = [name for name, _ in known if name not in above and name not in below]
        sentences.append(
            f"In {topic} {comparison.reference} is above {len(above)} of {len(known)} methods{listed(above)}, below "
            f"{len(below)}{listed(below)}, and not distinguished from {len(undecided)}{listed(undecided)}."
        )
    ahead = [row.method for row in single if row.share_behind is not None and row.share_behind.mean > 0]
    sentences.append(
        f"Of the {len(single)} methods that write one answer, {len(ahead)} have a smaller share of the limit than "
        f"{comparison.reference}{listed(ahead)}."
    )
    for method, aim in AIMS.items():
        for row in (row for row in others if row.method == method and row.hypervolume_ratio is not None):
            assert row.hypervolume_ratio is not None
            verdict = "reached" if row.hypervolume_ratio.mean >= aim else "missed"
            sentences.append(f"Ratio to {method}: {_figure(row.hypervolume_ratio)}, aim {aim:.2f}: {verdict}.")
    return sentences


def is_one_answer(row: MethodResult) -> bool:
    """Whether it generates only the answer that it gives."""
    return all(math.isclose(at.generated, at.num_tokens) for at in row.strengths)


def _figure(estimate: Estimate | None, is_bold: bool = False) -> str:
    if estimate is None:
        return UNKNOWN
    mark = "**" if is_bold else ""
    return minus(f"{mark}{estimate.mean:.2f}{mark} [{estimate.low:.2f}, {estimate.high:.2f}]")


def _plain(number: float) -> str:
    return minus(f"{number:.2f}")

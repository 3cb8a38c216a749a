"""The part of docs/results.md about steering by preferences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common.figures import machine_line, parse
from benchmarks.common.markdown import listed, minus, signed, table
from benchmarks.steerability.answers import MATO
from benchmarks.steerability.fronts import Front, Steerability, Summary

NONE = "–"
NOTE = """\
Rewards are in standard deviations above the run's base answers. `personal` is the share of words in the first person;
no value model is trained on it, so value models are measured on the other pairs only, and compared with MATO on those.
The weighted reward of an answer is the sum of weight times reward over the two objectives, averaged over the weights,
prompts and pairs; its 95 % interval resamples prompts, and differences are paired by prompt. The hypervolume of a front
is that of its mean rewards above the worst of each objective among all methods of the pair. Spearman correlates the
weights of an objective with its mean rewards. A method without weights counts with the same answers at every weight."""


def render(figures: Mapping[str, Any]) -> str:
    """The whole part, from the file of figures."""
    measured = parse(Steerability, figures)
    conditions, num_pairs = measured.conditions, len({front.pair for front in measured.fronts})
    rows = [
        ("command", f"`{figures['command']}`"),
        ("base model", f"{conditions['model']}, {conditions['dtype']}; system prompt: {conditions['system']!r}"),
        ("preferences", "; ".join(f"{reward}: {text!r}" for reward, text in conditions["preferences"].items())),
        ("weights", ", ".join(f"{weight:g}" for weight in conditions["weights"]) + " of the first objective of a pair"),
        (
            "answers",
            f"{conditions['prompts']} unseen prompts, at most {conditions['max_tokens']} tokens, one sample"
            + "".join(f", {count} of {method}" for method, count in conditions["samples"].items()),
        ),
        ("strengths", ", ".join(f"{method}: c = {c:.3g}" for method, c in conditions["strengths"].items())),
        ("value models", f"beta {conditions['beta']:g}"),
        ("machine", machine_line(figures)),
    ]
    parts = [
        "# Steering by preferences",
        table(("setting", "value"), rows),
        "## Mean of the pairs",
        _summary_table(measured.summaries, num_pairs),
        NOTE,
        "## Pairs",
        *(_pair_table(pair, measured.fronts) for pair in dict.fromkeys(front.pair for front in measured.fronts)),
        "Points are the mean rewards of both objectives at every weight, in order.",
        "## Findings",
        "\n".join(f"- {sentence}" for sentence in _findings(measured)),
    ]
    return "\n\n".join(parts)


def _summary_table(summaries: Sequence[Summary], num_pairs: int) -> str:
    head = ("method", "weighted reward, sd", "MATO above it", "hypervolume, sd²", "Spearman")
    return table(
        head,
        (
            (
                summary.method + (f", {summary.num_pairs} pairs" if summary.num_pairs < num_pairs else ""),
                signed(summary.weighted),
                NONE if summary.behind_mato is None else signed(summary.behind_mato),
                f"{summary.hypervolume:.2f}",
                NONE if summary.spearman is None else _plain(summary.spearman),
            )
            for summary in summaries
        ),
    )


def _pair_table(pair: tuple[str, str], fronts: Sequence[Front]) -> str:
    head = ("method", f"points ({pair[0]}, {pair[1]}), sd", "hypervolume", "Spearman", "KL, nats", "tokens")
    rows = (
        (
            front.method,
            " ".join(f"({_plain(a)}, {_plain(b)})" for a, b in front.rewards),
            f"{front.hypervolume:.2f}",
            ", ".join(map(_plain, front.spearman)) or NONE,
            _plain(front.divergence),
            f"{front.num_tokens:.0f}",
        )
        for front in fronts
        if front.pair == pair
    )
    return f"### {pair[0]} and {pair[1]}\n\n{table(head, rows)}"


def _findings(measured: Steerability) -> list[str]:
    monotone = [front for front in measured.fronts if front.method == MATO and min(front.spearman) >= 0.9]
    names = [" and ".join(front.pair) for front in monotone]
    num_pairs = len({front.pair for front in measured.fronts})
    others = [summary for summary in measured.summaries if summary.behind_mato is not None]
    above = [s.method for s in others if s.behind_mato and s.behind_mato.low > 0]
    below = [s.method for s in others if s.behind_mato and s.behind_mato.high < 0]
    open_ = [s.method for s in others if s.method not in (*above, *below)]
    return [
        f"Both Spearman correlations of MATO are at least .9 for {len(monotone)} of {num_pairs} pairs{listed(names)}.",
        f"In weighted reward MATO is above {len(above)} of {len(others)} other methods{listed(above)}, "
        f"below {len(below)}{listed(below)}, and not distinguished from {len(open_)}{listed(open_)}.",
    ]


def _plain(number: float) -> str:
    return minus(f"{number:.2f}")

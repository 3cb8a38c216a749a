"""The part of the results page about objectives in words."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common.markdown import signed, table
from benchmarks.common.sentences import SENTENCES
from benchmarks.steerability.answers import MATO, PARAMS, PERSONAL, PERSONAL_SENTENCE
from benchmarks.steerability.fronts import Front, Steerability, Summary

NONE = "–"
NOTE = """\
Rewards are in standard deviations above the run's base answers. `personal` is the share of words in the first person;
no value model is trained on it, so that value models have the other pairs only, and are compared with MATO on those.
The weighted reward of an answer is the sum of weight times reward over the two objectives; it is averaged over the
weights, prompts and pairs, its 95 % interval resamples prompts, and differences are paired by prompt. The hypervolume
of a front is that of its mean rewards above the worst of each objective among all ways of the pair. Spearman correlates
the weights of an objective with its mean rewards. A way whose weights cannot be set counts with the same answers at
every weight."""


def render(measured: Steerability, command: str) -> str:
    conditions, num_pairs = measured.conditions, len({front.pair for front in measured.fronts})
    rows = [
        ("command", f"`{command}`"),
        ("base model", f"{conditions['model']}, {conditions['dtype']}; system text: {conditions['system']!r}"),
        ("sentences", "; ".join(f"{r}: {text!r}" for r, text in {**SENTENCES, PERSONAL: PERSONAL_SENTENCE}.items())),
        ("weights", ", ".join(f"{weight:g}" for weight in conditions["weights"]) + " of the first objective of a pair"),
        (
            "answers",
            f"{conditions['prompts']} unseen prompts, at most {conditions['max_tokens']} tokens, one sample"
            + "".join(f", {count} of {way}" for way, count in conditions["samples"].items()),
        ),
        ("strengths", ", ".join(f"{way}: c = {params.strength:.3g}" for way, params in PARAMS.items())),
        ("value models", f"beta {conditions['beta']:g}"),
    ]
    parts = [
        "# Objectives in words",
        table(("what", "with"), rows),
        "## Mean of the pairs",
        _summary_table(measured.summaries, num_pairs),
        NOTE,
        "## Pairs",
        *(_pair_table(pair, measured.fronts) for pair in dict.fromkeys(front.pair for front in measured.fronts)),
        "Points are the mean rewards of both objectives at every weight, in order.",
        "## Reading the tables",
        "\n".join(f"- {sentence}" for sentence in _reading(measured)),
    ]
    return "\n\n".join(parts)


def _summary_table(summaries: Sequence[Summary], num_pairs: int) -> str:
    head = ("way", "weighted reward, sd", "MATO above it", "hypervolume, sd²", "Spearman")
    return table(
        head,
        (
            (
                summary.way + (f", {summary.num_pairs} pairs" if summary.num_pairs < num_pairs else ""),
                signed(summary.weighted),
                NONE if summary.behind_mato is None else signed(summary.behind_mato),
                f"{summary.hypervolume:.2f}",
                NONE if summary.spearman is None else _plain(summary.spearman),
            )
            for summary in summaries
        ),
    )


def _pair_table(pair: tuple[str, str], fronts: Sequence[Front]) -> str:
    head = ("way", f"points ({pair[0]}, {pair[1]}), sd", "hypervolume", "Spearman", "KL, nats", "tokens")
    rows = (
        (
            front.way,
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


def _reading(measured: Steerability) -> list[str]:
    monotone = [front for front in measured.fronts if front.way == MATO and min(front.spearman) >= 0.9]
    names = [" and ".join(front.pair) for front in monotone]
    num_pairs = len({front.pair for front in measured.fronts})
    others = [summary for summary in measured.summaries if summary.behind_mato is not None]
    above = [s.way for s in others if s.behind_mato and s.behind_mato.low > 0]
    below = [s.way for s in others if s.behind_mato and s.behind_mato.high < 0]
    open_ = [s.way for s in others if s.way not in (*above, *below)]
    return [
        f"Both Spearman correlations of MATO are at least .9 for {len(monotone)} of {num_pairs} pairs{_listed(names)}.",
        f"In weighted reward MATO is above {len(above)} of {len(others)} other ways{_listed(above)}, "
        f"below {len(below)}{_listed(below)}, and not told apart from {len(open_)}{_listed(open_)}.",
    ]


def _listed(names: Sequence[str]) -> str:
    return f" ({'; '.join(names)})" if names else ""


def _plain(number: float) -> str:
    return f"{number:.2f}".replace("-", "−")

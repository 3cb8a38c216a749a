"""The page of a study in Markdown: conditions, tables with intervals, and what the intervals say."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common.markdown import signed, table
from benchmarks.study.equal_kl import AtKl
from benchmarks.study.figures import Results, Row, Spent
from mavis_dist.evaluate.sweep import Estimate

NONE = "–"
ITERATIONS_NOTE = """\
Brackets are 95 % intervals. Gains are rewards above those of the base model's answers to the same prompts, in standard
deviations of the reward over the base model's training answers. They are compared at the KL that iteration 0 spends at
beta {beta:g}. Between the strengths below, and from the origin to the first, a gain is read off a straight line; beyond
them it is not reached. The line lies below a curve that flattens, so gains between strengths rather err low.

Intervals resample the unseen prompts, the same ones for all value models, so that differences are paired. They hold for
these value models: what another seed of the training would change is not in them. Errors are weighted means over the
held-out trees of the policy that an iteration learns from, later ones with the price of divergence in their targets:
they compare value models within an iteration, not between iterations. The gate is the run's own decision to publish,
by the difference in soft value to the newest one accepted before; the next iteration builds on accepted ones alone."""
VARIANTS_NOTE = """\
All value models of iteration 0 learn from the same trees. Errors are those of targets at every token, on the same
held-out trees for all, whatever a variant learns from; their intervals resample these trees."""


def render(results: Results) -> str:
    """The whole page."""
    parts = [
        "# What iterations and variants of the training bring",
        "Written by the command below from what it measured: run it again instead of editing.",
        table(("what", "with"), results.conditions.items()),
        "## Iterations",
        iteration_table(results),
        ITERATIONS_NOTE.format(beta=results.middle_beta),
    ]
    if results.variants:
        parts += ["## Variants of iteration 0", variant_table(results), VARIANTS_NOTE]
    parts += ["## Every strength", strength_table(results), "Gain in sd, at the KL in nats that an answer spends."]
    parts += ["## Reading", "\n".join(f"- {sentence}" for sentence in reading(results))]
    return "\n\n".join(parts)


def iteration_table(results: Results) -> str:
    head = (
        "objective",
        "value model",
        "validation error, sd²",
        "R²",
        "KL, nats",
        "gain at this KL, sd",
        "over iteration 0",
        "over the one before",
        "gate",
    )
    return table(head, (_iteration_cells(row, results.kl[row.objective]) for row in results.iterations))


def _iteration_cells(row: Row, kl: float) -> list[str]:
    differences = [_at(difference) for difference in row.gain_over.values()]
    # The second iteration's predecessor is iteration 0 itself.
    over_first, over_before = (differences[0], differences[-1]) if differences else (NONE, NONE)
    return [
        row.objective,
        row.label,
        _number(row.validation_error),
        _number(row.r2),
        f"{kl:.2f}",
        _at(row.gain),
        over_first,
        over_before,
        _gate(row),
    ]


def variant_table(results: Results) -> str:
    head = (
        "objective",
        "value model",
        "validation error, sd²",
        "over the reference",
        "R²",
        "KL, nats",
        "gain at this KL, sd",
        "over the reference",
    )
    rows = [
        [
            row.objective,
            row.label,
            _number(row.validation_error),
            signed(row.error_over) if row.error_over else NONE,
            _number(row.r2),
            f"{results.kl[row.objective]:.2f}",
            _at(row.gain),
            *([_at(difference) for difference in row.gain_over.values()] or [NONE]),
        ]
        for row in results.variants
    ]
    return table(head, rows)


def strength_table(results: Results) -> str:
    rows = _all(results)
    betas = [spent.beta for spent in results.iterations[0].strengths]
    head = ("objective", "value model", *(f"beta {beta:g}" for beta in betas))
    return table(head, ([row.objective, row.label, *map(_spent, row.strengths)] for row in rows))


def reading(results: Results) -> list[str]:
    """What the intervals say, in sentences."""
    steps = [(row, list(row.gain_over.items())[-1]) for row in results.iterations if row.gain_over]
    changes = [(row, pair) for row in results.variants for pair in row.gain_over.items()]
    errors = [(f"{row.objective}, {row.label}", row.error_over) for row in results.variants if row.error_over]
    sentences = [
        _verdict("gains at equal KL over the base model", [(_name(r), r.gain.estimate) for r in _all(results)])
    ]
    for what, pairs in (
        ("differences in gain between an iteration and the one before it", steps),
        ("differences in gain between a variant and the reference", changes),
    ):
        if pairs:
            sentences.append(_verdict(what, [(f"{_name(r)} over {other}", at.estimate) for r, (other, at) in pairs]))
    if errors:
        sentences.append(
            _verdict("differences in validation error (less is better) between a variant and the reference", errors)
        )
    sentences += _gate_sentences(results)
    sentences.append("Of intervals at 95 %, one in twenty excludes 0 where there is nothing to be found.")
    return sentences


def _verdict(what: str, estimates: Sequence[tuple[str, Estimate | None]]) -> str:
    """How many intervals lie above 0, below it, around it, with their names."""
    known = [(name, estimate) for name, estimate in estimates if estimate]
    above = [f"{name} {signed(e)}" for name, e in known if e.low > 0]
    below = [f"{name} {signed(e)}" for name, e in known if e.high < 0]
    unknown = [name for name, estimate in estimates if not estimate]
    num_around = len(known) - len(above) - len(below)
    parts = [
        f"{len(above)} above 0{_listed(above)}",
        f"{len(below)} below 0{_listed(below)}",
        f"{num_around} with 0 inside",
    ]
    if unknown:
        parts.append(f"{len(unknown)} unknown because a curve does not reach the KL{_listed(unknown)}")
    return f"Of {len(estimates)} {what}: " + "; ".join(parts) + "."


def _gate_sentences(results: Results) -> list[str]:
    decided = [row for row in results.iterations if row.gate]
    accepted = [_name(row) for row in decided if row.gate and row.gate["accepted"]]
    return [f"The gate accepted {len(accepted)} of {len(decided)} iterations{_listed(accepted)}."] if decided else []


def _all(results: Results) -> list[Row]:
    """Every value model once: the reference of the variants is iteration 0."""
    return results.iterations + [row for row in results.variants if row.gain_over]


def _name(row: Row) -> str:
    return f"{row.objective}, {row.label}"


def _listed(names: Sequence[str]) -> str:
    return f" ({'; '.join(names)})" if names else ""


def _gate(row: Row) -> str:
    if row.gate is None:
        return NONE
    verdict = "accepted" if row.gate["accepted"] else "refused"
    if row.gate.get("difference") is None:
        return verdict  # there was nothing to compare with
    return f"{verdict}, {signed(Estimate(row.gate['difference'], row.gate['low'], row.gate['high']))}"


def _at(value: AtKl) -> str:
    if value.estimate is None:
        return "KL not reached"
    note = "" if value.reached == 1 else f" (of the resamples, {value.reached:.0%} reach the KL)"
    return signed(value.estimate) + note


def _spent(spent: Spent) -> str:
    return f"{signed(spent.gain)} at {spent.divergence:.2f}"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}".replace("-", "−")

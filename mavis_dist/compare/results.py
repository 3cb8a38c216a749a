"""The figures of a comparison as plain values, as JSON and as a table."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from mavis_dist.evaluate.sweep import Estimate, Limit
from mavis_dist.tables import text_table

UNKNOWN = "–"


@dataclass(frozen=True)
class AtStrength:
    """A method at one strength with some weights, or the mean over all; means over prompts and seeds."""

    strength: float
    divergence: float | None  # nats per answer; None: unknown
    num_tokens: float  # per answer
    generated: float  # tokens per answer, those of discarded answers included
    gain: dict[str, Estimate]  # by objective, sd above the base model
    weighted: Estimate  # mean of the gains by weight


@dataclass(frozen=True)
class WeightsResult:
    """A method with weights, at the KL of the comparison; None: unknown."""

    method: str
    name: str  # of the weights
    weights: dict[str, float]
    weighted: Estimate | None
    gain: dict[str, Estimate | None]
    spent: float | None  # nats; less than the KL of the comparison if its strongest setting spends less
    share: Estimate | None  # of the limit of steering at the KL that it spends
    strengths: list[AtStrength]


@dataclass(frozen=True)
class Group:
    """A method over its weights of a pair or triple."""

    objectives: list[str]
    method: str
    hypervolume: Estimate | None  # sd^objectives above the base model, at the KL of the comparison
    ratio: Estimate | None  # the reference's over this one's, on common weights; None for it and the base model


@dataclass(frozen=True)
class Text:
    """Means over all weights and seeds of a method, at the strengths nearest to the KL of the comparison."""

    distinct_2: float
    repetition: float
    perplexity: float  # under the base model


@dataclass(frozen=True)
class TrainingCost:
    """What comes before the first answer: for all weights, and the mean for one weight vector, which is the same unless
    something is trained for each.
    """

    seconds: float = 0.0
    seconds_per_weights: float = 0.0
    tokens: float = 0.0  # that models generated to learn from
    tokens_per_weights: float = 0.0
    machines: list[str] = field(default_factory=list)  # where, as far as that is known


@dataclass(frozen=True)
class Cost:
    """What one answer takes at these strengths, and what came before."""

    tokens_per_s: float | None  # of the answer given, in a full batch; None: not timed
    generated: float  # tokens, those of discarded answers included
    reward_calls: float
    training: TrainingCost


@dataclass(frozen=True)
class Judged:
    """A method against the reference in the eyes of a judge, over all weights that both have."""

    preferred: Estimate  # share of its answers that are preferred, a tie counting half
    won: int  # pairs, in both orders
    tied: int
    lost: int
    unreadable: int  # pairs without a verdict, which count as ties


@dataclass(frozen=True)
class MethodResult:
    """A method over all its weights, at the KL of the comparison; None: unknown."""

    method: str
    num_weights: int  # that it has answers for; comparisons are over those that both methods have
    weighted: Estimate | None  # gain, sd, mean over its weights
    behind: Estimate | None  # the reference's less this one's, paired; None for the reference
    hypervolume: Estimate | None  # mean of the pairs
    hypervolume_anywhere: Estimate | None  # the same of all strengths together, whatever their KL
    hypervolume_ratio: Estimate | None  # the reference's over this one's; None for the reference and the base model
    share: Estimate | None  # of the limit, mean over its weights
    share_behind: Estimate | None  # the reference's less this one's, paired; None for the reference
    spearman: float | None  # of weights and gains, mean over pairs and objectives
    text: Text
    cost: Cost
    strengths: list[AtStrength]  # means over its weights
    judged: Judged | None = None  # None: the reference, or there is no judge


@dataclass(frozen=True)
class Comparison:
    """All figures."""

    conditions: dict[str, str]
    reference: str
    kl: float  # nats at which methods are compared
    timed_on: str  # the machine whose speeds are shown; "": unknown
    num_prompts: int
    num_weights: int
    objectives: list[str]
    limit: Limit  # of steering, mean over all weights
    settings: list[WeightsResult]
    groups: list[Group]
    methods: list[MethodResult]
    winners: dict[str, str | None]  # figure -> the method that is significantly ahead of every other

    def to_json(self) -> dict[str, Any]:
        """All figures, and first the main ones by method; unknown values and bounds are None."""
        others = [row for row in self.methods if row.method != self.reference]
        main = {
            "hypervolume_ratio": {row.method: row.hypervolume_ratio for row in others},
            "share_of_limit": {row.method: row.share for row in self.methods},
            "cost": {row.method: asdict(row.cost) for row in self.methods},
            "share_behind": {row.method: row.share_behind for row in others},
            "judged": {row.method: asdict(row.judged) for row in others if row.judged is not None},
        }
        found: dict[str, Any] = _finite({**main, **asdict(self)})
        return found


def _finite(value: Any) -> Any:
    """Plain values without infinities, which JSON does not have."""
    if isinstance(value, Estimate):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def where_measured(comparison: Comparison) -> list[str]:
    """Sentences about the machines of speeds and training, as far as they are known."""
    sentences = [f"Speeds are those of {comparison.timed_on}."] if comparison.timed_on else []
    methods_of: dict[str, list[str]] = {}
    for row in comparison.methods:
        if row.cost.training.machines not in ([], [comparison.timed_on]):
            methods_of.setdefault(" and ".join(row.cost.training.machines), []).append(row.method)
    return sentences + [
        f"What {', '.join(methods)} steer{'s' if len(methods) == 1 else ''} with was trained on {machines}."
        for machines, methods in methods_of.items()
    ]


def table(comparison: Comparison) -> str:
    """One line per method; a * marks a figure that is significantly ahead of every other."""
    head = ["method", "weighted gain, sd", "behind", "hypervolume", "ratio", "share of limit", "Spearman"]
    head += ["generated", "rewards", "tokens/s", "training, s", "for one, s"]
    rows = [
        [
            row.method,
            _figure(row.weighted, comparison.winners["weighted"] == row.method),
            _figure(row.behind),
            _figure(row.hypervolume, comparison.winners["hypervolume"] == row.method),
            _figure(row.hypervolume_ratio),
            _figure(row.share, comparison.winners["share"] == row.method),
            UNKNOWN if row.spearman is None else f"{row.spearman:.2f}",
            f"{row.cost.generated:.0f}",
            f"{row.cost.reward_calls:.0f}",
            UNKNOWN if row.cost.tokens_per_s is None else f"{row.cost.tokens_per_s:.0f}",
            f"{row.cost.training.seconds:.0f}",
            f"{row.cost.training.seconds_per_weights:.0f}",
        ]
        for row in comparison.methods
    ]
    note = (
        f"at {comparison.kl:g} nats, {comparison.num_prompts} unseen prompts, 95 % intervals; behind and ratio: "
        f"{comparison.reference} against the method; *: significantly ahead of every other"
    )
    lines = [text_table(head, rows, [18, *[23] * 5, *[11] * 4, 13, 12]), note, *where_measured(comparison)]
    fewer = [row for row in comparison.methods if row.num_weights < comparison.num_weights]
    if fewer:
        counts = ", ".join(f"{row.method} {row.num_weights}" for row in fewer)
        lines.append(
            f"of {comparison.num_weights} weights, these methods have fewer: {counts}; behind, ratio and * compare "
            "common weights only"
        )
    return "\n".join(lines)


def _figure(estimate: Estimate | None, is_winner: bool = False) -> str:
    if estimate is None:
        return UNKNOWN
    interval = f" [{estimate.low:.2f}, {estimate.high:.2f}]" if math.isfinite(estimate.low) else ""
    return f"{estimate.mean:.2f}{interval}{'*' if is_winner else ''}"

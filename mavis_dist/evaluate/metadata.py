"""Value models and stages as the report shows them. Plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mavis_dist.evaluate.sweep import Estimate


@dataclass(frozen=True)
class ModelMetadata:
    """One trained value model."""

    objective: str
    iteration: int
    r2: float | None  # of the rewards of held-out trees, 1 is perfect; None without any
    losses: list[float]  # training loss per optimiser step, sd^2
    reward: str  # the kind of reward
    gate: str = ""  # whether it replaced the current iteration, and why
    r2_ceiling: float | None = None  # R² of the true values on the same trees
    slopes: Mapping[int, Estimate] = field(default_factory=dict)  # of the sibling test, by tokens of each child
    correlations: Mapping[int, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class StageMetadata:
    """One stage of the run."""

    name: str
    seconds: float | None  # None when it was not timed
    detail: str

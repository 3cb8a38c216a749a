"""Value models and stages as the report shows them. Plain values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelMetadata:
    """One trained value model."""

    objective: str
    iteration: int
    r2: float | None  # of the rewards of held-out trees, 1 is perfect; None without any
    losses: list[float]  # training loss per optimiser step, sd^2
    reward: str  # the kind of reward
    gate: str = ""  # whether it replaced the current iteration, and why


@dataclass(frozen=True)
class StageMetadata:
    """One stage of the run."""

    name: str
    seconds: float | None  # None when it was not timed
    detail: str

"""The answers of a comparison as arrays: every method with its weights, at all strengths and at one divergence.

Shapes: P prompts, N answers of the base model to each, S strengths, D seeds, R resamples.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from mavis_dist.compare import statistics
from mavis_dist.compare.cells import Answers, Cell, Weights
from mavis_dist.compare.equal_kl import Curve, resamples
from mavis_dist.types import RewardScale

RESAMPLES = 2000


@dataclass(frozen=True, eq=False)
class Measured:
    """All answers of a comparison."""

    cells: Mapping[Cell, Answers]
    base_PN: Mapping[str, np.ndarray]  # by objective: rewards of many answers of the base model, sd above their mean
    scales: Mapping[str, RewardScale]
    kl: float  # nats at which methods are compared
    _limits: dict[Weights, np.ndarray] = field(default_factory=dict, init=False)  # [R], at this KL

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(cell.method for cell in self.cells))

    @cached_property
    def machine(self) -> str:
        """The one that has decoded for most methods, whose speeds can thus be compared; "" if that is unknown."""
        methods_of: dict[str, set[str]] = {}
        for cell, answers in self.cells.items():
            methods_of.setdefault(answers.machine, set()).add(cell.method)
        return max(methods_of, key=lambda machine: len(methods_of[machine]))

    @property
    def vectors(self) -> list[Weights]:
        return list(dict.fromkeys(cell.weights for cell in self.cells if cell.weights))

    @cached_property
    def covered(self) -> dict[str, frozenset[Weights]]:
        """By method: the weights that it has answers for, all of them if it is not steered."""
        found: dict[str, set[Weights]] = {}
        for cell in self.cells:
            found.setdefault(cell.method, set()).update([cell.weights] if cell.weights else self.vectors)
        return {method: frozenset(weights) for method, weights in found.items()}

    def common(self, *methods: str) -> tuple[Weights, ...]:
        """The weights that all these methods have answers for."""
        return tuple(weights for weights in self.vectors if all(weights in self.covered[m] for m in methods))

    @cached_property
    def weights_RP(self) -> np.ndarray:
        return resamples(len(next(iter(self.base_PN.values()))))[: 1 + RESAMPLES]

    @cached_property
    def settings(self) -> dict[tuple[str, Weights], Setting]:
        """Every method with all its weights."""
        return {
            (method, weights): _setting(self, method, weights)
            for method in self.methods
            for weights in self.common(method)
        }

    def front(self, group: Collection[str], *methods: str) -> tuple[Weights, ...]:
        """The weights of these objectives alone that all of these methods have; none where they lack all that mix
        the whole group: without them there is no front.
        """
        found = inside(self.common(*methods), group)
        mixed = {weights for weights in inside(self.vectors, group) if len(weights) == len(group)}
        return found if not mixed or mixed.intersection(found) else ()

    def mixture(self, weights: Weights) -> np.ndarray:
        """The weighted mean [P, N] of the rewards of the base model's answers."""
        return np.sum([share * self.base_PN[name] for name, share in weights], axis=0)

    def limit(self, weights: Weights, spent_R: np.ndarray) -> np.ndarray:
        """The limit [R] at a KL, in most cases the same for all methods."""
        if not (spent_R == self.kl).all():
            return statistics.limits(spent_R, self.mixture(weights), self.weights_RP)
        if weights not in self._limits:
            self._limits[weights] = statistics.limits(spent_R, self.mixture(weights), self.weights_RP)
        return self._limits[weights]

    def by_strength(self, method: str, weights: Weights) -> dict[float, list[Answers]]:
        """The answers of a method by strength, then by seed; without steering they are the same for all weights."""
        found: dict[float, list[Answers]] = {}
        for cell, answers in self.cells.items():
            if cell.method == method and cell.weights in (weights, ()):
                found.setdefault(cell.strength, []).append(answers)
        return found

    def curves(self, method: str, weights: Weights) -> dict[str, Curve]:
        """By objective: KL and gain at every strength, means over the seeds."""
        rows = self.by_strength(method, weights).values()
        kl_SP = np.array([np.mean([answers.divergence for answers in row], axis=0) for row in rows])
        curves = {}
        for name, scale in self.scales.items():
            raw_SP = np.array([np.mean([answers.reward[name] for answers in row], axis=0) for row in rows])
            curves[name] = Curve(kl_SP, (raw_SP - scale.mean) / scale.sd - self.base_PN[name].mean(axis=1))
        return curves


@dataclass(frozen=True, eq=False)
class Setting:
    """A method with weights, at the KL of the comparison; arrays are [R]."""

    curves: dict[str, Curve]  # by objective
    weighted: Curve  # mean of the objectives
    gain_R: dict[str, np.ndarray]
    weighted_R: np.ndarray
    share_R: np.ndarray
    spent_R: np.ndarray  # nats


def _setting(measured: Measured, method: str, weights: Weights) -> Setting:
    curves, weights_RP = measured.curves(method, weights), measured.weights_RP
    kl_SP = next(iter(curves.values())).kl_SP
    weighted = Curve(kl_SP, np.sum([share * curves[name].gain_SP for name, share in weights], axis=0))
    spent_R = statistics.spent_within(kl_SP, measured.kl, weights_RP)
    weighted_R = statistics.gains_within(weighted, measured.kl, weights_RP)
    return Setting(
        curves,
        weighted,
        {name: statistics.gains_within(curve, measured.kl, weights_RP) for name, curve in curves.items()},
        weighted_R,
        weighted_R / measured.limit(weights, spent_R),
        spent_R,
    )


def nearest_answers(measured: Measured, method: str, weights: Weights) -> list[Answers]:
    """By seed, those of the strength whose KL is nearest to that of the comparison; of the weakest if none is known."""
    by_strength = list(measured.by_strength(method, weights).values())
    distance_S = np.abs(measured.settings[method, weights].weighted.kl_SP.mean(axis=1) - measured.kl)
    return by_strength[int(np.argmin(np.where(np.isnan(distance_S), np.inf, distance_S)))]


def inside(vectors: Sequence[Weights], group: Collection[str]) -> tuple[Weights, ...]:
    """The weights of these objectives alone."""
    return tuple(weights for weights in vectors if {name for name, _ in weights} <= set(group))

"""Computes the figures of the study from answers and their rewards. Plain values; no models.

Shapes: P prompts, N answers of the base model to each, S strengths, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from benchmarks.common.answers import Answers
from benchmarks.common.result_cache import EvaluatedModel
from benchmarks.study.answers_by_beta import Setting
from benchmarks.study.decode_speed import DecodeSpeed
from benchmarks.study.text_quality import Spread, TextRatios
from mavis_dist.compare.equal_kl import AtKl, Curve, gains_at, resamples, summarise
from mavis_dist.core import limit
from mavis_dist.evaluate.sweep import Estimate, Limit, bootstrap
from mavis_dist.types import RewardScale


@dataclass(frozen=True)
class Steered:
    """Value models with weights that sum to 1."""

    name: str  # of the weights
    label: str  # of the value models, in tables
    models: tuple[tuple[EvaluatedModel, float], ...]

    def setting(self, beta: float) -> Setting:
        return Setting(tuple((model.name, weight) for model, weight in self.models), beta)

    @property
    def weights(self) -> dict[str, float]:
        """By objective."""
        return {model.objective: weight for model, weight in self.models}


@dataclass(frozen=True, eq=False)
class Measured:
    """Answers to the unseen prompts, with all that is needed to compare them."""

    answers: Mapping[Setting, Answers]
    base_PN: Mapping[str, np.ndarray]  # by objective: rewards of many answers of the base model, sd above the mean
    scales: Mapping[str, RewardScale]  # those of the reference: one unit for all value models
    betas: Sequence[float]  # ascending
    kl: float  # nats at which gains are compared

    def curves(self, steered: Steered) -> dict[str, Curve]:
        """By objective: KL and gain over the mean of the base model's answers to the same prompt."""
        answers = [self.answers[steered.setting(beta)] for beta in self.betas]
        kl_SP = np.array([found.divergence for found in answers])
        return {
            name: Curve(
                kl_SP,
                (np.array([found.reward[name] for found in answers]) - scale.mean) / scale.sd
                - self.base_PN[name].mean(axis=1),
            )
            for name, scale in self.scales.items()
        }

    def weighted_curve(self, steered: Steered) -> Curve:
        """The same for the weighted mean of the objectives."""
        curves = self.curves(steered)
        kl_SP = next(iter(curves.values())).kl_SP
        return Curve(kl_SP, np.sum([w * curves[name].gain_SP for name, w in steered.weights.items()], axis=0))

    def limit(self, steered: Steered) -> np.ndarray:
        """The limit [R] of the weighted mean of the objectives at the KL, sd; nan where it is not known."""
        rewards_PN = np.sum([w * self.base_PN[name] for name, w in steered.weights.items()], axis=0)
        weights_RP = resamples(len(rewards_PN))
        if not limit.MIN_DIVERGENCE <= self.kl <= limit.largest_divergence(rewards_PN.shape[1]):
            return np.full(len(weights_RP), np.nan)
        limit_R = limit.limits_at(rewards_PN, np.full(len(weights_RP), self.kl), weights_RP)
        return np.where(limit_R > 0, limit_R, np.nan)

    def at_kl(self, curve: Curve) -> np.ndarray:
        """The gain [R] at the KL."""
        return gains_at(curve, self.kl, resamples(curve.kl_SP.shape[1]))


@dataclass(frozen=True)
class StrengthResult:
    """KL, length and gains at one strength, means over the prompts."""

    beta: float
    divergence: float  # nats per answer
    num_tokens: float  # per answer
    gain: dict[str, Estimate]  # by objective, sd
    weighted_gain: Estimate


@dataclass(frozen=True)
class Validation:
    """R² and its ceiling on the held-out trees, and the sibling test on the unseen prompts; of an objective alone."""

    r2: float | None = None
    ceiling: float | None = None
    slopes: dict[int, Estimate] = field(default_factory=dict)  # of the sibling test, by tokens of each child
    correlations: dict[int, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """Value models under one setting of the weights, at the KL of the comparison unless it says otherwise."""

    name: str  # of the weights: an objective or a mixture
    label: str  # of the value models
    share: AtKl  # of the limit; no estimate: the KL is not reached, or the limit is not known there
    limit: float | None  # sd
    gain: dict[str, AtKl]  # by objective, sd
    weighted_gain: AtKl
    gain_over: dict[str, AtKl]  # label of another row with the same weights -> difference in weighted gain
    strengths: list[StrengthResult]
    validation: Validation | None = None
    gate: dict[str, Any] | None = None  # the run's own decision to publish


@dataclass(frozen=True)
class Cost:
    """What value models cost in training and in decoding."""

    fit_s: float | None  # seconds in which those of all objectives were trained; None: not recorded
    speed: DecodeSpeed


@dataclass(frozen=True)
class Results:
    """All figures of the page."""

    conditions: dict[str, str]
    kl: float  # nats at which gains are compared
    num_prompts: int
    limits: dict[str, Limit]  # by objective
    points: list[Row]  # the reference under all weights, every objective alone first
    variants: list[Row]  # of iteration 0, every objective alone
    iterations: list[Row]  # empty with one iteration
    costs: dict[str, Cost]  # by label of the value models of all objectives
    text: dict[str, TextRatios]  # by name of the point, at the strength whose KL is nearest
    text_base: dict[str, Spread]  # by figure

    def to_json(self) -> dict[str, Any]:
        """The main figures by name first, then everything that the page shows."""
        return {**headline(self), **asdict(self)}


def row_of(
    measured: Measured,
    steered: Steered,
    others: Sequence[Steered] = (),
    validation: Validation | None = None,
    gate: dict[str, Any] | None = None,
) -> Row:
    """The figures of one row; `others` have the same weights, and the gain is compared with theirs."""
    curves, weighted = measured.curves(steered), measured.weighted_curve(steered)
    gain_R, limit_R = measured.at_kl(weighted), measured.limit(steered)
    return Row(
        name=steered.name,
        label=steered.label,
        share=summarise(gain_R / limit_R),
        limit=None if math.isnan(limit_R[0]) else float(limit_R[0]),
        gain={name: summarise(measured.at_kl(curve)) for name, curve in curves.items()},
        weighted_gain=summarise(gain_R),
        gain_over={other.label: summarise(gain_R - measured.at_kl(measured.weighted_curve(other))) for other in others},
        strengths=[
            StrengthResult(
                beta=beta,
                divergence=float(weighted.kl_SP[s].mean()),
                num_tokens=float(np.mean(measured.answers[steered.setting(beta)].num_tokens)),
                gain={name: bootstrap(curve.gain_SP[s]) for name, curve in curves.items()},
                weighted_gain=bootstrap(weighted.gain_SP[s]),
            )
            for s, beta in enumerate(measured.betas)
        ],
        validation=validation,
        gate=gate,
    )


def nearest(row: Row, kl: float) -> StrengthResult:
    """The strength whose KL is nearest to `kl`."""
    return min(row.strengths, key=lambda strength: abs(strength.divergence - kl))


def headline(results: Results) -> dict[str, Any]:
    """The main figures of the reference by name of the weights, or by objective; unknown values and bounds are None."""
    alone = {row.name: row.validation for row in results.points if row.validation}
    common = {"kl": results.kl, "num_prompts": results.num_prompts}
    return {
        "share_of_limit": {row.name: {**_bounds(row.share.estimate), **common} for row in results.points},
        "gain": {row.name: {name: _bounds(gain.estimate) for name, gain in row.gain.items()} for row in results.points},
        "sibling_slope": {name: _by_tokens(found.slopes) for name, found in alone.items()},
        "sibling_corr": {name: _by_tokens(found.correlations) for name, found in alone.items()},
        "r2": {name: found.r2 for name, found in alone.items()},
        "r2_ceiling": {name: found.ceiling for name, found in alone.items()},
    }


def _by_tokens(estimates: Mapping[int, Estimate]) -> dict[str, Any]:
    return {str(num_tokens): _bounds(estimate) for num_tokens, estimate in estimates.items()}


def _bounds(estimate: Estimate | None) -> dict[str, float | None]:
    if estimate is None:
        return {"value": None, "low": None, "high": None}
    bounds = {"value": estimate.mean, "low": estimate.low, "high": estimate.high}
    return {name: bound if math.isfinite(bound) else None for name, bound in bounds.items()}

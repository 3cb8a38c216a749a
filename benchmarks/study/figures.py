"""Computes the figures of the study from answers and errors. Plain values; no models.

Shapes: P prompts, S strengths, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from benchmarks.common.answers import Answers
from benchmarks.common.result_cache import EvaluatedModel
from benchmarks.study.answers_by_beta import BASE, Setting
from benchmarks.study.equal_kl import AtKl, Curve, gains_at, resamples, summarise
from benchmarks.study.value_error import HeldOut
from mavis_dist.evaluate.sweep import Estimate, bootstrap

Errors = tuple[float | None, float | None]  # validation error and R²; None without held-out trees


@dataclass(frozen=True)
class StrengthResult:
    """KL, length and gain at one strength, means over the prompts."""

    beta: float
    divergence: float  # nats per answer
    num_tokens: float  # per answer
    gain: Estimate  # sd


@dataclass(frozen=True)
class Row:
    """One value model."""

    objective: str
    label: str
    validation_error: float | None  # sd^2; None without held-out trees
    r2: float | None
    gain: AtKl  # at the KL that all rows of the objective share
    gain_over: dict[str, AtKl]  # label of another row -> difference in gain
    strengths: list[StrengthResult]
    error_over: Estimate | None = None  # difference in validation error from the reference, on the same trees
    gate: dict[str, Any] | None = None  # the run's own decision to publish


@dataclass(frozen=True)
class Results:
    """All figures of the page."""

    conditions: dict[str, str]
    kl: dict[str, float]  # objective -> nats at which gains are compared
    middle_beta: float
    iterations: list[Row]
    variants: list[Row] = field(default_factory=list)  # with the reference, for every objective

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Scored:
    """One value model at every strength, scored by its own objective."""

    curve: Curve
    strengths: list[StrengthResult]


def score(answers: Mapping[Setting, Answers], model: EvaluatedModel, betas: Sequence[float]) -> Scored:
    """A value model's gains over the base model's answers to the same prompts, in sd of its objective."""
    settings = [Setting(model.name, beta) for beta in betas]
    base_P = np.array(answers[BASE].reward[model.objective])
    reward_SP = np.array([answers[setting].reward[model.objective] for setting in settings])
    gain_SP = (reward_SP - base_P) / model.scale.sd
    kl_SP = np.array([answers[setting].divergence for setting in settings])
    strengths = [
        StrengthResult(setting.beta, float(kl_P.mean()), float(np.mean(answers[setting].num_tokens)), bootstrap(gain_P))
        for setting, kl_P, gain_P in zip(settings, kl_SP, gain_SP, strict=True)
    ]
    return Scored(Curve(kl_SP, gain_SP), strengths)


def middle(betas: Sequence[float]) -> int:
    """Index of the middle strength; the upper one of two."""
    return len(betas) // 2


def compare(
    models: Sequence[EvaluatedModel],
    scored: Mapping[str, Scored],
    kl: float,
    others: Mapping[str, Sequence[str]],
    errors: Sequence[Errors],
) -> list[Row]:
    """One row per value model of an objective.

    Args:
        scored: by name of the value model.
        kl: nats at which the gains are compared.
        others: label -> labels of the rows that its gain is compared with.
        errors: validation error and R² of each value model.
    """
    weights_RP = resamples(scored[models[0].name].curve.kl_SP.shape[1])
    gains = {model.label: gains_at(scored[model.name].curve, kl, weights_RP) for model in models}
    return [
        Row(
            objective=model.objective,
            label=model.label,
            validation_error=error,
            r2=r2,
            gain=summarise(gains[model.label]),
            gain_over={other: summarise(gains[model.label] - gains[other]) for other in others.get(model.label, ())},
            strengths=scored[model.name].strengths,
        )
        for model, (error, r2) in zip(models, errors, strict=True)
    ]


def error_difference(ours: HeldOut | None, reference: HeldOut | None) -> Estimate | None:
    """Validation error above that of the reference on the same trees, paired by tree; sd^2."""
    if ours is None or reference is None:
        return None
    weights_RT = resamples(len(ours.error_T))
    return summarise(ours.errors(weights_RT) - reference.errors(weights_RT)).estimate

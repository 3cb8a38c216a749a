"""The sweep: answers to unseen prompts over a grid of weights, with their rewards and divergence. No Ray.

Every point of the grid answers every prompt with the same seed, so that points differ only in steering.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any, TypedDict

import moocore
import numpy as np
from scipy import stats

from mavis_dist.core import limit
from mavis_dist.decode import Choice, Request, SamplingParams, Scorer
from mavis_dist.decode.validate import normalise_weights
from mavis_dist.tables import text_table
from mavis_dist.types import Prompt, RewardScale

BOOTSTRAPS = 2000
LIMIT_POINTS = 60  # of the curve of a limit
UNKNOWN = "–"


@dataclass(frozen=True)
class Point:
    """One setting of the weights; without any it is the base model."""

    name: str
    weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class PointResult:
    """Results of one point, in standard deviations of the rewards; gains are paired with the base model by prompt."""

    name: str
    weights: dict[str, float]
    reward: dict[str, Estimate]
    gain: dict[str, Estimate]
    divergence: float  # nats per answer, KL(pi || pi_ref)
    num_tokens: float  # per answer
    share: Estimate | None = None  # of the limit of steering at its divergence; None: unknown


class Example(TypedDict):
    """One prompt with an answer of every point."""

    prompt: str
    answers: dict[str, str]


@dataclass(frozen=True)
class Limit:
    """What any method could gain in one objective by each divergence, up to where it is known."""

    divergence: list[float]  # nats per answer
    gain: list[float]  # in standard deviations of the reward


@dataclass(frozen=True)
class Sweep:
    """All points with the hypervolume of their mean rewards (reference: the worst of each objective)."""

    points: list[PointResult]
    hypervolume: float
    num_prompts: int
    beta: float
    examples: list[Example]
    limits: dict[str, Limit] = field(default_factory=dict)  # by objective
    limit_answers: int = 0  # base answers per prompt that told the limits; 0: none were measured

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def grid(objectives: Sequence[str], steps: int) -> list[Point]:
    """The base model, every objective alone, and `steps - 2` inner points between every pair of objectives."""
    points = [Point("base"), *(Point(name, {name: 1.0}) for name in objectives)]
    for first, second in combinations(objectives, 2):
        for step in range(1, steps - 1):
            weight = 1.0 - step / (steps - 1)
            name = f"{weight:.2g} {first} + {1 - weight:.2g} {second}"
            points.append(Point(name, {first: weight, second: 1.0 - weight}))
    return points


def request_id(point: Point, prompt: Prompt) -> str:
    return f"{point.name}/{prompt.id}"


def requests(
    point: Point,
    prompts: Sequence[Prompt],
    beta: float,
    tilt_cap: float | None,
    params: SamplingParams,
    scorer: Scorer = Scorer.LAZY,
    first_seed: int = 0,
) -> list[tuple[Prompt, Request]]:
    """The requests of one point, a seed per prompt; the worker fills in the prompts' tokens."""
    return [
        (
            prompt,
            Request(
                id=request_id(point, prompt),
                prompt=(),
                weights=point.weights,
                beta=beta,
                tilt_cap=tilt_cap,
                scorer=scorer,
                params=replace(params, seed=seed),
            ),
        )
        for seed, prompt in enumerate(prompts, first_seed)
    ]


def summarise(
    points: Sequence[Point],
    answers: Mapping[str, Sequence[Sequence[tuple[Choice, str]]]],
    scores: Mapping[str, Mapping[str, Sequence[float]]],
    scales: Mapping[str, RewardScale],
    prompts: Sequence[Prompt],
    beta: float,
    base_scores: Mapping[str, Sequence[Sequence[float]]] | None = None,
) -> Sweep:
    """The results of all points.

    Args:
        answers: point name -> prompt -> answers with their texts.
        scores: point name -> objective -> raw reward of every answer, prompt by prompt.
        base_scores: objective -> prompt -> raw rewards of equally many further answers of the base model, which tell
            the limit of steering; empty or None: it is not measured.
    """
    mean_by_prompt = {
        point.name: {
            name: np.array([scale.standardise(s) for s in scores[point.name][name]]).reshape(len(prompts), -1).mean(1)
            for name, scale in scales.items()
        }
        for point in points
    }
    base = mean_by_prompt[points[0].name]
    base_rewards_PN = {
        name: (np.array(rows) - scales[name].mean) / scales[name].sd for name, rows in (base_scores or {}).items()
    }
    results = []
    for point in points:
        rewards = mean_by_prompt[point.name]
        gain_P = {name: values - base[name] for name, values in rewards.items()}
        divergence_P = np.array([np.mean([choice.divergence for choice, _ in row]) for row in answers[point.name]])
        num_tokens = [len(choice.tokens) for row in answers[point.name] for choice, _ in row]
        results.append(
            PointResult(
                name=point.name,
                weights=dict(point.weights),
                reward={name: bootstrap(values) for name, values in rewards.items()},
                gain={name: bootstrap(values) for name, values in gain_P.items()},
                divergence=float(divergence_P.mean()),
                num_tokens=float(np.mean(num_tokens)),
                share=_share(point, gain_P, divergence_P, base_rewards_PN),
            )
        )
    examples: list[Example] = [
        {"prompt": prompt.text, "answers": {point.name: answers[point.name][index][0][1] for point in points}}
        for index, prompt in enumerate(prompts)
    ]
    limits = {name: limit_curve(rewards_PN) for name, rewards_PN in base_rewards_PN.items()}
    num_base_answers = max((rewards_PN.shape[1] for rewards_PN in base_rewards_PN.values()), default=0)
    return Sweep(results, _hypervolume(results), len(prompts), beta, examples, limits, num_base_answers)


def _share(
    point: Point, gain_P: Mapping[str, np.ndarray], divergence_P: np.ndarray, base_rewards_PN: Mapping[str, np.ndarray]
) -> Estimate | None:
    """The part of the limit that a point reaches; a mixture is judged by the mixture of the rewards."""
    weights = normalise_weights(point.weights, gain_P)  # those of the tilt
    if not weights or not base_rewards_PN:
        return None
    gain_of_mixture_P = np.sum([weight * gain_P[name] for name, weight in weights.items()], axis=0)
    rewards_PN = np.sum([weight * base_rewards_PN[name] for name, weight in weights.items()], axis=0)
    share = limit.share(gain_of_mixture_P, divergence_P, rewards_PN)
    return Estimate(*share) if share else None


def limit_curve(rewards_PN: np.ndarray) -> Limit:
    """The limit as a curve, with more points where it is steep."""
    largest = limit.largest_divergence(rewards_PN.shape[1])
    divergence = [float(root**2) for root in np.linspace(0.0, math.sqrt(largest), LIMIT_POINTS)]
    divergence[-1] = largest  # despite rounding
    return Limit(divergence, [limit.gain_at(rewards_PN, nats) for nats in divergence])


def sweep_from_json(raw: Mapping[str, Any]) -> Sweep:
    """The inverse of `Sweep.to_json`."""

    def estimates(by_name: Mapping[str, Any]) -> dict[str, Estimate]:
        return {name: Estimate(**value) for name, value in by_name.items()}

    def point_result(point: Mapping[str, Any]) -> PointResult:
        share = Estimate(**point["share"]) if point.get("share") else None
        found = {"reward": estimates(point["reward"]), "gain": estimates(point["gain"]), "share": share}
        return PointResult(**{**point, **found})

    points = [point_result(point) for point in raw["points"]]
    limits = {name: Limit(**curve) for name, curve in raw.get("limits", {}).items()}
    return Sweep(**{**raw, "points": points, "limits": limits})


def bootstrap(values: np.ndarray) -> Estimate:
    """Mean and 95 % percentile interval over resampled prompts; a fixed seed makes it repeatable."""
    if len(values) < 2:
        return Estimate(float(values.mean()), float("-inf"), float("inf"))
    interval = stats.bootstrap(
        (values,), np.mean, n_resamples=BOOTSTRAPS, confidence_level=0.95, method="percentile", rng=0
    ).confidence_interval
    return Estimate(float(values.mean()), float(interval.low), float(interval.high))


def _hypervolume(results: Sequence[PointResult]) -> float:
    """Volume between the mean rewards of all points and the worst of each objective."""
    means = np.array([[estimate.mean for estimate in result.reward.values()] for result in results])
    if means.shape[1] < 2:
        return float(np.ptp(means))
    return float(moocore.hypervolume(means, ref=means.min(axis=0), maximise=True))


def table(sweep: Sweep) -> str:
    """The sweep as text, one line per point."""
    names = list(sweep.points[0].gain)
    # Gains have wider heads than cells: docs quote the table as it is printed.
    head = ["weights", *(f"{name + ' gain, sd':>30}" for name in names), "KL, nats", "tokens"]
    rows = [
        [point.name, *map(_interval, point.gain.values()), f"{point.divergence:.2f}", f"{point.num_tokens:.1f}"]
        for point in sweep.points
    ]
    widths = [28, *[24] * len(names), 10, 8]
    if sweep.limit_answers:
        head, widths = [*head, "share of limit"], [*widths, 22]
        rows = [[*row, share_text(point.share)] for row, point in zip(rows, sweep.points, strict=True)]
    hypervolume = f"hypervolume {sweep.hypervolume:.3f} sd^{len(names)}, {sweep.num_prompts} unseen prompts"
    return "\n".join([text_table(head, rows, widths), hypervolume, *unknown_shares(sweep)])


def share_text(share: Estimate | None) -> str:
    """A share of the limit with its interval, as far as they are known."""
    if share is None:
        return UNKNOWN
    interval = f" [{share.low:.2f}, {share.high:.2f}]" if math.isfinite(share.low) else ""
    return f"{share.mean:.2f}{interval}"


def unknown_shares(sweep: Sweep) -> list[str]:
    """Why shares of the limit, or their intervals, are missing."""
    if not sweep.limit_answers:
        return []
    reasons = []
    if any(point.share is None for point in sweep.points if point.weights):
        largest = limit.largest_divergence(sweep.limit_answers)
        reasons.append(
            f"share of limit: known from {limit.MIN_DIVERGENCE} to {largest:.2f} nats "
            f"with evaluate.limit_answers={sweep.limit_answers}"
        )
    if sweep.num_prompts < limit.MIN_PROMPTS:
        reasons.append(
            f"share of limit: no intervals with prompts.evaluation={sweep.num_prompts}; "
            f"at least {limit.MIN_PROMPTS} are needed"
        )
    return reasons


def _interval(estimate: Estimate) -> str:
    return f"{estimate.mean:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]"

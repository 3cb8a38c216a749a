"""The sweep: answers to unseen prompts over a grid of weights, with their rewards and divergence. No Ray.

Every point of the grid answers every prompt with the same seed, so that points differ only in steering.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any, TypedDict

import moocore
import numpy as np
from scipy import stats

from mavis_dist.decode import Choice, Request, SamplingParams, Scorer
from mavis_dist.tables import text_table
from mavis_dist.types import Prompt, RewardScale

BOOTSTRAPS = 2000


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


class Example(TypedDict):
    """One prompt with an answer of every point."""

    prompt: str
    answers: dict[str, str]


@dataclass(frozen=True)
class Sweep:
    """All points with the hypervolume of their mean rewards (reference: the worst of each objective)."""

    points: list[PointResult]
    hypervolume: float
    num_prompts: int
    beta: float
    examples: list[Example]

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
) -> list[tuple[Prompt, Request]]:
    """The requests of one point; the worker fills in the prompts' tokens."""
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
                params=replace(params, seed=index),
            ),
        )
        for index, prompt in enumerate(prompts)
    ]


def summarise(
    points: Sequence[Point],
    answers: Mapping[str, Sequence[Sequence[tuple[Choice, str]]]],
    scores: Mapping[str, Mapping[str, Sequence[float]]],
    scales: Mapping[str, RewardScale],
    prompts: Sequence[Prompt],
    beta: float,
) -> Sweep:
    """The results of all points.

    Args:
        answers: point name -> prompt -> answers with their texts.
        scores: point name -> objective -> raw reward of every answer, prompt by prompt.
    """
    mean_by_prompt = {
        point.name: {
            name: np.array([scale.standardise(s) for s in scores[point.name][name]]).reshape(len(prompts), -1).mean(1)
            for name, scale in scales.items()
        }
        for point in points
    }
    base = mean_by_prompt[points[0].name]
    results = []
    for point in points:
        choices = [choice for row in answers[point.name] for choice, _ in row]
        rewards = mean_by_prompt[point.name]
        results.append(
            PointResult(
                name=point.name,
                weights=dict(point.weights),
                reward={name: bootstrap(values) for name, values in rewards.items()},
                gain={name: bootstrap(values - base[name]) for name, values in rewards.items()},
                divergence=float(np.mean([choice.divergence for choice in choices])),
                num_tokens=float(np.mean([len(choice.tokens) for choice in choices])),
            )
        )
    examples: list[Example] = [
        {"prompt": prompt.text, "answers": {point.name: answers[point.name][index][0][1] for point in points}}
        for index, prompt in enumerate(prompts)
    ]
    return Sweep(results, _hypervolume(results), len(prompts), beta, examples)


def sweep_from_json(raw: Mapping[str, Any]) -> Sweep:
    """The inverse of `Sweep.to_json`."""

    def estimates(by_name: Mapping[str, Any]) -> dict[str, Estimate]:
        return {name: Estimate(**value) for name, value in by_name.items()}

    points = [
        PointResult(**{**point, "reward": estimates(point["reward"]), "gain": estimates(point["gain"])})
        for point in raw["points"]
    ]
    return Sweep(**{**raw, "points": points})


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
    hypervolume = f"hypervolume {sweep.hypervolume:.3f} sd^{len(names)}, {sweep.num_prompts} unseen prompts"
    return f"{text_table(head, rows, [28, *[24] * len(names), 10, 8])}\n{hypervolume}"


def _interval(estimate: Estimate) -> str:
    return f"{estimate.mean:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]"

"""The sweep: answers to unseen prompts over a grid of weights, and what they cost. No Ray.

Every point of the grid answers every prompt from the same seed, so that points differ by their steering alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import moocore
import numpy as np

from mavis_dist.decode import Choice, Request, SamplingParams
from mavis_dist.types import Prompt, RewardScale

BOOTSTRAPS = 2000


@dataclass(frozen=True)
class Point:
    """One setting of the weights; no weights at all is the base model."""

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
    """What one setting did, in standard deviations of the rewards; gains are paired with the base by prompt."""

    name: str
    weights: dict[str, float]
    reward: dict[str, Estimate]
    gain: dict[str, Estimate]
    divergence: float  # nats per answer, KL(pi || pi_ref)
    num_tokens: float  # per answer


@dataclass(frozen=True)
class Sweep:
    """All points with the hypervolume of their mean rewards (reference: the worst of each objective)."""

    points: list[PointResult]
    hypervolume: float
    num_prompts: int
    beta: float
    examples: list[dict[str, Any]]  # {"prompt", "answers": {point: text}}

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


def requests(
    point: Point, prompts: Sequence[Prompt], samples: int, beta: float, tilt_cap: float | None, params: SamplingParams
) -> list[tuple[Prompt, Request]]:
    """The requests of one point; the worker fills in the prompts' tokens."""
    return [
        (
            prompt,
            Request(
                id=f"{point.name}/{prompt.id}",
                prompt=(),
                weights=point.weights,
                beta=beta,
                tilt_cap=tilt_cap,
                params=SamplingParams(
                    max_tokens=params.max_tokens,
                    top_k=params.top_k,
                    top_p=params.top_p,
                    min_p=params.min_p,
                    seed=index,
                    n=samples,
                ),
            ),
        )
        for index, prompt in enumerate(prompts)
    ]


def summarise(
    points: Sequence[Point],
    choices: Mapping[str, Sequence[Sequence[Choice]]],
    scores: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    scales: Mapping[str, RewardScale],
    prompts: Sequence[Prompt],
    texts: Mapping[str, Sequence[str]],
    beta: float,
) -> Sweep:
    """Numbers from answers.

    Args:
        choices: point name -> prompt -> answers.
        scores: point name -> objective -> prompt -> raw reward of every answer.
        texts: point name -> prompt -> text of the first answer.
    """
    standard = {
        point.name: {
            name: np.array([np.mean([scale.standardise(s) for s in row]) for row in scores[point.name][name]])
            for name, scale in scales.items()
        }
        for point in points
    }
    results = []
    for point in points:
        answers = [choice for row in choices[point.name] for choice in row]
        rewards = standard[point.name]
        results.append(
            PointResult(
                name=point.name,
                weights=dict(point.weights),
                reward={name: bootstrap(values) for name, values in rewards.items()},
                gain={name: bootstrap(values - standard[points[0].name][name]) for name, values in rewards.items()},
                divergence=float(np.mean([choice.divergence for choice in answers])),
                num_tokens=float(np.mean([len(choice.tokens) for choice in answers])),
            )
        )
    examples = [
        {"prompt": prompt.text, "answers": {point.name: texts[point.name][index] for point in points}}
        for index, prompt in enumerate(prompts)
    ]
    return Sweep(results, _hypervolume(results), len(prompts), beta, examples)


def bootstrap(values: np.ndarray) -> Estimate:
    """Mean and 95 % percentile interval over resampled prompts; a fixed seed makes it repeatable."""
    draws = np.random.default_rng(0).integers(0, len(values), (BOOTSTRAPS, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high))


def _hypervolume(results: Sequence[PointResult]) -> float:
    """Volume between the mean rewards of all points and the worst of each objective."""
    means = np.array([[estimate.mean for estimate in result.reward.values()] for result in results])
    if means.shape[1] < 2:
        return float(np.ptp(means))
    return float(moocore.hypervolume(means, ref=means.min(axis=0), maximise=True))


def table(sweep: Sweep) -> str:
    """The sweep as text, one line per point."""
    names = list(sweep.points[0].gain)
    head = (
        f"{'weights':<28}" + "".join(f"{name + ' gain, sd':>30}" for name in names) + f"{'KL, nats':>10}{'tokens':>8}"
    )
    lines = [head, "-" * len(head)]
    for point in sweep.points:
        gains = "".join(
            f"{f'{point.gain[n].mean:+.2f} [{point.gain[n].low:+.2f}, {point.gain[n].high:+.2f}]':>30}" for n in names
        )
        lines.append(f"{point.name:<28}{gains}{point.divergence:>10.2f}{point.num_tokens:>8.1f}")
    lines.append(f"hypervolume {sweep.hypervolume:.3f} sd^{len(names)}, {sweep.num_prompts} unseen prompts")
    return "\n".join(lines)

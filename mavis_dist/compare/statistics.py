"""Statistics of a comparison, paired by prompt: every figure is computed in the same resamples of the prompts.

Gains are in standard deviations of a reward above the base model's mean on the same prompt, so the base model lies at 0
in every objective. It is the reference point of hypervolumes: they measure what is better than the base model in all
objectives at once.

Shapes: P prompts, S strengths, R resamples (the first is the sample itself), W weights, O objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import moocore
import numpy as np
from scipy import stats

from mavis_dist.compare.equal_kl import AtKl, Curve, gains_at, summarise
from mavis_dist.core import limit
from mavis_dist.evaluate.sweep import Estimate

LARGEST_RATIO = 1000.0  # in a resample where the divisor is almost 0


def spent_within(kl_SP: np.ndarray, kl: float, weights_RP: np.ndarray) -> np.ndarray:
    """The mean KL [R] that a method spends when it may spend `kl` nats: less if its strongest setting does."""
    return np.minimum(kl, (weights_RP @ kl_SP.T).max(axis=1))


def gains_within(curve: Curve, kl: float, weights_RP: np.ndarray) -> np.ndarray:
    """The mean gain [R] at `kl` nats, or at the largest KL of a method that never spends as much; nan if it is unknown.

    Between two strengths the gain is interpolated. A mixture of both policies reaches it, at no more than this KL,
    because KL is convex.
    """
    if np.isnan(curve.kl_SP).any():
        return np.full(len(weights_RP), np.nan)
    gain_R = gains_at(curve, kl, weights_RP)
    most_R1 = (weights_RP @ curve.kl_SP.T).argmax(axis=1)[:, None]
    strongest_R = np.take_along_axis(weights_RP @ curve.gain_SP.T, most_R1, axis=1)[:, 0]
    return np.where(np.isnan(gain_R), strongest_R, gain_R)


def limits(spent_R: np.ndarray, rewards_PN: np.ndarray, weights_RP: np.ndarray) -> np.ndarray:
    """The limit of steering [R] at a KL; nan where it is not known or nothing.

    Args:
        rewards_PN: rewards of answers of the base model, for a mixture the mixture's.
    """
    largest = limit.largest_divergence(rewards_PN.shape[1])
    if not limit.MIN_DIVERGENCE <= spent_R[0] <= largest:
        return np.full(len(spent_R), np.nan)
    limit_R = limit.limits_at(rewards_PN, np.minimum(spent_R, largest), weights_RP)
    return np.where(limit_R > 0, limit_R, np.nan)


def mean(values_P: np.ndarray, weights_RP: np.ndarray) -> Estimate:
    """A mean over prompts with its 95 % interval."""
    found = estimate(weights_RP @ values_P)
    assert found is not None, "the values are known"
    return found


def hypervolume(points_WO: np.ndarray) -> float:
    """Volume, in sd^O, between the base model (0) and the front of these points; nan if one of them is unknown."""
    if np.isnan(points_WO).any():
        return float("nan")
    if points_WO.shape[1] == 1:  # moocore needs two
        return max(0.0, float(points_WO.max()))
    return float(moocore.hypervolume(points_WO, ref=np.zeros(points_WO.shape[1]), maximise=True))


def hypervolumes(points_RWO: np.ndarray) -> np.ndarray:
    """The hypervolume [R] of the mean points of every resample."""
    return np.array([hypervolume(points_WO) for points_WO in points_RWO])


def ratio(ours_R: np.ndarray, theirs_R: np.ndarray) -> np.ndarray:
    """A ratio of two figures in every resample, at most LARGEST_RATIO; nan if theirs is not above 0."""
    if not theirs_R[0] > 0:
        return np.full(len(ours_R), np.nan)
    return ours_R / np.maximum(theirs_R, np.maximum(ours_R, 1e-12) / LARGEST_RATIO)


def spearman(weights_W: np.ndarray, gain_W: np.ndarray) -> float:
    """Rank correlation of an objective's weights and its gains; 0 if all gains are equal."""
    return 0.0 if np.ptp(gain_W) == 0 else float(stats.spearmanr(weights_W, gain_W).statistic)


def estimate(value_R: np.ndarray) -> Estimate | None:
    """The figure of the sample with its 95 % interval over the resamples; None if it is unknown."""
    found: AtKl = summarise(value_R)
    return found.estimate


def winner(names: Sequence[str], figure: Callable[[str, str], np.ndarray]) -> str | None:
    """Whose figure is larger than every other's, each by an interval of the paired difference that excludes 0.

    Args:
        figure: [R] of a method, to be compared with another's; nan if it is unknown.
    """
    known = [name for name in names if not np.isnan(figure(name, name)[0])]

    def is_ahead(name: str, other: str) -> bool:
        difference = estimate(figure(name, other) - figure(other, name))
        return difference is not None and difference.low > 0

    winners = [name for name in known if all(is_ahead(name, other) for other in known if other != name)]
    return winners[0] if winners and len(known) > 1 else None

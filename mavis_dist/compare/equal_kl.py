"""Gains of several policies at the same divergence from the base model, with paired bootstrap intervals.

A policy is measured at a few strengths, each with a KL and a gain in reward. Between them, and from the origin (no
tilt, no gain) to the first, the gain is interpolated linearly in the KL.

Shapes: P prompts, S strengths in ascending order, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mavis_dist.core import resample
from mavis_dist.evaluate.sweep import Estimate

RESAMPLES = 4000
BOUNDS = (0.025, 0.975)  # of a 95 % interval


@dataclass(frozen=True, eq=False)
class Curve:
    """KL and gain of one policy at every strength."""

    kl_SP: np.ndarray  # nats of the answer to each prompt
    gain_SP: np.ndarray  # reward above the base model's mean for the same prompt, sd


@dataclass(frozen=True)
class AtKl:
    """A gain, or a difference of gains, at one KL."""

    estimate: Estimate | None  # None: a curve does not reach this KL; nothing is extrapolated
    reached: float  # share of the resamples whose curves reach it; the interval covers these


def resamples(count: int) -> np.ndarray:
    """Weights [1 + R, P] whose rows sum to 1: the sample itself, then bootstrap resamples of its members.

    The seed is fixed, so that everything computed for the same prompts is paired. A single member has no resamples.
    """
    whole_1P = np.full((1, count), 1 / count)
    if count < 2:
        return whole_1P
    return np.concatenate([whole_1P, resample.resamples(count, RESAMPLES) / count])


def gains_at(curve: Curve, kl: float, weights_RP: np.ndarray) -> np.ndarray:
    """The mean gain [R] at which a curve first reaches a mean KL of `kl` nats, per resample; nan if it never does.

    Strengths are taken in ascending order. The KL need not increase with them: strong tilts can end answers early.
    """
    origin_R1 = np.zeros((len(weights_RP), 1))
    kl_RS = np.hstack([origin_R1, weights_RP @ curve.kl_SP.T])
    gain_RS = np.hstack([origin_R1, weights_RP @ curve.gain_SP.T])
    is_reached_RS = kl_RS >= kl
    end_R1 = is_reached_RS.argmax(1)[:, None]
    start_R1 = np.maximum(end_R1 - 1, 0)
    from_R1, to_R1 = np.take_along_axis(kl_RS, start_R1, 1), np.take_along_axis(kl_RS, end_R1, 1)
    part_R1 = np.divide(kl - from_R1, to_R1 - from_R1, out=np.zeros_like(from_R1), where=to_R1 > from_R1)
    before_R1, after_R1 = np.take_along_axis(gain_RS, start_R1, 1), np.take_along_axis(gain_RS, end_R1, 1)
    gain_R = (before_R1 + part_R1 * (after_R1 - before_R1))[:, 0]
    return np.where(is_reached_RS.any(1), gain_R, np.nan)


def summarise(value_R: np.ndarray) -> AtKl:
    """The value of the sample (first entry) with the interval over its resamples (the others)."""
    resampled_R = value_R[1:]
    known_R = resampled_R[~np.isnan(resampled_R)]
    reached = len(known_R) / max(len(resampled_R), 1)
    if np.isnan(value_R[0]):
        return AtKl(None, reached)
    low, high = np.quantile(known_R, BOUNDS) if len(known_R) else (-np.inf, np.inf)
    return AtKl(Estimate(float(value_R[0]), float(low), float(high)), reached)

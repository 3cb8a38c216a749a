"""The limit of steering: the largest mean reward above the base model's that any policy can reach at a divergence.

Among all policies with the same mean KL(pi || p) over the prompts, none has a higher mean reward than the tilt
pi(y | x) ∝ p(y | x) exp(b r(x, y)) with one b for all prompts (Lagrange). It is estimated from N independent answers of
the base model to each prompt, without any value model: the tilt gives answer i the weight w_i ∝ exp(b r_i), so

    gain = mean over prompts of (sum w r - mean r)        KL = mean over prompts of sum w log(N w)

The weights and the mean come from the same N answers. No weight exceeds 1, so KL never exceeds log N, and an answer
better than the best of N is unknown: the estimate errs low and a share of it high, the more the closer KL is to log N.
For rewards with a normal distribution the estimate is too low by (percent, rows: N, columns: KL in nats)

          .25   .5    1   1.5    2   2.5    3
    14      5    6    9    14
    16      4    5    8    12
    32      2    3    4     7    9
    64      1    2    3     4    6     8   10
    128     1    1    1     2    3     4    6

Beyond log N - 1 nats, where the best of N lies, nothing can be said: the functions return nan.

Shapes: P prompts, N answers to each, B strengths of the tilt, R resamples of the prompts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy import optimize, special

from mavis_dist.core.resample import resamples

MIN_DIVERGENCE = 0.05  # nats; a share of the limit below it is a quotient of two small, noisy numbers
MIN_PROMPTS = 8  # resampling fewer prompts gives no interval worth the name
NUM_RESAMPLES = 2000

# Products of strength and spread of the rewards: from no visible tilt to the best answer alone.
_SCALED_STRENGTHS_B = np.concatenate([[0.0], np.geomspace(0.01, 1000.0, 240)])


class Curve(NamedTuple):
    """What every strength gains and costs on every prompt."""

    gain_BP: np.ndarray  # in the unit of the rewards
    divergence_BP: np.ndarray  # nats


class Share(NamedTuple):
    """A part of the limit with its 95 % bootstrap interval over prompts; infinite bounds where there is none."""

    mean: float
    low: float
    high: float


def largest_divergence(num_answers: int) -> float:
    """Up to how many nats so many answers per prompt tell the limit."""
    return math.log(num_answers) - 1.0


def curve(rewards_PN: np.ndarray, strengths_B: np.ndarray) -> Curve:
    """Gain and divergence of the tilt at every strength."""
    tilts = [_tilt(rewards_PN, float(strength)) for strength in strengths_B]
    return Curve(np.array([gain_P for gain_P, _ in tilts]), np.array([divergence_P for _, divergence_P in tilts]))


def gain_at(rewards_PN: np.ndarray, divergence: float) -> float:
    """The limit at a mean divergence in nats, in the unit of the rewards; nan beyond `largest_divergence`.

    A policy that gives only the best answers, several of them equally good, gains nothing by more divergence.
    """
    if not 0.0 <= divergence <= largest_divergence(rewards_PN.shape[1]):
        return math.nan
    spread = _spread(rewards_PN)
    if divergence == 0.0 or spread == 0.0:
        return 0.0

    def excess(strength: float) -> float:
        return float(_tilt(rewards_PN, strength)[1].mean()) - divergence

    strongest = float(_SCALED_STRENGTHS_B[-1]) / spread
    strength = optimize.brentq(excess, 0.0, strongest) if excess(strongest) > 0.0 else strongest
    return float(_tilt(rewards_PN, strength)[0].mean())


def limits_at(rewards_PN: np.ndarray, divergence_R: np.ndarray, weights_RP: np.ndarray) -> np.ndarray:
    """The limit [R] in resamples of the prompts, each at a mean divergence of its own; for bootstraps.

    It is read off the curve of the resample, which is almost a line over the square root of the divergence. The caller
    keeps to `largest_divergence`: a few resamples may lie beyond it.

    Args:
        weights_RP: weights of the prompts in every resample; rows sum to 1.
    """
    spread = _spread(rewards_PN)
    if spread == 0.0:
        return np.zeros(len(weights_RP))
    gain_BP, divergence_BP = curve(rewards_PN, _SCALED_STRENGTHS_B / spread)
    rows = zip(divergence_R, weights_RP @ divergence_BP.T, weights_RP @ gain_BP.T, strict=True)
    return np.array([np.interp(np.sqrt(nats), np.sqrt(divergence_B), gain_B) for nats, divergence_B, gain_B in rows])


def share(gain_P: np.ndarray, divergence_P: np.ndarray, rewards_PN: np.ndarray) -> Share | None:
    """A policy's gain over the limit at the divergence that it spends.

    The interval resamples prompts, each with the policy's gain and divergence and with its answers of the base model.
    None where the limit is unknown or nothing: the mean divergence is below MIN_DIVERGENCE, beyond
    `largest_divergence` or not a number, or all answers to every prompt are equally good.

    Args:
        gain_P: mean reward of the policy's answers above the base model's, in the unit of `rewards_PN`.
        divergence_P: mean divergence of its answers, nats.
        rewards_PN: rewards of answers of the base model, for a mixture the mixture's.
    """
    divergence = float(divergence_P.mean())
    limit = gain_at(rewards_PN, divergence) if divergence >= MIN_DIVERGENCE else math.nan
    if not limit > 0.0:
        return None
    low, high = _interval(gain_P, divergence_P, rewards_PN)
    return Share(float(gain_P.mean()) / limit, low, high)


def _tilt(rewards_PN: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Gain and divergence [P] of the tilt of one strength."""
    log_weights_PN = special.log_softmax(strength * rewards_PN, axis=1)
    weights_PN = np.exp(log_weights_PN)
    centred_PN = rewards_PN - rewards_PN.mean(axis=1, keepdims=True)
    gain_P = (weights_PN * centred_PN).sum(axis=1)
    divergence_P = np.log(rewards_PN.shape[1]) + (weights_PN * log_weights_PN).sum(axis=1)
    return gain_P, np.maximum(divergence_P, 0.0)  # rounding


def _spread(rewards_PN: np.ndarray) -> float:
    """Standard deviation of the rewards within prompts; 0 if it is rounding."""
    spread = float(np.sqrt(rewards_PN.var(axis=1).mean()))
    return spread if spread > 1e-12 * float(np.abs(rewards_PN).max()) else 0.0


def _interval(gain_P: np.ndarray, divergence_P: np.ndarray, rewards_PN: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the share over resampled prompts; a fixed seed makes it repeatable.

    Infinite for fewer than MIN_PROMPTS, or if so few prompts have answers of different reward that a resample has none.
    """
    num_prompts = len(gain_P)
    if num_prompts < MIN_PROMPTS:
        return -math.inf, math.inf
    weights_RP = resamples(num_prompts, NUM_RESAMPLES) / num_prompts
    limit_R = limits_at(rewards_PN, weights_RP @ divergence_P, weights_RP)
    if not (limit_R > 0.0).all():
        return -math.inf, math.inf
    low, high = np.quantile((weights_RP @ gain_P) / limit_R, [0.025, 0.975])
    return float(low), float(high)

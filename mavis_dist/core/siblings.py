"""What a value model can learn, and whether it tells continuations of one state apart. Numpy only.

The children of a state continue the same text and are independent of each other given that text. Two measures follow:

- The ceiling of R². The target of a state is a mean over few answers, and the best model predicts its expectation,
  the true value of the state. The covariance, over states, of the rewards below two different children estimates the
  variance of the true value, because all that the two share is their state. Divided by the variance of the
  targets it is the R² of a model that makes no error.
- The sibling test. Most of R² is which prompt and which answer it is, but steering uses nothing except differences
  between the continuations of one state. So values and rewards of the children are compared within their state.
  (The increment of V along a segment must not be compared with the target less V: both contain the error of V at the
  start of the segment, and a slope of one half would be found in pure noise.)

Fresh children of a dynamic split are siblings of each other: they continue the inner point at which the answer was cut,
independently. The rest of that answer continues the same point, but was chosen for having finished, so it is not
compared with them; the answer as a whole is an ordinary child of the prompt.

Shapes: X targets of one tree or of several, N nodes, A tokens of all segments, T trees, R resamples.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mavis_dist.core.resample import resamples
from mavis_dist.core.tree import ROOT, Targets, Tree

MIN_TREES = 8  # with several children of a state, below which nothing is reported
RESAMPLES = 2000
ROUNDING = 1e-18  # sd²
CEILING_KEY, SLOPE_KEY, CORRELATION_KEY = "r2_ceiling", "sibling_slope", "sibling_corr"  # in metrics and metadata


class Interval(NamedTuple):
    """A figure with its 95 % bootstrap interval over trees."""

    value: float
    low: float
    high: float


class SiblingTest(NamedTuple):
    """Regression of rewards on values, both centred within their state."""

    slope: Interval  # 1: differences of V are as large as those of the rewards; below: part of them is noise
    correlation: Interval


def interval_keys(name: str, num_tokens: int) -> tuple[str, str, str]:
    """Names under which a figure of the sibling test and its bounds are stored."""
    key = f"{name}/tokens_{num_tokens}"
    return key, f"{key}_low", f"{key}_high"


def noise(tree: Tree, targets: Targets, zeta: float) -> np.ndarray:
    """An unbiased estimate of each target's variance around the true value of its state, float64 [X].

    A target is a mean over K independent children, so it has the sample variance of one child divided by K. The state
    is the end of the target's segment: inside the segment a model has read less, so the noise is at least as large.
    An answer that ended is its own target: 0. States with one child: nan. Targets that average split answers with
    their fresh children (the published backup) are treated as if they did not.
    """
    # What a child contributes to its parent's target: its own value less the price of its segment.
    last_N = targets.value_X[_target_of_token(tree, targets)[tree.node_start[1:] - 1]].astype(np.float64)
    child_N = last_N - zeta * np.add.reduceat(tree.token_logratio.astype(np.float64), tree.node_start[:-1])
    noise_of = {
        state: float(np.var(child_N[nodes], ddof=1) / len(nodes)) if len(nodes) > 1 else np.nan
        for state, nodes in tree.children().items()
    }
    token_X = targets.index_X[1:] - len(tree.prompt_tokens)
    node_X = np.searchsorted(tree.node_start, token_X, side="right") - 1
    end_X = np.diff(tree.node_start)[node_X]  # tokens of the segment before the children that a target is the mean of
    is_cut_X = np.arange(1, len(targets.index_X)) >= _num_plain(targets)
    end_X[is_cut_X] = (token_X - tree.node_start[node_X] + 1)[is_cut_X]
    states = [(ROOT, 0), *zip(node_X.tolist(), end_X.tolist(), strict=True)]
    return np.array([noise_of.get(state, 0.0) for state in states])


def ceiling(target_X: np.ndarray, noise_X: np.ndarray, weight_X: np.ndarray | None = None) -> float:
    """R² of the true values on these targets: 1 - mean noise / variance of the targets; nan where noise is unknown.

    Variance less noise is the mean product of two different children's rewards, over all pairs, less the squared mean:
    their covariance over the states. No model can expect a higher R² on the same targets with the same weights.
    """
    mean = np.average(target_X, weights=weight_X)
    variance = np.average((target_X - mean) ** 2, weights=weight_X)
    return float(1.0 - np.average(noise_X, weights=weight_X) / np.maximum(variance, 1e-12))


def sibling_sums(tree: Tree, targets: Targets, pred_X: np.ndarray, num_tokens: int) -> np.ndarray:
    """Sums over the states of a tree of v * y, v² and y², and the number of these states, float64 [4].

    v is the value after `num_tokens` tokens of a child, y the target of the same token: the mean reward below the
    child, less the price of what follows the token in later iterations, which is part of the value as well. Both are
    centred over the children of a state. Children that are shorter, or have no target there, are left out; a leaf
    counts with its own reward.
    """
    target_A, sums_4 = _target_of_token(tree, targets), np.zeros(4)
    for tokens in tree.siblings_after(num_tokens):
        x = target_A[tokens]
        x = x[x >= 0]
        if len(x) > 1:
            sums_4 += state_sums(pred_X[x], targets.value_X[x])
    return sums_4


def state_sums(value_N: np.ndarray, target_N: np.ndarray) -> np.ndarray:
    """The sums of one state, from the value of each of its children and what it is compared with."""
    v, y = value_N - value_N.mean(), target_N - target_N.mean(dtype=np.float64)
    return np.array([v @ y, v @ v, y @ y, 1.0])


def sibling_test(sums_T4: np.ndarray) -> SiblingTest | None:
    """Slope and correlation from the sums of all trees, with intervals over resampled trees; the same in every call.

    None if fewer than MIN_TREES trees have siblings, or if all values or all rewards are the same but for rounding.
    """
    sums_T3 = sums_T4[sums_T4[:, 3] > 0, :3]
    num_trees = len(sums_T3)
    if num_trees < MIN_TREES or (sums_T3[:, 1:].sum(axis=0) < ROUNDING * num_trees).any():
        return None
    counts_RT = resamples(num_trees, RESAMPLES)
    slope, correlation = _slope_and_correlation(sums_T3.sum(axis=0))
    slope_R, correlation_R = _slope_and_correlation((counts_RT @ sums_T3).T)
    return SiblingTest(_interval(slope, slope_R), _interval(correlation, correlation_R))


def _slope_and_correlation(sums_3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of one set of sums [3], or of several [3, R]; nan where nothing differs."""
    vy, vv, yy = sums_3
    with np.errstate(invalid="ignore"):
        return vy / vv, vy / np.sqrt(vv * yy)


def _interval(value: np.ndarray, value_R: np.ndarray) -> Interval:
    low, high = np.nanpercentile(value_R, [2.5, 97.5])
    return Interval(float(value), float(low), float(high))


def _num_plain(targets: Targets) -> int:
    """Number of targets before those of cuts: the last of them is at the last token of the tree."""
    return int(np.argmax(targets.index_X)) + 1


def _target_of_token(tree: Tree, targets: Targets) -> np.ndarray:
    """The target at every token of the segments, those of cuts aside, int64 [A]; -1 where there is none."""
    target_A = np.full(len(tree.tokens), -1)
    num_plain = _num_plain(targets)
    target_A[targets.index_X[1:num_plain] - len(tree.prompt_tokens)] = np.arange(1, num_plain)
    return target_A

"""Quality of a value model's predictions of held-out targets. Numpy only.

Shapes: X targets. Errors are in squared standard deviations of the reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mavis_dist.core import siblings
from mavis_dist.core.tree import COMPARED_AFTER, Targets, Tree
from mavis_dist.types import R2_KEY

CALIBRATION_BINS = 10


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predicted and true values of targets."""

    pred_X: np.ndarray
    target_X: np.ndarray
    weight_X: np.ndarray  # in the loss
    depth_X: np.ndarray  # layer of the tree, 0 for the prompt

    def __len__(self) -> int:
        return len(self.pred_X)

    @property
    def r2(self) -> float:
        return float(r2(self.pred_X, self.target_X, self.weight_X))

    def part(self, is_chosen_X: np.ndarray) -> Predictions:
        return Predictions(*(x[is_chosen_X] for x in (self.pred_X, self.target_X, self.weight_X, self.depth_X)))


def squared_error(p: Predictions) -> float:
    """Weighted mean of (V - target)^2."""
    return float(np.average((p.pred_X - p.target_X) ** 2, weights=p.weight_X))


def r2(pred_X: np.ndarray, target_X: np.ndarray, weight_X: np.ndarray | None = None) -> np.ndarray:
    """1 - squared error / variance of the targets, weighted: 1 is perfect, 0 is as good as predicting their mean.

    A scalar for vectors, one per column for arrays of more columns. Stored and served as "explained_variance".
    """
    mean = np.average(target_X, axis=0, weights=weight_X)
    variance = np.average((target_X - mean) ** 2, axis=0, weights=weight_X)
    error = np.average((pred_X - target_X) ** 2, axis=0, weights=weight_X)
    return np.asarray(1.0 - error / np.maximum(variance, 1e-12))


def calibration(p: Predictions) -> dict[str, float]:
    """Calibration of the values.

    `slope` and `intercept` of the weighted regression of targets on values (1 and 0 are ideal), and `gap`: the mean
    distance between values and targets within ten equally large groups of similar values.
    """
    mean_pred, mean_target = (np.average(x, weights=p.weight_X) for x in (p.pred_X, p.target_X))
    variance = np.average((p.pred_X - mean_pred) ** 2, weights=p.weight_X)
    covariance = np.average((p.pred_X - mean_pred) * (p.target_X - mean_target), weights=p.weight_X)
    slope = float(covariance / max(variance, 1e-12))
    groups = [group for group in np.array_split(np.argsort(p.pred_X, kind="stable"), CALIBRATION_BINS) if len(group)]
    gaps = [np.average(p.pred_X[g] - p.target_X[g], weights=p.weight_X[g]) for g in groups]
    sizes = [p.weight_X[g].sum() for g in groups]
    return {
        "slope": slope,
        "intercept": float(mean_target - slope * mean_pred),
        "gap": float(np.average(np.abs(gaps), weights=sizes)),
    }


def summary(p: Predictions) -> dict[str, float]:
    """All figures, flat; empty without targets."""
    if len(p) == 0:
        return {}
    depths = [int(depth) for depth in np.unique(p.depth_X)]
    return {
        "validation_error": squared_error(p),
        R2_KEY: p.r2,
        **{f"{R2_KEY}/depth_{d}": p.part(p.depth_X == d).r2 for d in depths if d > 0},
        **{f"calibration/{name}": figure for name, figure in calibration(p).items()},
    }


def ceilings(p: Predictions, noise: Sequence[np.ndarray]) -> dict[str, float]:
    """The ceiling of R² with the weights of the loss, and at each depth at which states have several children.

    `noise` is that of every tree's targets, in the order of `p`. Fewer than MIN_TREES trees are too few for a ceiling.
    """
    noise_X, tree_X = np.concatenate(noise), np.repeat(np.arange(len(noise)), [len(part) for part in noise])
    figures = {siblings.CEILING_KEY: np.full(len(p), True)}
    figures |= {f"{siblings.CEILING_KEY}/depth_{depth}": p.depth_X == depth for depth in np.unique(p.depth_X)}
    return {
        name: siblings.ceiling(p.target_X[part_X], noise_X[part_X], p.weight_X[part_X])
        for name, part_X in figures.items()
        if len(np.unique(tree_X[part_X & (noise_X > 0)])) >= siblings.MIN_TREES and np.isfinite(noise_X[part_X]).all()
    }


def sibling_tests(p: Predictions, trees: Sequence[Tree], targets: Sequence[Targets]) -> dict[str, float]:
    """The sibling test after some numbers of tokens, flat, with bounds; without those that too few trees allow.

    `p` holds the predictions of the targets of all trees, in order.
    """
    ends_T = np.cumsum([len(part.index_X) for part in targets])[:-1]
    parts = list(zip(trees, targets, np.split(p.pred_X, ends_T), strict=True))
    figures: dict[str, float] = {}
    for num_tokens in COMPARED_AFTER:
        test = siblings.sibling_test(np.array([siblings.sibling_sums(*part, num_tokens) for part in parts]))
        if test is not None:
            figures |= zip(siblings.interval_keys(siblings.SLOPE_KEY, num_tokens), test.slope, strict=True)
            figures |= zip(siblings.interval_keys(siblings.CORRELATION_KEY, num_tokens), test.correlation, strict=True)
    return figures

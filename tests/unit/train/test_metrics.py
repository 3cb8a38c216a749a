"""Metrics of predictions whose metrics are known."""

from __future__ import annotations

import numpy as np
import pytest

from mavis_dist.train.metrics import Predictions, calibration, squared_error, summary

RANDOM = np.random.default_rng(0)


def predictions(pred: np.ndarray, target: np.ndarray, depth: np.ndarray | None = None) -> Predictions:
    weight = RANDOM.uniform(0.5, 2.0, size=len(pred))
    return Predictions(pred, target, weight, np.ones(len(pred), dtype=int) if depth is None else depth)


def test_perfect_mean_and_useless_predictions() -> None:
    target = RANDOM.normal(size=5000)
    assert predictions(target, target).r2 == pytest.approx(1.0)
    p = predictions(np.zeros(5000), target)
    mean = np.average(target, weights=p.weight_X)
    assert Predictions(np.full(5000, mean), target, p.weight_X, p.depth_X).r2 == pytest.approx(0.0)
    assert predictions(-target, target).r2 == pytest.approx(-3.0, abs=0.05)


def test_errors_are_weighted() -> None:
    p = Predictions(np.array([1.0, 0.0]), np.array([0.0, 0.0]), np.array([3.0, 1.0]), np.array([1, 1]))
    assert squared_error(p) == pytest.approx(0.75)


def test_calibration_finds_slope_intercept_and_gap() -> None:
    pred = RANDOM.normal(size=20000)
    calibrated = calibration(predictions(pred, pred + RANDOM.normal(size=20000)))
    assert calibrated["slope"] == pytest.approx(1.0, abs=0.03)
    assert calibrated["gap"] < 0.04
    overconfident = calibration(predictions(pred, 0.5 * pred + 0.3))
    assert overconfident["slope"] == pytest.approx(0.5)
    assert overconfident["intercept"] == pytest.approx(0.3)
    assert overconfident["gap"] > 0.3


def test_depths_have_separate_figures() -> None:
    target, depth = RANDOM.normal(size=4000), np.repeat([0, 1, 2, 2], 1000)
    pred = np.where(depth == 2, target, 0.0)
    figures = summary(predictions(pred, target, depth))
    assert figures["explained_variance/depth_1"] == pytest.approx(0.0, abs=0.01)
    assert figures["explained_variance/depth_2"] == pytest.approx(1.0)
    assert "explained_variance/depth_0" not in figures
    assert {"validation_error", "explained_variance", "calibration/slope"} <= figures.keys()
    assert summary(predictions(np.array([]), np.array([]))) == {}

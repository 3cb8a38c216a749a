"""Statistics against closed forms and figures by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mavis_dist.compare import statistics
from mavis_dist.compare.equal_kl import Curve, resamples
from mavis_dist.core import limit

WHOLE = resamples(1)


def curve(kl: list[float], gain: list[float]) -> Curve:
    """The same on a single prompt, so that means are these numbers."""
    return Curve(np.array(kl)[:, None], np.array(gain)[:, None])


@pytest.mark.parametrize(("kl", "gain", "spent"), [(0.5, 1.0, 0.5), (2.0, 2.5, 2.0), (9.0, 3.0, 3.0)])
def test_a_method_that_never_spends_the_kl_counts_with_its_most(kl: float, gain: float, spent: float) -> None:
    found = curve([1.0, 3.0, 2.0], [2.0, 3.0, 5.0])
    assert statistics.gains_within(found, kl, WHOLE) == pytest.approx([gain])
    assert statistics.spent_within(found.kl_SP, kl, WHOLE) == pytest.approx([spent])


def test_an_unknown_kl_has_no_gain() -> None:
    assert np.isnan(statistics.gains_within(curve([1.0, np.nan], [1.0, 2.0]), 0.5, WHOLE)).all()


@pytest.mark.parametrize(
    ("points", "volume"),
    [
        ([[1.0, 2.0]], 2.0),
        ([[2.0, 1.0], [1.0, 2.0]], 3.0),
        ([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0]], 3.0),  # a dominated point
        ([[3.0, -0.1], [-0.1, 3.0]], 0.0),  # worse than the base model in one objective
        ([[0.0, 0.0]], 0.0),
        ([[1.0, 2.0, 3.0]], 6.0),
        ([[2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.0, 2.0]], 4.0),
        ([[1.5], [0.5]], 1.5),
        ([[-1.0]], 0.0),
    ],
)
def test_volumes_of_boxes_above_the_base_model(points: list[list[float]], volume: float) -> None:
    assert statistics.hypervolume(np.array(points)) == pytest.approx(volume)


def test_the_volume_of_a_quarter_of_a_disc() -> None:
    angle = np.linspace(0, np.pi / 2, 2001)
    assert statistics.hypervolume(np.stack([np.cos(angle), np.sin(angle)], 1)) == pytest.approx(np.pi / 4, rel=1e-3)


def test_every_resample_has_a_volume_of_its_own_and_unknown_points_have_none() -> None:
    points = np.array([[[1.0, 1.0]], [[2.0, 1.0]], [[np.nan, 1.0]]])
    assert statistics.hypervolumes(points) == pytest.approx([1.0, 2.0, np.nan], nan_ok=True)


def test_a_ratio_is_joint() -> None:
    """Prompts that both methods find hard cancel."""
    rng = np.random.default_rng(0)
    weights_RP = resamples(80)
    theirs_P = rng.gamma(2.0, 1.0, 80)
    ours_R, theirs_R = weights_RP @ (1.2 * theirs_P), weights_RP @ theirs_P
    found = statistics.estimate(statistics.ratio(ours_R, theirs_R))
    assert found is not None
    assert [found.mean, found.low, found.high] == pytest.approx([1.2] * 3)
    assert statistics.estimate(statistics.ratio(np.ones(3), np.zeros(3))) is None
    assert statistics.ratio(np.array([1.0, 2.0]), np.array([0.5, 0.0])) == pytest.approx([2.0, 1000.0])
    assert statistics.ratio(np.array([1.0, 0.0]), np.array([0.5, 0.0])) == pytest.approx([2.0, 0.0])


def test_the_limit_of_normal_rewards() -> None:
    """Rewards with a normal distribution: the tilt that spends k nats gains sqrt(2 k) standard deviations."""
    rewards_PN = np.tile(stats.norm.ppf((np.arange(256) + 0.5) / 256), (40, 1))
    weights_RP = resamples(40)
    gain = limit.gain_at(rewards_PN, 1.0)
    assert gain == pytest.approx(np.sqrt(2), rel=0.02)
    one_R = np.ones(len(weights_RP))
    assert statistics.limits(one_R, rewards_PN, weights_RP) == pytest.approx(gain * one_R, rel=1e-3)
    for unknown in (0.0, 9.0):
        assert np.isnan(statistics.limits(unknown * one_R, rewards_PN, weights_RP)).all()


def test_a_mean_has_the_interval_of_its_standard_error() -> None:
    values_P = np.random.default_rng(2).normal(0.3, 1.0, 200)
    found = statistics.mean(values_P, resamples(200))
    assert found.mean == pytest.approx(values_P.mean())
    assert found.high - found.mean == pytest.approx(1.96 * values_P.std() / np.sqrt(200), rel=0.1)


def test_spearman_is_one_for_any_rising_gain_and_zero_for_equal_ones() -> None:
    weights = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    assert statistics.spearman(weights, weights**3) == pytest.approx(1.0)
    assert statistics.spearman(weights, -weights) == pytest.approx(-1.0)
    assert statistics.spearman(weights, np.ones(5)) == 0.0
    swapped = np.array([0.0, 2.0, 1.0, 3.0, 4.0])  # 1 - 6 * (1 + 1) / (5 * 24)
    assert statistics.spearman(weights, swapped) == pytest.approx(0.9)


def test_a_winner_must_be_ahead_of_every_other_beyond_doubt() -> None:
    rng, weights_RP = np.random.default_rng(1), resamples(60)
    hard_P = rng.normal(0, 5, 60)  # what all methods share
    noise = [rng.normal(0, 0.5, 60) for _ in range(3)]
    third_R, ours_R, close_R = (weights_RP @ (hard_P + x) for x in (noise[0], noise[1] + 1.0, noise[2] + 1.0))
    found = {"third": third_R, "ours": ours_R, "close": close_R, "unknown": np.full_like(ours_R, np.nan)}

    def winner(*names: str) -> str | None:
        return statistics.winner(names, lambda name, _: found[name])

    assert winner("third", "ours") == winner("third", "ours", "unknown") == "ours"
    assert winner("third", "ours", "close") is None
    assert winner("ours", "unknown") is None


def test_a_winner_is_ahead_on_the_weights_that_it_has_in_common_with_the_other() -> None:
    """One that only has the easy weights leads by its mean, and is behind there."""
    ours = {"ours": 1.0, "easy": 2.0}
    figure = {"ours": lambda other: ours[other], "easy": lambda _: 1.5}
    assert statistics.winner(["easy", "ours"], lambda name, other: np.full(9, figure[name](other))) == "ours"

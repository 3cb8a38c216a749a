"""Gains at equal KL against figures by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mavis_dist.compare.equal_kl import Curve, gains_at, resamples, summarise
from mavis_dist.evaluate.sweep import Estimate

WHOLE = resamples(1)


def curve(kl: list[float], gain: list[float]) -> Curve:
    """The same on a single prompt, so that means are these numbers."""
    return Curve(np.array(kl)[:, None], np.array(gain)[:, None])


@pytest.mark.parametrize(
    ("kl", "gain"),
    [(0.0, 0.0), (0.5, 1.0), (1.0, 2.0), (2.0, 2.5), (3.0, 3.0), (4.5, 2.0), (6.0, 1.0)],
)
def test_gains_are_read_off_the_lines_through_the_origin_and_the_strengths(kl: float, gain: float) -> None:
    assert gains_at(curve([1.0, 3.0, 6.0], [2.0, 3.0, 1.0]), kl, WHOLE) == pytest.approx([gain])


def test_a_kl_beyond_the_curve_is_not_reached() -> None:
    gain_R = gains_at(curve([1.0, 3.0], [2.0, 3.0]), 3.001, WHOLE)
    assert np.isnan(gain_R).all()
    assert summarise(gain_R).estimate is None


def test_where_more_strength_spends_less_the_first_crossing_counts() -> None:
    assert gains_at(curve([2.0, 1.0, 4.0], [1.0, 5.0, 8.0]), 1.5, WHOLE) == pytest.approx([0.75])
    assert gains_at(curve([2.0, 1.0, 4.0], [1.0, 5.0, 8.0]), 2.5, WHOLE) == pytest.approx([6.5])


def noisy(seed: int, num_prompts: int = 50) -> Curve:
    rng = np.random.default_rng(seed)
    return Curve(rng.uniform([[1.0], [3.0]], [[2.0], [5.0]], (2, num_prompts)), rng.normal(1, 1, (2, num_prompts)))


def test_the_interval_is_that_of_the_mean_over_prompts() -> None:
    """At a strength that every prompt spends the same KL at, the gain is a plain mean: mean ± 1.96 standard errors."""
    gain_P = np.random.default_rng(1).normal(0.3, 1.0, 200)
    flat = Curve(np.full((1, 200), 2.0), gain_P[None])
    at = summarise(gains_at(flat, 2.0, resamples(200)))
    assert at.estimate is not None
    assert at.reached == 1
    error = gain_P.std() / np.sqrt(200)
    assert at.estimate.mean == pytest.approx(gain_P.mean())
    assert at.estimate.high - at.estimate.mean == pytest.approx(1.96 * error, rel=0.1)
    assert at.estimate.mean - at.estimate.low == pytest.approx(1.96 * error, rel=0.1)


def test_every_resample_is_interpolated_separately() -> None:
    """By hand, with the prompts of one resample repeated as often as it drew them."""
    one, weights_RP = noisy(3), resamples(50)
    drawn = np.repeat(np.arange(50), np.rint(weights_RP[7] * 50).astype(int))
    assert len(drawn) == 50
    kl, gain = one.kl_SP[:, drawn].mean(1), one.gain_SP[:, drawn].mean(1)
    assert gains_at(one, 2.5, weights_RP)[7] == pytest.approx(np.interp(2.5, [0, *kl], [0, *gain]))


def test_differences_are_paired_by_prompt() -> None:
    """The variation that all value models share cancels, however much the prompts differ."""
    weights_RP = resamples(50)
    one = noisy(2)
    better = Curve(one.kl_SP, one.gain_SP + one.kl_SP)  # by one sd per nat
    ours, theirs = gains_at(better, 2.5, weights_RP), gains_at(one, 2.5, weights_RP)
    alone, difference = summarise(ours).estimate, summarise(ours - theirs).estimate
    assert alone is not None
    assert difference is not None
    assert alone.high - alone.low > 0.3
    assert [difference.mean, difference.low, difference.high] == pytest.approx([2.5] * 3)


def test_resamples_that_do_not_reach_the_kl_are_counted_and_left_out() -> None:
    one = noisy(4)
    kl = float(one.kl_SP[-1].mean())
    at = summarise(gains_at(one, kl, resamples(50)))
    assert at.estimate is not None
    assert 0.3 < at.reached < 0.7
    assert np.isfinite([at.estimate.low, at.estimate.high]).all()


def test_one_prompt_has_no_interval() -> None:
    at = summarise(gains_at(curve([1.0], [2.0]), 1.0, resamples(1)))
    assert at.estimate == Estimate(2.0, float("-inf"), float("inf"))

"""The limit of steering against distributions where it is known, and against every other policy.

Shapes: P prompts, N answers to each, B strengths.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mavis_dist.core.limit import MIN_DIVERGENCE, MIN_PROMPTS, curve, gain_at, largest_divergence, limits_at, share
from mavis_dist.core.resample import resamples

SEEDS = st.integers(0, 2**32 - 1)
STRENGTHS_B = np.array([0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 20.0])


def rewards(seed: int, num_prompts: int = 6, num_answers: int = 16) -> np.ndarray:
    """Prompts of different difficulty and spread; some answers are equally good."""
    rng = np.random.default_rng(seed)
    rewards_PN = rng.normal(size=(num_prompts, num_answers)) * rng.uniform(0.2, 2, (num_prompts, 1))
    return np.round(rewards_PN + rng.normal(0, 3, (num_prompts, 1)), 1)


# --- known limits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_normal_rewards_gain_as_the_square_root_of_the_divergence(divergence: float, spread: float) -> None:
    """A tilt by b moves the mean by b spread² and costs b² spread² / 2 nats."""
    rewards_PN = np.random.default_rng(0).normal(5.0, spread, (20, 20_000))
    assert gain_at(rewards_PN, divergence) == pytest.approx(spread * math.sqrt(2 * divergence), rel=0.01)


@given(num_good=st.integers(1, 31), strength=st.floats(0.01, 20))
def test_two_rewards_exactly(num_good: int, strength: float) -> None:
    base = num_good / 32
    tilted = base * math.exp(strength) / (base * math.exp(strength) + 1 - base)
    gain_BP, divergence_BP = curve(np.array([[1.0] * num_good + [0.0] * (32 - num_good)]), np.array([strength]))
    bad = (1 - tilted) * math.log((1 - tilted) / (1 - base)) if tilted < 1 else 0.0
    assert gain_BP.item() == pytest.approx(tilted - base, abs=1e-9)
    assert divergence_BP.item() == pytest.approx(tilted * math.log(tilted / base) + bad, abs=1e-9)


def test_where_all_answers_are_the_best_more_divergence_gains_nothing() -> None:
    """Half of the answers are equally good: log 2 nats suffice to give only these."""
    rewards_PN = np.array([[0.0, 1.0] * 8])
    assert gain_at(rewards_PN, 0.6) < 0.5
    assert gain_at(rewards_PN, 1.0) == pytest.approx(0.5) == gain_at(rewards_PN, 1.7)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_the_best_of_n_reaches_nine_tenths_of_the_limit(n: int) -> None:
    """Its divergence is log n - (n - 1) / n nats, its reward a mean of order statistics."""
    ordered_N = np.sort(np.random.default_rng(0).normal(size=20_000))
    below_N = np.arange(1, len(ordered_N) + 1) / len(ordered_N)
    chances_N = np.diff(below_N**n, prepend=0.0)  # that an answer is the best of n
    gain = float((chances_N * ordered_N).sum() - ordered_N.mean())
    limit = gain_at(ordered_N[None], math.log(n) - (n - 1) / n)
    assert 0.9 * limit < gain < limit


@pytest.mark.parametrize(("num_answers", "too_low"), [(16, 0.083), (32, 0.043), (64, 0.025), (128, 0.011)])
def test_few_answers_err_low_as_documented(num_answers: int, too_low: float) -> None:
    rewards_PN = np.random.default_rng(0).normal(size=(4000, num_answers))
    assert gain_at(rewards_PN, 1.0) == pytest.approx(math.sqrt(2) * (1 - too_low), rel=0.01)


# --- properties ----------------------------------------------------------------------------------------------------


@given(seed=SEEDS, evenness=st.floats(0.05, 20))
def test_no_other_weights_of_the_answers_gain_more(seed: int, evenness: float) -> None:
    rewards_PN = rewards(seed)
    num_prompts, num_answers = rewards_PN.shape
    weights_PN = np.random.default_rng(seed).dirichlet([evenness] * num_answers, num_prompts) + 1e-300
    gain = ((weights_PN * rewards_PN).sum(1) - rewards_PN.mean(1)).mean()
    divergence = (weights_PN * np.log(num_answers * weights_PN)).sum(1).mean()
    if divergence <= largest_divergence(num_answers):
        assert gain <= gain_at(rewards_PN, divergence) + 1e-9


@given(seed=SEEDS)
def test_a_stronger_tilt_gains_and_costs_more_on_every_prompt(seed: int) -> None:
    gain_BP, divergence_BP = curve(rewards(seed), STRENGTHS_B)
    assert gain_BP[0] == pytest.approx(0.0, abs=1e-12)
    assert divergence_BP[0] == pytest.approx(0.0, abs=1e-12)
    assert (np.diff(gain_BP, axis=0) >= -1e-9).all()
    assert (np.diff(divergence_BP, axis=0) >= -1e-9).all()
    assert divergence_BP.max() <= math.log(16) + 1e-9


@given(seed=SEEDS, strength=st.floats(0.1, 3))
def test_the_gain_at_the_divergence_of_a_tilt_is_the_gain_of_the_tilt(seed: int, strength: float) -> None:
    rewards_PN = rewards(seed)
    gain_BP, divergence_BP = curve(rewards_PN, np.array([strength]))
    if divergence_BP.mean() <= largest_divergence(16):
        assert gain_at(rewards_PN, divergence_BP.mean()) == pytest.approx(gain_BP.mean(), abs=1e-6)


@given(seed=SEEDS, factor=st.floats(0.01, 100), divergence=st.floats(1e-4, 1.7))
def test_the_level_of_a_prompt_does_not_matter_and_the_unit_is_that_of_the_rewards(
    seed: int, factor: float, divergence: float
) -> None:
    rewards_PN = rewards(seed)
    shift_P1 = np.random.default_rng(seed).normal(0, 10, (len(rewards_PN), 1))
    expected = factor * gain_at(rewards_PN, divergence)
    assert gain_at(factor * (rewards_PN + shift_P1), divergence) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_nothing_is_said_beyond_what_the_answers_tell() -> None:
    rewards_PN = rewards(0)
    assert gain_at(rewards_PN, 0.0) == 0.0
    assert math.isfinite(gain_at(rewards_PN, largest_divergence(16)))
    for divergence in (largest_divergence(16) + 1e-6, -0.1, math.nan, math.inf):
        assert math.isnan(gain_at(rewards_PN, divergence))


# --- shares --------------------------------------------------------------------------------------------------------


def tilted_policy(seed: int, strength: float, num_prompts: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gain of a sampled answer, divergence, and answers of the base; rewards are normal with sd 1 per prompt."""
    rng = np.random.default_rng(seed)
    mean_P1 = rng.normal(size=(num_prompts, 1))
    base_PN = mean_P1 + rng.normal(size=(num_prompts, 64))
    tilted_P = mean_P1[:, 0] + strength + rng.normal(size=num_prompts)
    return tilted_P - base_PN.mean(1), np.full(num_prompts, strength**2 / 2), base_PN


@pytest.mark.parametrize("strength", [0.7, 1.4])
def test_the_tilt_itself_reaches_the_whole_limit(strength: float) -> None:
    shares = [share(*tilted_policy(seed, strength)) for seed in range(30)]
    covered = [found is not None and found.low < 1 < found.high for found in shares]
    assert sum(covered) >= 26  # 95 % of 30, less chance
    assert np.mean([found.mean for found in shares if found]) == pytest.approx(1.0, abs=0.06)


def test_half_the_gain_at_the_same_divergence_is_half_the_share() -> None:
    gain_P, divergence_P, base_PN = tilted_policy(0, 1.0)
    whole, half = share(gain_P, divergence_P, base_PN), share(gain_P / 2, divergence_P, base_PN)
    assert whole is not None
    assert half is not None
    assert np.array(whole) / 2 == pytest.approx(np.array(half))


def test_the_interval_measures_the_limit_as_the_share_does() -> None:
    """Equal prompts: every resample is the whole."""
    base_PN = np.tile(rewards(1, num_prompts=1), (MIN_PROMPTS, 1))
    for divergence in (MIN_DIVERGENCE, 0.3, 1.0, largest_divergence(16)):
        found = share(np.full(MIN_PROMPTS, 0.4), np.full(MIN_PROMPTS, divergence), base_PN)
        assert found is not None
        assert found.mean == pytest.approx(0.4 / gain_at(base_PN, divergence))
        assert (found.low, found.high) == pytest.approx((found.mean, found.mean), rel=1e-3)


def test_limits_of_resamples_are_those_of_the_repeated_prompts() -> None:
    base_PN = rewards(2, num_prompts=12, num_answers=64)
    counts_RP = resamples(12, 20)
    divergence_R = np.linspace(0.05, largest_divergence(64), 20)
    limit_R = limits_at(base_PN, divergence_R, counts_RP / 12)
    for counts_P, divergence, limit in zip(counts_RP, divergence_R, limit_R, strict=True):
        drawn_PN = np.repeat(base_PN, counts_P, axis=0)
        assert limit == pytest.approx(gain_at(drawn_PN, divergence), rel=2e-3)
    assert limits_at(np.ones((12, 4)), divergence_R, counts_RP / 12).tolist() == [0.0] * 20


def test_a_prompt_with_much_divergence_widens_the_interval() -> None:
    """Gain, divergence and limit are resampled together."""
    gain_P, divergence_P, base_PN = tilted_policy(0, 1.0)
    even = share(np.ones_like(gain_P), divergence_P, base_PN)
    uneven = share(np.ones_like(gain_P), divergence_P * np.tile([0.1, 1.9], 30), base_PN)
    assert even is not None
    assert uneven is not None
    assert uneven.mean == pytest.approx(even.mean)
    assert uneven.high - uneven.low > 2 * (even.high - even.low)


@pytest.mark.parametrize("divergence", [0.0, MIN_DIVERGENCE / 2, largest_divergence(16) + 0.1, math.nan])
def test_without_a_known_limit_there_is_no_share(divergence: float) -> None:
    assert share(np.ones(20), np.full(20, divergence), rewards(0, 20)) is None


def test_equal_rewards_have_no_limit_to_share() -> None:
    assert share(np.zeros(20), np.full(20, 0.5), np.full((20, 16), 0.1)) is None


def test_few_prompts_have_a_share_without_an_interval() -> None:
    few = share(np.ones(MIN_PROMPTS - 1), np.full(MIN_PROMPTS - 1, 0.5), rewards(0, MIN_PROMPTS - 1))
    assert few is not None
    assert math.isfinite(few.mean)
    assert (few.low, few.high) == (-math.inf, math.inf)
    one_that_varies = np.zeros((MIN_PROMPTS, 16))
    one_that_varies[0] = rewards(0, 1)
    only = share(np.ones(MIN_PROMPTS), np.full(MIN_PROMPTS, 0.1), one_that_varies)
    assert only is not None
    assert only.low == -math.inf

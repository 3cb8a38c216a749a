"""The tilted policy against exactly solvable MDPs, brute force, and the statistics of its draws.

Shapes: B rows, V vocabulary, K candidates, M objectives.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mavis_dist.core import noise
from mavis_dist.core.tilt import candidates, choose, tilt
from tests.exact import divergence, log_ratio
from tests.toy import ToyMDP, truncate

INF = float("inf")
NUM_DRAWS = 40_000


# --- optimality of the tilt --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_tilting_by_the_optimal_soft_value_gives_the_kl_optimal_answers(seed):
    """pi(y) ∝ pi_ref(y) exp(R(y) / zeta) over all answers, enumerated: the maximum of E[R] - zeta KL."""
    mdp, zeta = ToyMDP(seed, vocab=5, horizon=4, top_k=3), 0.3 + 0.1 * seed
    tilted_F = mdp.answer_logprobs(mdp.ratio(mdp.delta(mdp.optimal_values(zeta), beta=1 / zeta)))
    base_F = mdp.answer_logprobs(torch.zeros_like(mdp.base_SK))
    best_F = torch.log_softmax(base_F + mdp.reward_F / zeta, 0)
    torch.testing.assert_close(tilted_F.exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(tilted_F, best_F, atol=1e-10, rtol=0)


@pytest.mark.parametrize("seed", range(10))
def test_soft_policy_iteration_reaches_the_optimum_within_horizon_steps(seed):
    """Starting from the base policy. One step is not enough: values of a policy are not yet optimal values."""
    mdp, zeta = ToyMDP(seed, vocab=5, horizon=4, top_k=3), 0.5
    best_SK = mdp.ratio(mdp.delta(mdp.optimal_values(zeta), beta=1 / zeta))
    errors = [float((ratio_SK - best_SK).abs().max()) for ratio_SK in iterate(mdp, zeta, 1 / zeta, mdp.horizon)]
    assert errors[1] > 1e-3
    assert errors[mdp.horizon] < 1e-10


def test_soft_policy_iteration_never_lowers_the_soft_value_of_any_state():
    """With zeta = 1 / beta and one truncation throughout: 60 MDPs, 5 iterations, all states, up to rounding."""
    worst = min(largest_fall(ToyMDP(seed), zeta, 1 / zeta) for seed, zeta in zip(range(60), zetas(), strict=False))
    assert worst > -1e-12


def test_a_price_other_than_one_over_beta_can_lower_soft_values():
    """The equality zeta = 1 / beta matters: at beta = 3 / zeta some of these MDPs lose far more than rounding."""
    falls = [largest_fall(ToyMDP(seed), zeta, 3 / zeta) for seed, zeta in zip(range(60), zetas(), strict=False)]
    assert sum(fall < -1e-3 for fall in falls) > 5


def zetas():
    return itertools.cycle([0.2, 0.5, 1.0, 2.0])


def iterate(mdp, zeta, beta, num):
    """Log-ratios of the base policy and of `num` rounds of soft policy iteration."""
    ratio_SK = torch.zeros_like(mdp.base_SK)
    yield ratio_SK
    for _ in range(num):
        ratio_SK = mdp.ratio(mdp.delta(mdp.values(ratio_SK, zeta), beta))
        yield ratio_SK


def largest_fall(mdp, zeta, beta):
    values = torch.stack([mdp.values(ratio_SK, zeta) for ratio_SK in iterate(mdp, zeta, beta, num=5)])
    return float(values.diff(dim=0).min())


def test_weights_mix_values_linearly():
    """Tilting by several objectives is tilting by their weighted sum; values of weight 0 are ignored."""
    torch.manual_seed(0)
    values_BKM, baseline_BM = torch.randn(6, 5, 3), torch.randn(6, 3)
    weights_BM = torch.tensor([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]]).repeat(3, 1)
    mixed_BK = tilt_of((values_BKM * weights_BM[:, None]).sum(-1, keepdim=True), (baseline_BM * weights_BM).sum(-1))
    values_BKM[1::2, :, 1:], baseline_BM[1::2, 1:] = float("nan"), float("nan")
    apart_BK = tilt(
        values_BKM, baseline_BM, weights_BM, torch.full((6,), 3.0), torch.full((6,), INF), torch.zeros(6, 5).bool()
    )
    torch.testing.assert_close(apart_BK, mixed_BK, atol=1e-5, rtol=0)


def tilt_of(values_BK1, baseline_B):
    num_rows, num_candidates, _ = values_BK1.shape
    cap_B, uncapped_BK = torch.full((num_rows,), INF), torch.zeros(num_rows, num_candidates).bool()
    return tilt(
        values_BK1, baseline_B[:, None], torch.ones(num_rows, 1), torch.full((num_rows,), 3.0), cap_B, uncapped_BK
    )


# --- distribution of the draws -----------------------------------------------------------------------------------

LOGPROBS = np.log([0.42, 0.05, 0.2, 0.03, 0.2, 0.1])
VALUES = np.array([-0.4, 0.9, 0.1, 1.1, -0.2, 0.3])
BASELINE, BETA, IDS = 0.05, 2.0, [7, 3, 20, 11, 2, 5]
IS_EOS = np.array([False, False, False, True, False, False])


@pytest.mark.parametrize("temperature", [0.4, 1.0, 1.7])
@pytest.mark.parametrize("cap", [INF, 0.5])
def test_draws_follow_the_tilted_distribution_at_every_temperature(cap, temperature):
    """Chi-square of 40,000 draws against softmax((log p + delta) / T), the end token exempt from the cap.

    A correct sampler fails one seed in 1,000; a cap on the end token, or T on one part only, fails every seed.
    """
    delta = BETA * (VALUES - BASELINE)
    delta = np.where(IS_EOS, delta, np.minimum(delta, cap))
    expected = np.exp((LOGPROBS + delta) / temperature)
    expected *= NUM_DRAWS / expected.sum()
    counts = np.bincount(draw(cap, temperature), minlength=len(expected))
    assert stats.chisquare(counts, expected).pvalue > 1e-3


def draw(cap, temperature):
    """Indices of tokens drawn at many positions of a few streams."""
    shape = (NUM_DRAWS, len(IDS))
    logprobs_BK, ids_BK = torch.tensor(LOGPROBS).expand(shape), torch.tensor(IDS).expand(shape)
    delta_BK = tilt(
        torch.tensor(VALUES).expand(shape)[..., None],
        torch.full((NUM_DRAWS, 1), BASELINE),
        torch.ones(NUM_DRAWS, 1),
        torch.full((NUM_DRAWS,), BETA),
        torch.full((NUM_DRAWS,), cap),
        torch.tensor(IS_EOS).expand(shape),
    )
    streams_B = torch.tensor([noise.stream(3, index) for index in range(8)]).repeat(NUM_DRAWS // 8)
    gumbel_BK = noise.gumbel(streams_B, torch.arange(NUM_DRAWS) // 8, ids_BK)
    return choose(logprobs_BK + temperature * gumbel_BK, delta_BK, ids_BK).numpy()


@given(st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_temperature_zero_chooses_the_mode_and_the_smaller_id_among_ties(data):
    """Values on a coarse grid, so that most cases have ties; ids in any order."""
    num_candidates = data.draw(st.integers(1, 8))
    grid = st.lists(st.integers(-2, 2).map(lambda x: x / 2), min_size=num_candidates, max_size=num_candidates)
    logprobs, delta = data.draw(grid), data.draw(grid)
    ids = data.draw(st.permutations(range(num_candidates)))
    gumbel_BK = noise.gumbel(torch.tensor([1]), torch.tensor([0]), torch.tensor([ids]))
    index = choose(
        torch.tensor([logprobs], dtype=torch.float64) + 0.0 * gumbel_BK,
        torch.tensor([delta], dtype=torch.float64),
        torch.tensor([ids]),
    )
    assert int(index) == min(range(num_candidates), key=lambda k: (-(logprobs[k] + delta[k]), ids[k]))


def test_noise_is_standard_gumbel_and_does_not_depend_on_the_batch():
    """Kolmogorov-Smirnov at 1 in 1,000; every number is the same when computed alone."""
    streams_B = torch.tensor([noise.stream(0, index) for index in range(50)])
    positions_B, ids_BK = torch.arange(50), torch.arange(400).expand(50, 400)
    gumbel_BK = noise.gumbel(streams_B, positions_B, ids_BK)
    assert stats.kstest(gumbel_BK.flatten().numpy(), "gumbel_r").pvalue > 1e-3
    for row, token in [(0, 0), (17, 399), (49, 5)]:
        alone = noise.gumbel(streams_B[row : row + 1], positions_B[row : row + 1], torch.tensor([[token]]))
        assert float(alone) == float(gumbel_BK[row, token])


OFFSETS = [offset for offset in itertools.product([-1, 0, 1], repeat=3) if offset > (0, 0, 0)]


@pytest.mark.parametrize("offset", OFFSETS)
def test_noise_is_independent_over_streams_positions_and_tokens(offset):
    """Between neighbours in any direction, diagonals included: |correlation| < 4.5 / sqrt(n), 1 in 10,000 for all 13.

    Streams here are consecutive numbers, harder than the hashes in use.
    """
    uniform = torch.exp(-torch.exp(-noise_block())).numpy() - 0.5
    a = uniform[tuple(slice(max(0, -step), min(40, 40 - step)) for step in offset)].ravel()
    b = uniform[tuple(slice(max(0, step), min(40, 40 + step)) for step in offset)].ravel()
    assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / math.sqrt(len(a))


def noise_block():
    """Gumbel noise [40 streams, 40 positions, 40 tokens]."""
    streams_B, positions_B = torch.arange(40).repeat_interleave(40), torch.arange(40).repeat(40)
    return noise.gumbel(streams_B, positions_B, torch.arange(40).expand(1600, 40)).reshape(40, 40, 40)


@pytest.mark.parametrize(("one", "other"), [((5, 0), (5, 1)), ((5, 0), (6, 0)), ((5, 1), (51,)), ((5, 0), (5, "0"))])
def test_streams_of_different_paths_share_no_noise(one, other):
    ids_BK, positions_B = torch.arange(100).expand(50, 100), torch.arange(50)
    a, b = (noise.gumbel(torch.tensor([noise.stream(*path)] * 50), positions_B, ids_BK) for path in (one, other))
    assert not (a == b).any()


# --- candidates --------------------------------------------------------------------------------------------------


def obvious_candidates(logits, top_k, top_p, min_p, temperature):
    """Token ids and log p of one row, by sorting."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[:top_k]
    scaled = np.array([logits[token] for token in order]) / (temperature or 1.0)
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    kept = [
        token
        for rank, token in enumerate(order)
        if rank == 0 or ((top_p == 1 or probs[:rank].sum() < top_p) and probs[rank] >= min_p * probs[0])
    ]
    left = np.array([logits[token] for token in kept])
    return kept, left - left.max() - np.log(np.exp(left - left.max()).sum())


@pytest.mark.parametrize("step", [0.0, 0.25, 1.0], ids=["continuous", "coarse", "mostly ties"])
@pytest.mark.parametrize("seed", range(15))
def test_candidates_match_a_plain_sort(seed, step):
    """Different top_k, top_p, min_p and temperature per row; with a step, logits tie as bfloat16 ones do."""
    rng = np.random.default_rng([seed, int(100 * step)])
    num_rows, num_tokens = 8, int(rng.integers(5, 60))
    logits = rng.normal(scale=2.0, size=(num_rows, num_tokens))
    logits = (np.round(logits / step) * step if step else logits).astype(np.float32)
    logits[0, 3] = -np.inf
    top_k = rng.integers(1, num_tokens + 10, num_rows)
    top_p = np.where(rng.random(num_rows) < 0.5, rng.random(num_rows), 1.0)
    min_p = np.where(rng.random(num_rows) < 0.5, rng.random(num_rows) / 3, 0.0)
    temperature = rng.choice([0.0, 0.5, 1.0, 2.0], num_rows)
    ids_BK, logprobs_BK = candidates(*map(torch.from_numpy, (logits, top_k, top_p, min_p, temperature)))
    for row in range(num_rows):
        settings_of_row = top_k[row], top_p[row], min_p[row], temperature[row]
        kept, logprobs = obvious_candidates(logits[row].astype(np.float64), *settings_of_row)
        finite = [token for token, logprob in zip(kept, logprobs, strict=True) if logprob > -INF]
        is_present_K = logprobs_BK[row] > -INF
        assert ids_BK[row][is_present_K].tolist() == finite
        assert is_present_K.tolist() == sorted(is_present_K.tolist(), reverse=True), "missing candidates come last"
        np.testing.assert_allclose(logprobs_BK[row][is_present_K], logprobs[: len(finite)], atol=1e-12)


@pytest.mark.parametrize("num_tokens", [5, 300, 5000])
@pytest.mark.parametrize("top_k", [1, 4, 40])
def test_ties_at_the_border_of_the_candidate_set_are_broken_by_token_id(top_k, num_tokens):
    """For any order in which torch.topk returns ties: one clear maximum, all others equal."""
    logits_BV = torch.zeros(2, num_tokens)
    logits_BV[1, num_tokens - 1] = 1.0
    ids_BK, _ = truncate(logits_BV, top_k)
    count = min(top_k, num_tokens)
    assert ids_BK[0].tolist() == list(range(count))
    assert ids_BK[1].tolist() == [num_tokens - 1, *range(count - 1)]


# --- divergence --------------------------------------------------------------------------------------------------


def random_step(seed, temperature):
    """A row with an absent candidate, its tilt, and brute-force log pi and log p_T of those present."""
    rng = np.random.default_rng(seed)
    logprobs, delta = np.log(rng.dirichlet(np.ones(6))), rng.normal(scale=2.0, size=7)
    log_tilted, log_base = (logprobs + delta[:6]) / temperature, logprobs / temperature
    log_tilted, log_base = (x - math.log(sum(math.exp(y) for y in x)) for x in (log_tilted, log_base))
    row = torch.tensor([[*logprobs, -INF]]), torch.from_numpy(delta)[None], torch.tensor([temperature])
    return row, log_tilted, log_base


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(10))
def test_divergence_and_log_ratio_match_brute_force(seed, temperature):
    """KL of the sampled distribution to the base model sampled at the same temperature."""
    row, log_tilted, log_base = random_step(seed, temperature)
    np.testing.assert_allclose(log_ratio(*row)[0, :6], log_tilted - log_base, atol=1e-12)
    np.testing.assert_allclose(divergence(*row), (np.exp(log_tilted) * (log_tilted - log_base)).sum(), atol=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_divergence_at_temperature_one_is_mean_tilt_minus_log_partition(seed):
    """KL = sum pi delta - log Z with Z = sum p e^delta."""
    (logprobs_BK, delta_BK, _), log_tilted, _ = random_step(seed, 1.0)
    log_partition = torch.logsumexp(logprobs_BK + delta_BK, -1)
    mean_tilt = float((torch.from_numpy(np.exp(log_tilted)) * delta_BK[0, :6]).sum())
    np.testing.assert_allclose(divergence(logprobs_BK, delta_BK, torch.ones(1)), mean_tilt - log_partition, atol=1e-12)


@given(st.integers(0, 10_000), st.sampled_from([0.3, 1.0, 1.9]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_without_a_tilt_the_divergence_is_exactly_zero(seed, temperature):
    (logprobs_BK, delta_BK, temperature_B), _, _ = random_step(seed, temperature)
    nothing_BK = torch.zeros_like(delta_BK)
    assert divergence(logprobs_BK, nothing_BK, temperature_B).tolist() == [0.0]
    assert (log_ratio(logprobs_BK, nothing_BK, temperature_B) == 0).all()


def test_temperature_zero_has_no_divergence_and_no_log_ratio():
    (logprobs_BK, delta_BK, _), _, _ = random_step(0, 1.0)
    assert divergence(logprobs_BK, delta_BK, torch.zeros(1)).isnan().all()
    assert (log_ratio(logprobs_BK, delta_BK, torch.zeros(1)) == 0).all()

"""The predicted scorer: the token of all candidates evaluated, from few of them, and its estimate of the divergence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats

from mavis_dist.core import noise
from mavis_dist.core.tilt import choose, evaluation_order
from mavis_dist.decode import Engine, LocalGuide, Request
from mavis_dist.decode import scorer as scoring
from mavis_dist.decode.request import Scorer
from mavis_dist.decode.scorer import Drafts, Scores, Steering, scores_of, search, with_predictions
from tests.exact import divergence, log_partition
from tests.fakes import VOCAB, tiny_base, tiny_student, tiny_value
from tests.unit.decode.test_lazy_scorer import EOS_ID, NUM_CANDIDATES, Table, drafts, mixed_requests

INF = float("inf")
NUM_DRAWS = 40_000
BETA = 1.5
STUDENT = tiny_student(5, num_objectives=2)
STUDENTS = {"a": (STUDENT, 0), "b": (STUDENT, 1)}
OWN = {"a": (STUDENT.model, 0), "b": (STUDENT.model, 1)}  # as of a published distilled model


def steering_of(scorers: list[Scorer], cap: float, residual_cap: float, num_first: int, beta: float) -> Steering:
    num_rows = len(scorers)
    first = {Scorer.FULL: NUM_CANDIDATES, Scorer.LAZY: 3, Scorer.PREDICTED: num_first}
    return Steering(
        is_guided_B=torch.ones(num_rows, dtype=torch.bool),
        num_first_B=torch.tensor([first[scorer] for scorer in scorers]),
        weights_BM=torch.ones(num_rows, 1),
        baseline_BM=torch.zeros(num_rows, 1),
        beta_B=torch.full((num_rows,), beta, dtype=torch.float64),
        cap_B=torch.full((num_rows,), cap, dtype=torch.float64),
        is_predicted_B=torch.tensor([scorer is Scorer.PREDICTED for scorer in scorers]),
        residual_cap_B=torch.full((num_rows,), residual_cap, dtype=torch.float64),
    )


def scored(
    drafted: Drafts, values_BV: torch.Tensor, predicted_BV: torch.Tensor, steering: Steering
) -> tuple[Drafts, Scores]:
    drafted = with_predictions(drafted, steering, predicted_BV.gather(1, drafted.ids_BK)[:, :, None])
    guide: Any = Table(values_BV)
    return drafted, scores_of(drafted, steering, search(drafted, steering, guide, range(len(values_BV))))


def tilt(
    drafted: Drafts, values_BV: torch.Tensor, predicted_BV: torch.Tensor, cap: float, residual_cap: float, beta: float
) -> torch.Tensor:
    """min(U, d' + min(d - d', U_r)); d for end-of-answer tokens."""
    exact_BK, predicted_BK = (beta * x.gather(1, drafted.ids_BK) for x in (values_BV, predicted_BV))
    capped_BK = (predicted_BK + (exact_BK - predicted_BK).clamp(max=residual_cap)).clamp(max=cap)
    return torch.where(drafted.is_eos_BK, exact_BK, capped_BK)


def tokens(drafted: Drafts, delta_BK: torch.Tensor) -> torch.Tensor:
    return drafted.ids_BK.gather(1, choose(drafted.phi_BK, delta_BK, drafted.ids_BK)[:, None])[:, 0]


def values_and_predictions(num_rows: int, seed: int, grid: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of variance 1, of which predictions explain half."""
    generator = torch.Generator().manual_seed(seed)
    predicted_BV, rest_BV = torch.randn(2, num_rows, 60, generator=generator, dtype=torch.float64) / 2**0.5
    pair = predicted_BV + rest_BV, predicted_BV
    rounded_BV, rounded_predicted_BV = ((x / grid).round() * grid if grid else x.float().double() for x in pair)
    return rounded_BV, rounded_predicted_BV


@pytest.mark.parametrize("grid", [0.0, 0.5])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 1.6])
@pytest.mark.parametrize("cap", [0.5, 2.5, INF])
@pytest.mark.parametrize("residual_cap", [0.25, 1.0, INF])
def test_it_draws_the_token_of_all_candidates(
    grid: float, temperature: float, cap: float, residual_cap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,000 rows a case, of which a third are lazy and a third full; numbers on a grid tie exactly, also at bounds."""
    num_rows = 2000
    scorers = [[Scorer.PREDICTED, Scorer.LAZY, Scorer.FULL][b % 3] for b in range(num_rows)]
    drafted = drafts(num_rows, 1, torch.full((num_rows,), temperature, dtype=torch.float64), grid)
    values_BV, predicted_BV = values_and_predictions(num_rows, 2, grid)
    delta_BK = tilt(drafted, values_BV, predicted_BV, cap, residual_cap, BETA)
    capped_BK = tilt(drafted, values_BV, predicted_BV, cap, INF, BETA)
    is_predicted_B = torch.tensor([scorer is Scorer.PREDICTED for scorer in scorers])
    expected = tokens(drafted, torch.where(is_predicted_B[:, None], delta_BK, capped_BK))
    present_B = (drafted.logprobs_BK > -INF).sum(-1)
    for num_first, slack in ((1, INF), (16, 0.0), (16, 0.5), (NUM_CANDIDATES, INF)):
        monkeypatch.setattr(scoring, "SLACK", slack)
        steering = steering_of(scorers, cap, residual_cap, num_first, BETA)
        ordered, scores = scored(drafted, values_BV, predicted_BV, steering)
        assert torch.equal(tokens(ordered, scores.delta_BK), expected)
        assert (scores.num_evaluated_B <= present_B).all()
        assert torch.equal(scores.num_evaluated_B[2::3], present_B[2::3])
        if num_first < NUM_CANDIDATES and residual_cap < 1:
            assert scores.num_evaluated_B[::3].sum() < 0.35 * present_B[::3].sum()
        # What is evaluated comes first, so that an index among the candidates is one among the evaluated ones.
        is_evaluated_BK = scores.values_BKM[..., 0].isfinite()
        assert torch.equal(is_evaluated_BK.sum(-1), scores.num_evaluated_B)
        assert (is_evaluated_BK.int().diff(dim=-1) <= 0).all()


def test_lazy_rows_do_not_notice_predicted_ones() -> None:
    """The same candidates are evaluated, in the same order, with the same estimates."""
    num_rows = 600
    drafted = drafts(num_rows, 3, torch.ones(num_rows, dtype=torch.float64), 0.0)
    values_BV, predicted_BV = values_and_predictions(num_rows, 4)
    alone = steering_of([Scorer.LAZY] * num_rows, 2.5, INF, 1, BETA)
    mixed = steering_of([Scorer.LAZY, Scorer.PREDICTED] * (num_rows // 2), 2.5, 1.0, 1, BETA)
    guide: Any = Table(values_BV)
    expected = scores_of(drafted, alone, search(drafted, alone, guide, range(num_rows)))
    ordered, scores = scored(drafted, values_BV, predicted_BV, mixed)
    assert torch.equal(ordered.ids_BK[::2], drafted.ids_BK[::2])
    for name in ("delta_BK", "num_evaluated_B", "divergence_B", "logratio_BK"):
        assert torch.equal(getattr(scores, name)[::2], getattr(expected, name)[::2])


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    """Chi-square against softmax((log p + delta) / T): one failure in 1,000 by chance; seeds are fixed."""
    one = drafts(20, 8, torch.ones(20, dtype=torch.float64), 0.0)
    b = int((one.logprobs_BK > -INF).sum(-1).argmax())
    ids_BK, logprobs_BK = (x[b : b + 1].expand(NUM_DRAWS, -1).contiguous() for x in (one.ids_BK, one.logprobs_BK))
    streams_B = torch.tensor([noise.stream(7, draw) for draw in range(NUM_DRAWS)])
    gumbel_BK = noise.gumbel(streams_B, torch.zeros(NUM_DRAWS, dtype=torch.int64), ids_BK)
    temperature_B = torch.full((NUM_DRAWS,), temperature, dtype=torch.float64)
    drafted = Drafts(ids_BK, logprobs_BK, logprobs_BK + temperature * gumbel_BK, ids_BK == EOS_ID, temperature_B)
    drafted = drafted.reordered(evaluation_order(logprobs_BK, drafted.phi_BK, drafted.is_eos_BK))
    values_BV, predicted_BV = (x.expand(NUM_DRAWS, -1).contiguous() for x in values_and_predictions(1, 9))
    steering = steering_of([Scorer.PREDICTED] * NUM_DRAWS, 2.0, 0.5, 1, BETA)
    ordered, scores = scored(drafted, values_BV, predicted_BV, steering)
    counts_V = torch.bincount(tokens(ordered, scores.delta_BK), minlength=60)
    delta_BK = tilt(drafted, values_BV, predicted_BV, 2.0, 0.5, BETA)
    pi_K = torch.softmax((drafted.logprobs_BK[0] + delta_BK[0]) / temperature, -1)
    expected_V = torch.zeros(60, dtype=torch.float64).index_add_(0, drafted.ids_BK[0], pi_K) * NUM_DRAWS
    is_likely_V = expected_V > 5
    observed = [*counts_V[is_likely_V].tolist(), int(counts_V[~is_likely_V].sum())]
    expected = [*expected_V[is_likely_V].tolist(), float(expected_V[~is_likely_V].sum())]
    assert stats.chisquare(observed, expected, sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.4])
def test_predictions_complete_the_estimates(temperature: float) -> None:
    """Tilts as those of a distilled model, in nats: predictions of sd 0.25, errors of 0.24 that all candidates of a
    state share, and of 0.19 that they do not. The pooled divergence is within 8 %, log Z within 0.01.
    """
    num_rows = 2000
    temperature_B = torch.full((num_rows,), temperature, dtype=torch.float64)
    drafted = drafts(num_rows, 3, temperature_B, 0.0)
    generator = torch.Generator().manual_seed(4)
    predicted_BV, own_BV = torch.randn(2, num_rows, 60, generator=generator, dtype=torch.float64)
    shared_B1 = torch.randn(num_rows, 1, generator=generator, dtype=torch.float64)
    predicted_BV = (0.25 * predicted_BV).float().double()
    values_BV = (predicted_BV + 0.24 * shared_B1 + 0.19 * own_BV).float().double()
    steering = steering_of([Scorer.PREDICTED] * num_rows, 3.0, 1.0, 16, 1.0)
    ordered, scores = scored(drafted, values_BV, predicted_BV, steering)
    delta_BK = tilt(ordered, values_BV, predicted_BV, 3.0, 1.0, 1.0)
    exact_B, log_z_B = (f(ordered.logprobs_BK, delta_BK, temperature_B) for f in (divergence, log_partition))
    assert float(scores.divergence_B.sum() / exact_B.sum()) == pytest.approx(1.0, abs=0.08)
    estimated_B = (delta_BK / temperature - scores.logratio_BK)[:, 0]  # the first candidate is always evaluated
    assert float((estimated_B - log_z_B).mean()) == pytest.approx(0.0, abs=0.01)
    assert scores.num_evaluated_B.double().mean() < 3


def test_estimates_are_exact_where_all_is_evaluated_and_zero_without_a_tilt(monkeypatch: pytest.MonkeyPatch) -> None:
    drafted = drafts(200, 3, torch.ones(200, dtype=torch.float64), 0.0)
    values_BV, predicted_BV = values_and_predictions(200, 4)
    steering = steering_of([Scorer.PREDICTED] * 200, 3.0, 1.0, NUM_CANDIDATES, BETA)
    _, scores = scored(drafted, 0 * values_BV, 0 * predicted_BV, steering)
    assert (scores.divergence_B == 0).all()
    assert (scores.logratio_BK[:, 0] == 0).all()
    monkeypatch.setattr(scoring, "SLACK", INF)
    ordered, scores = scored(drafted, values_BV, predicted_BV, steering)
    delta_BK = tilt(ordered, values_BV, predicted_BV, 3.0, 1.0, BETA)
    exact_B = divergence(ordered.logprobs_BK, delta_BK, ordered.temperature_B)
    torch.testing.assert_close(scores.divergence_B, exact_B, atol=1e-10, rtol=0)


def requests(scorer: Scorer, **fields: Any) -> list[Request]:
    return mixed_requests(**{"beta": 6.0, "tilt_cap": 2.5, "residual_cap": 0.5, "scorer": scorer, **fields})


def answers(asked: list[Request], models: Any = OWN, **limits: Any) -> list[tuple[list[int], list[int]]]:
    engine = Engine(tiny_base(eos_boost=1.0), LocalGuide(models, STUDENTS), **limits)
    return [(choice.tokens, choice.num_scored) for [choice] in engine.generate(asked)]


@pytest.mark.parametrize("caps", [(2.5, 0.5), (None, 0.5), (1.0, 1.0), (None, None)])
@pytest.mark.parametrize("guide_every", [1, 2])
def test_the_engine_generates_the_answers_of_all_candidates(
    caps: tuple[float | None, float | None], guide_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real decoders and caches: second calls, kept alternatives, rows that end, scorers mixed in one batch."""
    cap, residual_cap = caps
    asked = requests(Scorer.PREDICTED, tilt_cap=cap, residual_cap=residual_cap, guide_every=guide_every)
    lazy = answers(asked)
    mixed = [replace(request, scorer=scorer, id=f"{request.id} {scorer}") for request in asked for scorer in Scorer]
    neighbours = dict(zip([r.id for r in mixed], answers(mixed, max_rows=4), strict=True))
    assert [neighbours[f"{r.id} {Scorer.PREDICTED}"] for r in asked] == lazy
    monkeypatch.setattr(scoring, "FIRST_CHUNK_UNREAD", VOCAB)
    monkeypatch.setattr(scoring, "SLACK", INF)
    full = answers(asked)
    assert [tokens for tokens, _ in lazy] == [tokens for tokens, _ in full]
    num_lazy, num_full = (sum(sum(num_scored) for _, num_scored in found) for found in (lazy, full))
    assert num_lazy == num_full if caps == (None, None) else num_lazy < num_full


def test_without_a_residual_cap_it_is_lazy() -> None:
    """With the student's own value model, as published."""
    predicted = answers(requests(Scorer.PREDICTED, residual_cap=None))
    assert [tokens for tokens, _ in predicted] == [tokens for tokens, _ in answers(requests(Scorer.LAZY))]


def test_without_a_tilt_it_is_the_base_model() -> None:
    plain = [tokens for tokens, _ in answers(requests(Scorer.FULL, beta=0.0))]
    assert [tokens for tokens, _ in answers(requests(Scorer.PREDICTED, beta=0.0))] == plain
    assert [tokens for tokens, _ in answers(requests(Scorer.PREDICTED, beta=1e-9))] == plain


def test_a_token_costs_one_forward_pass_of_the_student(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own, over the candidates: the kept one brings the next predictions. Value models of others do not run."""
    guide = LocalGuide({"a": tiny_value(1), "b": tiny_value(2)}, STUDENTS)
    *others, checked = guide._trunks
    for trunk in others:
        monkeypatch.setattr(trunk.slots, "extend", None)
        monkeypatch.setattr(trunk.slots, "branch", None)
    passes: list[int] = []
    step = checked.slots._decoder.step
    monkeypatch.setattr(checked.slots._decoder, "step", lambda x: [passes.append(len(x.tokens_N)), step(x)][1])
    asked = requests(Scorer.PREDICTED, tilt_cap=None, residual_cap=None)[:1]  # all candidates in the first call
    [[choice]] = Engine(tiny_base(), guide).generate(asked)
    assert passes == [len(asked[0].prompt), *choice.num_scored]

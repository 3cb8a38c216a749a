"""Reported distributions of tokens: exact for `full` and without guidance; `lazy` omits what it did not evaluate."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mavis_dist.decode import (
    Engine,
    LocalGuide,
    Preference,
    Request,
    RequestError,
    SamplingParams,
    Scorer,
    TokenLogprobs,
)
from tests.fakes import tiny_base, tiny_value

PROMPT = (5, 6, 7, 8)
TOP_K = 20
PARAMS = SamplingParams(max_tokens=12, temperature=0.8, top_k=TOP_K, seed=3)
PREFERENCES = (Preference("a", (9, *PROMPT), 0.7), Preference("b", (11, *PROMPT), 0.3))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_base(), LocalGuide({"a": tiny_value(1, scale=2.0)}))


REQUEST = Request("r", PROMPT, {"a": 1.0}, 3.0, params=PARAMS, scorer=Scorer.FULL, top_logprobs=TOP_K)


def request(**fields) -> Request:
    return replace(REQUEST, **fields)


def logprobs_of(engine: Engine, request: Request) -> list[TokenLogprobs]:
    [[choice]] = engine.generate([request])
    assert [reported.chosen.token for reported in choice.logprobs] == choice.tokens
    return choice.logprobs


def base_logprobs(tokens: list[int], temperature: float) -> dict[int, float]:
    """log p_T of the most likely tokens after the prompt and some tokens."""
    with torch.no_grad():
        logits_V = tiny_base().model(torch.tensor([[*PROMPT, *tokens]])).logits[0, -1].double()
    if not tokens:
        logits_V[2] = -math.inf  # an answer has at least one token
    values_K, ids_K = logits_V.topk(TOP_K)
    return dict(zip(ids_K.tolist(), (values_K / temperature).log_softmax(-1).tolist(), strict=True))


@pytest.mark.parametrize("fields", [{}, {"weights": {}}, {"preferences": PREFERENCES}, {"guide_every": 3}])
def test_all_candidates_are_a_distribution_with_the_reported_divergence(engine, fields):
    [[choice]] = engine.generate([request(**fields)])
    for step, reported in enumerate(choice.logprobs):
        assert len(reported.top) == TOP_K
        assert [one.logprob for one in reported.top] == sorted((one.logprob for one in reported.top), reverse=True)
        probs = [math.exp(one.logprob) for one in reported.top]
        assert math.fsum(probs) == pytest.approx(1)
        divergence = math.fsum(p * one.logratio for p, one in zip(probs, reported.top, strict=True))
        assert reported.divergence == pytest.approx(divergence, abs=1e-6)
        assert reported.divergence == pytest.approx(choice.divergences[step], abs=1e-9)
        assert reported.chosen.logratio == pytest.approx(choice.logratios[step], abs=1e-9)
        assert reported.chosen in reported.top


@pytest.mark.parametrize("temperature", [0.8, 1.0])
def test_without_the_ratio_it_is_the_base_model(engine, temperature):
    params = replace(PARAMS, temperature=temperature)
    [[choice]] = engine.generate([request(params=params)])
    for step, reported in enumerate(choice.logprobs):
        expected = base_logprobs(choice.tokens[:step], temperature)
        for one in reported.top:
            assert one.logprob - one.logratio == pytest.approx(expected[one.token], abs=1e-4)


def test_temperature_0_reports_the_distribution_of_temperature_1(engine):
    greedy = logprobs_of(engine, request(params=replace(PARAMS, temperature=0.0, max_tokens=1)))
    drawn = logprobs_of(engine, request(params=replace(PARAMS, temperature=1.0, max_tokens=1)))
    for one, other in zip(greedy[0].top, drawn[0].top, strict=True):
        assert tuple(one) == pytest.approx(tuple(other), abs=1e-4)
    assert greedy[0].chosen == greedy[0].top[0]
    assert greedy[0].divergence == pytest.approx(drawn[0].divergence, abs=1e-4)
    steered = logprobs_of(engine, request(params=replace(PARAMS, temperature=0.0), preferences=PREFERENCES))
    assert all(math.fsum(math.exp(one.logprob) for one in reported.top) == pytest.approx(1) for reported in steered)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_lazy_reports_only_evaluated_candidates_and_the_exact_base_model(engine, temperature):
    params = replace(PARAMS, temperature=temperature)
    [[lazy]] = engine.generate([request(params=params, scorer=Scorer.LAZY)])
    [[full]] = engine.generate([request(params=params)])
    assert lazy.tokens == full.tokens
    for num_scored, reported, exact in zip(lazy.num_scored, lazy.logprobs, full.logprobs, strict=True):
        assert len(reported.top) == num_scored
        known = {one.token: one for one in exact.top}
        shifts = [one.logratio - known[one.token].logratio for one in reported.top]
        assert max(shifts) - min(shifts) < 1e-4  # they share the estimate of the normaliser
        assert reported.chosen.logprob <= 0
    assert min(lazy.num_scored) < TOP_K


def test_updates_contain_the_logprobs_of_their_own_tokens(engine):
    updates = list(engine.stream(request(top_logprobs=2)))
    assert all(len(update.logprobs) == len(update.tokens) == 1 for update in updates)
    assert [update.logprobs[0] for update in updates] == updates[-1].finished.logprobs
    assert all(len(update.logprobs[0].top) == 2 for update in updates)


def test_logprobs_are_reported_only_on_request(engine):
    with_logprobs, without = request(top_logprobs=0), request(id="o", top_logprobs=None)
    [[asked], [other]] = engine.generate([with_logprobs, without])
    assert asked.tokens == other.tokens
    assert [len(reported.top) for reported in asked.logprobs] == [0] * len(asked.tokens)
    assert other.logprobs == []


def test_a_continued_answer_has_the_same_logprobs(engine):
    whole = logprobs_of(engine, request(preferences=PREFERENCES))
    start = [reported.chosen.token for reported in whole[:5]]
    rest = logprobs_of(engine, request(preferences=PREFERENCES, answer=tuple(start)))
    for one, other in zip(whole[5:], rest, strict=True):
        assert one.chosen.logprob == pytest.approx(other.chosen.logprob, abs=1e-4)


def test_a_negative_number_is_rejected(engine):
    with pytest.raises(RequestError, match="top_logprobs"):
        engine.validate(request(top_logprobs=-1))

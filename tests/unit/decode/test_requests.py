"""Invalid requests, and requests that fail while running: each alone, with its reason."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mavis_dist.decode import Engine, FinishReason, LocalGuide, Preference, Request, RequestError, SamplingParams
from mavis_dist.decode.validate import Bounds, normalise_weights, validate
from tests.fakes import VOCAB, tiny_base, tiny_value

NAN, INF = float("nan"), float("inf")
REQUEST = Request("r", (5, 6, 7), {"a": 1.0}, params=SamplingParams(max_tokens=8, seed=0))
CONTEXT = 20
POISON = 90


def with_params(**fields) -> Request:
    return replace(REQUEST, params=replace(REQUEST.params, **fields))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.1, NAN, INF]),
        ("top_k", [0, -1]),
        ("top_p", [0.0, -0.5, 1.01, NAN]),
        ("min_p", [-0.1, 1.0, NAN]),
        ("n", [0]),
        ("max_tokens", [0, -3, CONTEXT - 2]),
        ("stop", [("",), ("a", "")]),
    ],
)
def test_a_setting_out_of_range_is_rejected_with_its_name_and_value(field, values):
    for value in values:
        with pytest.raises(RequestError) as caught:
            validate(with_params(**{field: value}), Bounds(["a"], CONTEXT))
        assert caught.value.field == field
        assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("beta", [-1.0, NAN, INF]),
        ("tilt_cap", [0.0, -1.0, NAN]),
        ("residual_cap", [0.0, -1.0, NAN]),
        ("guide_every", [0, -2]),
    ],
)
def test_steering_out_of_range_is_rejected_with_its_name_and_value(field, values):
    for value in values:
        with pytest.raises(RequestError) as caught:
            validate(replace(REQUEST, **{field: value}), Bounds(["a"], CONTEXT))
        assert caught.value.field == field
        assert repr(value) in str(caught.value)


def test_a_given_noise_stream_allows_one_answer_only():
    with pytest.raises(RequestError, match=r"stream: is 7; .*use n = 1"):
        validate(replace(with_params(n=2), stream=7), Bounds(["a"], CONTEXT))


@pytest.mark.parametrize("weights", [{"a": NAN}, {"a": INF}, {"a": -0.1}, {"a": 1.0, "b": -1.0}, {"c": 1.0}])
def test_invalid_weights_are_rejected_by_objective(weights):
    with pytest.raises(RequestError) as caught:
        validate(replace(REQUEST, weights=weights), Bounds(["a", "b"], CONTEXT))
    assert caught.value.field == "objective_weights"
    assert repr(list(weights)[-1]) in str(caught.value)


@pytest.mark.parametrize(
    ("field", "request_", "cache_tokens"),
    [
        ("prompt", replace(REQUEST, prompt=()), None),
        ("prompt", replace(REQUEST, prompt=(5,) * CONTEXT), None),
        ("max_tokens", with_params(max_tokens=CONTEXT - 2), None),
        ("max_tokens", with_params(max_tokens=8), 10),
        ("max_tokens", replace(REQUEST, answer=(5,) * 8), None),
    ],
)
def test_requests_that_exceed_context_or_cache_are_rejected(field, request_, cache_tokens):
    with pytest.raises(RequestError) as caught:
        validate(request_, Bounds(["a"], CONTEXT, cache_tokens=cache_tokens))
    assert caught.value.field == field


def test_requests_that_just_fit_are_accepted():
    full = with_params(max_tokens=CONTEXT - 3, top_k=1, top_p=1.0, min_p=0.0, temperature=0.0)
    assert validate(full, Bounds(["a"], CONTEXT, cache_tokens=CONTEXT)).params == full.params
    almost_written = replace(REQUEST, answer=(5,) * 7)
    assert validate(almost_written, Bounds(["a"], CONTEXT)).answer == almost_written.answer


@pytest.mark.parametrize("weights", [(1.0, 3.0), (1e-300, 3e-300), (5e307, 1.5e308)])
def test_only_the_proportions_of_weights_matter_however_large(weights):
    a, b = weights
    assert normalise_weights({"a": a, "b": b}, ["a", "b"]) == pytest.approx({"a": 0.25, "b": 0.75})


def test_a_rejected_request_leaves_no_state():
    engine = Engine(tiny_base(), LocalGuide({"a": tiny_value(1)}))
    for bad in (with_params(top_k=0), replace(REQUEST, weights={"b": 1.0})):
        with pytest.raises(RequestError):
            engine.submit(bad)
        with pytest.raises(RequestError):
            engine.generate([REQUEST, replace(bad, id="bad")])
        assert engine.is_idle


# --- failures while running --------------------------------------------------------------------------------------


def run_to_idle(engine):
    updates = []
    while not engine.is_idle:
        updates += engine.step()
    return updates


def poisoned_base():
    """A base model whose outputs are nan after one token."""
    base = tiny_base()
    base.model.model.embed_tokens.weight[POISON] = NAN
    return base


@pytest.mark.parametrize("use_hf_forward", [False, True])
@pytest.mark.parametrize("weights", [{}, {"a": 1.0}])
def test_nan_logits_fail_only_their_own_request(weights, use_hf_forward):
    """Its neighbours and the requests that reuse its slot get the same answers as without it."""
    params = SamplingParams(max_tokens=10, top_k=4)
    good = [Request(f"g{i}", (9 + i, 5, 6), weights, params=replace(params, seed=i)) for i in range(6)]
    bad = [Request(f"b{i}", (30 + i, POISON, 40), weights, params=replace(params, seed=i, n=2)) for i in range(2)]
    guide = {"a": tiny_value(1)}
    expected = Engine(poisoned_base(), LocalGuide(guide), use_hf_forward=use_hf_forward).generate(good)
    assert {choice.error for [choice] in expected} == {None}
    engine = Engine(poisoned_base(), LocalGuide(guide), max_rows=3, use_hf_forward=use_hf_forward)
    mixed = [bad[0], *good[:3], bad[1], *good[3:]]
    answers = dict(zip([request.id for request in mixed], engine.generate(mixed), strict=True))
    for request in bad:
        for choice in answers.pop(request.id):
            assert (choice.finish, choice.tokens) == (FinishReason.ERROR, [])
            assert request.id in choice.error
            assert "base model" in choice.error
    assert [c.tokens for [c] in answers.values()] == [c.tokens for [c] in expected]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_prompt_that_shares_a_prefix_with_a_failing_one_is_unaffected(when):
    """The first tokens are the same; the later ones of the failing prompt must not affect the other."""
    stem = tuple(range(10, 60))
    bad = Request("bad", (*stem, POISON, 7), params=SamplingParams(max_tokens=4, seed=0))
    good = Request("good", (*stem, 8, 9), params=SamplingParams(max_tokens=10, top_k=4, seed=1))
    [[expected]] = Engine(poisoned_base()).generate([good])
    assert expected.error is None
    engine, finished = Engine(poisoned_base()), {}
    for request in [good, bad] if when == "before" else [bad, good]:
        engine.submit(request)
        finished |= {update.request_id: update.finished for update in engine.step()}
    finished |= {update.request_id: update.finished for update in run_to_idle(engine)}
    assert finished["bad"].finish is FinishReason.ERROR
    assert (finished["good"].error, finished["good"].tokens) == (None, expected.tokens)


class Interrupted(LocalGuide):
    """Fails once, at the end of the method `at`."""

    def __init__(self, models, at):
        super().__init__(models)
        self.at = at

    def fail(self, name):
        if self.at == name:
            self.at = None
            raise MemoryError(name)

    def open(self, rows):
        values_BM = super().open(rows)
        self.fail("open")
        return values_BM

    def extend(self, rows, tokens):
        values_BM = super().extend(rows, tokens)
        self.fail("extend")
        return values_BM

    def score(self, rows, counts, candidates_N):
        values_NM = super().score(rows, counts, candidates_N)
        self.fail("score")
        return values_NM

    def keep(self, rows, index_B):
        super().keep(rows, index_B)
        self.fail("keep")


@pytest.mark.parametrize("at", ["open", "extend", "score", "keep"])
def test_an_engine_recovers_from_a_failed_step_when_all_is_cancelled(at):
    """No row stays in the guide or the cache, and the next answers are correct."""
    models = {"a": tiny_value(1)}
    requests = [replace(REQUEST, id=str(i), prompt=tuple(range(5, 16 + i)), guide_every=1 + i % 2) for i in range(3)]
    expected = Engine(tiny_base(), LocalGuide(models)).generate(requests)
    guide = Interrupted(models, at)
    engine = Engine(tiny_base(), guide, prefill_tokens=6)
    for request in requests:
        engine.submit(request)
    with pytest.raises(MemoryError, match=at):
        run_to_idle(engine)
    for request in requests:
        engine.cancel(request.id)
    assert engine.is_idle
    assert not guide._trunks[0].slots._rows
    assert not engine._base._rows
    assert [c.tokens for [c] in engine.generate(requests)] == [c.tokens for [c] in expected]


@pytest.mark.parametrize("token", [VOCAB, -1])
def test_a_token_outside_the_vocabulary_is_rejected(token):
    engine = Engine(tiny_base())
    for bad in (replace(REQUEST, weights={}, prompt=(5, token)), replace(REQUEST, weights={}, answer=(token,))):
        with pytest.raises(RequestError, match=str(token)):
            engine.submit(bad)


@given(st.lists(st.floats(0, 1e308), min_size=1, max_size=6), st.booleans())
@settings(deadline=None, max_examples=500, derandomize=True)
def test_validating_again_changes_nothing(weights, as_preferences):
    """To the last bit: the gateway and the engine both validate it."""
    if as_preferences:
        steering = {"preferences": tuple(Preference(str(k), (k, 9), w) for k, w in enumerate(weights))}
    else:
        steering = {"weights": {f"o{k}": weight for k, weight in enumerate(weights)}}
    bounds = Bounds([f"o{k}" for k in range(len(weights))], CONTEXT)
    try:
        once = validate(replace(REQUEST, **{"weights": {}, **steering}), bounds)
    except RequestError:
        assert as_preferences
        assert not any(weights)
        return
    assert validate(once, bounds) == once


def test_normalised_weights_are_not_divided_again():
    source = random.Random(0)
    pairs = [{"a": source.random(), "b": source.random()} for _ in range(20_000)]
    used = [normalise_weights(pair, "ab") for pair in pairs]
    assert [normalise_weights(pair, "ab") for pair in used] == used
    assert any({name: w / sum(pair.values()) for name, w in pair.items()} != pair for pair in used)

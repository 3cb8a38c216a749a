"""Preferences against the published loop, a reference implementation, and changes that must have no effect.

Shapes: V vocabulary, K preferences or candidates, B rows.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mavis_dist.core import noise
from mavis_dist.core.merge import anchor, guarded, is_in_nucleus
from mavis_dist.core.preferences import Accumulation, RewardTracker, adapted_weights, amplification
from mavis_dist.core.tilt import candidates, choose, tilt
from mavis_dist.decode import (
    PRESETS,
    Engine,
    LocalGuide,
    Preference,
    PreferenceParams,
    Request,
    RequestError,
    SamplingParams,
    Scorer,
)
from mavis_dist.decode.validate import Bounds, normalise_preferences, validate
from tests.fakes import EOS, VOCAB, tiny_base, tiny_value

BASE = tiny_base(seed=0, eos_boost=2.0)
MODELS = {"brief": tiny_value(1), "kind": tiny_value(2, layers=2)}
POSITIVE = st.floats(0.01, 20)


# --- the loop ----------------------------------------------------------------------------------------------------


def literal_loop(plain_V, anchor_V, alpha, lam, nu, steps):
    """log pi_T as published: every step's utility is kept, every policy normalised."""
    policy_V, utilities = anchor_V, []
    for t in range(1, steps + 1):
        utilities.append(alpha * (policy_V - plain_V))
        pulls_V = lam * anchor_V + torch.stack(utilities).sum(0) / t + policy_V / (nu * t)
        policy_V = (pulls_V / (lam + 1 / (nu * t))).log_softmax(-1)
    return policy_V


@given(
    seed=st.integers(0, 1000),
    alpha=st.floats(0, 5),
    lam=POSITIVE,
    nu=POSITIVE,
    steps=st.integers(0, 60),
)
def test_the_published_loop_reduces_to_one_scalar(seed, alpha, lam, nu, steps):
    c = amplification(alpha, lam, nu, steps)
    assume(c <= 50)
    plain_V, *variants = torch.randn(4, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    plain_V = plain_V.log_softmax(-1)
    anchor_V = (plain_V + 0.2 * variants[0] - 0.7 * variants[1]).log_softmax(-1)
    scaled_V = (plain_V + c * (anchor_V - plain_V)).log_softmax(-1)
    looped_V = literal_loop(plain_V, anchor_V, alpha, lam, nu, steps)
    torch.testing.assert_close(scaled_V, looped_V, atol=1e-12 * max(1.0, c), rtol=1e-12)


def test_the_published_parameters_nearly_double_the_anchor():
    assert PreferenceParams().strength == pytest.approx(1.9347243953720208, abs=1e-12)
    assert amplification(0.5, 1.0, 10.0, 0) == 1.0
    assert amplification(2.0, 0.5, 10.0, 100) > 1e5


# --- the weights -------------------------------------------------------------------------------------------------

WEIGHTS = st.lists(st.just(0.0) | st.floats(1e-6, 1), min_size=1, max_size=5).filter(
    lambda weights: sum(weights) > 0.01
)


def test_a_tiny_tau_gives_all_weight_to_the_least_rewarded():
    assert adapted_weights([0.5, 0.2, 0.3], [1.0, 2.0, 1.5], 1e-310) == [1.0, 0.0, 0.0]


@given(WEIGHTS, st.data(), st.floats(0.05, 10))
def test_weights_minimise_rewards_plus_the_pull_to_the_given_weights(initial, data, tau):
    initial = [weight / math.fsum(initial) for weight in initial]
    rewards = data.draw(st.lists(st.floats(-10, 10), min_size=len(initial), max_size=len(initial)))
    weights = adapted_weights(initial, rewards, tau)
    assert math.fsum(weights) == pytest.approx(1.0, abs=1e-12)
    assert all(weight >= 0 for weight in weights)
    assert all(weight == 0 for weight, given_ in zip(weights, initial, strict=True) if given_ == 0)

    def cost(w):
        pull = math.fsum(x * math.log(x / y) for x, y in zip(w, initial, strict=True) if x > 0)
        return math.fsum(x * s for x, s in zip(w, rewards, strict=True)) + tau * pull

    draws = np.random.default_rng(0).dirichlet(np.ones(len(initial)), size=20) * (np.array(initial) > 0)
    for other in draws:
        if other.sum() > 0:
            assert cost(weights) <= cost(list(other / other.sum())) + 1e-9


def test_rewards_accumulate_as_configured():
    rewards = [[1.0, -2.0], [3.0, 0.5], [2.0, -40.0]]
    expected = {Accumulation.MEAN: [2.0, -10.0], Accumulation.SUM: [6.0, -10.0], Accumulation.DECAY: [3.75, -10.0]}
    for accumulation, amounts in expected.items():
        tracker = RewardTracker(accumulation, 0.5, 10.0, [0.0, 0.0])
        assert tracker.accumulated() == [0.0, 0.0]
        for reward in rewards:
            tracker.add(reward)
        assert tracker.accumulated() == pytest.approx(amounts)


# --- the merged distribution -------------------------------------------------------------------------------------


def logits(seed, *shape):
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shift(plain_V, preference_KV, weights, c, top_p):
    anchor_V = anchor(plain_V, preference_KV, weights)
    return guarded(plain_V[None], anchor_V[None], torch.tensor([c]), torch.tensor([top_p]))[0]


def likely(logits_V, top_p):
    return is_in_nucleus(logits_V.log_softmax(-1)[None], torch.tensor([top_p], dtype=logits_V.dtype))[0]


@given(st.integers(0, 1000), st.floats(0.05, 0.999))
def test_a_nucleus_is_the_smallest_set_of_enough_probability(seed, top_p):
    logits_V = logits(seed, 200)
    probs_V, is_in_V = logits_V.softmax(-1), likely(logits_V, top_p)
    assert probs_V[is_in_V].sum() >= top_p - 1e-6
    assert probs_V[is_in_V].sum() - probs_V[is_in_V].min() < top_p + 1e-6
    assert probs_V[is_in_V].min() >= probs_V[~is_in_V].max()


def test_every_row_has_its_own_nucleus():
    logits_XV, top_p_X = logits(3, 6, 3000), torch.tensor([0.2, 0.9, 1.0, 0.999, 0.5, 0.99])
    logits_XV[3] /= 100  # nearly all tokens: more than the first sizes of topk
    is_in_XV = is_in_nucleus(logits_XV.log_softmax(-1), top_p_X)
    for row, top_p, is_in_V in zip(logits_XV, top_p_X, is_in_XV, strict=True):
        assert (likely(row, float(top_p)) == is_in_V).all()
    assert is_in_XV[2].all()
    assert 2900 < is_in_XV[3].sum() < 3000


@given(st.integers(0, 1000), st.floats(0, 4), st.floats(0.3, 1))
def test_only_tokens_in_a_nucleus_with_or_without_preferences_gain(seed, c, top_p):
    plain_V, *variants = logits(seed, 3, 120).double().log_softmax(-1)
    weights = [0.3, 0.7]
    g_KV = torch.stack(variants) - plain_V
    anchor_V = torch.tensor(weights, dtype=torch.float64) @ g_KV
    shift_V = shift(plain_V, torch.stack(variants), weights, c, top_p)
    is_likely_V = likely(plain_V, top_p) | likely(plain_V + anchor_V, top_p)
    free = is_likely_V | (anchor_V < 0) if top_p < 1 else torch.ones_like(is_likely_V)
    torch.testing.assert_close(shift_V[free], c * anchor_V[free], atol=1e-4, rtol=1e-4)
    assert (shift_V[~free] == 0).all()
    assert shift_V.isfinite().all()


# --- reference implementation ------------------------------------------------------------------------------------

PROMPT = (1, 5, 9)
PREFERENCE_PROMPTS = [(1, 40, 41, 5, 9), (1, 50, 5, 9), (1, 60, 61, 62, 5, 9)]


def preferences(*weights):
    return tuple(
        Preference(f"preference {k}", prompt, weight)
        for k, (prompt, weight) in enumerate(zip(PREFERENCE_PROMPTS, weights, strict=False))
    )


def some_requests():
    """Requests that differ in all settings of preferences; some with value models as well."""
    sampling = SamplingParams(max_tokens=10)
    return [
        Request(
            id=f"r{i}",
            prompt=PROMPT,
            weights=[{}, {"brief": 1.0}, {"brief": 0.5, "kind": 2.0}][i % 3],
            beta=3.0,
            tilt_cap=[None, 0.8][i % 2],
            scorer=[Scorer.FULL, Scorer.LAZY][i // 2 % 2],
            preferences=[preferences(1.0), preferences(0.2, 0.8), preferences(3.0, 1.0, 2.0)][i // 3 % 3],
            preference_params=[
                PRESETS["mato"],
                replace(PRESETS["mato"], accumulation=Accumulation.SUM, tau=0.5),
                replace(PRESETS["mato"], accumulation=Accumulation.DECAY, decay=0.7, top_p=1.0, c=2.5),
                replace(PRESETS["context_steering"], top_p=0.8),
                PRESETS["anchor"],
            ][i % 5],
            params=replace(
                sampling, temperature=[1.0, 0.7, 1.3, 0.0][i % 4], top_k=[40, 5][i % 2], seed=i, n=1 + (i % 7 == 0)
            ),
        )
        for i in range(18)
    ]


def engine(max_rows=32, **options):
    return Engine(BASE, LocalGuide(MODELS), max_rows, **options)


@cache
def alone():
    """The answers to every request from an engine of its own, one at a time."""
    return {request.id: engine(max_rows=4).generate([request])[0] for request in some_requests()}


def log_p(tokens):
    return BASE.model(input_ids=torch.tensor([tokens])).logits[0, -1].double().log_softmax(-1)


def value_of(names, sequences):
    return torch.stack([MODELS[m](input_ids=torch.tensor(sequences), use_cache=False)[:, -1, 0] for m in names], -1)


@torch.inference_mode()
def reference(request, index):
    """K + 1 models by whole forward passes, with the published loop: tokens, log-ratios, divergences, w, g."""
    params, sampling, one = request.preference_params, request.params, torch.ones(1)
    initial = [p.weight for p in request.preferences]
    if params.normalise:
        initial = [weight / sum(initial) for weight in initial]
    objectives = {m: w / sum(request.weights.values()) for m, w in request.weights.items()}
    written, history, found = [], [], []
    for position in range(sampling.max_tokens):
        plain_V = log_p([*request.prompt, *written])
        g_KV = torch.stack([log_p([*p.prompt, *written]) - plain_V for p in request.preferences])
        weights = initial
        if params.adapt:
            past = np.array(history or [[0.0] * len(initial)])
            factors = np.ones(len(past))
            if params.accumulation is Accumulation.MEAN:
                factors /= len(past)
            elif params.accumulation is Accumulation.DECAY:
                factors = params.decay ** np.arange(len(past))[::-1]
            rewards = np.clip(factors @ past, -params.clip, params.clip)
            weights = np.array(initial) * np.exp(-rewards / params.tau)
            weights = (weights / weights.sum()).tolist()
        anchor_V = plain_V + torch.tensor(weights, dtype=torch.float64) @ g_KV
        if params.c is None:
            optimised_V = literal_loop(
                plain_V, anchor_V.log_softmax(-1), params.alpha, params.lam, params.nu, params.steps
            )
            shift_V = optimised_V - plain_V
            shift_V += (params.strength * (anchor_V - plain_V) - shift_V)[0]  # undoes the normalisation
        else:
            shift_V = params.c * (anchor_V - plain_V)
        if params.top_p < 1:
            is_likely_V = likely(plain_V, params.top_p) | likely(anchor_V, params.top_p)
            shift_V = torch.where(is_likely_V, shift_V, shift_V.clamp(max=0))
        logits_1V = (plain_V + shift_V)[None]
        if position == 0:
            logits_1V[0, EOS] = float("-inf")
        temperature_B = one * sampling.temperature
        ids_1K, merged_1K = candidates(logits_1V, torch.tensor([sampling.top_k]), one, 0 * one, temperature_B)
        delta_1K = torch.zeros_like(merged_1K)
        if objectives:
            delta_1K = tilt(
                value_of(objectives, [[*request.prompt, *written, a] for a in ids_1K[0].tolist()])[None],
                value_of(objectives, [[*request.prompt, *written]]),
                torch.tensor([list(objectives.values())]),
                one * request.beta,
                one * (request.tilt_cap or float("inf")),
                ids_1K == EOS,
            )
        stream_B = torch.tensor([noise.stream(sampling.seed, index)])
        gumbel_1K = noise.gumbel(stream_B, torch.tensor([position]), ids_1K)
        chosen = int(choose(merged_1K + temperature_B[:, None] * gumbel_1K, delta_1K, ids_1K))
        token = int(ids_1K[0, chosen])
        temperature = sampling.temperature or float("inf")
        p_K = (merged_1K[0] / temperature).log_softmax(-1)
        plain_1V = plain_V[None].clone()
        plain_1V[0, EOS] = float("-inf") if position == 0 else plain_1V[0, EOS]
        plain_ids, _ = candidates(plain_1V, torch.tensor([sampling.top_k]), one, 0 * one, temperature_B)
        ref_K = plain_V[ids_1K[0]] / temperature - (plain_V[plain_ids[0]] / temperature).logsumexp(-1)
        pi_K = ((merged_1K[0] + delta_1K[0]) / temperature).log_softmax(-1)
        present = merged_1K[0].isfinite()
        total = float((pi_K.exp() * (pi_K - ref_K))[present].sum())
        preference_part = float((pi_K.exp() * (p_K - ref_K))[present].sum())
        history.append(g_KV[:, token].tolist())
        found.append((token, float((pi_K - ref_K)[chosen]), total, preference_part, weights, history[-1]))
        written.append(token)
        if token == EOS:
            break
    return found


@pytest.mark.parametrize("request_", some_requests(), ids=lambda request: request.id)
def test_answers_match_the_reference_implementation(request_):
    for choice in alone()[request_.id]:
        steps = reference(request_, choice.index)
        tokens, ratios, total, preference_part, weights, rewards = zip(*steps, strict=True)
        assert choice.tokens == list(tokens)
        np.testing.assert_allclose(choice.preference_weights, weights, atol=1e-5)
        np.testing.assert_allclose(choice.preference_rewards, rewards, atol=1e-4)
        if request_.params.temperature == 0:
            assert set(choice.logratios) == {0.0}
            assert np.isnan([*choice.divergences, *choice.preference_divergences]).all()
            continue
        is_estimated = request_.scorer is Scorer.LAZY and request_.weights and request_.tilt_cap is not None
        if not is_estimated:
            np.testing.assert_allclose(choice.logratios, ratios, atol=1e-4)
            np.testing.assert_allclose(choice.divergences, total, atol=1e-4)
            np.testing.assert_allclose(choice.preference_divergences, preference_part, atol=1e-4)


def test_the_requests_cover_the_relevant_differences():
    """Preferences change answers, and so do value models used with them."""
    without = engine().generate([replace(request, preferences=()) for request in some_requests()])
    untrained = engine().generate([replace(request, weights={}) for request in some_requests()])
    for others in (without, untrained):
        pairs = zip(chain(*alone().values()), chain(*others), strict=True)
        assert sum(one.tokens != other.tokens for one, other in pairs) >= 6


# --- weights and strength ----------------------------------------------------------------------------------------


def with_preferences(weights, params=PRESETS["mato"], **changes):
    return [
        replace(request, preferences=preferences(*weights), preference_params=params, **changes)
        for request in some_requests()
    ]


def assert_same(many, others):
    for choices, expected in zip(many, others, strict=True):
        assert [choice.tokens for choice in choices] == [choice.tokens for choice in expected]
        for one, other in zip(choices, expected, strict=True):
            np.testing.assert_allclose(one.logratios, other.logratios, atol=1e-4)
            np.testing.assert_allclose(one.divergences, other.divergences, atol=1e-3)


def test_weight_on_one_preference_is_that_preference_alone():
    """Preferences of weight 0 get no row, and the scale of the weights has no effect."""
    narrow = engine(max_rows=2)
    both = [replace(r, params=replace(r.params, n=1)) for r in with_preferences((5.0, 0.0, 0.0))]
    only = [replace(r, params=replace(r.params, n=1)) for r in with_preferences((1.0,))]
    assert_same(narrow.generate(both), engine().generate(only))


def test_strength_zero_is_the_model_without_preferences():
    params = replace(PRESETS["mato"], c=0.0)
    none = [replace(request, preferences=()) for request in some_requests()]
    answers = engine().generate(with_preferences((0.3, 0.7), params))
    assert_same(answers, engine().generate(none))
    for [choice, *_], request in zip(answers, none, strict=True):
        if request.params.temperature > 0:
            np.testing.assert_allclose(choice.preference_divergences, 0, atol=1e-12)


def test_a_negative_strength_steers_away_from_the_preference():
    params = replace(PRESETS["context_steering"], top_p=1.0)
    sampling = SamplingParams(max_tokens=1, temperature=0.0, top_k=VOCAB)
    request = Request("r", PROMPT, params=sampling, preference_params=params)
    rewards = [
        engine().generate([replace(request, preferences=preferences(strength))])[0][0].preference_rewards[0][0]
        for strength in (-4.0, -1.0, 1.0, 4.0)
    ]
    assert rewards == sorted(rewards)
    assert rewards[0] < rewards[-1]


def test_presets_match_their_papers():
    assert PRESETS["amulet"].strength == pytest.approx(5.6487, abs=1e-4)
    assert [PRESETS[name].strength for name in ("anchor", "opad", "linear_alignment")] == [1, 2, 3]
    assert [params for params in PRESETS.values() if params.adapt] == [PRESETS["mato"]]


# --- neighbours --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"max_rows": 5}, {"prefill_tokens": 2}, {"cache_tokens": 64}])
def test_neighbours_room_and_chunks_do_not_matter(options):
    """All at once, together with requests without preferences."""
    plain = [replace(request, id=f"plain {request.id}", preferences=()) for request in some_requests()]
    mixed = [request for pair in zip(some_requests(), plain, strict=True) for request in pair]
    assert_same(engine(**options).generate(mixed)[::2], alone().values())


@pytest.mark.parametrize("prefill_tokens", [None, 3])
def test_a_continued_answer_matches_the_whole_one(prefill_tokens):
    """The rewards of its tokens are recomputed from the tokens; neighbours share its prompts."""
    for request in some_requests()[1:7]:
        [whole] = alone()[request.id]
        for cut in range(1, len(whole.tokens)):
            rest = replace(request, answer=tuple(whole.tokens[:cut]), id="rest")
            [_, [choice]] = engine(prefill_tokens=prefill_tokens).generate([request, rest])
            assert choice.tokens == whole.tokens[cut:]
            np.testing.assert_allclose(choice.preference_weights, whole.preference_weights[cut:], atol=1e-5)


def test_a_request_takes_one_row_per_variant():
    """A request with K preferences takes K + 1 rows; requests that do not fit wait until they do."""
    engine_ = engine(max_rows=5)
    for request in with_preferences((1.0, 1.0))[:3]:
        engine_.submit(replace(request, params=replace(request.params, n=1)))
    assert engine_.load == (0, 9)
    engine_.step()
    assert engine_.load == (3, 6)
    while not engine_.is_idle:
        engine_.step()
    assert len(engine_._base._rows) == 0


# --- validation --------------------------------------------------------------------------------------------------

FINE = Request("r", PROMPT, preferences=preferences(1.0, 1.0), params=SamplingParams(max_tokens=4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preferences": (Preference(" ", PROMPT),)}, r"preferences\.0\.text: is ' '"),
        ({"preferences": preferences(0.5, -1.0)}, r"preferences\.1\.weight: is -1\.0; .*normalise: false"),
        ({"preferences": preferences(float("nan"))}, r"preferences\.0\.weight: is nan"),
        ({"preferences": preferences(0.0, 0.0)}, r"preferences: all weights are 0"),
        ({"preferences": (Preference("x", ()),)}, r"preferences: is empty"),
        ({"preferences": (Preference("x", (VOCAB,)),)}, r"preferences: has the token 97"),
        ({"preferences": (Preference("long", (1,) * 256),)}, r"preferences: with 'long' the prompt has 256 tokens"),
        ({"preferences": (Preference("long", (1,) * 253),)}, r"max_tokens: is 4; .*253 tokens.*from 1 to 3"),
        ({"preferences": (Preference("same", PROMPT),)}, r"preferences: 'same' changes nothing"),
        ({"preferences": preferences(1, 1, 1) * 2}, r"preferences: 6 given; at most 5 fit"),
        ({"preference_params": PreferenceParams(tau=0.0)}, r"preference_params\.tau: is 0\.0"),
        ({"preference_params": PreferenceParams(c=9.0)}, r"preference_params\.c: is 9\.0; .*0 to 8"),
        ({"preference_params": PreferenceParams(alpha=2.0, lam=0.5)}, r"preference_params\.alpha: is 2\.0; .*above 8"),
        ({"preference_params": PreferenceParams(steps=-1)}, r"preference_params\.steps: is -1"),
        ({"preference_params": PreferenceParams(top_p=0.0)}, r"preference_params\.top_p: is 0\.0"),
        ({"preference_params": PreferenceParams(normalise=False)}, r"preference_params\.adapt: is True"),
        (
            {
                "preference_params": PreferenceParams(adapt=False, normalise=False, c=9 / 2),
                "preferences": preferences(2),
            },
            r"preferences\.0\.weight: is 2; a strength times c = 4.5",
        ),
        ({"preferences": (), "preference_params": PreferenceParams(c=99)}, r"preference_params\.c: is 99"),
    ],
)
def test_invalid_preferences_are_rejected(changes, message):
    engine_ = engine(max_rows=6)
    engine_.validate(FINE)
    with pytest.raises(RequestError, match=message):
        engine_.validate(replace(FINE, **changes))


def test_a_cache_must_hold_all_variants():
    engine(cache_tokens=3 * 9).validate(FINE)
    with pytest.raises(RequestError, match=r"max_tokens: is 4; with 3 prompts .* leaves room for 3"):
        engine(cache_tokens=3 * 9 - 1).validate(FINE)


def test_several_draws_cannot_have_preferences():
    request = replace(FINE, weights={"brief": 1.0}, scorer=Scorer.FULL, draws=2)
    with pytest.raises(RequestError, match=r"preferences: cannot be combined"):
        engine().validate(replace(request, params=SamplingParams(max_tokens=1)))


@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=5))
def test_validated_weights_sum_to_one(weights):
    assume(any(weights))
    used = normalise_preferences(tuple(Preference("x", PROMPT, w) for w in weights), PRESETS["mato"])
    assert math.fsum(preference.weight for preference in used) == pytest.approx(1.0)
    assert all(preference.weight > 0 for preference in used)
    again = normalise_preferences(used, PRESETS["mato"])
    assert [p.weight for p in again] == pytest.approx([p.weight for p in used])


@pytest.mark.parametrize(
    ("field", "bad"),
    [("nu", 0.0), ("nu", 5e-324), ("lam", 0.0), ("lam", math.nan), ("steps", 10**18), ("c", -1.0)],
)
def test_parameters_of_a_strength_are_checked_before_it_is_computed(field: str, bad: float) -> None:
    """A strength for weights that are not normalised: it divides by nu, and takes as long as there are steps."""
    params = replace(PreferenceParams(adapt=False, normalise=False), **{field: bad})
    asked = Request("r", PROMPT, preferences=(Preference("x", (*PROMPT, 3), 1.0),), preference_params=params)
    with pytest.raises(RequestError, match=r"^preference"):
        validate(asked, Bounds((), 64))

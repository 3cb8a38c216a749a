"""Best-of-n and beams against a reference implementation by whole forward passes, and against ordinary requests.

Shapes: K candidates, M objectives, Q draws.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from mavis_dist.core import noise
from mavis_dist.core.tilt import candidates, tilt
from mavis_dist.decode import (
    Engine,
    FinishReason,
    LocalGuide,
    Request,
    RequestError,
    SamplingParams,
    Scorer,
    beam_search,
    best_of,
)
from tests.exact import divergence, log_ratio
from tests.fakes import EOS, Letters, tiny_base, tiny_value

BASE = tiny_base(seed=0, eos_boost=2.0)
MODELS = {"brief": tiny_value(15), "kind": tiny_value(25, layers=2)}


def engine(max_rows=32, guide=None):
    return Engine(BASE, guide or LocalGuide(MODELS), max_rows)


def some_requests():
    """Requests that differ in everything a beam depends on."""
    return [
        Request(
            id=f"r{i}",
            prompt=(1, 5 + i, *range(20, 20 + 2 * (i % 3))),
            weights=[{"brief": 1.0}, {"kind": 3.0, "brief": 1.0}][i % 2],
            beta=[1.0, 6.0][i // 2 % 2],
            tilt_cap=[None, 0.8][i // 4 % 2],
            params=SamplingParams(
                max_tokens=[1, 9, 14, 7][i % 4], temperature=[1.0, 0.0, 1.4][i % 3], top_k=[40, 3][i % 2], seed=i
            ),
            answer=[(), (30, 31)][i == 6],
            stream=[None, 77][i == 5],
        )
        for i in range(12)
    ]


# --- reference implementation ------------------------------------------------------------------------------------


def values_of(weights, sequences):
    """V_m of every sequence's last token [K, M], by whole forward passes."""
    ids = torch.tensor(sequences)
    return torch.stack([MODELS[name](input_ids=ids, use_cache=False)[:, -1, 0] for name in weights], -1)


@torch.inference_mode()
def candidates_of(request, tokens):
    """Candidates of the token after `tokens`: ids, log p, delta [1, K] and V_m(s∘a) [K, M]."""
    weights, one, params = request.weights, torch.ones(1), request.params
    logits_1V = BASE.model(input_ids=torch.tensor([tokens])).logits[:, -1].double()
    if len(tokens) == len(request.prompt):
        logits_1V[0, EOS] = float("-inf")
    ids_1K, logprobs_1K = candidates(
        logits_1V, torch.tensor([params.top_k]), one, 0 * one, torch.tensor([params.temperature])
    )
    values_KM = values_of(weights, [[*tokens, a] for a in ids_1K[0].tolist()])
    delta_1K = tilt(
        values_KM[None],
        values_of(weights, [tokens]),
        torch.tensor([list(weights.values())]) / sum(weights.values()),
        one * request.beta,
        one * (request.tilt_cap or float("inf")),
        ids_1K == EOS,
    )
    return ids_1K, logprobs_1K, delta_1K, values_KM


def reference(request, width):
    """Beams as (tokens, V_m after each, log-ratios, divergences), best first."""
    temperature_1 = torch.tensor([request.params.temperature])
    weights = np.array(list(request.weights.values())) / sum(request.weights.values())
    root = request.params.seed if request.stream is None else request.stream
    beams = [([*request.answer], [], [], [])]

    def is_finished(beam):
        return len(beam[1]) > 0 and (beam[0][-1] == EOS or len(beam[0]) == request.params.max_tokens)

    while not all(is_finished(beam) for beam in beams):
        pool = []
        for place, beam in enumerate(beams):
            if is_finished(beam):
                pool.append(beam)
                continue
            tokens, values, ratios, kls = beam
            ids_1K, logprobs_1K, delta_1K, values_KM = candidates_of(request, [*request.prompt, *tokens])
            stream_1 = torch.tensor([noise.stream(root, "beam", place)])
            gumbel_1K = noise.gumbel(stream_1, torch.tensor([len(tokens)]), ids_1K)
            phi_K = (logprobs_1K + delta_1K + temperature_1 * gumbel_1K)[0].tolist()
            drawn = sorted(range(len(phi_K)), key=lambda k: -phi_K[k])[:width]
            ratio_K = log_ratio(logprobs_1K, delta_1K, temperature_1)[0].tolist()
            kl = float(divergence(logprobs_1K, delta_1K, temperature_1))
            pool += [
                ([*tokens, int(ids_1K[0, k])], [*values, values_KM[k].tolist()], [*ratios, ratio_K[k]], [*kls, kl])
                for k in drawn
            ]
        beams = sorted(pool, key=lambda beam: -float(weights @ beam[1][-1]))[:width]
    return beams


def assert_are(choices, beams, request):
    assert [[*request.answer, *choice.tokens] for choice in choices] == [tokens for tokens, *_ in beams]
    for index, (choice, (tokens, values, ratios, kls)) in enumerate(zip(choices, beams, strict=True)):
        assert choice.index == index
        assert choice.finish is (FinishReason.STOP if tokens[-1] == EOS else FinishReason.LENGTH)
        assert choice.text == Letters().decode(tokens)
        np.testing.assert_allclose(np.transpose([choice.values[name] for name in request.weights]), values, atol=1e-4)
        np.testing.assert_allclose(choice.logratios, ratios, atol=1e-4)
        np.testing.assert_allclose(choice.divergences, kls, atol=1e-3)
        assert len(choice.num_scored) == len(choice.tokens)


@pytest.mark.parametrize("max_rows", [2, 32])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_beams_match_the_reference_implementation(width, max_rows):
    """Tokens, values and all reported figures, also where the batch is too small for all beams."""
    requests = some_requests()
    for choices, request in zip(beam_search(engine(max_rows), requests, width), requests, strict=True):
        assert_are(choices, reference(request, width), request)


def test_the_beams_cover_the_relevant_differences():
    """Both finish reasons occur, and finished beams wait for others."""
    results = beam_search(engine(), some_requests(), 3)
    lengths = [sorted(len(choice.tokens) for choice in choices) for choices in results]
    finishes = Counter(choice.finish for choices in results for choice in choices)
    assert sum(length[0] < length[-1] for length in lengths) >= 3
    assert min(finishes[FinishReason.STOP], finishes[FinishReason.LENGTH]) >= 3


def test_a_finished_beam_keeps_the_value_after_its_last_token():
    requests = some_requests()
    ended = 0
    for choices, request in zip(beam_search(engine(), requests, 3), requests, strict=True):
        longest = max(len(choice.tokens) for choice in choices)
        for choice in choices:
            if len(choice.tokens) < longest:
                ended += 1
                last_M = values_of(request.weights, [[*request.prompt, *request.answer, *choice.tokens]])[0]
                assert [choice.values[m][-1] for m in request.weights] == pytest.approx(last_M.tolist(), abs=1e-4)
    assert ended >= 3


def test_a_beam_of_width_one_is_an_ordinary_answer_with_its_stream():
    requests = [replace(request, stream=None) for request in some_requests()]
    plain = [
        replace(
            request,
            stream=noise.stream(request.params.seed, "beam", 0),
            params=replace(request.params, stop=()),
            scorer=Scorer.FULL,
        )
        for request in requests
    ]
    for [beam], [choice] in zip(beam_search(engine(), requests, 1), engine().generate(plain), strict=True):
        assert (beam.tokens, beam.finish, beam.text) == (choice.tokens, choice.finish, choice.text)
        assert beam.num_scored == choice.num_scored
        np.testing.assert_allclose(beam.logratios, choice.logratios, atol=1e-4)
        np.testing.assert_allclose(beam.divergences, choice.divergences, atol=1e-4)


def test_beams_do_not_depend_on_neighbours():
    requests = some_requests()
    together = beam_search(engine(max_rows=5), list(reversed(requests)), 2)[::-1]
    for request, choices in zip(requests, together, strict=True):
        [alone] = beam_search(engine(), [request], 2)
        assert [c.tokens for c in choices] == [c.tokens for c in alone]


def test_stop_strings_end_a_beam():
    """As they end an ordinary answer; here the stop string is the fourth letter of the best beam."""
    request = some_requests()[2]
    [[plain]] = beam_search(engine(), [request], 1)
    stop = Letters().decode(plain.tokens[3:4])
    assert stop not in Letters().decode(plain.tokens[:3])
    [[stopped]] = beam_search(engine(), [replace(request, params=replace(request.params, stop=(stop,)))], 1)
    assert stopped.tokens == plain.tokens[:4]
    assert (stopped.finish, stopped.text) == (FinishReason.STOP, Letters().decode(plain.tokens[:3]))


# --- several draws of one token ----------------------------------------------------------------------------------


def one_token(draws, seed=0, temperature=1.0, top_k=4, **fields):
    params = SamplingParams(max_tokens=1, temperature=temperature, top_k=top_k, seed=seed)
    return Request(f"d{seed}", (1, 9, 10), {"brief": 1.0}, 0.5, None, params, draws=draws, scorer=Scorer.FULL, **fields)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_are_samples_without_replacement(temperature):
    """Chi-square of ordered pairs against p(a) p(b) / (1 - p(a)): one failure in 1,000 by chance; seeds are fixed."""
    requests = [one_token(2, seed, temperature) for seed in range(3000)]
    pairs = Counter(
        tuple(alternative.token for alternative in choice.alternatives)
        for [choice] in engine(max_rows=256).generate(requests)
    )
    ids_1K, logprobs_1K, delta_1K, _ = candidates_of(requests[0], list(requests[0].prompt))
    p_K = torch.softmax((logprobs_1K + delta_1K)[0] / temperature, -1).tolist()
    p = dict(zip(ids_1K[0].tolist(), p_K, strict=True))
    expected = {(a, b): len(requests) * p[a] * p[b] / (1 - p[a]) for a in p for b in p if a != b}
    assert set(pairs) <= set(expected)
    assert min(expected.values()) > 5
    observed = [pairs[pair] for pair in expected]
    assert stats.chisquare(observed, list(expected.values())).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_first_draw_is_the_ordinary_token(temperature):
    for seed in range(20):
        [[drawn]] = engine().generate([one_token(3, seed, temperature)])
        [[plain]] = engine().generate([one_token(None, seed, temperature)])
        first = drawn.alternatives[0]
        assert plain.alternatives == []
        assert drawn.tokens == plain.tokens == [first.token]
        assert [first.logratio] == pytest.approx(plain.logratios, abs=1e-6)
        assert [first.divergence] == pytest.approx(plain.divergences, abs=1e-6, nan_ok=True)
        assert [first.values["brief"]] == pytest.approx(plain.values["brief"], abs=1e-6)


def test_at_temperature_zero_draws_are_the_most_likely():
    request = one_token(3, temperature=0.0, top_k=40)
    [[choice]] = engine().generate([request])
    ids_1K, logprobs_1K, delta_1K, _ = candidates_of(request, list(request.prompt))
    best = (logprobs_1K + delta_1K)[0].topk(3).indices
    assert [alternative.token for alternative in choice.alternatives] == ids_1K[0, best].tolist()


def test_draws_are_limited_by_the_candidates():
    """Also next to a request with more candidates."""
    few, many = one_token(8, seed=1, top_k=3), one_token(8, seed=2, top_k=40)
    [narrow], [wide] = engine().generate([few, many])
    assert [len({a.token for a in choice.alternatives}) for choice in (narrow, wide)] == [3, 8]


# --- best of n ---------------------------------------------------------------------------------------------------


def test_best_of_returns_the_answer_of_largest_combined_value():
    requests = [replace(request, stream=None) for request in some_requests()]
    answers = engine().generate([replace(request, params=replace(request.params, n=4)) for request in requests])
    changed = 0
    for request, choices, best in zip(requests, answers, best_of(engine(), requests, 4), strict=True):
        total = sum(request.weights.values())
        values = [sum(w / total * choice.values[m][-1] for m, w in request.weights.items()) for choice in choices]
        assert best.tokens == choices[int(np.argmax(values))].tokens
        assert best.index == int(np.argmax(values))
        changed += best.index > 0
    assert changed >= 2


def test_best_of_ranks_by_a_given_score():
    """Also without guidance; the score sees whole choices."""
    requests = [replace(request, stream=None, weights={}) for request in some_requests()]
    seen = []

    def score(request, choice):
        seen.append((request.id, choice.index))
        return -sum(choice.tokens)

    best = best_of(Engine(BASE), requests, 3, score)
    answers = Engine(BASE).generate([replace(request, params=replace(request.params, n=3)) for request in requests])
    assert set(seen) == {(request.id, index) for request in requests for index in range(3)}
    for choice, choices in zip(best, answers, strict=True):
        assert sum(choice.tokens) == min(sum(other.tokens) for other in choices)


# --- failures and cleaning up ------------------------------------------------------------------------------------


class Watched(LocalGuide):
    """Records the rows that it follows and opens; fails after `breaks_at` rows."""

    def __init__(self, models, breaks_at=None):
        super().__init__(models)
        self.rows, self.opened, self.breaks_at = set(), [], breaks_at

    def open(self, rows):
        self.rows |= {row.row for row in rows}
        self.opened += rows
        return super().open(rows)

    def score(self, rows, counts, candidates_N):
        if self.breaks_at is not None and len(self.opened) >= self.breaks_at:
            raise MemoryError("no room")
        return super().score(rows, counts, candidates_N)

    def close(self, rows):
        self.rows.difference_update(rows)
        super().close(rows)


@pytest.mark.parametrize("num_requests", [1, 3])
def test_a_continuation_shares_the_keys_and_values_of_its_beam(num_requests):
    """Every step of every beam encodes one token, also when no other row is running."""
    requests = [replace(request, id=str(i)) for i, request in enumerate([some_requests()[2]] * num_requests)]
    guide = Watched(MODELS)
    beam_search(engine(guide=guide), requests, 2)
    later = [row for row in guide.opened if len(row.tokens) > len(requests[0].prompt)]
    assert len(later) >= 10
    assert all(row.source is not None and row.shared == len(row.tokens) - 1 for row in later)


def test_no_state_remains():
    guide = Watched(MODELS)
    engine_ = engine(guide=guide)
    beam_search(engine_, some_requests(), 3)
    assert engine_.is_idle
    assert guide.rows == set()
    plain = replace(some_requests()[1], params=SamplingParams(max_tokens=5, seed=3))
    [[after]], [[fresh]] = engine_.generate([plain]), engine().generate([plain])
    assert after.tokens == fresh.tokens


def test_a_failing_step_leaves_an_idle_engine():
    guide = Watched(MODELS, breaks_at=12)
    engine_ = engine(guide=guide)
    with pytest.raises(MemoryError):
        beam_search(engine_, some_requests(), 2)
    assert engine_.is_idle
    assert guide.rows == set()


def test_nan_values_fail_only_their_own_request():
    model = tiny_value(15)
    model.backbone.embed_tokens.weight[90] = float("nan")
    params = SamplingParams(max_tokens=6, top_k=2, seed=0)
    good = Request("good", (1, 5), {"brief": 1.0}, params=params)
    bad = Request("bad", (1, 90), {"brief": 1.0}, params=params)
    engine_ = engine(guide=LocalGuide({"brief": model}))
    [alone] = beam_search(engine_, [good], 2)
    [beams, [broken]] = beam_search(engine_, [good, bad], 2)
    assert [choice.tokens for choice in beams] == [choice.tokens for choice in alone]
    assert broken.finish is FinishReason.ERROR
    assert "not finite" in broken.error
    assert best_of(engine_, [bad], 2)[0].finish is FinishReason.ERROR


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("objective_weights", {"weights": {}}),
        ("objective_weights", {"beta": 0.0}),
        ("objective_weights", {"weights": {"wise": 1.0}}),
        ("guide_every", {"guide_every": 2}),
        ("n", {"params": SamplingParams(n=2)}),
        ("max_tokens", {"params": SamplingParams(max_tokens=1000)}),
    ],
)
def test_invalid_requests_are_rejected_before_any_search_starts(field, change):
    good = some_requests()[0]
    engine_ = engine()
    with pytest.raises(RequestError) as caught:
        beam_search(engine_, [good, replace(good, id="bad", **change)], 2)
    assert caught.value.field == field
    assert engine_.is_idle


def test_other_errors_name_their_field():
    request = some_requests()[0]
    with pytest.raises(RequestError, match="width"):
        beam_search(engine(), [request], 0)
    with pytest.raises(RequestError, match="'r0' is the id of two requests"):
        beam_search(engine(), [request, request], 2)
    with pytest.raises(RequestError, match="give a score"):
        best_of(engine(), [replace(request, weights={})], 2)
    with pytest.raises(RequestError, match="give a score"):
        best_of(engine(), [replace(request, guide_every=2)], 2)
    with pytest.raises(RequestError, match="stream"):
        best_of(engine(), [replace(request, stream=3)], 2)
    for change, field in (
        ({"draws": 0}, "draws"),
        ({"weights": {}}, "draws"),
        ({"scorer": Scorer.LAZY}, "scorer"),
        ({"params": SamplingParams(max_tokens=2)}, "max_tokens"),
    ):
        with pytest.raises(RequestError) as caught:
            engine().submit(replace(one_token(2), **change))
        assert caught.value.field == field

"""The engine against a slow loop without cache or batch, and the independence of each request from all others.

Shapes: V vocabulary, K candidates, M objectives.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from mavis_dist.core import noise
from mavis_dist.core.tilt import candidates, choose, tilt
from mavis_dist.decode import Engine, FinishReason, LocalGuide, Request, SamplingParams, Scorer
from mavis_dist.models.value import ValueModel
from tests.exact import divergence, log_ratio
from tests.fakes import EOS, VOCAB, tiny_base, tiny_value

BASE = tiny_base(seed=0, eos_boost=2.0)
MODELS = {"brief": tiny_value(1), "kind": tiny_value(2, layers=2)}
WEIGHTS = [{}, {"brief": 1.0}, {"kind": 2.0, "brief": 1.0}, {"kind": 0.7, "brief": 0.0}]


def some_requests():
    """Requests that differ in every field; seeds given."""
    return [
        Request(
            id=f"r{i}",
            prompt=(1, 5 + i, *range(20, 20 + 3 * (i % 4))),
            weights=WEIGHTS[i % 4],
            beta=[3.0, 8.0, 0.0][i % 3],
            tilt_cap=[None, 0.8][i % 2],
            scorer=Scorer.FULL,
            guide_every=[1, 1, 1, 2, 3][i % 5],
            params=SamplingParams(
                max_tokens=[1, 12, 9, 15, 6][i % 5],
                temperature=[1.0, 0.0, 0.7, 1.6][i // 4],
                top_k=[40, 5, 200][i % 3],
                top_p=[1.0, 0.8][i // 2 % 2],
                min_p=[0.0, 0.1][i // 3 % 2],
                seed=i,
                n=1 + i % 2,
            ),
        )
        for i in range(16)
    ]


def engine(max_rows=32, models=MODELS):
    return Engine(BASE, LocalGuide(models), max_rows)


@cache
def alone():
    """What every request gets from an engine of its own, one answer at a time."""
    return {request.id: engine(max_rows=1).generate([request])[0] for request in some_requests()}


def assert_same(choices, others):
    """The same tokens; numbers up to rounding, which depends on the shape of the batch."""
    assert [c.tokens for c in choices] == [c.tokens for c in others]
    assert [(c.index, c.finish, c.error) for c in choices] == [(c.index, c.finish, c.error) for c in others]
    for one, other in zip(choices, others, strict=True):
        np.testing.assert_allclose(one.logratios, other.logratios, atol=1e-4)
        np.testing.assert_allclose(one.divergence, other.divergence, atol=1e-3)
        assert_same_values(one.values, other.values)
        assert one.num_scored == other.num_scored


def assert_same_values(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name] == pytest.approx(other[name], abs=1e-4, nan_ok=True)


# --- reference implementation ------------------------------------------------------------------------------------


@torch.inference_mode()
def reference(request, index):
    """One answer by whole forward passes: tokens, log-ratios, divergence, values by objective, scored candidates."""
    weights = {m: w / sum(request.weights.values()) for m, w in request.weights.items() if w > 0}
    params, tokens, ratios, kl, values, counts = request.params, list(request.prompt), [], 0.0, {}, []
    one = torch.ones(1)
    stream_B = torch.tensor([noise.stream(params.seed, index)])
    for position in range(params.max_tokens):
        logits_1V = BASE.model(input_ids=torch.tensor([tokens])).logits[:, -1].double()
        if position == 0:
            logits_1V[0, EOS] = float("-inf")
        temperature_B = one * params.temperature
        ids_1K, logprobs_1K = candidates(
            logits_1V, torch.tensor([params.top_k]), one * params.top_p, one * params.min_p, temperature_B
        )
        delta_1K = torch.zeros_like(logprobs_1K)
        values_KM = torch.full((ids_1K.shape[1], len(weights)), float("nan"))
        is_tilted = weights and request.beta > 0 and position % request.guide_every == 0
        counts.append(int((logprobs_1K > float("-inf")).sum()) if is_tilted else 0)
        if is_tilted:
            values_KM = value_of(weights, [[*tokens, a] for a in ids_1K[0].tolist()])
            delta_1K = tilt(
                values_KM[None],
                value_of(weights, [tokens]),
                torch.tensor([list(weights.values())]),
                one * request.beta,
                one * (request.tilt_cap or float("inf")),
                ids_1K == EOS,
            )
        gumbel_1K = noise.gumbel(stream_B, torch.tensor([position]), ids_1K)
        chosen = int(choose(logprobs_1K + temperature_B[:, None] * gumbel_1K, delta_1K, ids_1K))
        ratios.append(float(log_ratio(logprobs_1K, delta_1K, temperature_B)[0, chosen]))
        kl += float(divergence(logprobs_1K, delta_1K, temperature_B))
        for m, value in zip(weights if request.beta > 0 else (), values_KM[chosen].tolist(), strict=False):
            values.setdefault(m, []).append(value)
        tokens.append(int(ids_1K[0, chosen]))
        if tokens[-1] == EOS:
            break
    return tokens[len(request.prompt) :], ratios, kl, values, counts


def value_of(weights, sequences):
    """V_m of every sequence's last token [K, M]."""
    return torch.stack([MODELS[m](input_ids=torch.tensor(sequences), use_cache=False)[:, -1, 0] for m in weights], -1)


@pytest.mark.parametrize("request_", some_requests(), ids=lambda request: request.id)
def test_answers_match_the_reference_implementation(request_):
    """Tokens, log-ratios, divergence and values, for all temperatures, filters, caps, weights and `guide_every`."""
    for choice in alone()[request_.id]:
        tokens, ratios, kl, values, counts = reference(request_, choice.index)
        assert choice.tokens == tokens
        np.testing.assert_allclose(choice.logratios, ratios, atol=1e-4)
        np.testing.assert_allclose(choice.divergence, kl, atol=1e-3)
        assert_same_values(choice.values, values)
        assert choice.num_scored == (counts if any(counts) else [])
        assert choice.finish is (FinishReason.STOP if tokens[-1] == EOS else FinishReason.LENGTH)


def test_the_requests_cover_the_relevant_differences():
    """The tilt changes answers, both finish reasons occur, and two choices of one request differ."""
    requests = [replace(request, weights={}) for request in some_requests()]
    plain = engine().generate(requests)
    changed = [alone()[r.id][0].tokens != choices[0].tokens for r, choices in zip(requests, plain, strict=True)]
    assert 4 <= sum(changed) < len(changed)
    finishes = [choice.finish for choices in alone().values() for choice in choices]
    assert min(finishes.count(FinishReason.STOP), finishes.count(FinishReason.LENGTH)) >= 3
    pairs = [choices for choices in alone().values() if len(choices) == 2 and choices[0].divergence >= 0]
    assert sum(one.tokens != other.tokens for one, other in pairs) >= len(pairs) - 1


def test_greedy_decoding_without_weights_matches_transformers():
    """With at least one new token: where the model would end at once, both take the second most likely token."""
    base = tiny_base(seed=0, eos_boost=2.0)
    prompts = [(1, 5 + i, 7 + i % 3) for i in range(24)]
    params = SamplingParams(max_tokens=4, temperature=0.0)
    answers = Engine(base).generate([Request(str(i), p, params=params) for i, p in enumerate(prompts)])
    first = [int(base.model(input_ids=torch.tensor([p])).logits[0, -1].argmax()) for p in prompts]
    assert EOS in first
    assert {choice.finish for [choice] in answers} == {FinishReason.STOP, FinishReason.LENGTH}
    for prompt, [choice] in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        reference = base.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=1,
            max_new_tokens=4,
            pad_token_id=EOS,
        )
        assert choice.tokens == reference[0, len(prompt) :].tolist()


# --- weights -----------------------------------------------------------------------------------------------------


class _NeverRunHead(torch.nn.Linear):
    def forward(self, *_):
        raise AssertionError("a value model of weight 0 was run")


class NeverRun(ValueModel):
    """A value model that must not be run."""

    def __init__(self):
        super().__init__(tiny_value(9).backbone, 1)
        self.heads = _NeverRunHead(32, 1)


def guided(weights, beta=8.0):
    """The requests, all with these weights."""
    return [replace(request, weights=weights, beta=beta) for request in some_requests()]


@pytest.mark.parametrize("name", list(MODELS))
def test_weight_on_one_objective_is_that_objective_alone(name):
    """Weight 0 equals omitting the objective, the other model is not run, and the scale has no effect."""
    only = engine(models={name: MODELS[name]}).generate(guided({name: 1.0}))
    other = next(m for m in MODELS if m != name)
    both = engine(models={other: NeverRun(), name: MODELS[name]}).generate(guided({other: 0.0, name: 5.0}))
    for choices, expected in zip(both, only, strict=True):
        assert_same(choices, expected)


def test_only_the_proportions_of_weights_matter():
    for one, other in zip(
        engine().generate(guided({"brief": 0.25, "kind": 0.75})),
        engine().generate(guided({"kind": 6.0, "brief": 2.0})),
        strict=True,
    ):
        assert_same(one, other)


@pytest.mark.parametrize(("weights", "beta"), [({"brief": 0.0, "kind": 0.0}, 8.0), ({"brief": 1.0}, 0.0)])
def test_weight_zero_and_beta_zero_are_the_base_model(weights, beta):
    """Token for token with the same seed, with no divergence, and without running a value model."""
    silent = engine(models={"brief": NeverRun(), "kind": NeverRun()})
    plain = Engine(BASE).generate(guided({}))
    for choices, expected in zip(silent.generate(guided(weights, beta)), plain, strict=True):
        assert_same(choices, expected)
        for choice in choices:
            assert choice.num_scored == []
            assert set(choice.logratios) == {0.0}
            assert choice.divergence == 0 or np.isnan(choice.divergence)


class PrefersEnd(LocalGuide):
    """Values only the end of the answer."""

    def score(self, rows, counts, candidates_N):
        super().score(rows, counts, candidates_N)
        return 10.0 * (candidates_N == EOS)[:, None].float()


@pytest.mark.parametrize("cap", [None, 0.01])
def test_the_cap_never_prevents_an_answer_from_ending(cap):
    """The value of ending far exceeds the cap: the answer stops as early as possible, unlike the base model's."""
    request = Request(
        "r", (1, 5), {"brief": 1.0}, 20.0, cap, SamplingParams(max_tokens=8, temperature=0.0, top_k=VOCAB)
    )
    base = tiny_base(seed=0)
    [[plain]] = Engine(base).generate([replace(request, weights={})])
    [[steered]] = Engine(base, PrefersEnd({"brief": MODELS["brief"]})).generate([request])
    assert plain.finish is FinishReason.LENGTH
    assert steered.tokens == [steered.tokens[0], EOS]


# --- guide_every -------------------------------------------------------------------------------------------------


class Following(LocalGuide):
    """Records the tokens that it has received of each row, at every call of score."""

    def __init__(self, models):
        super().__init__(models)
        self.tokens, self.asked, self.known = {}, {}, {}  # known: tokens received, at every call

    def open(self, rows):
        self.tokens |= {row.row: list(row.tokens) for row in rows}
        return super().open(rows)

    def extend(self, rows, tokens):
        for row, new in zip(rows, tokens, strict=True):
            self.tokens[row] += new
        return super().extend(rows, tokens)

    def score(self, rows, counts, candidates_N):
        for row, own in zip(rows, candidates_N.split(counts), strict=True):
            self.known.setdefault(row, []).append(tuple(self.tokens[row]))
            self.asked.setdefault(row, []).extend(own.tolist())
        return super().score(rows, counts, candidates_N)

    def keep(self, rows, index_B):
        for row, index in zip(rows, index_B.tolist(), strict=True):
            self.tokens[row].append(self.asked.pop(row)[index])
        super().keep(rows, index_B)


@pytest.mark.parametrize("every", [1, 2, 3, 20])
@pytest.mark.parametrize("written", [0, 1, 2])
def test_every_nth_token_is_tilted_and_the_guide_receives_the_others(every, written):
    """The guide has the whole answer at every call, also when one is continued between two tilted tokens."""
    params = SamplingParams(max_tokens=14, seed=3)
    request = Request("r", (1, 5, 9), {"brief": 1.0}, 4.0, None, params, guide_every=every)
    base, guide = tiny_base(seed=0), Following(MODELS)
    [[plain]] = Engine(base).generate([replace(request, weights={})])
    answer = tuple(plain.tokens[:written])
    [[choice]] = Engine(base, guide, max_rows=1).generate([replace(request, answer=answer)])
    whole = (*request.prompt, *answer, *choice.tokens)
    positions = range(written, written + len(choice.tokens))
    tilted = [position for position in positions if position % every == 0]
    assert guide.known.get(0, []) == [whole[: 3 + position] for position in tilted]
    for position, ratio, kl, value, num_scored in zip(
        positions, choice.logratios, choice.divergences, choice.values["brief"], choice.num_scored, strict=True
    ):
        if position in tilted:
            assert (kl > 0, np.isfinite(value), num_scored) == (True, True, 40)
        else:
            assert (ratio, kl, np.isnan(value), num_scored) == (0, 0, True, 0)


def test_tokens_between_tilted_ones_are_those_of_the_base_model():
    """With the noise of their stream and position, after any preceding tokens."""
    request = replace(guided({"brief": 1.0})[13], guide_every=4)
    for choice in engine().generate([request])[0]:
        stream = noise.stream(request.params.seed, choice.index)
        for position in (p for p in range(1, len(choice.tokens)) if p % 4):
            rest = replace(request, weights={}, answer=tuple(choice.tokens[:position]), stream=stream)
            rest = replace(rest, params=replace(request.params, max_tokens=position + 1, n=1))
            assert engine().generate([rest])[0][0].tokens == [choice.tokens[position]]


# --- neighbours --------------------------------------------------------------------------------------------------


def run(engine_, requests, arrive_every=0, cancel=()):
    """Finished choices by request; requests arrive every few steps, and some are cancelled."""
    requests, answers, steps = list(requests), {request.id: [] for request in requests}, 0
    while requests or not engine_.is_idle:
        while requests and steps >= arrive_every * (len(answers) - len(requests)):
            engine_.submit(requests.pop(0), first=arrive_every == 2)
        updates = engine_.step()
        if steps >= 3 and cancel:
            updates += engine_.cancel(cancel[0])
            cancel = cancel[1:]
        for update in updates:
            if update.finished is not None:
                answers[update.request_id].append(update.finished)
        steps += 1
    return {name: sorted(choices, key=lambda choice: choice.index) for name, choices in answers.items()}


@pytest.mark.parametrize("arrive_every", [0, 1, 2])
@pytest.mark.parametrize("max_rows", [2, 5, 32])
def test_answers_do_not_depend_on_neighbours_rows_or_arrival(max_rows, arrive_every):
    """Tokens are exact in fp32; every case has its own random order of submission."""
    requests = some_requests()
    order = np.random.default_rng([max_rows, arrive_every]).permutation(len(requests))
    for name, choices in run(engine(max_rows), [requests[i] for i in order], arrive_every).items():
        assert_same(choices, alone()[name])


def test_answers_do_not_depend_on_cancellations():
    """Cancelled answers stop with their tokens so far; all others are unaffected, including later ones."""
    cancelled = ["r3", "r14", "r8", "r7"]
    answers = run(engine(max_rows=6), some_requests(), cancel=cancelled)
    stopped = [choice for name in cancelled for choice in answers.pop(name)]
    assert FinishReason.ABORT in {choice.finish for choice in stopped}
    for name, choices in answers.items():
        assert_same(choices, alone()[name])


@pytest.mark.parametrize("max_rows", [1, 32])
def test_an_answer_resubmitted_with_its_tokens_so_far_continues_identically(max_rows):
    """From every point of every answer, all in one batch: tokens, log-ratios, values and finish reason."""
    continued, expected = [], []
    for request in some_requests():
        for choice in alone()[request.id]:
            stream = noise.stream(request.params.seed, choice.index)
            for cut in range(1, len(choice.tokens)):
                written = tuple(choice.tokens[:cut])
                params = replace(request.params, n=1)
                name = f"{request.id}-{choice.index}-{cut}"
                continued.append(replace(request, id=name, params=params, answer=written, stream=stream))
                expected.append((choice, cut))
    if max_rows == 1:
        continued, expected = continued[::7], expected[::7]
    for [choice], (whole, cut) in zip(engine(max_rows).generate(continued), expected, strict=True):
        assert choice.tokens == whole.tokens[cut:]
        assert choice.finish is whole.finish
        np.testing.assert_allclose(choice.logratios, whole.logratios[cut:], atol=1e-4)
        assert_same_values(choice.values, {name: values[cut:] for name, values in whole.values.items()})


def test_candidates_of_a_neighbour_have_no_effect():
    """A value model that is nan for one token: a request without this candidate continues beside one that has it."""
    narrow = Request("narrow", (1, 6), {"brief": 1.0}, params=SamplingParams(max_tokens=8, top_k=2, seed=1))
    wide = replace(narrow, id="wide", prompt=(1, 30), params=SamplingParams(max_tokens=8, top_k=VOCAB, seed=2))
    poison = next(a for a in range(3, VOCAB) if a not in reachable(narrow) | set(wide.prompt))
    [[expected]] = poisoned(poison).generate([narrow])
    [choice], [broken] = poisoned(poison).generate([narrow, wide])
    assert broken.finish is FinishReason.ERROR
    assert expected.finish is not FinishReason.ERROR
    assert_same([choice], [expected])


def reachable(request):
    """Candidates of a request with top_k 2 along its answer, and the tokens of that answer."""
    [[choice]] = engine().generate([request])
    tokens, seen = list(request.prompt), {*request.prompt, *choice.tokens}
    for token in choice.tokens:
        seen.update(BASE.model(input_ids=torch.tensor([tokens])).logits[0, -1].topk(3).indices.tolist())
        tokens.append(token)
    return seen


def poisoned(token):
    """An engine whose value model has nan for one token's embedding."""
    model = tiny_value(1)
    model.backbone.embed_tokens.weight[token] = float("nan")
    return engine(max_rows=2, models={"brief": model})


class CountingGuide(LocalGuide):
    """Records the rows that it follows."""

    def __init__(self, models):
        super().__init__(models)
        self.rows, self.most = set(), 0

    def open(self, rows):
        numbers = {row.row for row in rows}
        assert not numbers & self.rows
        self.rows |= numbers
        self.most = max(self.most, len(self.rows))
        return super().open(rows)

    def close(self, rows):
        self.rows.difference_update(rows)
        super().close(rows)


def test_a_guide_follows_rows_only_while_their_answers_run():
    """Finished and cancelled rows stay for at most one admission, so that others can share their tokens."""
    guide = CountingGuide(MODELS)
    engine_ = Engine(BASE, guide, max_rows=3)
    run(engine_, guided({"brief": 1.0}), cancel=["r3", "r14"])
    assert 3 <= guide.most <= 6
    engine_.step()
    assert guide.rows == set()


# --- failures ----------------------------------------------------------------------------------------------------


def test_a_nan_value_fails_only_its_own_request():
    """Its neighbours and the requests that reuse its slot get the same answers as without it."""
    poison = 90
    params = SamplingParams(max_tokens=12, top_k=2)
    prompts = [(1, 5 + i, 30 + i) for i in range(9)]
    good = [
        Request(f"good{i}", p, {"brief": 1.0}, params=replace(params, seed=i, max_tokens=5 + i))
        for i, p in enumerate(prompts)
    ]
    bad = [
        Request(f"bad{i}", (1, poison, *range(40, 60)), {"brief": 1.0}, params=replace(params, seed=i))
        for i in range(3)
    ]
    expected = run(poisoned(poison), good)
    assert {c.error for choices in expected.values() for c in choices} == {None}
    mixed = [good[0], bad[0], good[1], bad[1], *good[2:5], bad[2], *good[5:]]
    answers = run(poisoned(poison), mixed)
    for request in bad:
        [choice] = answers.pop(request.id)
        assert choice.finish is FinishReason.ERROR
        assert "not finite" in choice.error
        assert choice.tokens == []
    for name, choices in answers.items():
        assert_same(choices, expected[name])


class BrokenGuide(LocalGuide):
    """Returns values that are not finite: at the opening of a row, or for its candidates."""

    def __init__(self, models, at):
        super().__init__(models)
        self.at = at

    def open(self, rows):
        values_BM = super().open(rows)
        return values_BM * (float("nan") if self.at == "open" else 1.0)

    def score(self, rows, counts, candidates_N):
        values_NM = super().score(rows, counts, candidates_N)
        if self.at == "score":
            values_NM[1] = float("inf")
        return values_NM


@pytest.mark.parametrize("at", ["open", "score"])
@pytest.mark.parametrize("cap", [None, 1.0])
def test_no_token_is_drawn_with_a_tilt_that_is_not_finite(at, cap):
    """V(s) and V(s∘a) alike: the request fails with the reason instead of continuing with another distribution."""
    request = Request("r", (1, 5), {"brief": 1.0}, tilt_cap=cap, params=SamplingParams(max_tokens=4, seed=0))
    unguided = replace(request, id="plain", weights={})
    [broken], [plain] = Engine(BASE, BrokenGuide({"brief": MODELS["brief"]}, at)).generate([request, unguided])
    assert (broken.finish, broken.tokens) == (FinishReason.ERROR, [])
    assert plain.finish in (FinishReason.STOP, FinishReason.LENGTH)


def test_streaming_matches_generating_and_ends_on_cancellation() -> None:
    request = Request("s", (5, 6, 7), params=SamplingParams(max_tokens=12, seed=3))
    [[whole]] = Engine(tiny_base()).generate([request])
    assert [t for update in Engine(tiny_base()).stream(request) for t in update.tokens] == whole.tokens
    engine = Engine(tiny_base())
    seen = []
    for update in engine.stream(request):
        seen += update.tokens
        if len(seen) == 4:
            engine.cancel("s")
    assert seen == whole.tokens[:4]
    assert engine.is_idle

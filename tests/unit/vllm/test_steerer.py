"""The rows of another engine's batch are steered as this engine's are, whatever the other engine does with them.

Shapes: B rows, V vocabulary, K candidates.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
import torch

from mavis_dist.core import noise
from mavis_dist.core.tilt import candidates, choose, tilt
from mavis_dist.decode import Engine, LocalGuide, Request, SamplingParams, Scorer
from mavis_dist.decode.validate import Bounds, validate
from mavis_dist.vllm.steerer import Steered, Steerer
from tests.fakes import EOS, VOCAB, CountingGuide, tiny_base, tiny_student, tiny_value

BASE = tiny_base(seed=0, eos_boost=1.5)
MODELS = {"brief": tiny_value(1), "kind": tiny_value(2, layers=2)}
STUDENT = tiny_student(3, 2)
FAILURE = 0
FUZZED = int(os.environ.get("MAVIS_FUZZED_STEPS", "400"))  # tokens whose distribution is checked
OTHER_SETTINGS = (
    {"scorer": Scorer.FULL},
    {"scorer": Scorer.LAZY},
    {"scorer": Scorer.LAZY, "tilt_cap": None},
    {"scorer": Scorer.FULL, "guide_every": 3},
    {"guide_every": 2},
    {"beta": 0.5},
)
OTHER_SAMPLING = ({}, {"temperature": 0.0}, {"temperature": 0.7}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.05})


def request(prompt, weights=None, n=1, seed=0, max_tokens=14, beta=2.0, tilt_cap=2.5, **fields):
    sampling = {name: fields.pop(name) for name in ("temperature", "top_k", "top_p", "min_p") if name in fields}
    params = SamplingParams(max_tokens=max_tokens, seed=seed, n=n, **sampling)
    return validate(
        Request(str(seed), tuple(prompt), weights or {"kind": 3, "brief": 1}, beta, tilt_cap, params, **fields),
        Bounds(("brief", "kind"), 256, ("brief", "kind")),
    )


@dataclass(eq=False)
class Answer:
    steered: Steered
    tokens: list[int] = field(default_factory=list)
    is_waiting: bool = False

    @property
    def is_finished(self):
        return bool(self.tokens) and (
            self.tokens[-1] == EOS
            or self.steered.error is not None
            or len(self.tokens) == self.steered.request.params.max_tokens
        )


class Host:
    """Another engine: computes logits from the start at every step, and samples."""

    def __init__(self, steerer, chance=None):
        self.steerer, self.answers, self.chance = steerer, [], chance or random.Random(0)

    def add(self, request, is_drawn_here=True):
        answer = Answer(Steered(request, [], is_drawn_here))
        answer.steered.generated = answer.tokens
        self.answers.append(answer)
        return answer

    def step(self, check=None, discarded=()):
        """One more token of all answers that are neither finished nor waiting, nor discarded."""
        running = [a for a in self.answers if not (a.is_waiting or a.is_finished)]
        if not running:
            return
        contexts = [[*a.steered.request.prompt, *a.tokens] for a in running]
        logits_BV = torch.stack([BASE.model(torch.tensor([ids])).logits[0, -1] for ids in contexts])
        tilted_BV = logits_BV.clone()
        self.steerer.steer([a.steered for a in running], tilted_BV)
        for answer, logits_V, tilted_V in zip(running, logits_BV, tilted_BV, strict=True):
            if check is not None:
                check(answer, logits_V, tilted_V)
            temperature = answer.steered.request.params.temperature
            if temperature == 0 or answer.steered.is_drawn_here:
                token = int(tilted_V.argmax())
            else:
                weights = (tilted_V.double() / temperature).softmax(-1).tolist()
                [token] = self.chance.choices(range(VOCAB), weights)
            if answer not in discarded:
                answer.tokens.append(token)
        self.steerer.close([a.steered for a in running if a.is_finished])

    def run(self, check=None):
        while any(not a.is_finished for a in self.answers):
            self.step(check)
        return [a.tokens for a in self.answers]


def steerer(guide=None, failure_id=None):
    return Steerer(guide or LocalGuide(MODELS), (EOS,), EOS, VOCAB, failure_id)


def engine_tokens(requests, guide=None):
    engine = Engine(BASE, guide or LocalGuide(MODELS))
    return [choices[0].tokens for choices in engine.generate([replace(r, id=str(i)) for i, r in enumerate(requests)])]


class Law:
    """Checks the logits that a host gets with whole forward passes over all candidates."""

    def __init__(self):
        self.num_checked = 0

    def __call__(self, answer, logits_V, tilted_V):
        request, ids = answer.steered.request, [*answer.steered.request.prompt, *answer.tokens]
        position, params = len(answer.tokens), request.params
        logits_V = logits_V.clone()
        if position == 0:
            logits_V[EOS] = float("-inf")
        row = torch.ones(1)
        ids_1K, logprobs_1K = candidates(
            logits_V[None], row.long() * params.top_k, row * params.top_p, row * params.min_p, row * params.temperature
        )
        delta_1K = torch.zeros_like(logprobs_1K)
        if position % request.guide_every == 0:
            delta_1K = tilt(
                values([[*ids, a] for a in ids_1K[0].tolist()], request)[None],
                values([ids], request),
                torch.tensor([list(request.weights.values())], dtype=torch.float64),
                row.double() * request.beta,
                row.double() * (request.tilt_cap or float("inf")),
                ids_1K == EOS,
            )
        if answer.steered.is_drawn_here:
            noise_1K = noise.gumbel(torch.tensor([noise.stream(params.seed, 0)]), torch.tensor([position]), ids_1K)
            index = choose(logprobs_1K + params.temperature * noise_1K, delta_1K, ids_1K)
            assert tilted_V.isfinite().nonzero().flatten().tolist() == ids_1K[0, index].tolist()
        else:
            expected_V = torch.full_like(logits_V, float("-inf")).double()
            expected_V[ids_1K[0]] = (logprobs_1K + delta_1K)[0]
            assert (tilted_V.isfinite() == expected_V.isfinite()).all()
            law, expected = tilted_V.double().softmax(-1), expected_V.softmax(-1)
            assert (law - expected).abs().sum() / 2 < 1e-4
        self.num_checked += 1


def values(sequences, request):
    inputs = {"input_ids": torch.tensor(sequences), "use_cache": False}
    return torch.stack([MODELS[m](**inputs)[:, -1, 0] for m in request.weights], 1)


# --- the law --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", OTHER_SETTINGS, ids=str)
def test_drawn_tokens_are_those_of_this_engine(settings):
    requests = [
        request((1, 5 + i, 20), seed=i, weights={"kind": i % 3, "brief": 1}, **settings, **OTHER_SAMPLING[i % 6])
        for i in range(12)
    ]
    host = Host(steerer())
    for one in requests:
        host.add(one)
    assert host.run() == engine_tokens(requests)


@pytest.mark.parametrize("scorer", [Scorer.QHEAD, Scorer.PREDICTED])
def test_students_predict_as_in_this_engine(scorer):
    def guide():
        students = {name: (STUDENT, head) for head, name in enumerate(("brief", "kind"))}
        return LocalGuide({name: (STUDENT.model, head) for name, (_, head) in students.items()}, students)

    requests = [request((1, 5 + i, 20), seed=i, scorer=scorer) for i in range(8)]
    host = Host(steerer(guide()))
    for one in requests:
        host.add(one)
    assert host.run() == engine_tokens(requests, guide())


def test_no_law_is_wrong_however_the_host_arranges_its_rows():
    chance, law, guide = random.Random(7), Law(), CountingGuide(MODELS)
    host = Host(steerer(guide), chance)
    seed = 0
    while law.num_checked < FUZZED:
        if chance.random() < 0.4:
            seed += 1
            prompt = [1, *chance.choices(range(3, VOCAB), k=chance.randint(1, 6))]
            if host.answers and chance.random() < 0.3:
                prompt = chance.choice(host.answers).steered.request.prompt
            settings = chance.choice(OTHER_SETTINGS) | chance.choice(OTHER_SAMPLING)
            one = request(prompt, seed=seed, weights={"kind": chance.random(), "brief": 1}, **settings)
            host.add(one, is_drawn_here=one.scorer is not Scorer.FULL or chance.random() < 0.5)
        for answer in host.answers:
            if chance.random() < 0.15:  # preempted, or resumed
                answer.is_waiting = not answer.is_waiting
                host.steerer.close([answer.steered] if answer.is_waiting and chance.random() < 0.7 else [])
        for answer in [answer for answer in host.answers if chance.random() < 0.02]:  # aborted
            host.steerer.close([answer.steered])
            host.answers.remove(answer)
        chance.shuffle(host.answers)  # moved
        host.step(law, [answer for answer in host.answers if chance.random() < 0.1])
        host.answers = [answer for answer in host.answers if not answer.is_finished][:10]
        for answer in host.answers:
            if answer.tokens and chance.random() < 0.03:  # taken back, and computed again
                del answer.tokens[chance.randrange(len(answer.tokens)) :]
    host.steerer.close([answer.steered for answer in host.answers])
    assert guide.num_kept > FUZZED / 4


def test_a_host_that_samples_draws_from_the_tilted_distribution():
    chance, drawn = random.Random(3), Counter()
    one = request((1, 8, 30), scorer=Scorer.FULL, top_k=4, temperature=0.7, max_tokens=1)
    laws = []
    host = Host(steerer(), chance)
    for _ in range(10):
        host.answers = []
        answers = [host.add(one, is_drawn_here=False) for _ in range(200)]
        host.step(lambda _answer, _logits, tilted: laws.append((tilted / 0.7).softmax(-1)))
        drawn.update(answer.tokens[0] for answer in answers)
    expected = {token: 2000 * p for token, p in enumerate(laws[0].tolist()) if p > 0}
    assert sum((drawn[t] - e) ** 2 / e for t, e in expected.items()) < 16.3  # chi-square, 3 degrees of freedom, .001


# --- caches ---------------------------------------------------------------------------------------------------------


def test_rows_are_followed_while_they_grow_and_prompts_are_shared():
    guide = CountingGuide(MODELS)
    host = Host(steerer(guide))
    for seed in range(6):
        host.add(request((1, 5, 20), seed=seed))
    tokens = host.run()
    assert guide.num_from_start == 1
    assert guide.num_kept == sum(len(answer) - 1 for answer in tokens)
    assert guide.rows == set()


def test_an_answer_that_comes_back_continues_its_noise():
    one = request((1, 9, 40), seed=4, max_tokens=12)
    [expected] = engine_tokens([one])
    guide = CountingGuide(MODELS)
    host = Host(steerer(guide))
    answer = host.add(one)
    for _ in range(4):
        host.step()
    host.steerer.close([answer.steered])
    assert guide.rows == set()
    assert host.run() == [expected]


def test_a_token_that_somebody_else_chose_is_followed():
    host, law = Host(steerer()), Law()
    answer = host.add(request((1, 9, 40), seed=4))
    host.step(law)
    answer.tokens[-1] = next(t for t in range(3, VOCAB) if t != answer.tokens[-1])
    host.step(law)
    host.step(law)
    assert law.num_checked == 3


# --- failures -------------------------------------------------------------------------------------------------------


class Breaking(LocalGuide):
    """Cannot evaluate a certain token."""

    def __init__(self, fault):
        super().__init__(MODELS)
        self.fault = fault

    def open(self, rows):
        if self.fault == "raises" and any(77 in row.tokens for row in rows):
            raise MemoryError("no room")
        self.is_bad = {row.row for row in rows if 77 in row.tokens} | getattr(self, "is_bad", set())
        return super().open(rows)

    def score(self, rows, counts, candidates_N):
        values_NM = super().score(rows, counts, candidates_N)
        bad_N = torch.tensor([row in self.is_bad for row in rows]).repeat_interleave(torch.tensor(counts))
        return torch.where(bad_N[:, None], float("nan"), values_NM)


@pytest.mark.parametrize("fault", ["raises", "nan"])
@pytest.mark.parametrize("failure_id", [FAILURE, None])
def test_an_answer_whose_value_models_fail_ends_alone(fault, failure_id):
    sound = [request((1, 5 + i, 20), seed=i) for i in range(3)]
    host = Host(steerer(Breaking(fault), failure_id))
    for one in (sound[0], request((1, 77, 20), seed=9), *sound[1:]):
        host.add(one)
    first, failed, *rest = host.run()
    assert [first, *rest] == engine_tokens(sound)
    assert failed == [FAILURE if failure_id is not None else EOS]
    reason = host.answers[1].steered.error
    assert reason == (
        "MemoryError: no room" if fault == "raises" else "the value model returned a number that is not finite"
    )


def test_an_end_that_the_host_does_not_know_is_followed_by_one_that_it_knows():
    one = request((1, 5, 20), temperature=0.0)
    steered = Steered(one, [9, 3])
    other = Steerer(LocalGuide(MODELS), (EOS, 3), EOS, VOCAB)
    logits_BV = torch.zeros(1, VOCAB)
    other.steer([steered], logits_BV)
    assert logits_BV[0].isfinite().nonzero().flatten().tolist() == [EOS]

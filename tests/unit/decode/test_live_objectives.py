"""Objectives are added and removed while an engine runs; answers that do not use them are unaffected."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from mavis_dist.decode import Choice, Engine, FinishReason, Guide, LocalGuide, Request, SamplingParams, Scorer
from serve.base.remote_guide import RemoteGuide
from serve.messages import Call, Reply
from serve.value.sessions import Sessions
from tests.fakes import tiny_base, tiny_student, tiny_value

BASE = tiny_base(seed=0, eos_boost=1.0)
STUDENT = tiny_student(7, num_objectives=2)
# Two versions of one objective, another one, and two objectives of a distilled model.
MODELS = {
    "a@i0": (tiny_value(1), 0),
    "a@i1": (tiny_value(2, layers=2), 0),
    "b@i0": (tiny_value(3), 0),
    "a@d5": (STUDENT.model, 0),
    "b@d5": (STUDENT.model, 1),
}
STUDENTS = {"a@d5": (STUDENT, 0), "b@d5": (STUDENT, 1)}


def some_requests(scorers: tuple[Scorer, ...]) -> list[Request]:
    weights = [{"a@i0": 1.0}, {"a@i1": 1.0}, {"a@i0": 1.0, "b@i0": 2.0}, {"b@d5": 1.0, "a@d5": 3.0}, {}, {"b@d5": 1.0}]
    requests = [
        Request(
            id=str(i),
            prompt=(1, *range(20, 26), 5 + i % 7),
            weights=weights[i % 6],
            beta=4.0,
            tilt_cap=0.8,
            scorer=scorers[i % len(scorers)],
            guide_every=1 + i % 2,
            params=SamplingParams(max_tokens=4 + i % 9, top_k=20, seed=i),
        )
        for i in range(24)
    ]
    needs_student = [r.scorer in (Scorer.QHEAD, Scorer.PREDICTED) for r in requests]
    has_student = [set() < set(r.weights) <= set(STUDENTS) for r in requests]
    triples = zip(requests, needs_student, has_student, strict=True)
    return [replace(r, scorer=Scorer.FULL) if needs and not has else r for r, needs, has in triples]


class InProcess:
    """Value replicas that never fail."""

    def __init__(self) -> None:
        self._sessions = {name: Sessions(name, model) for name, model in MODELS.items()}

    def __call__(self, objective: str, session: str, call: Call) -> InProcess:
        assert call.version == objective
        self._reply = self._sessions[objective].answer(call)
        return _Done(self._reply)


class _Done:
    def __init__(self, reply: Reply):
        self._reply = reply

    def result(self, timeout_s: float) -> Reply:
        return self._reply


class Changing:
    """Adds and removes a guide's objectives at random, except those in use."""

    def __init__(self, guide: LocalGuide | RemoteGuide, seed: int):
        self.guide, self._chance = guide, random.Random(seed)
        self.num_changes = 0

    def change(self, needed: set[str]) -> None:
        for name in MODELS:
            if (name in self.guide.objectives) != (name in needed or self._chance.random() < 0.5):
                self.num_changes += 1
                self._remove(name) if name in self.guide.objectives else self._add(name)

    def _add(self, name: str) -> None:
        if isinstance(self.guide, RemoteGuide):
            self.guide.add((name,))
        else:
            students = {name: STUDENTS[name]} if name in STUDENTS else {}
            self.guide.add({name: MODELS[name]}, students)

    def _remove(self, name: str) -> None:
        self.guide.remove((name,))


def write(guide: Guide, requests: list[Request], seed: int) -> dict[str, Choice]:
    """The answers, while objectives change before every step and requests arrive one by one."""
    engine, changing = Engine(BASE, guide, max_rows=4, prefill_tokens=3), Changing(guide, seed)
    left, running, choices = list(requests), {}, {}
    while left or running:
        new = left.pop(0) if len(running) < 5 and left else None
        running |= {new.id: new} if new else {}
        changing.change({name for request in running.values() for name in request.weights})
        if new:
            engine.submit(new)
        for update in engine.step():
            if update.finished is not None:
                choices[update.request_id] = update.finished
                del running[update.request_id]
    assert changing.num_changes > 20
    return choices


def assert_same(choice: Choice, other: Choice) -> None:
    """The same tokens; numbers up to rounding, which depends on the shape of the batch."""
    assert (choice.tokens, choice.finish, choice.error) == (other.tokens, other.finish, None)
    assert choice.num_scored == other.num_scored
    assert choice.values.keys() == other.values.keys()
    for name, numbers in choice.values.items():
        np.testing.assert_allclose(numbers, other.values[name], atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["local", "remote"])
def test_answers_match_those_of_an_engine_with_fixed_objectives(kind, seed):
    scorers = (Scorer.FULL, Scorer.LAZY) + ((Scorer.QHEAD, Scorer.PREDICTED) if kind == "local" else ())
    requests = some_requests(scorers)
    random.Random(seed).shuffle(requests)
    guide = LocalGuide({}) if kind == "local" else RemoteGuide((), InProcess(), num_sessions=2)
    choices = write(guide, requests, seed)
    undisturbed = Engine(BASE, LocalGuide(MODELS, STUDENTS))
    for request, [expected] in zip(requests, undisturbed.generate(requests), strict=True):
        assert_same(choices[request.id], expected)


def test_versions_of_one_objective_can_be_used_at_once():
    old = Request("old", (1, 5, 6), {"a@i0": 1.0}, beta=6.0, params=SamplingParams(max_tokens=20, seed=1))
    new = replace(old, id="new", weights={"a@i1": 1.0})
    [[one], [other]] = Engine(BASE, LocalGuide(MODELS)).generate([old, new])
    assert one.tokens != other.tokens
    for request, choice in ((old, one), (new, other)):
        [name] = request.weights
        [[alone]] = Engine(BASE, LocalGuide({name: MODELS[name]})).generate([request])
        assert_same(choice, alone)


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_the_order_in_which_objectives_arrive_changes_no_bit(kind):
    """Sums of floating-point numbers depend on their order: replicas that load models in another one must agree."""
    names = ["a@i0", "a@i1", "b@i0", "a@d5"]
    weights = {name: 1 / (3 + k) for k, name in enumerate(names)}
    request = Request("r", (1, 5, 6), weights, beta=6.0, scorer=Scorer.FULL, params=SamplingParams(12, seed=2))
    found = []
    for order in (names, names[::-1], names[2:] + names[:2]):
        guide = LocalGuide({}) if kind == "local" else RemoteGuide((), InProcess())
        for name in order:
            guide.add({name: MODELS[name]})
        [[choice]] = Engine(BASE, guide).generate([request])
        found.append((choice.tokens, choice.logratios, choice.divergences))
    assert found[0] == found[1] == found[2]


def test_one_of_several_heads_must_be_named():
    with pytest.raises(ValueError, match=r"value model of 'kind' has 2 heads: give \(model, index\)"):
        LocalGuide({"kind": tiny_value(3, num_objectives=2)})


def test_heads_added_one_by_one_share_their_model():
    guide = LocalGuide({"a@d5": MODELS["a@d5"]})
    guide.add({"b@d5": MODELS["b@d5"], "b@i0": MODELS["b@i0"]})
    assert len(guide._trunks) == 2
    guide.remove(["a@d5"])
    assert (guide.objectives, len(guide._trunks)) == (("b@d5", "b@i0"), 2)
    guide.remove(["b@d5"])
    assert (guide.objectives, len(guide._trunks)) == (("b@i0",), 1)


@pytest.mark.parametrize("scorer", [Scorer.LAZY, Scorer.QHEAD, Scorer.PREDICTED])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_removing_an_objective_in_use_ends_only_its_answers(scorer, steps):
    """Steering by the remaining objectives alone would not be what was requested."""
    params = SamplingParams(max_tokens=12, seed=2)
    lost = Request("lost", (1, 5), {"a@d5": 1.0, "b@d5": 1.0}, beta=4.0, params=params, scorer=scorer)
    kept = replace(lost, id="kept", weights={"b@d5": 1.0})
    guide, base, choices = LocalGuide(MODELS, STUDENTS), tiny_base(seed=0), {}
    engine = Engine(base, guide)
    for request in (lost, kept):
        engine.submit(request)
    for step in range(20):
        if step == steps:
            guide.remove(["a@d5"])
        choices |= {update.request_id: update.finished for update in engine.step() if update.finished}
    assert choices["lost"].finish is FinishReason.ERROR
    assert "'a@d5' was taken away" in choices["lost"].error
    assert len(choices["lost"].tokens) == steps
    [[expected]] = Engine(base, LocalGuide(MODELS, STUDENTS)).generate([kept])
    assert_same(choices["kept"], expected)

"""Guides of value models on the base model's states, alone and beside models of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mavis_dist.decode import Choice, Engine, GuideRow, LocalGuide, Request, SamplingParams, Scorer
from mavis_dist.decode.trunks import StatesPredictor
from mavis_dist.models.load import BaseModel
from mavis_dist.models.qhead import Student
from mavis_dist.models.value import ValueModel
from serve.base.remote_guide import RemoteGuide
from serve.messages import Call, Reply
from serve.value.sessions import Sessions
from tests.fakes import tiny_base, tiny_states, tiny_states_student, tiny_student, tiny_value

PROMPT = (1, 5, 6, 7)
Students = dict[str, tuple[Student, int]]


def requests(scorer: Scorer, weights: dict[str, float]) -> list[Request]:
    return [
        Request(str(i), (1, 20 + i, *range(5, 9 + i)), weights, 6.0, 1.0, params=params, scorer=scorer)
        for i in range(6)
        for params in [SamplingParams(max_tokens=6 + i, seed=i, n=1 + i % 2)]
    ]


def tokens(choices: list[list[Choice]]) -> list[list[list[int]]]:
    return [[choice.tokens for choice in row] for row in choices]


@pytest.mark.parametrize("head_size", [8, 64], ids=["fused", "native"])
def test_lazy_draws_the_tokens_of_full(head_size: int) -> None:
    base = tiny_base(eos_boost=1.0, head_size=head_size)
    models = {"brief": tiny_states(base, 3), "kind": tiny_states(base, 4)}
    weights = {"brief": 0.4, "kind": 0.6}
    full, lazy = (
        Engine(base, LocalGuide(models)).generate(requests(scorer, weights)) for scorer in (Scorer.FULL, Scorer.LAZY)
    )
    assert tokens(full) == tokens(lazy)
    plain = Engine(base).generate(requests(Scorer.FULL, {}))
    assert tokens(full) != tokens(plain)


@pytest.mark.parametrize("head_size", [8, 64], ids=["fused", "native"])
def test_kinds_mix_in_one_guide(head_size: int) -> None:
    """Values of a mixture are those of each model alone, and heads on one layer share a pass."""
    base = tiny_base(eos_boost=1.0, head_size=head_size)
    models = {
        "a": tiny_states(base, 3),
        "b": tiny_value(1, head_size=head_size),
        "c": tiny_states(base, 4, num_objectives=2),
        "d": tiny_states(base, 5, layer=2),
    }
    guide = LocalGuide({name: (model, model.num_objectives - 1) for name, model in models.items()})
    assert len(guide._trunks) == 3
    row = GuideRow(0, PROMPT, frozenset(models))
    candidates_N = torch.tensor([9, 30, 31])
    opened_BM, scored_NM = guide.open([row]), guide.score([0], [3], candidates_N)
    for m, (name, model) in enumerate(models.items()):
        for n, last in enumerate([(), *((int(token),) for token in candidates_N)]):
            with torch.no_grad():
                expected = model(input_ids=torch.tensor([[*PROMPT, *last]]))[0, -1, -1]
            found = opened_BM[0, m] if n == 0 else scored_NM[n - 1, m]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, msg=name)


def test_objectives_on_one_layer_come_and_go_while_rows_stay() -> None:
    base = tiny_base(head_size=64)
    first, second, third = (tiny_states(base, seed) for seed in (3, 4, 5))
    guide, row = LocalGuide({"b": second}), GuideRow(0, PROMPT, frozenset({"b"}))
    expected = float(guide.open([row])[0, 0])
    guide.add({"a": first, "c": third})
    assert len(guide._trunks) == 1
    values_BM = guide.extend([0], [[9]])
    fresh = LocalGuide({"b": second})
    fresh.open([row])
    assert values_BM[0, 1] == fresh.extend([0], [[9]])[0, 0] != expected
    guide.remove({"a"})
    for one in (guide, fresh):
        one.score([0], [2], torch.tensor([11, 12]))
        one.keep([0], torch.tensor([1]))
    assert guide.extend([0], [[13]])[0, 0] == fresh.extend([0], [[13]])[0, 0]
    other = GuideRow(1, PROMPT, frozenset({"b", "c"}))
    np.testing.assert_allclose(guide.open([other])[0, 0], expected, atol=1e-6)


def test_an_answer_does_not_depend_on_the_others_models() -> None:
    base = tiny_base(eos_boost=1.0, head_size=64)
    models = {"a": tiny_states(base, 3), "b": tiny_value(1, head_size=64)}
    mixed = [
        replace(r, weights=w)
        for r, w in zip(requests(Scorer.LAZY, {}), [{"a": 1.0}, {"b": 1.0}, {"a": 0.3, "b": 0.7}] * 2, strict=True)
    ]
    together = Engine(base, LocalGuide(models)).generate(mixed)
    alone = [Engine(base, LocalGuide({n: models[n] for n in r.weights})).generate([r])[0] for r in mixed]
    assert tokens(together) == tokens(alone)


class Replicas:
    """Value replicas in this process."""

    def __init__(self, models: dict[str, ValueModel]):
        self._sessions = {name: Sessions(name, model) for name, model in models.items()}

    def __call__(self, objective: str, session: str, call: Call) -> Replied:
        return Replied(self._sessions[objective].answer(call))


class Replied:
    def __init__(self, reply: Reply):
        self._reply = reply

    def result(self, timeout_s: float) -> Reply:
        return self._reply


def test_value_replicas_draw_the_same_tokens() -> None:
    base = tiny_base(eos_boost=1.0, head_size=64)
    models = {"a": tiny_states(base, 3), "b": tiny_value(1, head_size=64)}
    asked = requests(Scorer.LAZY, {"a": 0.5, "b": 0.5})
    remote = Engine(base, RemoteGuide(tuple(models), Replicas(models))).generate(asked)
    assert tokens(remote) == tokens(Engine(base, LocalGuide(models)).generate(asked))


# --- students on the states that the base model computes in any case ---------------------------------------------


def students(base: BaseModel, seeds: dict[str, int]) -> tuple[dict[str, tuple[ValueModel, int]], Students]:
    made = {name: tiny_states_student(base, seed, 2) for name, seed in seeds.items()}
    return {n: (s.model, 1) for n, s in made.items()}, {n: (s, 1) for n, s in made.items()}


@pytest.mark.parametrize("head_size", [8, 64], ids=["fused", "native"])
@pytest.mark.parametrize("guide_every", [1, 3])
def test_a_student_draws_the_same_tokens_from_the_states_of_the_engines_steps(head_size: int, guide_every: int) -> None:
    base = tiny_base(eos_boost=1.0, head_size=head_size)
    models, by_student = students(base, {"a": 3, "b": 4})
    asked = [replace(r, guide_every=guide_every) for r in requests(Scorer.QHEAD, {"a": 0.4, "b": 0.6})]
    guide = LocalGuide(models, by_student)
    free = Engine(base, guide).generate(asked)
    assert guide.reads_states
    own = Engine(base, Unaware(LocalGuide(models, by_student))).generate(asked)
    assert tokens(free) == tokens(own) != tokens(Engine(base).generate(requests(Scorer.FULL, {})))
    for mine, theirs in zip(free, own, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(one.values["a"], other.values["a"], atol=1e-4)
            np.testing.assert_allclose(one.divergences, other.divergences, atol=1e-4)


class Unaware:
    """A guide that an engine gives no states."""

    def __init__(self, guide: LocalGuide):
        self._guide = guide

    def __getattr__(self, name: str) -> Any:
        if name == "accept_states":
            raise AttributeError
        return getattr(self._guide, name)


def test_a_student_on_states_costs_no_keys_values_or_passes() -> None:
    base = tiny_base(head_size=64)
    models, by_student = students(base, {"a": 3})
    guide = LocalGuide(models, by_student)
    engine = Engine(base, guide)
    [predicting] = [trunk for trunk in guide._trunks if isinstance(trunk, StatesPredictor)]
    assert not hasattr(predicting, "slots")
    engine.generate(requests(Scorer.QHEAD, {"a": 1.0}))
    assert [trunk.slots.num_tokens for trunk in guide._trunks if trunk is not predicting] == [0, 0]
    assert not predicting.known


@pytest.mark.parametrize("head_size", [8, 64], ids=["fused", "native"])
def test_a_student_on_states_checks_its_predictions(head_size: int) -> None:
    """Without a cap of what the student does not predict, the predicted scorer draws the tokens of the lazy one."""
    base = tiny_base(eos_boost=1.0, head_size=head_size)
    models, by_student = students(base, {"a": 3, "b": 4})
    engine, weights = Engine(base, LocalGuide(models, by_student)), {"a": 0.4, "b": 0.6}
    lazy = engine.generate(requests(Scorer.LAZY, weights))
    predicted = [replace(r, residual_cap=None) for r in requests(Scorer.PREDICTED, weights)]
    assert tokens(engine.generate(predicted)) == tokens(lazy)
    capped = [replace(r, residual_cap=0.01) for r in predicted]
    assert tokens(engine.generate(capped)) != tokens(lazy)


def test_all_scorers_and_kinds_of_students_share_a_batch() -> None:
    """Students on states, students with a trunk of their own, and full and lazy scoring of both."""
    base = tiny_base(eos_boost=1.0, head_size=64)
    models, by_student = students(base, {"a": 3})
    other = tiny_student(7, 1, head_size=64)
    models["t"], by_student["t"] = (other.model, 0), (other, 0)
    weights = [{"a": 1.0}, {"t": 1.0}, {"a": 0.5, "t": 0.5}]
    asked = [
        replace(r, weights=w, scorer=scorer, id=f"{r.id}-{scorer}-{k}")
        for scorer in Scorer
        for k, w in enumerate(weights)
        for r in requests(scorer, w)[:2]
    ]
    together = Engine(base, LocalGuide(models, by_student)).generate(asked)
    alone = [Engine(base, LocalGuide(models, by_student)).generate([r])[0] for r in asked]
    assert tokens(together) == tokens(alone)


def test_students_come_and_go_and_the_base_model_returns_states_while_one_reads_them() -> None:
    base = tiny_base(head_size=64)
    models, by_student = students(base, {"a": 3})
    guide = LocalGuide({"v": tiny_value(1, head_size=64)})
    engine = Engine(base, guide)
    [before] = engine.generate(requests(Scorer.LAZY, {"v": 1.0})[:1])
    assert engine._base.states is None
    guide.add(models, by_student)
    engine.generate(requests(Scorer.QHEAD, {"a": 1.0})[:2])
    assert engine._base.states is not None
    guide.remove({"a"})
    [after] = engine.generate(requests(Scorer.LAZY, {"v": 1.0})[:1])
    assert engine._base.states is None
    assert tokens([before]) == tokens([after])


def test_a_decoder_without_states_leaves_students_their_own_pass() -> None:
    base = tiny_base()
    models, by_student = students(base, {"a": 3})
    guide = LocalGuide(models, by_student)
    asked = requests(Scorer.QHEAD, {"a": 1.0})
    slow = Engine(base, guide, use_hf_forward=True).generate(asked)
    assert not guide.reads_states
    assert tokens(slow) == tokens(Engine(base, LocalGuide(models, by_student)).generate(asked))


def test_static_shapes_and_states() -> None:
    base = tiny_base(eos_boost=1.0)
    models, by_student = students(base, {"a": 3})
    static, exact = (
        Engine(base, LocalGuide(models, by_student, static_shapes=s), static_shapes=s) for s in (True, False)
    )
    asked = requests(Scorer.QHEAD, {"a": 1.0})
    assert tokens(static.generate(asked)) == tokens(exact.generate(asked))

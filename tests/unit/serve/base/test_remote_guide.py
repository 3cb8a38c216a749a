"""Remote guidance equals local guidance, whatever happens to the calls."""

from __future__ import annotations

import math
import pickle
import random

import numpy as np
import pytest
import torch

from mavis_dist.decode import (
    Choice,
    Engine,
    FinishReason,
    Guide,
    GuideRow,
    LocalGuide,
    Request,
    SamplingParams,
    Scorer,
)
from serve.base import remote_guide
from serve.base.remote_guide import RemoteGuide
from serve.messages import Call, Kept, Question, ReplicaLost, Reply, RowTokens
from serve.value.sessions import Sessions
from tests.fakes import tiny_base, tiny_value

MODELS = {"good": tiny_value(1), "short": tiny_value(2)}


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(remote_guide, "RETRY_PAUSE_S", 0.0)


class Done:
    def __init__(self, reply: Reply | Exception):
        self._reply = reply

    def result(self, timeout_s: float) -> Reply:
        if isinstance(self._reply, Exception):
            raise self._reply
        return self._reply


class Replicas:
    """Value replicas that die, lose rows, hang after the work is done, hear calls twice, and swap sessions."""

    def __init__(self, trouble: float = 0.0, seed: int = 0, per_objective: int = 1):
        self._chance = random.Random(seed)
        self._trouble = trouble
        self._replicas = {name: [self._start(name) for _ in range(per_objective)] for name in MODELS}
        self.calls: list[tuple[str, Call]] = []
        self.troubles: dict[str, int] = {}
        self.next: str | None = None  # what goes wrong with the next call

    @staticmethod
    def _start(name: str) -> Sessions:
        return Sessions(name, MODELS[name])

    def __call__(self, objective: str, session: str, call: Call) -> Done:
        self.calls.append((objective, call))
        replicas = self._replicas[objective]
        place = sum(int(part) for part in session.split("-")[1:]) % len(replicas)
        kind = self.next
        if kind is None and self._chance.random() < self._trouble:
            kind = self._chance.choice(["die", "restart", "hang", "twice", "elsewhere"])
        if kind is None:
            return Done(replicas[place].answer(call))
        self.troubles[kind] = self.troubles.get(kind, 0) + 1
        if kind == "die":
            replicas[place] = self._start(objective)
            return Done(ReplicaLost("killed"))
        if kind == "restart":
            replicas[place] = self._start(objective)
        if kind == "elsewhere":
            place = (place + 1) % len(replicas)
        reply = replicas[place].answer(call)
        if kind == "twice":
            reply = replicas[place].answer(call)
        return Done(TimeoutError() if kind == "hang" else reply)


def answers(guide: Guide, seed: int = 0, count: int = 6) -> list[Choice]:
    """Requests of all kinds, side by side; prompts come in pieces of 4 tokens."""
    engine = Engine(tiny_base(), guide, max_rows=4, prefill_tokens=4)
    requests = [
        Request(
            str(i),
            (5, 6, 7 + i % 2, *range(10, 10 + 5 * i))[: 2 + 5 * i],
            [{"good": 1.0}, {"good": 1.0, "short": 2.0}, {}][i % 3],
            beta=1.0,
            tilt_cap=0.7,
            params=SamplingParams(max_tokens=20 + i, seed=seed + i, n=1 + i % 2),
            scorer=Scorer.LAZY if i % 2 else Scorer.FULL,
            guide_every=1 + i // 3,
        )
        for i in range(count)
    ]
    return [choice for choices in engine.generate(requests) for choice in choices]


def assert_same(choices: list[Choice], others: list[Choice]) -> None:
    """The same answers; values to rounding, which depends on what is computed side by side."""
    for one, other in zip(choices, others, strict=True):
        assert (one.tokens, one.finish, one.num_scored) == (other.tokens, other.finish, other.num_scored)
        assert one.values.keys() == other.values.keys()
        for name, values in one.values.items():
            assert values == pytest.approx(other.values[name], abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("num_sessions", [1, 2])
def test_remote_guidance_is_local_guidance(num_sessions):
    replicas = Replicas(per_objective=num_sessions)
    assert_same(answers(RemoteGuide(tuple(MODELS), replicas, num_sessions)), answers(LocalGuide(MODELS)))
    counts = [call.question.score.counts for _, call in replicas.calls if call.question.score]
    assert any(len(set(of_rows)) > 1 for of_rows in counts)


@pytest.mark.parametrize("seed", range(8))
def test_lost_repeated_and_misdirected_calls_change_no_token(seed):
    replicas = Replicas(trouble=0.25, seed=seed, per_objective=2)
    assert_same(answers(RemoteGuide(tuple(MODELS), replicas, 2), seed), answers(LocalGuide(MODELS), seed))
    assert len(replicas.troubles) == 5


@pytest.mark.parametrize("kind", ["die", "restart", "twice"])
def test_faults_during_an_answer_change_no_token(kind):
    class AtEveryPiece(Replicas):
        num_pieces = 0

        def __call__(self, objective, session, call):
            self.num_pieces += call.question.extend is not None
            self.next = kind if call.question.extend else None
            return super().__call__(objective, session, call)

    replicas = AtEveryPiece()
    assert_same(answers(RemoteGuide(tuple(MODELS), replicas)), answers(LocalGuide(MODELS)))
    assert replicas.num_pieces == replicas.troubles[kind] > 20


def test_an_engine_step_costs_one_call_per_objective():
    replicas = Replicas()
    guide = RemoteGuide(tuple(MODELS), replicas)
    engine = Engine(tiny_base(), guide)
    weights, params = {"good": 1, "short": 1}, SamplingParams(30, seed=0)
    engine.submit(Request("r", (5, 6, 7), weights, beta=1.0, params=params, scorer=Scorer.FULL))
    engine.step()  # opens the row, too
    num_steps = 0
    while not engine.is_idle:
        before = len(replicas.calls)
        engine.step()
        num_steps += 1
        assert sorted(name for name, _ in replicas.calls[before:]) == ["good", "short"]
    assert num_steps > 5


def test_an_unreachable_objective_ends_only_the_answers_that_use_it():
    class Partly(Replicas):
        def __call__(self, objective, session, call):
            if objective == "short":
                return Done(ReplicaLost("gone"))
            return super().__call__(objective, session, call)

    engine = Engine(tiny_base(), RemoteGuide(tuple(MODELS), Partly(), limit_s=0.05))
    params = SamplingParams(max_tokens=8, seed=1)
    [[fine], [broken]] = engine.generate(
        [
            Request("fine", (5, 6), {"good": 1.0}, beta=1.0, params=params),
            Request("broken", (5, 6), {"short": 1.0}, beta=1.0, params=params),
        ]
    )
    assert fine.finish in (FinishReason.LENGTH, FinishReason.STOP)
    assert broken.finish is FinishReason.ERROR


def test_closed_rows_leave_the_replica_with_a_later_call():
    replicas = Replicas()
    engine = Engine(tiny_base(), RemoteGuide(("good",), replicas))
    for name in ("a", "b", "c"):
        engine.generate([Request(name, (5, 6), {"good": 1.0}, params=SamplingParams(4, seed=1))])
    assert [row for _, call in replicas.calls for row in call.close] == [0, 1]


def test_engines_that_are_gone_are_forgotten():
    sessions = Sessions("good", MODELS["good"], idle_limit_s=-1)
    sessions.answer(Call("old"))
    sessions.answer(Call("new"))
    assert len(sessions) <= 1


def tokens_of(rows: dict[int, list[int]], length: int) -> RowTokens:
    flat = [id for ids in rows.values() for id in ids]
    counts = tuple(len(ids) for ids in rows.values())
    return RowTokens(tuple(rows), (length,) * len(rows), counts, np.array(flat, dtype=np.int32))


def row(number: int, *tokens: int) -> GuideRow:
    return GuideRow(number, tokens, frozenset({"good"}))


def value_of(*tokens: int) -> float:
    """V of the last of some tokens, from nothing but them."""
    return LocalGuide({"good": MODELS["good"]}).open([row(0, *tokens)]).item()


@pytest.fixture
def ask():
    """Puts questions to a replica of `good`."""
    sessions = Sessions("good", MODELS["good"])
    return lambda question, *kept: sessions.answer(Call("s", kept, question=question))


def test_another_engine_costs_no_copy_of_the_weights():
    model = tiny_value(1)
    sessions = Sessions("good", model)
    places = []
    for name in ("one", "two"):
        sessions.answer(Call(name, question=Question((row(1, 5, 6),))))
        places.append([parameter.data_ptr() for parameter in model.parameters()])
    assert places[0] == places[1]


def test_an_unknown_row_is_named_and_the_others_are_valued(ask):
    ask(Question((row(1, 5, 6),)))
    reply = ask(Question(score=tokens_of({2: [3, 4], 1: [3, 4, 8], 3: [9]}, 2)))
    assert reply.unknown == (2, 3)
    expected = [math.nan, math.nan, value_of(5, 6, 3), value_of(5, 6, 4), value_of(5, 6, 8), math.nan]
    assert reply.values == pytest.approx(expected, abs=1e-5, nan_ok=True)
    reply = ask(Question(extend=tokens_of({2: [3], 1: [3, 4]}, 2)))
    assert reply.unknown == (2,)
    assert reply.values == pytest.approx([math.nan, value_of(5, 6, 3, 4)], abs=1e-5, nan_ok=True)


def test_a_repeated_question_does_not_change_the_next_one(ask):
    ask(Question((row(1, 5, 6),)))
    for _ in range(2):
        ask(Question(score=tokens_of({1: [3, 4]}, 2)))
    reply = ask(Question(score=tokens_of({1: [7]}, 3)), Kept(1, 2, 4))
    assert (reply.unknown, reply.values) == ((), pytest.approx([value_of(5, 6, 4, 7)], abs=1e-5))
    more = Question(extend=tokens_of({1: [8, 9]}, 3))
    assert ask(more).values == pytest.approx([value_of(5, 6, 4, 8, 9)], abs=1e-5)
    assert ask(more).unknown == (1,)


@pytest.mark.parametrize("kept", [Kept(1, 2, 9), Kept(1, 3, 4), Kept(2, 2, 4)], ids=["not scored", "later", "no row"])
def test_a_token_that_cannot_be_kept_makes_its_row_unknown(ask, kept):
    ask(Question((row(1, 5, 6),)))
    ask(Question(score=tokens_of({1: [3, 4]}, 2)))
    assert ask(Question(score=tokens_of({kept.row: [7]}, kept.length + 1)), kept).unknown == (kept.row,)


def test_answers_of_a_replica_are_single_precision():
    sessions = Sessions("good", tiny_value(1).to_precision(torch.bfloat16))
    reply = sessions.answer(Call("s", question=Question((row(1, 5, 6),))))
    assert (reply.values.dtype, reply.values.shape) == (np.float32, (1,))


def test_a_step_of_many_rows_is_a_small_message():
    asked = tokens_of({number: list(range(49_000, 49_040)) for number in range(64)}, 500)
    kept = tuple(Kept(number, 499, 49_000) for number in range(64))
    assert len(pickle.dumps(Call("s" * 40, kept, question=Question(score=asked)))) < 16_000

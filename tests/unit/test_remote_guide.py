"""Guidance from elsewhere is the guidance in this process, whatever happens to the calls."""

from __future__ import annotations

import random

import pytest
import torch

from mavis_dist.decode import Engine, FinishReason, GuideRow, LocalGuide, Request, SamplingParams, Scorer
from serve import remote_guide
from serve.remote_guide import RemoteGuide, ReplicaLost
from serve.sessions import Call, Reply, Sessions
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

    @staticmethod
    def _start(name: str) -> Sessions:
        return Sessions(name, MODELS[name])

    def __call__(self, objective: str, session: str, call: Call) -> Done:
        self.calls.append((objective, call))
        replicas = self._replicas[objective]
        place = hash(session) % len(replicas)
        kind = self._chance.choice(["die", "restart", "hang", "twice", "elsewhere"])
        if self._chance.random() >= self._trouble:
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


def answers(guide, seed: int = 0, count: int = 6) -> list[tuple]:
    engine = Engine(tiny_base(), guide, max_rows=4)
    requests = [
        Request(
            str(i),
            (5, 6, 7 + i % 2, 8)[: 2 + i % 3],
            [{"good": 1.0}, {"good": 1.0, "short": 2.0}, {}][i % 3],
            beta=1.0,
            tilt_cap=0.7,
            params=SamplingParams(max_tokens=20 + i, seed=seed + i, n=1 + i % 2),
            scorer=Scorer.LAZY if i % 2 else Scorer.FULL,
        )
        for i in range(count)
    ]
    choices = [choice for choices in engine.generate(requests) for choice in choices]
    return [(c.tokens, c.finish, {name: round(v, 3) for name, v in c.values.items()}) for c in choices]


@pytest.mark.parametrize("num_sessions", [1, 2])
def test_remote_guidance_is_local_guidance(num_sessions):
    replicas = Replicas(per_objective=num_sessions)
    assert answers(RemoteGuide(tuple(MODELS), replicas, num_sessions)) == answers(LocalGuide(MODELS))


@pytest.mark.parametrize("seed", range(8))
def test_lost_repeated_and_misdirected_calls_change_no_token(seed):
    replicas = Replicas(trouble=0.25, seed=seed, per_objective=2)
    assert answers(RemoteGuide(tuple(MODELS), replicas, 2), seed) == answers(LocalGuide(MODELS), seed)
    assert len(replicas.troubles) == 5


def test_an_engine_step_costs_one_call_per_objective():
    replicas = Replicas()
    guide = RemoteGuide(tuple(MODELS), replicas)
    engine = Engine(tiny_base(), guide)
    engine.submit(Request("r", (5, 6, 7), {"good": 1, "short": 1}, beta=1.0, params=SamplingParams(30, seed=0)))
    engine.step()  # opens the row, too
    num_steps = 0
    while not engine.is_idle:
        before = len(replicas.calls)
        engine.step()
        num_steps += 1
        assert sorted(name for name, _ in replicas.calls[before:]) == ["good", "short"]
    assert num_steps > 5


def test_an_objective_out_of_reach_ends_only_the_answers_that_use_it():
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


def test_an_unknown_row_is_named_and_the_others_are_valued():
    sessions = Sessions("good", MODELS["good"])
    sessions.answer(Call("s", open=(GuideRow(1, (5, 6), frozenset({"good"})),)))
    candidates = torch.tensor([[3, 4], [3, 4]]).numpy()
    reply = sessions.answer(Call("s", rows=(1, 2), lengths=(2, 2), offsets=(0, 0), candidates_BK=candidates))
    assert reply.unknown == (2,)
    assert not torch.from_numpy(reply.values[0]).isnan().any()

"""One engine thread: concurrent callers, cancellation, reported failures, and answers resumed on other replicas."""

from __future__ import annotations

import asyncio
import queue
import random
import threading
import time
from contextlib import aclosing
from dataclasses import replace
from functools import partial

import pytest

from mavis_dist.decode import (
    Engine,
    FinishReason,
    LocalGuide,
    Preference,
    Request,
    RequestError,
    SamplingParams,
    Update,
)
from mavis_dist.sections import Limits
from serve.base.engine_loop import EngineLoop, stream
from serve.gateway.failover import Piece
from serve.gateway.refusals import Overloaded
from serve.gateway.streams import answer_stream
from serve.messages import Admission, AnswerFailed, AnswerLate, BaseLost, EngineStopped, Full, Refused
from tests.fakes import tiny_base, tiny_value

LIMITS = Limits(stall_s=5, deadline_s=20)


def make_engine(rows: int = 4) -> Engine:
    return Engine(tiny_base(), LocalGuide({"good": tiny_value(1)}), rows)


@pytest.fixture
def loop():
    loop = EngineLoop(make_engine())
    yield loop
    loop.stop()


def make_request(id: str = "r", max_tokens: int = 12, **fields) -> Request:
    params = SamplingParams(max_tokens=max_tokens, seed=fields.pop("seed", 5))
    return Request(id, (5, 6, 7), {"good": 1.0}, beta=1.0, params=params, **fields)


def expected_tokens(request: Request) -> list[int]:
    [[choice]] = make_engine().generate([request])
    return choice.tokens


def collect(updates: queue.Queue[Update]) -> list[int]:
    tokens: list[int] = []
    while True:
        update = updates.get(timeout=10)
        assert update.start == len(tokens)
        tokens += update.tokens
        if update.finished is not None:
            return tokens


def wait_until_idle(loop: EngineLoop) -> None:
    deadline = time.monotonic() + 10
    while loop.load != (0, 0):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_concurrent_answers_are_those_of_the_bare_engine(loop):
    requests = [make_request(str(seed), seed=seed) for seed in range(6)]
    queues = []
    for request in requests:
        queues.append(queue.Queue())
        loop.submit(request, queues[-1].put)
    for request, updates in zip(requests, queues, strict=True):
        assert collect(updates) == expected_tokens(request)


def test_a_bad_request_is_refused_at_once(loop):
    with pytest.raises(RequestError) as caught:
        loop.submit(make_request(max_tokens=10_000), print)
    assert caught.value.field == "max_tokens"

    async def first():
        return await anext(stream(loop, make_request(max_tokens=10_000)))

    assert isinstance(asyncio.run(first()), Refused)


def test_a_request_that_never_fits_the_cache_is_refused_at_once():
    loop = EngineLoop(Engine(tiny_base(), cache_tokens=20))
    with pytest.raises(RequestError, match="cache of 20 tokens"):
        loop.submit(Request("r", (5, 6, 7), params=SamplingParams(max_tokens=18)), print)
    loop.stop()


def test_leaving_a_stream_frees_its_row(loop):
    async def leave():
        async with aclosing(stream(loop, make_request(max_tokens=250))) as messages:
            assert isinstance(await anext(messages), Request)
            assert await anext(messages)

    asyncio.run(leave())
    wait_until_idle(loop)


def test_a_waiting_stream_sends_empty_lists():
    loop = EngineLoop(make_engine(rows=1))
    loop.submit(make_request("first", max_tokens=250), lambda _: time.sleep(0.01))

    async def second():
        async with aclosing(stream(loop, make_request("second"), heartbeat_s=0.01)) as messages:
            return [await anext(messages) for _ in range(2)]

    assert asyncio.run(second())[1] == []
    loop.stop()


class Failing(Engine):
    failures = 0

    def step(self):
        if self.failures and not self.is_idle:
            self.failures -= 1
            raise MemoryError("no room")
        return super().step()


def test_a_request_is_validated_once_on_its_way_into_the_engine(monkeypatch):
    seen, validate = [], Engine.validate
    monkeypatch.setattr(Engine, "validate", lambda self, request: seen.append(request.id) or validate(self, request))
    loop, updates = EngineLoop(make_engine()), queue.Queue()
    loop.submit(make_request(), updates.put)
    assert collect(updates) == expected_tokens(make_request("other"))
    loop.stop()
    assert seen == ["r", "other"]


def test_a_failing_step_ends_open_answers_with_its_reason_and_the_engine_continues():
    engine = Failing(tiny_base(), LocalGuide({"good": tiny_value(1)}))
    engine.failures = 1
    loop = EngineLoop(engine)
    updates = queue.Queue()
    loop.submit(make_request(), updates.put)
    choice = updates.get(timeout=10).finished
    assert choice.finish is FinishReason.ERROR
    assert "no room" in choice.error
    loop.submit(make_request("next"), updates.put)
    assert collect(updates) == expected_tokens(make_request())
    loop.stop()


def test_an_engine_that_only_fails_is_reported_as_unhealthy():
    engine = Failing(tiny_base(), None)
    engine.failures = 1000
    loop = EngineLoop(engine)
    updates = queue.Queue()
    for attempt in range(3):
        loop.check()
        loop.submit(Request(str(attempt), (5,), params=SamplingParams(4)), updates.put)
        assert updates.get(timeout=10).finished.error
    with pytest.raises(EngineStopped, match="no room"):
        loop.check()
    loop.stop()


def test_a_stopped_loop_refuses_requests(loop):
    loop.stop()
    with pytest.raises(EngineStopped):
        loop.submit(make_request(), print)


class Flaky:
    """Base replicas that are lost, send nothing, stop early or repeat messages after a few tokens."""

    def __init__(self, loop: EngineLoop, troubles: list[str]):
        self._loop, self._troubles, self.opened, self.admissions = loop, troubles, [], []

    async def __call__(self, request: Request, admission: Admission):
        self.opened.append(request)
        self.admissions.append(admission)
        trouble = self._troubles.pop(0) if self._troubles else None
        count = 0
        async with aclosing(stream(self._loop, request, admission)) as messages:
            async for message in messages:
                yield message
                if isinstance(message, list) and message and trouble == "repeat":
                    yield message
                count += isinstance(message, list)
                if trouble == "lost" and count == 3:
                    raise BaseLost("killed")
                if trouble == "silent" and count == 2:
                    await asyncio.sleep(60)
                if trouble == "early" and count == 1:
                    return


async def tokens_of(request: Request, open_stream, limits: Limits = LIMITS) -> tuple[list[int], Piece]:
    tokens, last = [], None
    async with aclosing(answer_stream(request, open_stream, limits)) as items:
        accepted = await anext(items)
        assert isinstance(accepted, Request)
        async for piece in items:
            assert isinstance(piece, Piece)
            tokens += piece.tokens
            last = piece
    return tokens, last


def test_a_resumed_answer_has_the_tokens_of_an_uninterrupted_one(loop):
    request = make_request(max_tokens=40)
    replicas = Flaky(loop, ["lost", "early", "repeat", "silent"])
    tokens, last = asyncio.run(tokens_of(request, replicas, Limits(stall_s=0.5, deadline_s=20)))
    assert tokens == expected_tokens(request)
    assert len(replicas.opened) >= 3
    assert last.resumed
    assert last.finished.finish in (FinishReason.LENGTH, FinishReason.STOP)
    wait_until_idle(loop)


def test_an_answer_that_no_replica_completes_fails_with_the_reason(loop):
    replicas = Flaky(loop, ["early"] * 1000)
    with pytest.raises(AnswerFailed, match="stream ended early"):
        asyncio.run(tokens_of(make_request(max_tokens=200), replicas, Limits(stall_s=1, deadline_s=1)))


# --- room and turns -----------------------------------------------------------------------------------------------


class Gated(Engine):
    """Steps only while the gate is open; notes in which order requests come, and whether more come than fit."""

    def __init__(self, rows: int):
        super().__init__(tiny_base(), LocalGuide({"good": tiny_value(1)}), rows)
        self.gate, self.order, self.most = threading.Event(), [], 0

    def enqueue(self, request, first=False):
        self.order.append(request.id)
        super().enqueue(request, first)

    def step(self):
        self.most = max(self.most, sum(self.load))
        assert self.gate.wait(20)
        return super().step()


class Queueing:
    """A gated loop, and what its answers are."""

    def __init__(self, rows: int = 4, queue_rows: int | None = None):
        self.engine = Gated(rows)
        self.loop = EngineLoop(self.engine, queue=queue_rows, name="here")
        self.answers: dict[str, queue.Queue[Update]] = {}

    def submit(self, id: str, key: str = "", num_preferences: int = 0, **terms) -> bool:
        """Whether it is let in."""
        preferences = tuple(Preference(str(k), (8, k + 1, 5, 6, 7), 1.0) for k in range(num_preferences))
        request = make_request(id, preferences=preferences)
        updates = queue.Queue()
        accepted = self.loop.submit(request, updates.put, Admission(key, **terms))
        if isinstance(accepted, Request):
            self.answers[id] = updates
        else:
            assert accepted.replica == "here"
            assert accepted.wait_s > 0
        return isinstance(accepted, Request)

    def finish(self) -> None:
        """Let all answers be written: they are those of the bare engine, the engine never had more than it could take,
        and no row is left behind."""
        self.engine.gate.set()
        for updates in self.answers.values():
            assert len(collect(updates)) == 12
        wait_until_idle(self.loop)
        assert self.engine.most <= self.engine.max_rows
        self.loop.stop()


def test_room_is_counted_in_rows_exactly():
    queueing = Queueing(rows=4, queue_rows=8)
    let_in = [queueing.submit(str(i), num_preferences=1) for i in range(10)]
    # Two run; two wait, half of the queue; the fifth would have to leave as much as it takes.
    assert let_in == [True] * 4 + [False] * 6
    assert queueing.loop.load == (4, 4)
    assert [queueing.submit(f"b{i}", "b") for i in range(4)] == [True, True, False, False]
    assert queueing.loop.load == (4, 6)
    queueing.finish()


def test_admitted_requests_are_never_refused_and_resumed_ones_go_first():
    queueing = Queueing(rows=1, queue_rows=1)
    assert [queueing.submit(id) for id in "abc"] == [True, True, False]
    assert queueing.submit("another choice", rows=0)
    assert queueing.submit("resumed", rows=0, is_resumed=True)
    queueing.finish()
    assert queueing.engine.order == ["a", "resumed", "b", "another choice"]


def test_a_request_reserves_rows_for_all_its_choices():
    queueing = Queueing(rows=1, queue_rows=4)
    assert [queueing.submit("a"), queueing.submit("b")] == [True, True]
    assert [queueing.submit("c", rows=3), queueing.submit("d", rows=2), queueing.submit("e")] == [False, True, False]
    queueing.finish()


def test_a_hundred_requests_of_one_user_do_not_starve_the_one_of_another():
    queueing = Queueing(rows=2, queue_rows=400)
    assert all(queueing.submit(f"a{i}", "a") for i in range(40))
    assert queueing.submit("b", "b")
    queueing.finish()
    assert queueing.engine.order.index("b") <= 2 + 1


def test_a_request_of_many_rows_is_not_starved_by_single_ones():
    queueing = Queueing(rows=3, queue_rows=100)
    assert all(queueing.submit(f"a{i}", "a") for i in range(20))
    assert queueing.submit("wide", "b", num_preferences=2)
    queueing.finish()
    assert queueing.engine.order.index("wide") <= 3 + 1


def test_a_request_with_more_choices_than_rows_is_completed():
    queueing = Queueing(rows=2)
    request = replace(make_request("n"), params=replace(make_request().params, n=5))
    updates = queue.Queue()
    assert isinstance(queueing.loop.submit(request, updates.put), Request)
    assert queueing.submit("next")
    queueing.engine.gate.set()
    finished = []
    while len(finished) < 5:
        update = updates.get(timeout=10)
        finished += [update.finished] if update.finished else []
    assert sorted(choice.index for choice in finished) == list(range(5))
    queueing.engine.most = 0  # those of one request cannot come one by one
    queueing.finish()


@pytest.mark.parametrize("seed", range(4))
def test_a_cancelled_request_leaves_no_row_wherever_it_is(seed):
    draw = random.Random(seed)
    queueing = Queueing(rows=3, queue_rows=12)
    ids = [id for id in map(str, range(14)) if queueing.submit(id, draw.choice("ab"), draw.randrange(3))]
    assert queueing.loop.load[1] > 0
    for id in draw.sample(ids, len(ids) // 2):  # in line, on the way to the engine, or in it
        queueing.loop.cancel(id)
        del queueing.answers[id]
    queueing.engine.gate.set()
    for id in list(queueing.answers)[::2]:
        queueing.answers[id].get(timeout=10)  # it is being written
        queueing.loop.cancel(id)
        del queueing.answers[id]
    queueing.loop.cancel("nobody")
    queueing.finish()
    assert len(set(queueing.engine.order)) == len(queueing.engine.order)


def test_a_cancelled_head_lets_the_next_one_pass():
    queueing = Queueing(rows=2, queue_rows=10)
    assert [queueing.submit("a"), queueing.submit("wide", num_preferences=1), queueing.submit("b")] == [True] * 3
    assert queueing.loop.load == (1, 3)
    queueing.loop.cancel("wide")
    assert queueing.loop.load == (2, 0)
    del queueing.answers["wide"]
    queueing.finish()


def test_an_engine_short_of_cache_gets_no_more_requests_until_it_started_its_own():
    seen = []

    class Watched(Engine):
        def step(self):
            updates = super().step()
            seen.append(self.load)
            return updates

    loop = EngineLoop(Watched(tiny_base(), max_rows=4, cache_tokens=40))
    queues = []
    for id in range(8):
        queues.append(queue.Queue())
        loop.submit(Request(str(id), (5, 6, 7), params=SamplingParams(12, seed=id)), queues[-1].put)
    for updates in queues:
        assert collect(updates)
    assert max(running for running, _ in seen) <= 2
    assert max(running + waiting for running, waiting in seen) <= 4
    wait_until_idle(loop)
    loop.stop()


def test_a_failing_step_does_not_end_waiting_requests():
    engine = Failing(tiny_base(), LocalGuide({"good": tiny_value(1)}), 1)
    loop = EngineLoop(engine)
    first, second = queue.Queue(), queue.Queue()
    loop.submit(make_request("first", max_tokens=200), first.put)
    loop.submit(make_request("second"), second.put)
    engine.failures = 1
    while not (finished := first.get(timeout=10).finished):
        pass
    assert finished.finish is FinishReason.ERROR
    assert collect(second) == expected_tokens(make_request())
    loop.stop()


# --- refusals ------------------------------------------------------------------------------------------------------


class Replicas:
    """Base replicas by name, asked as the router would; those that are full say so, and "dies" is lost once."""

    def __init__(self, loop: EngineLoop, *names: str):
        self._loop, self._names, self.asked, self._deaths_left = loop, names, [], 1

    async def __call__(self, request: Request, admission: Admission):
        name = next((name for name in self._names if name != admission.avoid), self._names[0])
        self.asked.append((name, admission))
        if "full" in name and admission.rows != 0:
            yield Full(name, 2.0 if name == "full" else 3.0)
            return
        count = 0
        async with aclosing(stream(self._loop, request, admission)) as messages:
            async for message in messages:
                yield message
                count += 1
                if "dies" in name and self._deaths_left and count == 3:
                    self._deaths_left = 0
                    raise BaseLost("killed")


def test_a_request_refused_by_a_full_replica_goes_to_another(loop):
    replicas = Replicas(loop, "full", "free")
    tokens, last = asyncio.run(tokens_of(make_request(), replicas))
    assert tokens == expected_tokens(make_request())
    assert not last.resumed
    assert [(name, admission.avoid) for name, admission in replicas.asked] == [("full", ""), ("free", "full")]


@pytest.mark.parametrize(("names", "wait_s"), [(("full",), 2.0), (("full too", "full", "free"), 2.0)])
def test_a_request_is_refused_after_two_full_replicas(loop, names, wait_s):
    replicas = Replicas(loop, *names)
    with pytest.raises(Overloaded) as refused:
        asyncio.run(tokens_of(make_request(), replicas))
    assert refused.value.wait_s == wait_s
    assert len(replicas.asked) == 2
    assert loop.load == (0, 0)


def test_an_answer_that_has_begun_is_never_refused(loop):
    class FullAfterwards(Replicas):
        async def __call__(self, request, admission):
            self._names = ("dies",) if not self.asked else ("full",)
            async with aclosing(super().__call__(request, admission)) as messages:
                async for message in messages:
                    yield message

    replicas = FullAfterwards(loop)
    tokens, last = asyncio.run(tokens_of(make_request(max_tokens=40), replicas))
    assert tokens == expected_tokens(make_request(max_tokens=40))
    assert last.resumed
    assert [(admission.rows, admission.is_resumed) for _, admission in replicas.asked] == [(None, False), (0, True)]


def test_an_answer_that_waits_too_long_is_late():
    queueing = Queueing(rows=1)
    queueing.submit("first")

    async def second():
        opened = partial(stream, queueing.loop)
        return await tokens_of(make_request("second"), opened, Limits(stall_s=5, deadline_s=0.3))

    with pytest.raises(AnswerLate, match=r"not complete within 0\.3 s"):
        asyncio.run(second())
    assert queueing.loop.load == (1, 0)
    queueing.finish()

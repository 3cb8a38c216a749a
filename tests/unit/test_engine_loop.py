"""One engine thread: many callers, cancellation, failures that are seen, and answers that go on elsewhere."""

from __future__ import annotations

import asyncio
import queue
import time
from contextlib import aclosing

import pytest

from mavis_dist.decode import Engine, FinishReason, LocalGuide, Request, RequestError, SamplingParams, Update
from serve.answers import AnswerFailed, BaseLost, Limits, Piece, follow
from serve.engine_loop import EngineLoop, EngineStopped, Refused, stream
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


def test_a_stream_without_news_says_that_it_waits():
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


def test_a_failing_step_ends_open_answers_with_its_reason_and_the_engine_goes_on():
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


def test_a_stopped_loop_says_so(loop):
    loop.stop()
    with pytest.raises(EngineStopped):
        loop.submit(make_request(), print)


class Flaky:
    """Base replicas that are lost, fall silent, stop early or repeat themselves after a few tokens."""

    def __init__(self, loop: EngineLoop, troubles: list[str]):
        self._loop, self._troubles, self.opened = loop, troubles, []

    async def __call__(self, request: Request):
        self.opened.append(request)
        trouble = self._troubles.pop(0) if self._troubles else None
        count = 0
        async with aclosing(stream(self._loop, request)) as messages:
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
    async with aclosing(follow(request, open_stream, limits)) as items:
        accepted = await anext(items)
        assert isinstance(accepted, Request)
        async for piece in items:
            assert isinstance(piece, Piece)
            tokens += piece.tokens
            last = piece
    return tokens, last


def test_an_answer_goes_on_elsewhere_with_the_tokens_it_would_have_had(loop):
    request = make_request(max_tokens=40)
    replicas = Flaky(loop, ["lost", "early", "repeat", "silent"])
    tokens, last = asyncio.run(tokens_of(request, replicas, Limits(stall_s=0.5, deadline_s=20)))
    assert tokens == expected_tokens(request)
    assert len(replicas.opened) >= 3
    assert last.resumed
    assert last.finished.finish in (FinishReason.LENGTH, FinishReason.STOP)
    wait_until_idle(loop)


def test_an_answer_that_no_replica_completes_fails_and_says_why(loop):
    replicas = Flaky(loop, ["early"] * 1000)
    with pytest.raises(AnswerFailed, match="stream ended early"):
        asyncio.run(tokens_of(make_request(max_tokens=200), replicas, Limits(stall_s=1, deadline_s=1)))

"""Feeds of base replicas, read by a gateway: the same answers in fewer messages, and none lost with a feed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import pytest

from mavis_dist.decode import Engine, LocalGuide, Request, SamplingParams, Update
from mavis_dist.sections import Limits
from serve.base import feeds as base
from serve.base.engine_loop import EngineLoop
from serve.gateway import feeds as gateway
from serve.gateway.failover import Piece
from serve.gateway.streams import answer_stream
from serve.messages import ANYBODY, Admission, BaseLost, Feed, Message
from tests.fakes import tiny_base, tiny_value

LIMITS = Limits(stall_s=5, deadline_s=30)
REPLICA = "base-1"


def make_engine(rows: int = 8) -> Engine:
    return Engine(tiny_base(), LocalGuide({"good": tiny_value(1)}), rows)


def make_request(id: str, max_tokens: int = 24, **fields) -> Request:
    return Request(
        id, (5, 6, 7), {"good": 1.0}, beta=1.0, params=SamplingParams(max_tokens, seed=int(id) + 5), **fields
    )


class Service:
    """A gateway and one base replica in this process."""

    def __init__(
        self, rows: int = 8, interval_s: float = 0.01, heartbeat_s: float = 5.0, fail_after: int | None = None
    ):
        """`fail_after`: every feed is lost after that many messages."""
        self.loop = EngineLoop(make_engine(rows))
        self.base = base.Feeds(self.loop, REPLICA, interval_s, heartbeat_s)
        self.gateway = gateway.Feeds(self._open_stream, self._open_feed)
        self.num_opened, self.fed, self.streamed = 0, [], []  # feeds; messages of feeds, and of streams
        self._fail_after = fail_after

    async def _open_stream(self, request: Request, admission: Admission) -> AsyncGenerator[Message, None]:
        async with aclosing(self.base.stream(request, admission)) as messages:
            async for message in messages:
                self.streamed.append(message)
                yield message

    async def _open_feed(self, feed: Feed) -> AsyncGenerator[list[Update], None]:
        self.num_opened, count = self.num_opened + 1, 0
        async with aclosing(self.base.read(feed)) as bundles:
            async for updates in bundles:
                yield updates
                self.fed.append(updates)
                count += 1
                if count == self._fail_after:
                    raise BaseLost("the replica died")

    async def tokens(self, request: Request) -> list[int]:
        answer = answer_stream(request, self.gateway.stream, LIMITS)
        return [token async for piece in answer if isinstance(piece, Piece) for token in piece.tokens]


def run(service: Service, scenario) -> None:
    try:
        asyncio.run(scenario())
    finally:
        service.loop.stop()


def expected(requests: list[Request]) -> list[list[int]]:
    return [choice.tokens for [choice] in make_engine().generate(requests)]


async def until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def test_answers_of_a_feed_are_those_of_the_engine_in_common_messages():
    service = Service()
    requests = [make_request(str(i)) for i in range(9)]

    async def scenario():
        first = await service.tokens(requests[0])
        num_streamed = len(service.streamed)
        others = await asyncio.gather(*map(service.tokens, requests[1:]))
        assert [first, *others] == expected(requests)
        assert len(service.streamed) == num_streamed + 8  # the accepted requests, and nothing else
        assert service.num_opened == 1
        assert max(len(updates) for updates in service.fed) > 1

    run(service, scenario)


def test_a_lost_feed_loses_no_token():
    service = Service(fail_after=3)
    requests = [make_request(str(i), max_tokens=60) for i in range(6)]

    async def scenario():
        assert [await service.tokens(requests[0])] == expected(requests[:1])
        assert await asyncio.gather(*map(service.tokens, requests[1:])) == expected(requests[1:])
        assert service.num_opened > 1
        await until(lambda: service.loop.load == (0, 0))

    run(service, scenario)


def test_leaving_an_answer_of_a_feed_frees_its_row_and_no_other():
    service = Service()

    async def scenario():
        await service.tokens(make_request("0"))
        stays = asyncio.create_task(service.tokens(make_request("1", max_tokens=100)))
        async with aclosing(service.gateway.stream(make_request("2", max_tokens=250), ANYBODY)) as messages:
            assert isinstance(await anext(messages), Request)
            assert await anext(messages)
        assert await stays == expected([make_request("1", max_tokens=100)])[0]
        await until(lambda: service.loop.load == (0, 0))

    run(service, scenario)


def test_a_feed_outlives_the_answer_that_opened_it_and_ends_without_answers():
    service = Service(heartbeat_s=0.05)

    async def scenario():
        async with aclosing(service.gateway.stream(make_request("0", max_tokens=250), ANYBODY)) as messages:
            await anext(messages)
            await until(lambda: service.num_opened)
        assert await service.tokens(make_request("1")) == expected([make_request("1")])[0]
        assert service.fed
        await until(lambda: not service.base._open)
        assert await service.tokens(make_request("2")) == expected([make_request("2")])[0]
        assert service.num_opened == 2

    run(service, scenario)


def test_a_waiting_answer_hears_that_its_base_replica_lives(monkeypatch):
    monkeypatch.setattr(gateway, "HEARTBEAT_S", 0.01)
    service = Service(rows=1)

    async def scenario():
        await service.tokens(make_request("0"))
        busy = asyncio.create_task(service.tokens(make_request("1", max_tokens=200)))
        await until(lambda: service.loop.load[0])
        async with aclosing(service.gateway.stream(make_request("2"), ANYBODY)) as messages:
            assert isinstance(await anext(messages), Request)
            assert await anext(messages) == []
        await busy

    run(service, scenario)


def test_a_feed_that_reaches_another_base_replica_is_refused():
    service = Service()
    open_feed = service.gateway._open_feed
    service.gateway._open_feed = lambda feed: open_feed(replace(feed, replica="base-2"))
    requests = [make_request(str(i)) for i in range(3)]

    async def scenario():
        assert [await service.tokens(request) for request in requests] == expected(requests)
        assert not service.fed
        assert service.num_opened == 3

    run(service, scenario)


def test_a_replica_that_names_a_lost_feed_is_asked_again():
    service = Service()

    async def scenario():
        await service.tokens(make_request("0"))
        await until(lambda: service.gateway._feeds)
        [(name, task)] = service.gateway._feeds.items()
        service.gateway._feeds = {}  # lost here, while the base replica has not noticed
        with pytest.raises(BaseLost):
            async with aclosing(service.gateway.stream(make_request("1"), ANYBODY)) as messages:
                [_ async for _ in messages]
        service.gateway._feeds = {name: task}

    run(service, scenario)

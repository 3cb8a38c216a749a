"""Overload and clients that leave: the HTTP routes over a real engine, without Ray."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import httpx
import pytest

from mavis_dist.decode import Engine, Request
from mavis_dist.models.load import BaseModel, load_base
from serve.base.engine_loop import EngineLoop, stream
from serve.gateway import failover
from serve.gateway.build_request import Completions
from serve.gateway.refusals import MAX_MEMORY_S
from serve.gateway.routes import create_api
from serve.messages import Admission
from tests.local import args_of
from tests.tiny import write_base

ROWS, QUEUE = 2, 4
LONG = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 400, "seed": 3}


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(failover, "RETRY_PAUSE_S", 0.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> BaseModel:
    return load_base(str(write_base(tmp_path_factory.mktemp("base"))))


class Slow(Engine):
    pause_s = 0.02

    def step(self):
        time.sleep(self.pause_s)
        return super().step()


class NoObjectives:
    async def versions(self) -> dict[str, str]:
        return {}


class Service:
    """The routes, over one base replica."""

    def __init__(self, base: BaseModel):
        self.engine = Slow(base, max_rows=ROWS)
        self.loop = EngineLoop(self.engine, queue=QUEUE)
        self.num_opened = 0
        args = args_of("tiny", rows=ROWS, max_tokens=400, stall_s=20, deadline_s=30)
        self.completions = Completions(base.tokenizer, args, 1024, self._open)
        self.api = create_api(args, self.completions, NoObjectives(), self._load)  # type: ignore[arg-type]

    async def _open(self, request: Request, admission: Admission):
        self.num_opened += 1
        async with aclosing(stream(self.loop, request, admission)) as messages:
            async for message in messages:
                yield message

    async def _load(self) -> tuple[int, int]:
        return self.loop.load

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(self.api)
        async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=30) as client:
            yield client

    async def until(self, condition: Callable[[tuple[int, int]], bool], limit_s: float = 10) -> float:
        """Seconds until the load is as it should be."""
        began = time.monotonic()
        while not condition(self.loop.load):
            assert time.monotonic() - began < limit_s, self.loop.load
            await asyncio.sleep(0.005)
        return time.monotonic() - began

    async def fill(self, client: httpx.AsyncClient, user: str = "", num: int = ROWS + QUEUE // 2) -> list[asyncio.Task]:
        """Requests that take all rows, and what one user may have of the queue."""
        body = {**LONG, "user": user} if user else LONG
        tasks = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(num)]
        await self.until(lambda load: sum(load) == num)
        return tasks


@pytest.fixture
def service(base) -> Iterator[Service]:
    service = Service(base)
    yield service
    service.loop.stop()


async def leave(tasks: list[asyncio.Task]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def run(scenario: Callable[[httpx.AsyncClient], Awaitable[Any]], service: Service) -> Any:
    async def whole():
        async with service.client() as client:
            return await scenario(client)

    return asyncio.run(whole())


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_a_request_without_room_is_refused_as_openai_would(service, is_streamed, n):
    async def scenario(client):
        tasks = await service.fill(client)
        load = service.loop.load
        response = await client.post("/v1/completions", json={**LONG, "n": n, "stream": is_streamed})
        assert service.loop.load == load
        await leave(tasks)
        return response

    response = run(scenario, service)
    assert response.status_code == 429
    assert response.headers["content-type"] == "application/json"
    assert 1 <= int(response.headers["retry-after"]) <= 60
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", "overloaded", None)
    assert "try again" in error["message"]


def test_all_choices_are_admitted_or_none(service):
    async def scenario(client):
        tasks = await service.fill(client, num=ROWS + 1)
        opened = service.num_opened
        # One of three would still have room.
        refused = await client.post("/v1/completions", json={**LONG, "n": 3})
        assert service.num_opened - opened <= 2
        assert service.loop.load == (ROWS, 1)
        other = {**LONG, "max_tokens": 3, "user": "other", "n": 3}
        accepted = asyncio.create_task(client.post("/v1/completions", json=other))
        await service.until(lambda load: load == (ROWS, 1 + 3))
        await leave(tasks)
        return refused.status_code, await accepted

    status, accepted = run(scenario, service)
    assert status == 429
    assert [choice["index"] for choice in accepted.json()["choices"]] == [0, 1, 2]


def test_an_idle_service_takes_max_n_choices(service):
    async def scenario(client):
        return await client.post("/v1/completions", json={**LONG, "max_tokens": 3, "n": 16})

    assert len(run(scenario, service).json()["choices"]) == 16


def test_a_flood_of_one_user_leaves_room_and_turns_for_another(service):
    service.engine.pause_s = 0.005

    async def scenario(client):
        short = {**LONG, "max_tokens": 20}
        flood = [
            asyncio.create_task(client.post("/v1/completions", json={**short, "user": "greedy"})) for _ in range(60)
        ]
        await service.until(lambda load: load[1] > 0)
        answer = await client.post("/v1/completions", json={**short, "user": "modest"})
        return answer.status_code, [response.status_code for response in await asyncio.gather(*flood)]

    status, flood = run(scenario, service)
    assert status == 200
    assert set(flood) == {200, 429}


def test_refusals_are_cheap(service):
    """After the first ones none reaches a base replica for a moment, and then as few again."""
    now = [0.0]
    service.completions._refusals._clock = lambda: now[0]

    async def refuse(client) -> int:
        opened = service.num_opened
        responses = await asyncio.gather(*(client.post("/v1/completions", json=LONG) for _ in range(20)))
        assert {response.status_code for response in responses} == {429}
        return service.num_opened - opened

    async def scenario(client):
        tasks = await service.fill(client)
        asked = []
        for _ in range(2):
            asked.append([await refuse(client) for _ in range(4)])
            now[0] += 2 * MAX_MEMORY_S
        await leave(tasks)
        return asked

    for first, *others in run(scenario, service):
        assert 0 < first <= 2 * 20
        assert others == [0, 0, 0]


class Visitor:
    """An HTTP client at the level of ASGI, which can leave at any moment."""

    def __init__(self, service: Service, body: dict):
        self.sent: list[dict] = []
        self._gone, self._is_read, self._body = asyncio.Event(), False, json.dumps(body).encode()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        self.task = asyncio.create_task(service.api(scope, self._receive, self._send))

    async def _receive(self) -> dict:
        if not self._is_read:
            self._is_read = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict) -> None:
        self.sent.append(message)

    def leave(self) -> None:
        self._gone.set()

    @property
    def has_text(self) -> bool:
        return any(message.get("body") for message in self.sent)


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("is_running", [False, True])
@pytest.mark.parametrize("how", ["disconnect", "cancel"])  # the server in front tells, or cancels
def test_a_client_that_leaves_frees_its_rows_at_once(service, is_streamed, is_running, how):
    async def scenario(client):
        others = [] if is_running else await service.fill(client, user="other", num=ROWS)
        visitor = Visitor(service, {**LONG, "n": 2, "stream": is_streamed})
        await service.until(lambda load: sum(load) == len(others) + 2)
        if is_running:
            while is_streamed and not visitor.has_text:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.05)
        if how == "disconnect":
            visitor.leave()
        else:
            visitor.task.cancel()
        freed_s = await service.until(lambda load: sum(load) == len(others))
        await asyncio.wait([visitor.task], timeout=5)
        assert visitor.task.done()
        await leave(others)
        await service.until(lambda load: load == (0, 0))
        return freed_s

    assert run(scenario, service) < 1


def test_a_stream_that_is_cancelled_before_its_first_event_frees_its_rows(service):
    class Stuck(Visitor):
        async def _send(self, message):
            await asyncio.Event().wait()

    async def scenario(client):
        visitor = Stuck(service, {**LONG, "stream": True})
        await service.until(lambda load: load == (1, 0))
        await asyncio.sleep(0.1)
        visitor.task.cancel()
        return await service.until(lambda load: load == (0, 0))

    assert run(scenario, service) < 1

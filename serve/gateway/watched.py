"""The gateway's metrics: streams and routes that count, and GET /metrics with the figures of all nodes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import httpx
import ray
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mavis_dist.decode import Request
from serve.messages import OpenStream
from serve.metrics import PREFIX, Record

SCRAPE_LIMIT_S = 3.0


def watched_streams(open_stream: OpenStream, record: Record) -> OpenStream:
    """The same streams, with times and ends told."""

    async def watched(request: Request, *rest: Any) -> AsyncGenerator[Any, None]:
        began, first, last, num_tokens = time.perf_counter(), 0.0, 0.0, 0
        if request.answer:
            record("mavis_failovers", 1)
        source = open_stream(request, *rest)
        try:
            async for message in source:
                for update in message if isinstance(message, list) else ():
                    last = time.perf_counter()
                    if update.tokens and not num_tokens:
                        first = last
                        if not request.answer:
                            record("mavis_first_token_seconds", first - began)
                    num_tokens += len(update.tokens)
                    if update.finished is not None and update.finished.finish is not None:
                        record("mavis_answers", 1, finish=update.finished.finish.value)
                yield message
        finally:
            await source.aclose()
            if num_tokens > 1:
                record("mavis_token_seconds", (last - first) / (num_tokens - 1))

    return watched


def watched_api(api: FastAPI, record: Record) -> FastAPI:
    """The same routes, counted, and GET /metrics."""
    api.add_middleware(_CountRequests, record=record)

    @api.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        addresses = await asyncio.to_thread(_node_addresses)
        pages = await asyncio.gather(*map(_page, addresses))
        return PlainTextResponse(merged(pages), media_type="text/plain; version=0.0.4")

    return api


class _CountRequests:
    def __init__(self, app: ASGIApp, record: Record):
        self._app, self._record = app, record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = "left"  # before there was an answer

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except Exception:
            status = "500" if status == "left" else status
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")  # the template: paths may be anything
            self._record("mavis_requests", 1, route=route, status=status)


def _node_addresses() -> list[str]:
    return [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes() if node["Alive"]]


async def _page(address: str) -> str:
    """What a node tells Prometheus; a comment that says so where it does not."""
    try:
        async with httpx.AsyncClient(timeout=SCRAPE_LIMIT_S, trust_env=False) as client:
            return (await client.get(f"http://{address}/metrics")).raise_for_status().text
    except httpx.HTTPError as error:
        return f"# {address} does not answer: {type(error).__name__}\n"


def merged(pages: Sequence[str]) -> str:
    """One page of this service's families; a family's figures of all nodes stand together, as the format wants it."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    complaints = []
    for page in pages:
        family = ""
        for line in page.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = line.split(maxsplit=3)[2]
                if line not in heads.setdefault(family, []):
                    heads[family].append(line)
            elif line.startswith("#"):
                complaints.append(line)
            elif line:
                samples.setdefault(family, []).append(line)
    ours = [line for name in sorted(samples) if name.startswith(PREFIX) for line in (*heads[name], *samples[name])]
    return "".join(f"{line}\n" for line in (*complaints, *ours))

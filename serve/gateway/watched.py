"""The gateway's HTTP metrics: a count of requests, and GET /metrics with the figures of all nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import httpx
import ray
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.metrics import PREFIX, Record
from serve.settings import authority

SCRAPE_LIMIT_S = 3.0


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
        status = "left"  # the client, before the response

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
    return [authority(node["NodeManagerAddress"], node["MetricsExportPort"]) for node in ray.nodes() if node["Alive"]]


async def _page(address: str) -> str:
    """A node's page for Prometheus; a comment if it does not answer."""
    try:
        async with httpx.AsyncClient(timeout=SCRAPE_LIMIT_S, trust_env=False) as client:
            return (await client.get(f"http://{address}/metrics")).raise_for_status().text
    except httpx.HTTPError as error:
        return f"# {address} does not answer: {type(error).__name__}\n"


def merged(pages: Sequence[str]) -> str:
    """One page of this service's metric families; the format requires all samples of a family to be adjacent."""
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

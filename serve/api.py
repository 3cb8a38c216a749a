"""The HTTP routes. Every error leaves in OpenAI's shape. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from serve.completion import Completion
from serve.completions import Completions
from serve.registry import Registry
from serve.schema import ApiError, ChatRequest, Json, TextRequest, refusal

logger = logging.getLogger(__name__)


def create_api(
    model: str, completions: Completions, registry: Registry, base_load: Callable[[], Awaitable[tuple[int, int]]]
) -> FastAPI:
    """`base_load` asks a base replica for answers running and waiting, and raises if none is healthy."""
    api = FastAPI(title="mavis_dist", docs_url=None, redoc_url=None)
    _add_error_handlers(api)
    model_object = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "mavis_dist"}

    async def complete(request: Request, body: ChatRequest | TextRequest) -> Any:
        completion = await completions.start(body, await registry.iterations())
        if not body.stream:
            return JSONResponse(await _while_connected(request, completion.whole()))
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return _Events(completion, media_type="text/event-stream", headers=headers)

    @api.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Any:
        return await complete(request, body)

    @api.post("/v1/completions")
    async def text_completions(request: Request, body: TextRequest) -> Any:
        return await complete(request, body)

    @api.get("/v1/models")
    async def models() -> Json:
        return {"object": "list", "data": [model_object]}

    @api.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Json:
        if name != model:
            raise ApiError(404, f"the model {name!r} does not exist here; use {model!r}", "model", "model_not_found")
        return model_object

    @api.get("/v1/objectives")
    async def objectives() -> Json:
        return {"object": "list", "data": await registry.describe()}

    @api.get("/health")
    async def health() -> Json:
        running, waiting = await base_load()
        return {"status": "ok", "model": model, "running": running, "waiting": waiting}

    return api


class _Events(StreamingResponse):
    """The events of a completion, which is closed in any case: a client may leave before the first of them."""

    def __init__(self, completion: Completion, **options: Any):
        super().__init__(completion.events(), **options)
        self._completion = completion

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._completion.close()


async def _while_connected(request: Request, work: Coroutine[Any, Any, Json]) -> Json:
    """The result of `work`, which is cancelled when the client leaves; raises ApiError then, for the log."""
    working, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        gone.exception()  # taken note of: Serve says by an error of its own that nobody is there any more
        raise ApiError(499, "the client closed the connection", code="client_closed_request")
    finally:
        working.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_error_handlers(api: FastAPI) -> None:
    @api.exception_handler(ApiError)
    async def known(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @api.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        refused = refusal(error.errors())
        return JSONResponse(refused.body, refused.status)

    @api.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)

    @api.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        failed = ApiError(500, f"internal error: {type(error).__name__}", code="internal_error")
        return JSONResponse(failed.body, failed.status)

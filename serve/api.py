"""The HTTP routes. Every error leaves in OpenAI's shape. Knows nothing of Ray."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

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

    async def complete(body: ChatRequest | TextRequest) -> Any:
        completion = await completions.start(body, await registry.versions())
        if not body.stream:
            return JSONResponse(await completion.whole())
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(completion.events(), media_type="text/event-stream", headers=headers)

    @api.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest) -> Any:
        return await complete(body)

    @api.post("/v1/completions")
    async def text_completions(body: TextRequest) -> Any:
        return await complete(body)

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


def _add_error_handlers(api: FastAPI) -> None:
    @api.exception_handler(ApiError)
    async def known(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status)

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

"""The HTTP routes. Every error leaves in OpenAI's shape. Knows nothing of Ray."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import Body, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from serve.completion import Completion
from serve.completions import Completions
from serve.door import ID_HEADER, Door, Edge
from serve.examples import CHAT_BODIES, QUESTION, REFUSALS, TEXT_BODIES, answer
from serve.page import playground
from serve.registry import Registry
from serve.schema import ApiError, ChatRequest, Json, TextRequest, refusal


def create_api(
    model: str,
    completions: Completions,
    registry: Registry,
    base_load: Callable[[], Awaitable[tuple[int, int]]],
    edge: Edge | None = None,
) -> FastAPI:
    """`base_load` asks a base replica for answers running and waiting, and raises if none is healthy."""
    edge = edge or Edge()
    api = FastAPI(title="mavis_dist", docs_url=None, redoc_url=None, responses=REFUSALS)
    _add_error_handlers(api)
    _add_door(api, edge)
    # The door has looked at the key; here it is for the description alone.
    keyed = [Depends(HTTPBearer(auto_error=False, description="An API key, where the server asks for one"))]
    model_object = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "mavis_dist"}

    async def complete(request: Request, body: ChatRequest | TextRequest) -> Any:
        asked = {"body": body.model_dump(exclude_none=True)} if edge.log_prompts else {}
        request.state.facts = lambda: asked
        completion = await completions.start(body, await registry.iterations(), request.state.request_id)
        request.state.facts = lambda: {**completion.log, **asked}
        return await _answer(completion, bool(body.stream))

    @api.post(
        "/v1/chat/completions",
        dependencies=keyed,
        responses={200: answer("chat.completion", {"message": QUESTION[0]}, "chatcmpl")},
    )
    async def chat_completions(
        request: Request, body: Annotated[ChatRequest, Body(openapi_examples=CHAT_BODIES)]
    ) -> Any:
        return await complete(request, body)

    @api.post(
        "/v1/completions",
        dependencies=keyed,
        responses={200: answer("text_completion", {"text": " long and good."}, "cmpl")},
    )
    async def text_completions(
        request: Request, body: Annotated[TextRequest, Body(openapi_examples=TEXT_BODIES)]
    ) -> Any:
        return await complete(request, body)

    @api.get("/v1/models", dependencies=keyed)
    async def models() -> Json:
        return {"object": "list", "data": [model_object]}

    @api.get("/v1/models/{name:path}", dependencies=keyed)
    async def one_model(name: str) -> Json:
        if name != model:
            raise ApiError(404, f"the model {name!r} does not exist here; use {model!r}", "model", "model_not_found")
        return model_object

    @api.get("/v1/objectives", dependencies=keyed)
    async def objectives() -> Json:
        """What is served: the reward of every objective, its scale, and how good its value model is."""
        return {"object": "list", "data": await registry.describe()}

    api.get("/", include_in_schema=False)(playground)

    @api.get("/health")
    async def health() -> Json:
        running, waiting = await base_load()
        return {"status": "ok", "model": model, "running": running, "waiting": waiting}

    return api


async def _answer(completion: Completion, is_streamed: bool) -> Response:
    if not is_streamed:
        return JSONResponse(await completion.whole())
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(completion.events(), media_type="text/event-stream", headers=headers)


def _add_door(api: FastAPI, edge: Edge) -> None:
    api.add_middleware(Door, edge=edge)
    if edge.cors_origins:  # outside of the door, so that a page can read refusals
        api.add_middleware(
            CORSMiddleware,
            allow_origins=edge.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[ID_HEADER, "retry-after"],
        )


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

"""The HTTP routes. Every error has OpenAI's format. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Annotated, Any

from fastapi import Body, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from serve.gateway.api_keys import Keys
from serve.gateway.build_request import Completions
from serve.gateway.examples import ANSWER, CHAT_BODIES, REFUSALS, TEXT_BODIES, answer
from serve.gateway.middleware import ID_HEADER, Middleware
from serve.gateway.playground import playground
from serve.gateway.protocol import CHAT, TEXT, ApiError, Json
from serve.gateway.read_body import JsonRoute
from serve.gateway.registry import Registry
from serve.gateway.requests import ChatRequest, TextRequest, refusal
from serve.gateway.responses import (
    ChatChunk,
    ChatCompletion,
    Health,
    ModelList,
    ModelObject,
    ObjectiveList,
    ResponseBody,
    TextChunk,
    TextCompletion,
    chunk_schemas,
)
from serve.gateway.write_response import Completion
from serve.settings import MainArgs


class _Api(FastAPI):
    """Adds what FastAPI leaves out of the description: chunks of streams, and null in examples."""

    def openapi(self) -> Json:
        if self.openapi_schema is None:
            described = super().openapi()
            described["components"]["schemas"].update(chunk_schemas())
            for route in self.routes:
                if isinstance(route, APIRoute) and route.include_in_schema:
                    for method in route.methods or ():
                        responses = described["paths"][route.path_format][method.lower()]["responses"]
                        for status, response in route.responses.items():
                            for kind, content in response.get("content", {}).items():
                                responses[str(status)]["content"][kind]["example"] = content["example"]
        return super().openapi()


def create_api(
    args: MainArgs,
    completions: Completions,
    registry: Registry,
    base_load: Callable[[], Awaitable[tuple[int, int]]],
    keys: Keys | None = None,
    returns_id: bool = True,
) -> FastAPI:
    """`base_load` asks a base replica for rows in use and waiting, and raises if none is healthy.

    `keys` and `returns_id` as in Middleware.
    """
    model = args.model_name
    api = _Api(title="mavis_dist", docs_url=None, redoc_url=None, responses=REFUSALS)
    api.router.route_class = JsonRoute
    _add_error_handlers(api)
    _add_middleware(api, args, keys, returns_id)
    # The middleware checks the key; this is for the description alone.
    keyed = [Depends(HTTPBearer(auto_error=False, description="An API key"))] if keys else []
    model_object = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "mavis_dist"}

    async def complete(request: Request, body: ChatRequest | TextRequest) -> Any:
        asked = {"body": body.model_dump(exclude_none=True)} if args.log_prompts else {}
        request.state.facts = lambda: asked
        key, request_id = request.state.key or "", request.state.request_id
        completion = await completions.start(body, await registry.versions(), key, request_id)
        request.state.facts = lambda: {**completion.log, **asked}
        if not body.stream:
            return JSONResponse(await _while_connected(request, completion.whole()))
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return _Events(completion, media_type="text/event-stream", headers=headers)

    @api.post(
        "/v1/chat/completions",
        dependencies=keyed,
        response_model=None,
        responses={200: answer(CHAT, ChatCompletion, ChatChunk, ANSWER)},
    )
    async def chat_completions(
        request: Request, body: Annotated[ChatRequest, Body(openapi_examples=CHAT_BODIES)]
    ) -> Any:
        return await complete(request, body)

    @api.post(
        "/v1/completions",
        dependencies=keyed,
        response_model=None,
        responses={200: answer(TEXT, TextCompletion, TextChunk, " long and good.")},
    )
    async def text_completions(
        request: Request, body: Annotated[TextRequest, Body(openapi_examples=TEXT_BODIES)]
    ) -> Any:
        return await complete(request, body)

    @api.get("/v1/models", dependencies=keyed, **_described(ModelList))
    async def models() -> Json:
        return {"object": "list", "data": [model_object]}

    @api.get("/v1/models/{name:path}", dependencies=keyed, **_described(ModelObject))
    async def one_model(name: str) -> Json:
        if name != model:
            raise ApiError(404, f"the model {name!r} does not exist here; use {model!r}", "model", "model_not_found")
        return model_object

    @api.get("/v1/objectives", dependencies=keyed, **_described(ObjectiveList))
    async def objectives() -> Json:
        """The objectives that are served: reward, scale and quality of the value model of each."""
        return {"object": "list", "data": await registry.describe()}

    api.get("/", include_in_schema=False)(playground)

    @api.get("/health", **_described(Health))
    async def health() -> Json:
        running, waiting = await base_load()
        return {"status": "ok", "model": model, "running": running, "waiting": waiting}

    return api


def _described(body: type[ResponseBody]) -> dict[str, Any]:
    """Options of a route with a body of this kind, which is sent as it is."""
    return {"response_model": None, "responses": {200: {"model": body}}}


def _add_middleware(api: FastAPI, args: MainArgs, keys: Keys | None, returns_id: bool) -> None:
    api.add_middleware(Middleware, settings=args, keys=keys, returns_id=returns_id)
    if args.cors_origins:  # outermost, so that a page can read refusals
        api.add_middleware(
            CORSMiddleware,
            allow_origins=args.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[ID_HEADER, "retry-after"],
        )


class _Events(StreamingResponse):
    """The events of a completion, which is closed in any case: a client may leave before the first event."""

    def __init__(self, completion: Completion, **options: Any):
        super().__init__(completion.events(), **options)
        self._completion = completion

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._completion.close()


async def _while_connected(request: Request, work: Coroutine[Any, Any, Json]) -> Json:
    """The result of `work`, which is cancelled when the client leaves; then raises ApiError, for the log."""
    working, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        gone.exception()  # retrieved, since Serve reports a client that left by an error of its own
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
        detail = "no such route; /openapi.json lists all" if error.status_code == 404 else error.detail
        message = f"{request.method} {request.url.path}: {detail}"
        return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)

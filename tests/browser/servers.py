"""Servers for the browser: the real API over a tiny engine, and one that plays written answers."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp

from mavis_dist.decode import Engine, LocalGuide
from mavis_dist.decode.load_guide import fetch_published, load_models
from mavis_dist.models.load import load_base
from mavis_dist.store import values
from mavis_dist.store.files import Store
from serve.base.engine_loop import EngineLoop, stream
from serve.gateway.build_request import Completions
from serve.gateway.protocol import DONE, ApiError, Json, event
from serve.gateway.registry import Registry
from serve.gateway.routes import create_api
from tests.local import args_of
from tests.tiny import MODEL, write_models

START_LIMIT_S = 20.0


@contextmanager
def served(app: ASGIApp) -> Iterator[str]:
    """The URL of `app`, on a free port of this machine, until the block ends."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="uvicorn")
        thread.start()
        try:
            _wait_until(lambda: server.started)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


def _wait_until(is_true) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while not is_true():
        assert time.monotonic() < deadline, f"nothing within {START_LIMIT_S} s"
        time.sleep(0.01)


@contextmanager
def tiny_engine_app(folder: Path, objectives: tuple[str, ...]) -> Iterator[FastAPI]:
    """The API as the gateway creates it, with the engine in this process."""
    write_models(folder, "run", objectives)
    base = load_base(str(folder / MODEL))
    store = Store(str(folder / "runs"), "run")
    models = load_models(fetch_published(store))
    versions = {values.served(store)[name].version: model for name, model in models.items()}
    loop = EngineLoop(Engine(base, LocalGuide(versions), max_rows=8))

    async def load() -> tuple[int, int]:
        return loop.load

    args = args_of("tiny", rows=8, max_tokens=400, beta=8.0, stall_s=10, deadline_s=30)
    try:
        completions = Completions(base.tokenizer, args, 1024, lambda *asked: stream(loop, *asked))
        yield create_api(args, completions, Registry(store), load)
    finally:
        loop.stop()


# --- written answers ----------------------------------------------------------------------------------------------


def token(
    text: str | bytes, logprob: float = -0.5, logratio: float = 0.0, others: Mapping[str, tuple[float, float]] = {}
) -> Json:
    """One token in the format of the API. `others`: further candidates with their (logprob, logratio)."""
    top = [_candidate(text, logprob, logratio), *(_candidate(other, *numbers) for other, numbers in others.items())]
    chosen = _candidate(text, logprob, logratio)
    return {**chosen, "top_logprobs": top, "mavis": {"logratio": logratio, "divergence": abs(logratio) / 4}}


def _candidate(text: str | bytes, logprob: float, logratio: float) -> Json:
    raw = text.encode() if isinstance(text, str) else text
    spelt = raw.decode(errors="replace")
    return {"token": spelt, "logprob": logprob, "bytes": list(raw), "mavis": {"logratio": logratio}}


@dataclass
class Written:
    """An answer, chunk by chunk; None: an end without one, as of a server that dies."""

    chunks: Sequence[tuple[str, Sequence[Json]]]
    report: Json = field(default_factory=lambda: {"divergence": 0.0, "values": {}, "candidates_per_token": 0.0})
    echo: Json = field(default_factory=dict)
    ending: str = "done"  # or `error`, `cut`, `endless`

    @classmethod
    def of(cls, *tokens: Json, **fields: Any) -> Written:
        """A chunk per token."""
        return cls([(token["token"], [token]) for token in tokens], **fields)


@dataclass
class Script:
    """The responses that the server plays, and the requests it received."""

    base: Written
    steered: Written
    objectives: Sequence[str] = ("positive", "brief")
    key: str | None = None
    refusal: ApiError | None = None  # of steered requests
    has_token_data: bool = True
    bodies: list[Json] = field(default_factory=list)
    num_broken_off: int = 0  # streams whose client left

    async def versions(self) -> dict[str, str]:
        return {name: f"{name}@i2" for name in self.objectives}

    async def describe(self) -> list[Json]:
        facts = {"iteration": 2, "reward": {"reward": "sentiment"}, "max_tokens": 48, "explained_variance": 0.61}
        return [{"id": name, "object": "objective", **facts} for name in self.objectives]

    async def play(self, written: Written) -> AsyncIterator[str]:
        whole = False
        try:
            yield _chunk({"delta": {"role": "assistant", "content": ""}})
            for text, tokens in written.chunks:
                logprobs = {"content": list(tokens)} if self.has_token_data else None
                yield _chunk({"delta": {"content": text}, "logprobs": logprobs})
            while written.ending == "endless":
                yield _chunk({"delta": {"content": "more "}})
                await asyncio.sleep(0.02)
            if written.ending == "error":
                yield event(ApiError(500, "the engine <b>failed</b>", code="engine_error").body)
            if written.ending == "done":
                yield _chunk({"delta": {}, "finish_reason": "stop", "mavis": written.report}, mavis=written.echo)
                yield DONE
            whole = True
        finally:
            self.num_broken_off += not whole


def _chunk(choice: Json, **extra: Json) -> str:
    choices = [{"index": 0, "finish_reason": None, "logprobs": None, **choice}]
    return event({"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": choices, **extra})


def scripted_app(script: Script) -> FastAPI:
    """The real page, models and objectives; completions are played."""

    async def load() -> tuple[int, int]:
        return 0, 0

    app = FastAPI()

    @app.middleware("http")
    async def ask_for_the_key(request: Request, go_on) -> Response:
        if script.key and request.url.path != "/" and request.headers.get("authorization") != f"Bearer {script.key}":
            return JSONResponse(ApiError(401, "this server asks for an API key").body, 401)
        return await go_on(request)

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        body = await request.json()
        script.bodies.append(body)
        is_steered = "objective_weights" in body or "preferences" in body
        if "logprobs" in body and not script.has_token_data:
            refused = ApiError(400, "the field 'logprobs' is not supported", "logprobs", "unsupported_field")
            return JSONResponse(refused.body, refused.status)
        if is_steered and script.refusal:
            return JSONResponse(script.refusal.body, script.refusal.status, {"Retry-After": "7"})
        return StreamingResponse(
            script.play(script.steered if is_steered else script.base), media_type="text/event-stream"
        )

    app.mount("/", create_api(args_of("played"), cast(Completions, None), cast(Registry, script), load))
    return app


def as_events(text: str) -> list[Json]:
    """The chunks of a completed stream."""
    *lines, done = text.strip().split("\n\n")
    assert done == DONE.strip()
    return [json.loads(line.removeprefix("data: ")) for line in lines]

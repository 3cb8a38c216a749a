"""The HTTP service in this process: real engine, real routes, no Ray."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
import yaml
from fastapi import FastAPI

from mavis_dist import config as config_module
from mavis_dist.decode import Engine, LocalGuide
from mavis_dist.models.load import context_length, load_base
from mavis_dist.store import layout
from mavis_dist.store.files import Store
from serve.base.engine_loop import EngineLoop, stream
from serve.base.model_loader import LocalModelLoader
from serve.gateway.api_keys import Keys
from serve.gateway.build_request import Completions
from serve.gateway.registry import Registry
from serve.gateway.routes import create_api
from serve.settings import NO_KEYS, MainArgs, main_args
from tests.fakes import tiny_value
from tests.tiny import MODEL, write_models

NAME = "tiny"
OBJECTIVES = ("brief", "positive")


def args_of(base: str, **settings: Any) -> MainArgs:
    """Arguments of the application `main`, without keys and system prompt."""
    return MainArgs(**{"run": "run", "base": base, "system": "", "beta": 1.0, "keys": NO_KEYS, **settings})


class LocalService:
    """A tiny base model with two objectives; apps on top of it differ in who may access them."""

    def __init__(self, folder: Path, template: str | None = None):
        """`template`: the tokenizer's chat template."""
        write_models(folder, "run", OBJECTIVES)
        base = load_base(str(folder / MODEL))
        base.tokenizer.chat_template = template
        versions = [f"{name}@i0" for name in OBJECTIVES]
        models = {name: tiny_value(k, vocab=base.model.config.vocab_size) for k, name in enumerate(versions)}
        self.loop = EngineLoop(Engine(base, LocalGuide(models), max_rows=4))
        self._args = args_of(NAME, rows=4, max_tokens=64, max_prompt_tokens=200, max_n=3, stall_s=5, deadline_s=20)
        self._completions = Completions(base.tokenizer, self._args, 1024, lambda *asked: stream(self.loop, *asked))
        self._registry = Registry(Store(str(folder / "runs"), "run"))

    def app(self, keys: Keys | None = None, **settings: Any) -> FastAPI:
        """`settings` of mavis_dist.sections.Access."""

        async def load() -> tuple[int, int]:
            return self.loop.load

        return create_api(self._args.model_copy(update=settings), self._completions, self._registry, load, keys)


class RunService:
    """The service of a finished run: what its replicas build from the config, with value models in the base replica."""

    def __init__(self, run: Path, **settings: object):
        """`settings` replace those of the config's `serve` section."""
        config = config_module.parse(yaml.safe_load((run / layout.CONFIG_FILE).read_text()))
        serve = config.serve.model_copy(update=settings)
        args = main_args(config.model_copy(update={"storage": str(run.parent), "run": run.name, "serve": serve}))
        base, store = load_base(args.base, args.dtype, args.device), Store(args.storage, args.run)
        guide = LocalGuide({})
        self.loop = EngineLoop(Engine(base, guide, args.rows), queue=10_000)
        loader = LocalModelLoader(store, base, guide, self.loop)
        loader.begin()
        self._args, self._registry = args, Registry(store)
        self._completions = Completions(
            base.tokenizer,
            args,
            context_length(args.base),
            lambda request, admission: loader.stream(request, stream(self.loop, request, admission)),
        )

    def app(self, keys: Keys | None = None) -> FastAPI:
        async def load() -> tuple[int, int]:
            return self.loop.load

        return create_api(self._args, self._completions, self._registry, load, keys)


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The URL of an app on loopback."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        deadline = time.monotonic() + 10
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


@contextmanager
def listening_nowhere() -> Iterator[int]:
    """A port that takes connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]

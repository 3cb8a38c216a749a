"""The gateway replica: tokenizer, store and handles behind the HTTP routes. A shell around serve.gateway.routes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from mavis_dist.models.load import context_length, load_tokenizer
from mavis_dist.store.files import Store
from serve.gateway.api_keys import Keys
from serve.gateway.build_request import Completions
from serve.gateway.feeds import Feeds
from serve.gateway.protocol import ApiError
from serve.gateway.registry import Registry
from serve.gateway.routes import create_api
from serve.gateway.watched import watched_api
from serve.logs import configure_logs
from serve.metrics import RayRecord
from serve.ray_handles import LOST, base_feeds, base_streams, value_replicas
from serve.settings import NO_KEYS, MainArgs

HEALTH_LIMIT_S = 5.0


def open_keys(args: MainArgs) -> Keys | None:
    """None: no key is required. Raises KeyFileError."""
    assert args.keys is not None  # MainArgs replaces it by the default file
    return None if args.keys == NO_KEYS else Keys(Path(args.keys))


class Gateway:
    def __init__(self, args: MainArgs, base: DeploymentHandle[Any]):
        configure_logs()
        self._args, self._base = args, base
        self._keys, self._record = open_keys(args), RayRecord()
        self._feeds = Feeds(base_streams(base), base_feeds(base))
        self._completions = Completions(
            load_tokenizer(args.base), args, context_length(args.base), self._feeds.stream, self._record
        )
        replicas = value_replicas if args.placement == "replicas" else None
        self._registry = Registry(Store(args.storage, args.run), replicas=replicas)

    def __serve_build_asgi_app__(self) -> FastAPI:
        # Serve's proxy gives every request an id and returns it.
        api = create_api(self._args, self._completions, self._registry, self._base_load, self._keys, returns_id=False)
        return watched_api(api, self._record)

    async def _base_load(self) -> tuple[int, int]:
        try:
            return await asyncio.wait_for(_awaited(self._base.load.remote()), HEALTH_LIMIT_S)
        except (asyncio.TimeoutError, DeploymentUnavailableError, *LOST):
            raise ApiError(503, "no base replica answers", code="engine_unavailable") from None


async def _awaited(response: Any) -> Any:
    return await response

"""The gateway replica: tokenizer, store and handles behind the HTTP routes. A shell around serve.gateway.routes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from transformers import AutoConfig

from mavis_dist.models.load import fetch, load_tokenizer
from mavis_dist.store.files import Store
from serve.gateway.api_keys import Keys
from serve.gateway.build_request import Completions, Settings
from serve.gateway.failover import Limits
from serve.gateway.middleware import Edge
from serve.gateway.protocol import ApiError
from serve.gateway.registry import Registry
from serve.gateway.routes import create_api
from serve.gateway.watched import watched_api, watched_streams
from serve.logs import configure_logs
from serve.metrics import RayRecord
from serve.ray_handles import LOST, base_streams, value_replicas
from serve.settings import NO_KEYS, MainArgs

HEALTH_LIMIT_S = 5.0


def settings_of(args: MainArgs) -> Settings:
    model = AutoConfig.from_pretrained(fetch(args.base)).get_text_config()
    return Settings(
        model=args.base,
        system=args.system,
        max_context=model.max_position_embeddings,
        max_tokens=args.max_tokens,
        rows=args.rows,
        beta=args.beta,
        tilt_cap=args.tilt_cap,
        limits=Limits(args.stall_s, args.deadline_s),
        max_prompt_tokens=args.max_prompt_tokens,
        max_n=args.max_n,
        max_preferences=args.max_preferences,
    )


def open_keys(args: MainArgs) -> Keys | None:
    """None: no keys are asked for. Raises KeyFileError."""
    return None if args.keys == NO_KEYS else Keys(Path(args.keys))


class Gateway:
    def __init__(self, args: MainArgs, base: DeploymentHandle[Any]):
        configure_logs()
        self._args, self._base = args, base
        self._keys, self._record = open_keys(args), RayRecord()
        streams = watched_streams(base_streams(base), self._record)
        self._completions = Completions(load_tokenizer(args.base), settings_of(args), streams)
        replicas = value_replicas if args.placement == "replicas" else None
        self._registry = Registry(Store(args.storage, args.run), replicas=replicas)

    def __serve_build_asgi_app__(self) -> FastAPI:
        args = self._args
        edge = Edge(
            keys=self._keys,
            cors_origins=args.cors_origins,
            max_body_bytes=args.max_body_bytes,
            log_access=args.log_access,
            log_prompts=args.log_prompts,
            returns_id=False,  # Serve's proxy gives every request an id and answers with it
        )
        api = create_api(args.base, self._completions, self._registry, self._base_load, edge)
        return watched_api(api, self._record)

    async def _base_load(self) -> tuple[int, int]:
        try:
            return await asyncio.wait_for(_awaited(self._base.load.remote()), HEALTH_LIMIT_S)
        except (asyncio.TimeoutError, DeploymentUnavailableError, *LOST):
            raise ApiError(503, "no base replica answers", code="engine_unavailable") from None


async def _awaited(response: Any) -> Any:
    return await response

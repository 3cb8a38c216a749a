"""The published value models of a run, read again every few seconds. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from statistics import fmean

from mavis_dist.decode.load_guide import read_card
from mavis_dist.store import layout, values
from mavis_dist.store.files import Store
from mavis_dist.store.values import Served
from serve.gateway.protocol import ApiError, Json

logger = logging.getLogger(__name__)

COUNT_LIMIT_S = 5.0


class Registry:
    def __init__(self, store: Store, fresh_s: float = 2.0, replicas: Callable[[], dict[str, int]] | None = None):
        """`replicas` counts the running value replicas, by objective; none: value models are colocated."""
        self._store, self._fresh_s, self._replicas = store, fresh_s, replicas
        self._served: dict[str, Served] = {}
        self._read_at = -float("inf")
        self._reading: asyncio.Lock | None = None
        self._count: asyncio.Task[dict[str, int]] | None = None
        self._described: dict[str, Json] = {}  # by version; what is published never changes

    async def versions(self) -> dict[str, str]:
        """objective -> version, for requests that begin now."""
        return {name: model.version for name, model in (await self._current()).items()}

    async def describe(self) -> list[Json]:
        """One object per objective; raises UserError if a published model cannot be read."""
        models = (await self._current()).values()
        for model in models:
            if model.version not in self._described:
                self._described[model.version] = await asyncio.to_thread(self._describe, model)
        running = await self._running()
        return [
            {
                **self._described[model.version],
                "value_replicas": None if running is None else running.get(model.objective, 0),
            }
            for model in models
        ]

    async def _running(self) -> dict[str, int] | None:
        if self._replicas is None:
            return None
        # One at a time: a count may hang, and reading the store needs threads, too.
        if self._count is None or self._count.done():
            self._count = asyncio.create_task(asyncio.to_thread(self._replicas))
        try:
            return await asyncio.wait_for(asyncio.shield(self._count), COUNT_LIMIT_S)
        except Exception as error:  # the rest of the description does not need it
            logger.warning("value replicas cannot be counted: %s", error or "no answer")
            return None

    async def _current(self) -> dict[str, Served]:
        """The published models, at most a few seconds old; older if the store is unreachable.

        Raises ApiError if it has never been reachable.
        """
        if self._reading is None:
            self._reading = asyncio.Lock()  # made here, where the event loop runs
        async with self._reading:
            if time.monotonic() - self._read_at > self._fresh_s:
                try:
                    self._served = await asyncio.to_thread(values.served, self._store)
                except Exception as error:  # every file system has errors of its own
                    if not self._served:
                        logger.exception("what is published cannot be read")
                        message = "what is published cannot be read; the service's log says why"
                        raise ApiError(503, message, code="engine_unavailable") from None
                    logger.warning("what is published cannot be read; the last known models are served: %s", error)
                self._read_at = time.monotonic()
        return self._served

    def _describe(self, model: Served) -> Json:
        card = read_card(self._store, model.folder)
        place = card.objectives.index(model.objective)
        scale = card.scales[place]
        return {
            "id": model.objective,
            "object": "objective",
            "version": model.version,
            "iteration": model.iteration,
            "distilled": model.distilled is not None,
            "reward": card.rewards[place],
            "scale": {"mean": scale.mean, "sd": scale.sd},
            "max_tokens": card.max_tokens,
            "explained_variance": card.r2,
            "gate": self._gate(model.objective, model.iteration),
        }

    def _gate(self, name: str, iteration: int) -> Json | None:
        """The iteration's result on validation prompts; None if it was not measured."""
        facts = self._store.metadata(layout.gate_folder(name, iteration))
        if not facts or not facts["soft_values"]:
            return None
        return {
            "soft_value": fmean(facts["soft_values"]),  # E[R - KL / beta], sd of the reward
            "num_prompts": len(facts["soft_values"]),
            "compared_with": facts["current"],
            "difference": facts["difference"],
            "low": facts["low"],
            "high": facts["high"],
        }

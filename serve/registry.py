"""What is published in a run, read again every few seconds. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import time

from mavis_dist.models import value
from mavis_dist.store import values
from mavis_dist.store.files import Store
from serve.schema import Json


class Registry:
    def __init__(self, store: Store, fresh_s: float = 2.0):
        self._store, self._fresh_s = store, fresh_s
        self._iterations: dict[str, int] = {}
        self._read_at = -float("inf")

    async def iterations(self) -> dict[str, int]:
        """objective -> published iteration."""
        if time.monotonic() - self._read_at > self._fresh_s:
            self._iterations = await asyncio.to_thread(values.published, self._store)
            self._read_at = time.monotonic()
        return self._iterations

    async def describe(self) -> list[Json]:
        """One object per objective."""
        iterations = await self.iterations()
        return [await asyncio.to_thread(self._describe, name, iteration) for name, iteration in iterations.items()]

    def _describe(self, name: str, iteration: int) -> Json:
        card = value.load_card(values.fetch(self._store, name, iteration))
        place = card.objectives.index(name)
        scale = card.scales[place]
        return {
            "id": name,
            "object": "objective",
            "iteration": iteration,
            "reward": card.rewards[place],
            "scale": {"mean": scale.mean, "sd": scale.sd},
            "max_tokens": card.max_tokens,
            "explained_variance": card.explained_variance,
        }

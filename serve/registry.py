"""What is published in a run, read again every few seconds. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import time
from statistics import fmean
from typing import Any

from mavis_dist.models import value
from mavis_dist.store import values
from mavis_dist.store.files import Store

Json = dict[str, Any]


class Registry:
    def __init__(self, store: Store, fresh_s: float = 2.0):
        self._store, self._fresh_s = store, fresh_s
        self._iterations: dict[str, int] = {}
        self._read_at = -float("inf")
        self._described: dict[tuple[str, int, str], Json] = {}  # what is published never changes

    async def iterations(self) -> dict[str, int]:
        """objective -> published iteration."""
        if time.monotonic() - self._read_at > self._fresh_s:
            self._iterations = await asyncio.to_thread(values.published, self._store)
            self._read_at = time.monotonic()
        return self._iterations

    async def describe(self) -> list[Json]:
        """One object per objective; raises UserError where what is published cannot be read."""
        return await asyncio.to_thread(self._describe_all)

    def _describe_all(self) -> list[Json]:
        iterations, folders = values.published(self._store), values.published_folders(self._store)
        described = {
            (name, iteration, folders[name]): self._described.get((name, iteration, folders[name]))
            or self._describe(name, iteration, folders[name])
            for name, iteration in iterations.items()
            if name in folders
        }
        self._described = described
        return list(described.values())

    def _describe(self, name: str, iteration: int, folder: str) -> Json:
        """`folder` is that of the model that is served: the objective's own, or one distilled from several."""
        file = f"{folder}/{value.CARD_FILE}"
        card = value.parse_card(self._store.read_bytes(file), file)
        place = card.objectives.index(name)
        scale = card.scales[place]
        return {
            "id": name,
            "object": "objective",
            "iteration": iteration,
            "distilled": folder != values.folder(name, iteration),
            "reward": card.rewards[place],
            "scale": {"mean": scale.mean, "sd": scale.sd},
            "max_tokens": card.max_tokens,
            "explained_variance": card.explained_variance,
            "gate": self._gate(name, iteration),
        }

    def _gate(self, name: str, iteration: int) -> Json | None:
        """How the iteration did on validation prompts; None where it was not measured."""
        facts = self._store.facts(values.gate_folder(name, iteration))
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

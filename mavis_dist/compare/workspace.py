"""What all methods of one process share: the base model, an engine, rewards and answers of the base model.

Everything is loaded on first use. Shapes: P prompts, N answers to each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mavis_dist.compare.preferences import PREFERENCES
from mavis_dist.compare.text_quality import Surprise, surprises
from mavis_dist.config import Config
from mavis_dist.core import noise
from mavis_dist.decode import Choice, Engine, FinishReason, Request
from mavis_dist.decode.load_guide import load_guide
from mavis_dist.models.load import BaseModel, load_base
from mavis_dist.models.value import load_card
from mavis_dist.rewards import Reward, build
from mavis_dist.rollout.trees import RolloutError
from mavis_dist.run_state import answer_params
from mavis_dist.store import layout, values
from mavis_dist.store.files import Store
from mavis_dist.types import Prompt, RewardScale, UserError

Folders = Mapping[str, Path]  # objective -> folder of the value model that guides


@dataclass(frozen=True, eq=False)
class Generated:
    """Answers of one batch."""

    choices: list[list[Choice]]  # [P][N]
    seconds: float

    def seconds_of(self, choices: Sequence[Choice]) -> float:
        """The share of some answers in the time of the batch, by their tokens."""
        total = sum(len(choice.tokens) for row in self.choices for choice in row)
        return self.seconds * sum(len(choice.tokens) for choice in choices) / max(1, total)


class Workspace:
    """The models and rewards of one run."""

    def __init__(self, config: Config, load: Callable[[], BaseModel] | None = None):
        """`load` gives the base model; left out: this process loads all of it."""
        self.config, self.store = config, Store(config.storage, config.run)
        self._load = load
        self._engine: tuple[dict[str, Path], Engine] | None = None
        self._scores: dict[tuple[str, str, str], float] = {}  # by objective, prompt, answer
        self._surprises: dict[tuple[Prompt, str], Surprise] = {}  # by prompt, answer
        self._drawn: dict[tuple[tuple[str, ...], int], Generated] = {}  # by prompts, seed

    @cached_property
    def base(self) -> BaseModel:
        if self._load is not None:
            return self._load()
        return load_base(self.config.base.model, self.config.base.dtype, self.config.base.device)

    @cached_property
    def scales(self) -> dict[str, RewardScale]:
        """The unit of every objective, as stored with its first value model; raises UserError if there is none."""
        for name in self.config.objectives:
            if self.store.metadata(layout.value_folder(name, 0)) is None:
                raise UserError(f"run {self.config.run!r} has no value model of {name!r}: run jobs.pipeline first")
        folders = {name: values.fetch(self.store, name, 0) for name in self.config.objectives}
        return {name: load_card(folder).only(name).scales[0] for name, folder in folders.items()}

    @cached_property
    def rewards(self) -> dict[str, Reward]:
        return {name: build(objective) for name, objective in self.config.objectives.items()}

    def preference(self, objective: str) -> str:
        """The preference of an objective; raises UserError if it has none."""
        text = self.config.compare.preferences.get(objective) or PREFERENCES.get(
            self.config.objectives[objective].reward
        )
        if text is None:
            raise UserError(
                f"objective {objective!r} has no preference: give compare.preferences.{objective}='a sentence', or "
                "leave the method out of compare.methods"
            )
        return text

    def requests(self, prompts: Sequence[Prompt], seed: int, n: int = 1, **steering: Any) -> list[Request]:
        """One request per prompt with the reference policy of the run; `steering` are fields of Request."""
        params, system = answer_params(self.config, n), self.config.base.system
        return [
            Request(
                id=prompt.id,
                prompt=self.base.chat(prompt.messages, system),
                params=replace(params, seed=noise.stream(seed, prompt.id)),
                **steering,
            )
            for prompt in prompts
        ]

    def engine(self, folders: Folders) -> Engine:
        """An engine with these value models around the same base model; only the newest is kept."""
        if self._engine is None or self._engine[0] != folders:
            base, settings = self.base, self.config.base
            for folder in set(folders.values()):
                load_card(folder).check(base.fingerprint, base.tokenizer_fingerprint)
            self._engine = None  # frees the keys and values of the old one first
            guide = load_guide(folders, getattr(torch, settings.dtype), settings.device, base) if folders else None
            self._engine = dict(folders), Engine(base, guide, self.config.rollout.rows)
        return self._engine[1]

    def generate(self, requests: Sequence[Request], folders: Folders) -> Generated:
        """All answers to all requests, timed; raises RolloutError if one of them failed."""
        engine = self.engine(folders)
        started = time.perf_counter()
        found = Generated(engine.generate(requests), time.perf_counter() - started)
        for request, row in zip(requests, found.choices, strict=True):
            for choice in row:
                if choice.finish not in (FinishReason.STOP, FinishReason.LENGTH):
                    raise RolloutError(f"prompt {request.id}: {choice.error}")
        return found

    def draw(self, prompts: Sequence[Prompt], n: int, seed: int) -> Generated:
        """At least `n` independent answers of the base model to every prompt; drawn once for all methods."""
        key = tuple(prompt.id for prompt in prompts), seed
        known = self._drawn.get(key)
        if known is None or len(known.choices[0]) < n:
            self._drawn[key] = self.generate(self.requests(prompts, seed, n), {})
        return self._drawn[key]

    def score(self, objective: str, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """Raw rewards of one answer per prompt."""
        keys = [(objective, prompt.text, text) for prompt, text in zip(prompts, texts, strict=True)]
        if missing := list(dict.fromkeys(key for key in keys if key not in self._scores)):
            scores = self.rewards[objective].score([key[1] for key in missing], [key[2] for key in missing])
            self._scores.update(zip(missing, scores, strict=True))
        return [self._scores[key] for key in keys]

    def weighted(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[Choice]], weights: Mapping[str, float]
    ) -> np.ndarray:
        """The weighted reward [P, N] of equally many answers per prompt, in standard deviations."""
        pairs = [(prompt, choice.text) for prompt, row in zip(prompts, answers, strict=True) for choice in row]
        total = np.zeros(len(pairs))
        for name, weight in weights.items():
            scores = np.array(self.score(name, [prompt for prompt, _ in pairs], [text for _, text in pairs]))
            total += weight * (scores - self.scales[name].mean) / self.scales[name].sd
        return total.reshape(len(prompts), -1)

    def surprise(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Surprise]:
        """How unlikely the base model finds one answer per prompt."""
        keys = list(zip(prompts, texts, strict=True))
        if missing := list(dict.fromkeys(key for key in keys if key not in self._surprises)):
            tokens = [self.base.chat(prompt.messages, self.config.base.system) for prompt, _ in missing]
            found = surprises(self.base, tokens, [text for _, text in missing])
            self._surprises.update(zip(missing, found, strict=True))
        return [self._surprises[key] for key in keys]

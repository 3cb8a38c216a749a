"""The Ray shell around the engine: one actor, one copy of the models. Grows trees and answers requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch

from mavis_dist.config import Config
from mavis_dist.core.tree import Shape
from mavis_dist.decode import Choice, Engine, LocalGuide, Request
from mavis_dist.decode.request import Update
from mavis_dist.models.load import load_base
from mavis_dist.models.value import load
from mavis_dist.rollout.trees import Sampling, TreeGrower
from mavis_dist.store import values
from mavis_dist.store.files import Store
from mavis_dist.types import Policy, Prompt

Answer = tuple[Choice, str]  # with its text


@dataclass(frozen=True)
class Grow:
    """One tree to be grown."""

    policy: Policy
    prompt: Prompt

    @property
    def key(self) -> tuple[Policy, str]:
        return self.policy, self.prompt.id


@dataclass(frozen=True)
class Ask:
    """One request to be answered; its prompt is still text."""

    prompt: Prompt
    request: Request

    @property
    def key(self) -> str:
        return self.request.id


@ray.remote
class Worker:
    """Works on any mixture of trees and requests, all in one batch. All it is told, and makes, fits in a message."""

    def __init__(self, config: Config, value_iterations: Mapping[str, int]):
        """`value_iterations` names the value models to load: objective -> iteration."""
        torch.set_num_threads(max(1, int(config.rollout.cpus_per_actor)))
        self._config = config
        self._base = load_base(config.base.model, config.base.dtype, config.base.device)
        guides = _load_guides(config, value_iterations, self._base.fingerprint, self._base.tokenizer_fingerprint)
        self._engine = Engine(self._base, LocalGuide(guides) if guides else None, config.rollout.rows)
        self._growers: dict[Policy, TreeGrower] = {}
        self._answers: dict[str, list[Answer | None]] = {}  # by request id, until all n are there

    def work(self, items: Sequence[Grow | Ask]) -> tuple[list[tuple[Any, Any]], int]:
        """Begin `items` and write until anything is finished.

        Returns what is finished, as (key of the item, a tree or a list of answers), and how many more items keep the
        rows busy.
        """
        for item in items:
            self._begin(item)
        done: list[tuple[Any, Any]] = []
        while not done and not self._engine.is_idle:
            for update in self._engine.step():
                done += self._absorb(update)
        # Waiting rows hold no keys and values: one for every running one keeps the batch full.
        return done, max(0, 2 * self._config.rollout.rows - sum(self._engine.load))

    def _begin(self, item: Grow | Ask) -> None:
        prompt_tokens = self._base.chat(item.prompt.text, self._config.base.system)
        if isinstance(item, Grow):
            if item.policy not in self._growers:
                self._growers[item.policy] = make_grower(self._config, self._engine, item.policy)
            self._growers[item.policy].plant(item.prompt, prompt_tokens)
        else:
            self._engine.submit(replace(item.request, prompt=prompt_tokens))
            self._answers[item.request.id] = [None] * item.request.params.n

    def _absorb(self, update: Update) -> list[tuple[Any, Any]]:
        """What an update finishes: a tree, the last answer to a request, or nothing."""
        if update.request_id not in self._answers:
            trees = ((policy, grower.absorb(update)) for policy, grower in self._growers.items())
            return [((policy, tree.prompt_id), tree) for policy, tree in trees if tree is not None]
        if update.finished is None:
            return []
        answers = self._answers[update.request_id]
        text = self._base.tokenizer.decode(update.finished.tokens, skip_special_tokens=True)
        answers[update.index] = update.finished, str(text)
        return [] if None in answers else [(update.request_id, self._answers.pop(update.request_id))]


def make_grower(config: Config, engine: Engine, policy: Policy) -> TreeGrower:
    """Trees of a policy as the config wants them."""
    rollout, steer = config.rollout, config.steer
    branching = rollout.first if policy.objective is None else rollout.later
    shape = Shape(branching.root, branching.children, branching.layers, rollout.max_tokens, rollout.dynamic_split)
    sampling = Sampling(rollout.top_k, rollout.top_p, rollout.min_p, steer.beta, steer.tilt_cap)
    return TreeGrower(engine, shape, policy, sampling, config.seed)


def _load_guides(config: Config, value_iterations: Mapping[str, int], base: str, tokenizer: str) -> dict[str, Any]:
    store, guides = Store(config.storage, config.run), {}
    for objective, iteration in value_iterations.items():
        model, card = load(
            values.fetch(store, objective, iteration), getattr(torch, config.base.dtype), config.base.device
        )
        card.check(base, tokenizer)
        guides[objective] = model
    return guides


def worker_factory(config: Config, value_iterations: Mapping[str, int]) -> Callable[[], Any]:
    """Starts an actor as `rollout.cpus_per_actor` and `rollout.gpus_per_actor` say."""
    options = Worker.options(  # type: ignore[attr-defined]
        num_cpus=config.rollout.cpus_per_actor, num_gpus=config.rollout.gpus_per_actor
    )
    return lambda: options.remote(config, dict(value_iterations))

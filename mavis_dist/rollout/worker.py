"""The Ray shell around the engine: one actor, one copy of the models. Grows trees and answers requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
import torch

from mavis_dist.config import Config
from mavis_dist.core.tree import Shape
from mavis_dist.decode import Choice, Engine, LocalGuide, Request
from mavis_dist.models.load import load_base
from mavis_dist.models.value import load
from mavis_dist.rollout.trees import Sampling, TreeGrower
from mavis_dist.store import values
from mavis_dist.store.files import Store
from mavis_dist.store.shards import write_trees
from mavis_dist.types import Policy, Prompt


@ray.remote
class Worker:
    """Everything it is told fits in a message; what it makes goes to the store."""

    def __init__(self, config: Config, value_iterations: Mapping[str, int], board: Any):
        """`value_iterations` names the value models to load: objective -> iteration."""
        torch.set_num_threads(max(1, int(config.rollout.cpus_per_actor)))
        self._config, self._board = config, board
        self._store = Store(config.storage, config.run)
        self._base = load_base(config.base.model, config.base.dtype, config.base.device)
        dtype = getattr(torch, config.base.dtype)
        guides = {}
        for objective, iteration in value_iterations.items():
            model, card = load(values.fetch(self._store, objective, iteration), dtype, config.base.device)
            card.check(self._base.fingerprint, self._base.tokenizer_fingerprint)
            guides[objective] = model
        self._engine = Engine(self._base, LocalGuide(guides) if guides else None, config.rollout.rows)

    def grow(self, stage: str, policy: Policy, prompts: Sequence[Prompt], path: str) -> int:
        """Grow the trees of some prompts and store them as one shard; returns the number of answer tokens written."""
        rollout, steer = self._config.rollout, self._config.steer
        branching = rollout.first if policy.objective is None else rollout.later
        shape = Shape(branching.root, branching.children, branching.layers, rollout.max_tokens, rollout.dynamic_split)
        sampling = Sampling(rollout.top_k, rollout.top_p, rollout.min_p, steer.beta, steer.tilt_cap)
        grower = TreeGrower(self._engine, shape, policy, sampling, self._config.seed)
        trees = {}
        for tree in grower.grow(prompts, [self._encode(prompt) for prompt in prompts]):
            trees[tree.prompt_id] = tree
            self._board.post.remote(stage, path, len(trees), len(prompts))
        write_trees(self._store, path, [trees[prompt.id] for prompt in prompts])
        return grower.num_tokens

    def answer(
        self, stage: str, part: str, requests: Sequence[tuple[Prompt, Request]]
    ) -> tuple[str, list[list[tuple[Choice, str]]]]:
        """`part` again, and the answers with their texts to requests whose prompts are still text, in their order."""
        encoded = [replace(request, prompt=self._encode(prompt)) for prompt, request in requests]
        choices = self._engine.generate(encoded)
        self._board.post.remote(stage, part, len(requests), len(requests))
        return part, [[(choice, self._decode(choice.tokens)) for choice in row] for row in choices]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._base.tokenizer.decode(tokens, skip_special_tokens=True))

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        return self._base.chat(prompt.text, self._config.base.system)


def start_workers(config: Config, count: int, value_iterations: Mapping[str, int], board: Any) -> list[Any]:
    """Actors as `rollout.cpus_per_actor` and `rollout.gpus_per_actor` say; they load their models on the way."""
    options = Worker.options(  # type: ignore[attr-defined]
        num_cpus=config.rollout.cpus_per_actor, num_gpus=config.rollout.gpus_per_actor
    )
    return [options.remote(config, dict(value_iterations), board) for _ in range(count)]

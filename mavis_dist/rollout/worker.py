"""The rollout actor: an engine with its own copy of the models. Grows trees and answers requests."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import ray
import torch

from mavis_dist.actors import Turn
from mavis_dist.config import Config
from mavis_dist.core.tree import Shape, Tree
from mavis_dist.decode import Choice, Engine, LocalGuide, Request
from mavis_dist.decode.load_guide import load_models
from mavis_dist.decode.request import Update
from mavis_dist.groups import Alike, LeaderStarter, rollout_group
from mavis_dist.models.value import ValueModel, load_card
from mavis_dist.rollout.trees import Sampling, TreeGrower
from mavis_dist.store import values
from mavis_dist.store.files import Store
from mavis_dist.types import Policy, Prompt

Answer = tuple[Choice, str]  # with its text


@dataclass(frozen=True)
class Grow:
    """A tree to grow."""

    policy: Policy
    prompt: Prompt


@dataclass(frozen=True)
class Ask:
    """A request to answer; its prompt is still text."""

    prompt: Prompt
    request: Request


Batch = Sequence[Grow | Ask]  # items that an actor works on at the same time


@dataclass(frozen=True, eq=False)
class Grown:
    """A finished tree."""

    policy: Policy
    tree: Tree

    @property
    def key(self) -> Hashable:
        """Which item this is the result of."""
        return self.policy, self.tree.prompt_id

    @property
    def num_tokens(self) -> int:
        return len(self.tree.tokens)


@dataclass(frozen=True, eq=False)
class Answered:
    """All answers to one request."""

    request_id: str
    answers: list[Answer]

    @property
    def key(self) -> Hashable:
        """Which item this is the result of."""
        return self.request_id

    @property
    def num_tokens(self) -> int:
        return sum(len(choice.tokens) for choice, _ in self.answers)


Result = Grown | Answered


@ray.remote
class Worker:
    """Works on batches of trees and requests, whose results are the same to the last bit on every actor.

    Where no row's result depends on the other rows, a batch starts as soon as no row waits. Elsewhere it depends on
    them by rounding, and a batch starts whole in an empty engine.
    """

    def __init__(self, config: Config, driver: Alike):
        self._config = config
        self._base = rollout_group(config, driver).base
        self._growers: dict[Policy, TreeGrower] = {}
        self._answers: dict[str, list[Answer | None]] = {}  # by request id, until all n are there
        self._guides: dict[str, tuple[ValueModel, int]] = {}
        self._value_iterations: dict[str, int] = {}
        self._unfinished: dict[int, set[Hashable]] = {}  # keys of missing results, by batch
        self._load({})

    def work(self, value_iterations: Mapping[str, int], batch: tuple[int, Batch] | None) -> Turn[Result]:
        """Start a numbered batch, or continue with the current ones if given None, until there is a result.

        `value_iterations` are the value models that guide: objective -> iteration; they stay the same until all batches
        are finished.
        """
        if batch is not None:
            if self._engine.is_idle:
                self._load(value_iterations)
            self._unfinished[batch[0]] = {_key(item) for item in batch[1]}
            for item in batch[1]:
                self._start(item)
        done: list[Result] = []
        while not done and not self._engine.is_idle:
            for update in self._engine.step():
                done += self._absorb(update)
        keys = {result.key for result in done}
        self._unfinished = {number: left for number, old in self._unfinished.items() if (left := old - keys)}
        has_room = self._is_batch_invariant and self._engine.load[1] == 0
        return Turn(done, frozenset(self._unfinished), has_room)

    def _load(self, value_iterations: Mapping[str, int]) -> None:
        """An empty engine with these value models around the same base model."""
        if self._value_iterations != value_iterations:
            store, base = Store(self._config.storage, self._config.run), self._config.base
            folders = {name: values.fetch(store, name, iteration) for name, iteration in value_iterations.items()}
            for folder in set(folders.values()):
                load_card(folder).check(self._base.fingerprint, self._base.tokenizer_fingerprint)
            self._guides = load_models(folders, getattr(torch, base.dtype), base.device, self._base)
            self._value_iterations = dict(value_iterations)
        guide = LocalGuide(self._guides) if self._guides else None
        self._engine = Engine(self._base, guide, self._config.rollout.rows)
        self._is_batch_invariant = self._engine.is_batch_invariant and (guide is None or guide.is_batch_invariant)
        self._growers.clear()
        self._answers.clear()

    def _start(self, item: Grow | Ask) -> None:
        prompt_tokens = self._base.chat(item.prompt.messages, self._config.base.system)
        if isinstance(item, Grow):
            if item.policy not in self._growers:
                self._growers[item.policy] = make_grower(self._config, self._engine, item.policy)
            self._growers[item.policy].plant(item.prompt, prompt_tokens)
        else:
            self._engine.submit(replace(item.request, prompt=prompt_tokens))
            self._answers[item.request.id] = [None] * item.request.params.n

    def _absorb(self, update: Update) -> list[Result]:
        """Results that an update completes: a tree, the last answer to a request, or none."""
        if update.request_id not in self._answers:
            trees = ((policy, grower.absorb(update)) for policy, grower in self._growers.items())
            return [Grown(policy, tree) for policy, tree in trees if tree is not None]
        if update.finished is None:
            return []
        answers = self._answers[update.request_id]
        text = self._base.tokenizer.decode(update.finished.tokens, skip_special_tokens=True)
        answers[update.index] = update.finished, str(text)
        finished = [answer for answer in answers if answer is not None]
        if len(finished) < len(answers):
            return []
        del self._answers[update.request_id]
        return [Answered(update.request_id, finished)]


def _key(item: Grow | Ask) -> Hashable:
    """Which result belongs to an item."""
    return (item.policy, item.prompt.id) if isinstance(item, Grow) else item.request.id


def make_grower(config: Config, engine: Engine, policy: Policy) -> TreeGrower:
    """A grower of a policy's trees with the settings of the config."""
    rollout, steer = config.rollout, config.steer
    branching = rollout.first if policy.objective is None else rollout.later
    shape = Shape(branching.root, branching.children, branching.layers, rollout.max_tokens, rollout.dynamic_split)
    sampling = Sampling(rollout.top_k, rollout.top_p, rollout.min_p, steer.beta, steer.tilt_cap)
    return TreeGrower(engine, shape, policy, sampling, config.seed)


def worker_starter(config: Config) -> LeaderStarter:
    """Starts actors with `rollout.cpus_per_actor` and `rollout.gpus_per_actor`."""
    return LeaderStarter(Worker, config)

"""Training on packed trees against one sequence per node: same trees, targets, model, optimiser, precision, threads.

Both use targets at segment ends, as published. A step is whole trees as configured, or 32 sequences in random order
(arXiv 2508.13415).
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import distributed

from benchmarks.common.interleave import Speeds, take_turns
from benchmarks.common.trees import grow, questions_of
from benchmarks.training import naive
from mavis_dist.config import Config
from mavis_dist.core.tree import Shape
from mavis_dist.decode import Engine
from mavis_dist.models.load import load_base
from mavis_dist.models.value import ValueModel, load_card
from mavis_dist.store import values
from mavis_dist.store.files import Store
from mavis_dist.store.shards import Labels
from mavis_dist.train.data import Fit, TreeSet, load_trees, steps, tree_set
from mavis_dist.train.engine import make_engine
from mavis_dist.train.fit import squared_error
from mavis_dist.train.model import trainable_model
from mavis_dist.types import Policy, RewardScale

SEQUENCES_PER_STEP = 32
PAPER_SHAPE = Shape(root=4, children=2, layers=5, max_tokens=128)
SAME_LOSS = 1e-4  # relative
CHECKED_TREES = 4
STEPS = 1000  # of the schedule; the learning rate does not affect the speed

Parts = dict[str, float]  # seconds


def trees_of_run(config: Config, store: Store) -> TreeSet:
    """The base model's trees, labelled by the first objective."""
    objective = next(iter(config.objectives))
    scale = load_card(values.fetch(store, objective, 0)).scales[0]
    pairs = load_trees(store, Policy(), objective)
    return tree_set(pairs, scale, zeta=0.0, layers=config.rollout.first.layers, every_token=False)


def trees_of_paper(config: Config, count: int) -> TreeSet:
    """Trees of the published shape, grown by the run's base model, with random rewards."""
    base = load_base(config.base.model, config.base.dtype)
    engine = Engine(base, max_rows=config.rollout.rows)
    trees = grow(engine, config, PAPER_SHAPE, Policy(), questions_of(config, base)[:count])
    source = np.random.default_rng(config.seed)
    pairs = [(tree, Labels(tree.prompt_id, tree.leaves(), source.normal(size=len(tree.leaves())))) for tree in trees]
    return tree_set(pairs, RewardScale(0.0, 1.0), zeta=0.0, layers=PAPER_SHAPE.layers, every_token=False)


def make_model(config: Config, store: Store) -> ValueModel:
    """The first objective's value model as the start of iteration 1."""
    objective = next(iter(config.objectives))
    return trainable_model(Fit((objective,), 1, 0, (RewardScale(0.0, 1.0),), frozenset()), config, store)


@torch.no_grad()
def loss_difference(model: ValueModel, trees: TreeSet, indices: list[int]) -> float:
    """Relative difference of the two variants' squared error in float32; an assertion fails if it is large."""
    packed = float(squared_error(model, trees, indices, "cpu"))
    batches = naive.batches(naive.examples(trees, indices), SEQUENCES_PER_STEP, seed=0)
    plain = sum(float(naive.squared_error(model, batch)) for batch in batches)
    difference = abs(packed - plain) / plain
    assert difference < SAME_LOSS, f"packed trees have the squared error {packed}, their nodes one by one {plain}"
    return difference


def measure(trees: TreeSet, config: Config, store: Store, num_trees: int, repetitions: int) -> dict[str, Any]:
    """Nodes per second of every variant, seconds by part of the step, and tokens read."""
    difference = loss_difference(make_model(config, store), trees, list(range(min(CHECKED_TREES, len(trees)))))
    benchmark = PackingBenchmark(trees, config, store, num_trees)
    speeds = benchmark.measure(repetitions)
    return {
        "trees": len(trees),
        "nodes": num_nodes(trees, range(len(trees))),
        "nodes_per_s": speeds.per_s,
        "nodes_per_cpu_s": speeds.per_cpu_s,
        "seconds": benchmark.parts,
        "token_forwards": token_forwards(trees, config.train.trees_per_step, config.seed),
        "loss_difference": difference,
    }


class PackingBenchmark:
    """Two training engines with the same model and the same trees, for packed trees and single sequences."""

    def __init__(self, trees: TreeSet, config: Config, store: Store, num_trees: int):
        self._trees, self._per_step, self._seed = trees, config.train.trees_per_step, config.seed
        self._num_steps = max(1, num_trees // self._per_step)
        settings = config.train.model_copy(update={"accumulation": 1})  # a step per loss
        self._packed = make_engine(make_model(config, store), settings, STEPS, self._per_step)
        self._plain = make_engine(make_model(config, store), settings, STEPS, SEQUENCES_PER_STEP)
        self.parts: dict[str, list[Parts]] = {"packed": [], "packed_singly": [], "per_node": []}

    def measure(self, repetitions: int) -> Speeds:
        """Nodes per second. `packed_singly` has one tree per step and therefore no padding."""
        optimise(self._packed, self._packed_losses(self._chosen(0)[:1]))
        optimise(self._plain, islice(self._plain_losses(self._chosen(0)[:1], 0), 1))
        variants = {"packed": self._run_packed, "packed_singly": self._run_singly, "per_node": self._run_plain}
        return take_turns(variants, repetitions)

    def _chosen(self, repetition: int) -> list[list[int]]:
        """The trees of every step."""
        return list(islice(steps(self._trees.lengths, self._per_step, repetition, self._seed), self._num_steps))

    def _run_packed(self, repetition: int) -> float:
        chosen = self._chosen(repetition)
        return self._run("packed", self._packed, self._packed_losses(chosen), chosen)

    def _run_singly(self, repetition: int) -> float:
        chosen = [[i] for i in chain(*self._chosen(repetition))]
        return self._run("packed_singly", self._packed, self._packed_losses(chosen), chosen)

    def _run_plain(self, repetition: int) -> float:
        chosen = self._chosen(repetition)
        return self._run("per_node", self._plain, self._plain_losses(chosen, repetition), chosen)

    def _run(self, variant: str, engine: Any, losses: Iterator[torch.Tensor], chosen: Iterable[list[int]]) -> float:
        self.parts[variant].append(optimise(engine, losses))
        return num_nodes(self._trees, chain(*chosen))

    def _packed_losses(self, chosen: Iterable[list[int]]) -> Iterator[torch.Tensor]:
        for indices in chosen:
            yield squared_error(self._packed, self._trees, indices, "cpu") / self._trees.total_weight(indices)

    def _plain_losses(self, chosen: Iterable[list[int]], seed: int) -> Iterator[torch.Tensor]:
        found = naive.examples(self._trees, chain(*chosen))
        for batch in naive.batches(found, SEQUENCES_PER_STEP, seed):
            weight = sum(example.weight for example in batch)
            yield naive.squared_error(self._plain, batch) / weight


def optimise(engine: Any, losses: Iterator[torch.Tensor]) -> Parts:
    """One optimiser step per loss. The time of the forward pass includes making the batch."""
    engine.train()
    seconds: Parts = defaultdict(float)
    while True:
        started = time.perf_counter()
        loss = next(losses, None)
        if loss is None:
            return dict(seconds)
        computed = time.perf_counter()
        engine.backward(loss)
        derived = time.perf_counter()
        engine.step()
        seconds["forward"] += computed - started
        seconds["backward"] += derived - computed
        seconds["optimiser"] += time.perf_counter() - derived


def num_nodes(trees: TreeSet, indices: Iterable[int]) -> int:
    """Number of targets: at segment ends, at the prompt, and at the cuts of split answers."""
    return sum(len(trees.targets[i].index_X) for i in indices)


def token_forwards(trees: TreeSet, trees_per_step: int, seed: int) -> dict[str, int]:
    """Tokens in the forward passes of one epoch, with and without padding."""
    epoch = list(steps(trees.lengths, trees_per_step, 0, seed))
    found = naive.examples(trees, range(len(trees)))
    batches = naive.batches(found, SEQUENCES_PER_STEP, seed)
    num_tokens = sum(len(tree.prompt_tokens) + len(tree.tokens) for tree in trees.trees)
    return {
        "packed": num_tokens,
        "packed_padded": sum(trees.batch(indices).tokens_BS.numel() for indices in epoch),
        "packed_singly": num_tokens,
        "packed_singly_padded": num_tokens,
        "per_node": sum(len(example.tokens) for example in found),
        "per_node_padded": sum(len(batch) * max(len(example.tokens) for example in batch) for batch in batches),
    }


@contextmanager
def process_group() -> Iterator[None]:
    """A process group of this process alone, which DeepSpeed requires."""
    os.environ.setdefault("LOCAL_RANK", "0")
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        yield
    finally:
        distributed.destroy_process_group()

"""Stored trees and labels -> what the value model learns from. No Ray, no DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mavis_dist.core.packing import PackedBatch, pack
from mavis_dist.core.tree import Targets, Tree, backup, depth_weights, targets
from mavis_dist.store.files import Store, StoreError
from mavis_dist.store.shards import Labels, read_labels, read_trees
from mavis_dist.types import Policy, RewardScale


def rollout_folder(policy: Policy) -> str:
    return f"rollouts/{policy.name}"


def label_folder(policy: Policy, objective: str) -> str:
    return f"labels/{policy.name}/{objective}"


def shard_names(store: Store, folder: str) -> list[str]:
    return [name for name in store.list(folder) if name.endswith(".parquet")]


def load_trees(store: Store, policy: Policy, objective: str) -> list[tuple[Tree, Labels]]:
    """All labelled trees of a policy, in the order of their shards."""
    folder, labels = rollout_folder(policy), label_folder(policy, objective)
    pairs = []
    for name in shard_names(store, folder):
        trees, scores = read_trees(store, f"{folder}/{name}"), read_labels(store, f"{labels}/{name}")
        if [t.prompt_id for t in trees] != [s.prompt_id for s in scores]:
            raise StoreError(f"{store.root}/{labels}/{name} does not belong to its trees: delete it and run again")
        pairs += list(zip(trees, scores, strict=True))
    return pairs


@dataclass(frozen=True, eq=False)
class TreeSet:
    """Trees with their targets and the weight of each depth in the loss."""

    trees: list[Tree]
    targets: list[Targets]
    weight_by_depth: np.ndarray

    def __len__(self) -> int:
        return len(self.trees)

    def total_weight(self, indices: list[int]) -> float:
        """Sum of the target weights of some trees: what their squared errors are divided by."""
        return float(sum(self.weight_by_depth[self.targets[i].depth_X].sum() for i in indices))

    def batch(self, indices: list[int]) -> PackedBatch:
        return pack([self.trees[i] for i in indices], [self.targets[i] for i in indices], self.weight_by_depth)


def tree_set(
    pairs: list[tuple[Tree, Labels]],
    scale: RewardScale,
    zeta: float,
    layers: int,
    every_token: bool = True,
    depth_balance: bool = True,
) -> TreeSet:
    """Back up the standardised rewards through every tree and derive its targets."""
    trees, all_targets = [], []
    for tree, labels in pairs:
        rewards = {int(node): scale.standardise(score) for node, score in zip(labels.node, labels.score, strict=True)}
        trees.append(tree)
        all_targets.append(targets(tree, backup(tree, rewards), zeta, every_token))
    weights = depth_weights(all_targets, layers) if depth_balance else np.ones(layers + 1)
    return TreeSet(trees, all_targets, weights)


def steps(num_trees: int, trees_per_step: int, epoch: int, seed: int) -> Iterator[list[int]]:
    """Indices of the trees of every optimiser step of an epoch: a seeded shuffle, the same on all workers."""
    order = np.random.default_rng([seed, epoch]).permutation(num_trees).tolist()
    for start in range(0, num_trees, trees_per_step):
        yield order[start : start + trees_per_step]

"""Training data of a value model, from stored trees and labels. No Ray, no DeepSpeed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from mavis_dist.config import Config
from mavis_dist.core import siblings
from mavis_dist.core.packing import PackedBatch, pack, subtrees
from mavis_dist.core.tree import Targets, Tree, backup, depth_weights, targets
from mavis_dist.store.files import Store, StoreError
from mavis_dist.store.layout import label_folder, rollout_folder
from mavis_dist.store.shards import Labels, read_labels, read_trees, shard_names
from mavis_dist.types import Policy, RewardScale

STEPS_PER_BUCKET = 8
WHOLE_TREE_TOKENS = 512  # longer trees are split: their attention would cost more than encoding the prompt again
MAX_PADDING = 0.15  # part of a batch


def load_trees(store: Store, policy: Policy, objective: str) -> list[tuple[Tree, Labels]]:
    """All labelled trees of a policy, in the order of their shards."""
    folder, labels = rollout_folder(policy), label_folder(policy, objective)
    pairs = []
    names = shard_names(store, folder)
    if shard_names(store, labels) != names:
        raise StoreError(f"{store.root}/{labels} does not belong to its trees: delete it and run again")
    for name in names:
        trees, scores = read_trees(store, f"{folder}/{name}"), read_labels(store, f"{labels}/{name}")
        if [t.prompt_id for t in trees] != [s.prompt_id for s in scores]:
            raise StoreError(f"{store.root}/{labels}/{name} does not belong to its trees: delete it and run again")
        pairs += list(zip(trees, scores, strict=True))
    return pairs


@dataclass(frozen=True)
class Fit:
    """One value model to be trained, with a head for each of its objectives."""

    objectives: tuple[str, ...]  # several only in iteration 0, where they share the base model's trees
    iteration: int  # of the policy whose trees it learns from
    parent: int | None  # iteration of the value model behind that policy, where training starts; None: the base model
    scales: tuple[RewardScale, ...]  # by objective
    validation_ids: frozenset[str]  # prompts whose trees validate and do not train

    @property
    def name(self) -> str:
        return "-".join(self.objectives)

    @property
    def policy(self) -> Policy:
        if self.iteration == 0:
            return Policy()
        [objective] = self.objectives
        return Policy(objective, self.iteration)


@dataclass(frozen=True, eq=False)
class TreeSet:
    """Trees with their targets and the weight of each depth in the loss."""

    trees: list[Tree]
    targets: list[Targets]
    weight_by_depth: np.ndarray
    zeta: float = 0.0  # price of a nat in the targets

    def __len__(self) -> int:
        return len(self.trees)

    @property
    def lengths(self) -> list[int]:
        """Packed tokens of every tree."""
        return [len(tree.prompt_tokens) + len(tree.tokens) for tree in self.trees]

    @property
    def noise(self) -> list[np.ndarray]:
        """Variance of every tree's targets around the true values, estimated from their children."""
        return [siblings.noise(*pair, self.zeta) for pair in zip(self.trees, self.targets, strict=True)]

    def total_weight(self, indices: list[int]) -> float:
        """Sum of the target weights of some trees, the divisor of their squared errors."""
        return float(sum(self.weight_by_depth[self.targets[i].depth_X].sum() for i in indices))

    def num_siblings(self, indices: list[int]) -> int:
        """Targets of some trees that are compared with those of siblings."""
        return sum(int((self.targets[i].siblings_X >= 0).sum()) for i in indices)

    def batch(self, indices: list[int]) -> PackedBatch:
        """Some trees, whole, in one batch."""
        return pack([self.trees[i] for i in indices], [self.targets[i] for i in indices], self.weight_by_depth)

    def batches(self, indices: list[int]) -> list[PackedBatch]:
        """Some trees, the large ones split at the prompt, in batches of similar length."""
        rows = []
        for tree, targets_ in ((self.trees[i], self.targets[i]) for i in indices):
            is_large = len(tree.prompt_tokens) + len(tree.tokens) > WHOLE_TREE_TOKENS
            rows += subtrees(tree, targets_, WHOLE_TREE_TOKENS) if is_large else [(tree, targets_)]
        rows.sort(key=lambda row: len(row[0].tokens) + len(row[0].prompt_tokens))
        groups: list[list[tuple[Tree, Targets]]] = []
        for row in rows:
            if groups and _padding([*groups[-1], row]) <= MAX_PADDING:
                groups[-1].append(row)
            else:
                groups.append([row])
        return [pack([t for t, _ in group], [x for _, x in group], self.weight_by_depth) for group in groups]


def _padding(rows: Sequence[tuple[Tree, Targets]]) -> float:
    """Part of a batch that would be padding."""
    lengths = [len(tree.prompt_tokens) + len(tree.tokens) for tree, _ in rows]
    return 1 - sum(lengths) / (len(lengths) * max(lengths))


def tree_set(
    pairs: list[tuple[Tree, Labels]],
    scale: RewardScale,
    zeta: float,
    layers: int,
    every_token: bool = True,
    depth_balance: bool = True,
    average_split: bool = False,
) -> TreeSet:
    """Back up the standardised rewards through every tree and derive its targets."""
    trees, all_targets, num_groups = [], [], 0
    for tree, labels in pairs:
        rewards = {int(node): scale.standardise(score) for node, score in zip(labels.node, labels.score, strict=True)}
        trees.append(tree)
        found = targets(tree, backup(tree, rewards, average_split), zeta, every_token)
        # Unique in the set: the parts of a split tree are compared across passes.
        siblings_X = np.where(found.siblings_X >= 0, found.siblings_X + num_groups, -1)
        num_groups = max(num_groups, int(siblings_X.max()) + 1)
        all_targets.append(replace(found, siblings_X=siblings_X))
    weights = depth_weights(all_targets, layers) if depth_balance else np.ones(layers + 1)
    return TreeSet(trees, all_targets, weights, zeta)


def prefix_set(pairs: Sequence[tuple[Tree, Labels]]) -> TreeSet:
    """The rewards of all answers, finished or not, as targets of their last tokens, in standard deviations of all."""
    scores = [np.concatenate([labels.score, labels.prefix_score]) for _, labels in pairs]
    everything = np.concatenate(scores)
    mean, sd = everything.mean(), everything.std()
    all_targets = []
    for (tree, labels), score_X in zip(pairs, scores, strict=True):
        token_X = np.concatenate([tree.node_start[labels.node + 1] - 1, labels.token])
        value_X = (score_X - mean) / sd
        zero_X = np.zeros(len(token_X), dtype=np.int32)
        index_X = len(tree.prompt_tokens) + token_X.astype(np.int64)
        all_targets.append(Targets(index_X, value_X.astype(np.float32), zero_X, zero_X - 1))
    return TreeSet([tree for tree, _ in pairs], all_targets, np.ones(1))


def zeta(config: Config, iteration: int) -> float:
    """Price of one nat of divergence in standard deviations of reward: 1 / beta, and 0 for the untilted policy."""
    return 1.0 / config.steer.beta if iteration > 0 and config.steer.beta > 0 else 0.0


class Data(NamedTuple):
    """The trees of a fit with the targets of each of its objectives."""

    training: list[TreeSet]
    prefixes: list[TreeSet]  # the training trees with the rewards of answers, finished or not; may be empty
    validation: list[TreeSet]


def data_of(fit: Fit, config: Config, store: Store) -> Data:
    parts = [_data_of(fit, *pair, config, store) for pair in zip(fit.objectives, fit.scales, strict=True)]
    training, prefixes, validation = zip(*parts, strict=True)
    return Data(list(training), [one for one in prefixes if one is not None], list(validation))


def _data_of(
    fit: Fit, objective: str, scale: RewardScale, config: Config, store: Store
) -> tuple[TreeSet, TreeSet | None, TreeSet]:
    shape = config.rollout.first if fit.iteration == 0 else config.rollout.later
    pairs = load_trees(store, fit.policy, objective)
    training = [pair for pair in pairs if pair[0].prompt_id not in fit.validation_ids]
    validation = [pair for pair in pairs if pair[0].prompt_id in fit.validation_ids]
    with_values = [
        tree_set(
            chosen,
            scale,
            zeta(config, fit.iteration),
            shape.layers,
            every_token=config.train.targets != "node",
            depth_balance=config.train.depth_balance,
            average_split=config.train.split_backup == "paper",
        )
        if chosen
        else TreeSet([], [], np.ones(shape.layers + 1))
        for chosen in (training, validation)
    ]
    return with_values[0], prefix_set(training) if config.learns_prefixes else None, with_values[1]


def steps(lengths: Sequence[int], trees_per_step: int, epoch: int, seed: int) -> list[list[int]]:
    """Indices of the trees of every optimiser step of an epoch, the same on all workers.

    A seeded shuffle of the trees, sorted by length in packed tokens within buckets of a few steps to reduce padding,
    and a shuffle of the steps. Indices of a step are sorted by length.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths)).tolist()
    chosen = []
    for start in range(0, len(order), trees_per_step * STEPS_PER_BUCKET):
        bucket = order[start : start + trees_per_step * STEPS_PER_BUCKET]
        bucket.sort(key=lambda index: lengths[index])
        chosen += [bucket[i : i + trees_per_step] for i in range(0, len(bucket), trees_per_step)]
    return [chosen[i] for i in random.permutation(len(chosen))]


def passes(indices: Sequence[int], rank: int, num_workers: int, accumulation: int) -> list[list[int]]:
    """A worker's share of a step, split into forward passes of trees of similar length; some may be empty."""
    mine = list(indices[rank::num_workers])
    return [part.tolist() for part in np.array_split(np.array(mine, dtype=np.int64), accumulation)]

"""Labels: one objective's reward of every leaf of stored trees. No Ray.

A separate stage, so that a new objective can score trees that are already stored.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from mavis_dist.config import Config
from mavis_dist.models.load import load_tokenizer
from mavis_dist.rewards import build
from mavis_dist.store.files import Store
from mavis_dist.store.shards import Labels, read_labels, read_trees, write_labels
from mavis_dist.types import Prompt, RewardScale, UserError


class LabelError(UserError):
    """Rewards that are all equal, so that nothing can be learnt."""


def label_shards(config: Config, objective: str, prompts: Sequence[Prompt], shards: Sequence[tuple[str, str]]) -> int:
    """Score the leaves of tree shards, `shards` being (trees, labels) paths; returns the number of leaves.

    The reward is called once per shard, with prompts and answers as text without special tokens.
    """
    store = Store(config.storage, config.run)
    reward = build(config.objectives[objective])
    tokenizer = load_tokenizer(config.base.model)
    text_of = {prompt.id: prompt.text for prompt in prompts}
    num_leaves = 0
    for source, target in shards:
        trees = read_trees(store, source)
        leaves = [(tree, node) for tree in trees for node in tree.leaves().tolist()]
        answers = tokenizer.batch_decode(
            [tree.answer(node).tolist() for tree, node in leaves], skip_special_tokens=True
        )
        scores = iter(reward.score([text_of[tree.prompt_id] for tree, _ in leaves], answers))
        labels = []
        for tree in trees:
            nodes = tree.leaves()
            labels.append(Labels(tree.prompt_id, nodes, np.array([next(scores) for _ in nodes])))
        write_labels(store, target, labels)
        num_leaves += len(leaves)
    return num_leaves


def reward_scale(store: Store, objective: str, paths: Sequence[str], training: Collection[str]) -> RewardScale:
    """Mean and standard deviation of an objective over the leaves of the training prompts.

    Raises:
        LabelError: if all rewards are equal.
    """
    labels = [item for path in paths for item in read_labels(store, path) if item.prompt_id in training]
    scores = np.concatenate([item.score for item in labels])
    mean, sd = float(scores.mean()), float(scores.std())
    if sd < 1e-6 * max(1.0, abs(mean)) or len(np.unique(scores)) < 2:
        raise LabelError(
            f"objective {objective!r} gives all {len(scores)} training answers the same reward ({mean:g}): "
            f"choose another reward, more prompts or longer answers (rollout.max_tokens)"
        )
    return RewardScale(mean, sd)

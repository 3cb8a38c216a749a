"""Labels: one objective's reward of every leaf of stored trees, and of unfinished answers. No Ray.

A separate stage, so that a new objective can score trees that are already stored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from mavis_dist.config import Config
from mavis_dist.core.tree import Tree
from mavis_dist.models.load import load_tokenizer
from mavis_dist.rewards import Reward, build
from mavis_dist.store.files import DamagedFile, Store
from mavis_dist.store.shards import Labels, read_labels, read_trees, write_labels
from mavis_dist.types import Prompt, RewardScale, UserError

PREFIX_TOKENS = 8  # between the unfinished answers that are scored


class LabelError(UserError):
    """Rewards that are all equal, so that nothing can be learnt."""


def label_shards(config: Config, objective: str, prompts: Sequence[Prompt], shards: Sequence[tuple[str, str]]) -> int:
    """Score the leaves of tree shards, `shards` being (trees, labels) paths; returns the number of leaves.

    With `train.targets: prefix` their unfinished answers are scored as well. Shards that an earlier attempt has scored
    are not scored again.
    """
    store = Store(config.storage, config.run)
    reward = cache(lambda: build(config.objectives[objective]))  # needed only where labels are missing
    tokenizer = cache(lambda: load_tokenizer(config.base.model))
    text_of = {prompt.id: prompt.text for prompt in prompts}
    prefix_tokens = PREFIX_TOKENS if config.learns_prefixes else None
    num_leaves = 0
    for source, target in shards:
        trees = read_trees(store, source)
        labels = stored(store, target, trees, prefix_tokens)
        if labels is None:
            labels = score(trees, text_of, reward(), tokenizer(), prefix_tokens)
            write_labels(store, target, labels)
        num_leaves += sum(len(item.node) for item in labels)
    return num_leaves


def stored(store: Store, path: str, trees: Sequence[Tree], prefix_tokens: int | None) -> list[Labels] | None:
    """The labels of these trees in a file; None: it does not exist, is damaged, or has others."""
    if not store.exists(path):
        return None
    try:
        labels = read_labels(store, path)
    except DamagedFile:
        return None

    def scored(tree: Tree) -> tuple[str, list[int], list[int]]:
        prefixes = [] if prefix_tokens is None else [token for token, _ in tree.prefixes(prefix_tokens)]
        return tree.prompt_id, tree.leaves().tolist(), prefixes

    found = [(item.prompt_id, item.node.tolist(), item.token.tolist()) for item in labels]
    return labels if found == [*map(scored, trees)] else None


def score(
    trees: Sequence[Tree], text_of: Mapping[str, str], reward: Reward, tokenizer: Any, prefix_tokens: int | None
) -> list[Labels]:
    """The rewards of all leaves of some trees, and of unfinished answers after every `prefix_tokens` tokens and at the
    ends of segments, None: of none.

    The reward is called once, with prompts (by the id of their tree) and answers as text without special tokens.
    """
    leaves = [tree.leaves() for tree in trees]
    prefixes = [[] if prefix_tokens is None else [*tree.prefixes(prefix_tokens)] for tree in trees]
    prompts, answers, ends = list[str](), list[list[int]](), list[int]()
    for tree, nodes, unfinished in zip(trees, leaves, prefixes, strict=True):
        found = [*map(tree.answer, nodes.tolist()), *(answer for _, answer in unfinished)]
        answers += [answer.tolist() for answer in found]
        prompts += [text_of[tree.prompt_id]] * len(found)
        ends += [len(answers) - len(unfinished), len(answers)]
    scores = np.array(reward.score(prompts, tokenizer.batch_decode(answers, skip_special_tokens=True)))
    parts = np.split(scores, ends)
    return [
        Labels(tree.prompt_id, nodes, of_leaves, np.array([token for token, _ in unfinished], np.int32), of_prefixes)
        for tree, nodes, unfinished, of_leaves, of_prefixes in zip(
            trees, leaves, prefixes, parts[0:-1:2], parts[1:-1:2], strict=True
        )
    ]


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

"""Preference pairs from stored trees: answers to the same prompt, a good one against a bad one."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from mavis_dist.core.tree import Tree
from mavis_dist.store.shards import Labels


@dataclass(frozen=True)
class Pair:
    """Token ids, chat template applied; answers end with the end-of-answer token unless they were cut."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float  # of their rewards, in the reward's own unit


def pairs_of(
    trees: Iterable[tuple[Tree, Labels]], excluded_ids: Collection[str] = (), per_prompt: int = 1
) -> list[Pair]:
    """The best against the worst answer of every tree, then the second best against the second worst, and so on.

    Answers with equal rewards make no pair, and no answer is in two.

    Args:
        excluded_ids: prompts without pairs, those of validation.
    """
    pairs = []
    for tree, labels in trees:
        if tree.prompt_id in excluded_ids:
            continue
        order = np.argsort(labels.score, kind="stable")
        for worst, best in zip(order[: len(order) // 2][:per_prompt], order[::-1], strict=False):
            margin = float(labels.score[best] - labels.score[worst])
            if margin > 0:
                chosen, rejected = (tree.answer(int(labels.node[place])).tolist() for place in (best, worst))
                pairs.append(Pair(tree.prompt_tokens.tolist(), chosen, rejected, margin))
    return pairs

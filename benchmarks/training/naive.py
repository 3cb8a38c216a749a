"""Regression on one sequence per node (arXiv 2508.13415), the reference for packed trees.

A node's sequence is the prompt with the path down to the node; the value model's output at its last token is compared
with the node's target. Sequences are padded on the right, so that causal attention never reaches the padding and needs
no mask, which is fastest in a Hugging Face decoder.

Shapes: B sequences, T tokens of the longest, M objectives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mavis_dist.core.tree import Tree
from mavis_dist.train.data import TreeSet


@dataclass(frozen=True, eq=False)
class Example:
    """One node."""

    tokens: np.ndarray  # int32, prompt and answer down to the node
    value: float  # target, in standard deviations of the reward
    weight: float


def examples(trees: TreeSet, indices: Iterable[int]) -> list[Example]:
    """One sequence per target of these trees."""
    found = []
    for i in indices:
        target = trees.targets[i]
        weight_X = trees.weight_by_depth[target.depth_X]
        for index, value, weight in zip(target.index_X, target.value_X, weight_X, strict=True):
            found.append(Example(sequence(trees.trees[i], int(index)), float(value), float(weight)))
    return found


def sequence(tree: Tree, index: int) -> np.ndarray:
    """Prompt and path down to one token; `index` counts the tokens of prompt and segments in storage order."""
    num_prompt = len(tree.prompt_tokens)
    if index < num_prompt:
        return tree.prompt_tokens[: index + 1]
    node = int(np.searchsorted(tree.node_start, index - num_prompt, side="right")) - 1
    num_later = int(tree.node_start[node + 1]) - (index - num_prompt) - 1
    answer = tree.answer(node)
    return np.concatenate([tree.prompt_tokens, answer[: len(answer) - num_later]])


def batches(found: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """All examples in a seeded random order, `size` at a time."""
    order = np.random.default_rng(seed).permutation(len(found))
    for start in range(0, len(order), size):
        yield [found[i] for i in order[start : start + size]]


def squared_error(model: Any, batch: Sequence[Example]) -> torch.Tensor:
    """Sum over the sequences of weight * (V - target)^2; a scalar."""
    lengths_B = torch.tensor([len(example.tokens) for example in batch])
    tokens_BT = torch.zeros(len(batch), int(lengths_B.max()), dtype=torch.int64)
    for row, example in zip(tokens_BT, batch, strict=True):
        row[: len(example.tokens)] = torch.from_numpy(example.tokens)
    values_BTM = model(input_ids=tokens_BT, use_cache=False)
    pred_B = values_BTM[torch.arange(len(batch)), lengths_B - 1, 0]
    target_B = torch.tensor([example.value for example in batch])
    weight_B = torch.tensor([example.weight for example in batch])
    return (weight_B * (pred_B - target_B) ** 2).sum()

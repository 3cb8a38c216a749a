"""Trees as packed sequences: every prompt and segment once; each token attends to its ancestors only.

Equivalent to one forward pass per root-to-leaf path, with a fraction of the tokens.

Shapes: B trees, S tokens of the longest packed tree, X targets of the tree with most targets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from mavis_dist.core.tree import ROOT, Targets, Tree


@dataclass(frozen=True, eq=False)
class PackedBatch:
    tokens_BS: torch.Tensor  # int64, 0 where padded
    positions_BS: torch.Tensor  # int64, depth in tokens
    mask_BSS: torch.Tensor  # bool, True where the second token is an ancestor of the first, or itself
    index_BX: torch.Tensor  # int64, the token of each target
    value_BX: torch.Tensor  # float32
    weight_BX: torch.Tensor  # float32, 0 where padded
    siblings_BX: torch.Tensor  # int64, numbers of groups of targets that are compared; -1: with none


def visibility(tree: Tree) -> tuple[np.ndarray, np.ndarray]:
    """Positions int64 [S] and ancestor mask bool [S, S] of prompt and segments in storage order."""
    num_prompt = len(tree.prompt_tokens)
    size = num_prompt + len(tree.tokens)
    position_S = np.arange(size)
    mask_SS = np.zeros((size, size), dtype=bool)
    mask_SS[:num_prompt, :num_prompt] = np.tri(num_prompt, dtype=bool)
    for node in range(tree.num_nodes):
        start, end = num_prompt + tree.node_start[node], num_prompt + tree.node_start[node + 1]
        parent = tree.node_parent[node]
        before = num_prompt if parent == ROOT else num_prompt + tree.node_start[parent] + tree.node_cut[node]
        mask_SS[start:end] = mask_SS[before - 1]
        mask_SS[start:end, start:end] = np.tri(end - start, dtype=bool)
        position_S[start:end] = position_S[before - 1] + 1 + np.arange(end - start)
    return position_S, mask_SS


def pack(trees: list[Tree], targets: list[Targets], weight_by_depth: np.ndarray) -> PackedBatch:
    """One padded batch of packed trees with the weight of every target."""
    num_tokens = max(len(t.prompt_tokens) + len(t.tokens) for t in trees)
    num_targets = max(len(t.index_X) for t in targets)
    tokens_BS = np.zeros((len(trees), num_tokens), dtype=np.int64)
    positions_BS = np.zeros_like(tokens_BS)
    mask_BSS = np.repeat(np.eye(num_tokens, dtype=bool)[None], len(trees), axis=0)  # padding sees itself, to avoid nan
    index_BX = np.zeros((len(trees), num_targets), dtype=np.int64)
    value_BX = np.zeros((len(trees), num_targets), dtype=np.float32)
    weight_BX = np.zeros_like(value_BX)
    siblings_BX = np.full_like(index_BX, -1)
    for row, (tree, target) in enumerate(zip(trees, targets, strict=True)):
        size, count = len(tree.prompt_tokens) + len(tree.tokens), len(target.index_X)
        tokens_BS[row, :size] = np.concatenate([tree.prompt_tokens, tree.tokens])
        positions_BS[row, :size], mask_BSS[row, :size, :size] = visibility(tree)
        index_BX[row, :count] = target.index_X
        value_BX[row, :count] = target.value_X
        weight_BX[row, :count] = weight_by_depth[target.depth_X]
        siblings_BX[row, :count] = target.siblings_X
    as_tensor = torch.from_numpy
    return PackedBatch(
        as_tensor(tokens_BS),
        as_tensor(positions_BS),
        as_tensor(mask_BSS),
        as_tensor(index_BX),
        as_tensor(value_BX),
        as_tensor(weight_BX),
        as_tensor(siblings_BX),
    )


def subtrees(tree: Tree, targets: Targets, max_tokens: int = 0) -> list[tuple[Tree, Targets]]:
    """A tree split at the prompt: the segments that start there, with descendants and targets, in parts of about
    `max_tokens` with the prompt, and of at least one such segment.

    Attention is quadratic in the sequence length, and most of a large tree's mask is empty: several parts that repeat
    the prompt cost less. The prompt's own target stays with the first part.
    """
    num_prompt = len(tree.prompt_tokens)
    part_N = _parts(tree, max_tokens - num_prompt)
    part_T = np.repeat(part_N, np.diff(tree.node_start))
    # The part that each target belongs to, by the token that carries it.
    part_X = np.where(targets.index_X < num_prompt, part_N[0], part_T[np.maximum(targets.index_X - num_prompt, 0)])
    parts = []
    for part in np.unique(part_N):
        nodes, is_inside_T, is_inside_X = np.flatnonzero(part_N == part), part_T == part, part_X == part
        number_N = np.cumsum(part_N == part) - 1
        parent_N = tree.node_parent[nodes]
        inside = replace(
            tree,
            node_parent=np.where(parent_N == ROOT, ROOT, number_N[parent_N]).astype(np.int32),
            node_cut=tree.node_cut[nodes],
            node_start=np.cumsum([0, *np.diff(tree.node_start)[nodes]], dtype=np.int32),
            node_finish=tree.node_finish[nodes],
            tokens=tree.tokens[is_inside_T],
            token_logratio=tree.token_logratio[is_inside_T],
        )
        place = np.concatenate([np.arange(num_prompt), num_prompt + np.cumsum(is_inside_T) - 1])
        columns = (x[is_inside_X] for x in (targets.value_X, targets.depth_X, targets.siblings_X))
        parts.append((inside, Targets(place[targets.index_X[is_inside_X]], *columns)))
    return parts


def _parts(tree: Tree, max_tokens: int) -> np.ndarray:
    """The part of every node, int64 [N], for equal parts of about `max_tokens`; a segment at the prompt has all its
    descendants in its own part.
    """
    top_N = np.arange(tree.num_nodes)
    for node, parent in enumerate(tree.node_parent):
        top_N[node] = node if parent == ROOT else top_N[parent]
    size_N = np.bincount(top_N, np.diff(tree.node_start), tree.num_nodes)  # of all below it; 0 but at the prompt
    num_tokens = len(tree.tokens)
    equal = max(1.0, num_tokens / math.ceil(num_tokens / max(1, max_tokens)))
    middle_N = np.cumsum(size_N) - size_N / 2
    return (middle_N // equal).astype(np.int64)[top_N]

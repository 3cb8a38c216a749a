"""Trees as packed sequences: every prompt and segment once; each token attends to its ancestors only.

Equivalent to one forward pass per root-to-leaf path, with a fraction of the tokens.

Shapes: B trees, S tokens of the longest packed tree, X targets of the tree with most targets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from mavis_dist.core.tree import ROOT, Targets, Tree


@dataclass(frozen=True, eq=False)
class PackedBatch:
    tokens_BS: torch.Tensor  # int64, 0 where padded
    positions_BS: torch.Tensor  # int64, depth in tokens
    mask_B1SS: torch.Tensor  # bool, True where the second token is an ancestor of the first, or itself
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
        as_tensor(mask_BSS)[:, None],
        as_tensor(index_BX),
        as_tensor(value_BX),
        as_tensor(weight_BX),
        as_tensor(siblings_BX),
    )


def subtrees(tree: Tree, targets: Targets) -> list[tuple[Tree, Targets]]:
    """A tree split at the prompt: one tree per segment that starts there, with descendants and targets.

    Attention is quadratic in the sequence length, and most of a large tree's mask is empty: several parts that repeat
    the prompt cost less. The prompt's own target stays with the first part.
    """
    top_N = np.arange(tree.num_nodes)
    for node, parent in enumerate(tree.node_parent):
        top_N[node] = node if parent == ROOT else top_N[parent]
    num_prompt = len(tree.prompt_tokens)
    top_T = np.repeat(top_N, np.diff(tree.node_start))
    # The part that each target belongs to, by the token that carries it.
    top_X = np.where(targets.index_X < num_prompt, top_N[0], top_T[np.maximum(targets.index_X - num_prompt, 0)])
    parts = []
    for top in np.flatnonzero(tree.node_parent == ROOT):
        nodes, is_inside_T, is_inside_X = np.flatnonzero(top_N == top), top_T == top, top_X == top
        number_N = np.cumsum(top_N == top) - 1
        parent_N = tree.node_parent[nodes]
        part = replace(
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
        parts.append((part, Targets(place[targets.index_X[is_inside_X]], *columns)))
    return parts

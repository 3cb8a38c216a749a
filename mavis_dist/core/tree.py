"""Trees of rollouts as flat arrays: the growth rule, the backup, the regression targets.

A tree belongs to one prompt. Its nodes are segments of answers; node n continues its parent after the first
`node_cut[n]` tokens of the parent's segment, or the prompt if the parent is -1. Ordinary children continue the whole
segment. Children of a dynamic split continue an inner point of an already finished answer.

Sources: arXiv 2508.13415 (trees, mean backup, node targets, dynamic split); the separate backup of split answers and
the target at every token are this project's.

Shapes: N nodes, T tokens of all segments, X targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

ROOT = -1
COMPARED_AFTER = (1, 2, 4, 8)  # tokens of siblings


class Finish(IntEnum):
    """Why a segment ended."""

    OPEN = 0  # it has children
    STOP = 1  # the model ended the answer
    LENGTH = 2  # the answer reached its maximum length


@dataclass(frozen=True)
class Shape:
    """Branching: `root` segments at the prompt, `children` at inner nodes, `layers` segments down to a leaf."""

    root: int
    children: int
    layers: int
    max_tokens: int
    dynamic_split: bool = True


def segment_length(shape: Shape, layer: int, left: int, uniform: float) -> int:
    """Length of the segments that start at a state in `layer` (the prompt is layer 0) with `left` tokens remaining.

    Uniform on {1 .. 2 * floor(left / (layers - layer)) - 1}; the last layer gets all that is left.
    """
    layers_to_go = shape.layers - layer
    if layers_to_go <= 1:
        return left
    longest = max(1, 2 * (left // layers_to_go) - 1)
    return 1 + min(int(uniform * longest), longest - 1)


def cut_point(length: int, uniform: float) -> int:
    """A uniform inner point of a segment of at least two tokens: the number of tokens before the cut."""
    return 1 + min(int(uniform * (length - 1)), length - 2)


@dataclass(frozen=True, eq=False)
class Tree:
    """One prompt's answers. Parents precede their children."""

    prompt_id: str
    policy: str
    seed: int
    prompt_tokens: np.ndarray  # int32 [P]
    node_parent: np.ndarray  # int32 [N], ROOT for the prompt
    node_cut: np.ndarray  # int32 [N], tokens of the parent's segment that precede this node; 0 below the prompt
    node_start: np.ndarray  # int32 [N + 1], segment n is tokens[node_start[n] : node_start[n + 1]]
    node_finish: np.ndarray  # int8 [N], Finish
    tokens: np.ndarray  # int32 [T]
    token_logratio: np.ndarray  # float32 [T], log pi(a) - log pi_ref(a)

    @property
    def num_nodes(self) -> int:
        return len(self.node_parent)

    def length(self, node: int) -> int:
        return int(self.node_start[node + 1] - self.node_start[node])

    def segment(self, node: int) -> np.ndarray:
        return self.tokens[self.node_start[node] : self.node_start[node + 1]]

    def logratios(self, node: int) -> np.ndarray:
        return self.token_logratio[self.node_start[node] : self.node_start[node + 1]]

    def is_split(self, node: int) -> bool:
        """Whether this node continues an inner point of a finished answer."""
        parent = int(self.node_parent[node])
        return parent != ROOT and int(self.node_cut[node]) < self.length(parent)

    def leaves(self) -> np.ndarray:
        """Nodes that end an answer, int64."""
        return np.flatnonzero(self.node_finish != Finish.OPEN)

    def prefixes(self, every: int) -> Iterator[tuple[int, np.ndarray]]:
        """Unfinished answers: after every so many tokens and at the ends of inner segments, the last token of each, an
        index into `tokens`, and all its tokens.
        """
        for node in range(self.num_nodes):
            answer, length = self.answer(node), self.length(node)
            before, start = len(answer) - length, int(self.node_start[node])
            for place in range(1, length + 1):
                is_inside = place < length and (before + place) % every == 0
                if is_inside or (place == length and self.node_finish[node] == Finish.OPEN):
                    yield start + place - 1, answer[: before + place]

    def answer(self, node: int) -> np.ndarray:
        """All answer tokens from the prompt to the end of this node, int32."""
        parts = [self.segment(node)]
        while self.node_parent[node] != ROOT:
            parts.append(self.segment(self.node_parent[node])[: self.node_cut[node]])
            node = self.node_parent[node]
        return np.concatenate(parts[::-1])

    def children(self) -> dict[tuple[int, int], list[int]]:
        """The nodes that continue each state: (node, tokens of its segment before them) -> nodes."""
        nodes_of: dict[tuple[int, int], list[int]] = {}
        for node, state in enumerate(zip(self.node_parent.tolist(), self.node_cut.tolist(), strict=True)):
            nodes_of.setdefault(state, []).append(node)
        return nodes_of

    def siblings_after(self, num_tokens: int) -> list[list[int]]:
        """For every state the last of the first `num_tokens` tokens of each child that has so many."""
        return [
            [int(self.node_start[node]) + num_tokens - 1 for node in nodes if self.length(node) >= num_tokens]
            for nodes in self.children().values()
        ]

    def depths(self) -> np.ndarray:
        """Layer of every node, 1 below the prompt, int32 [N]."""
        depth_N = np.zeros(self.num_nodes, dtype=np.int32)
        for node, parent in enumerate(self.node_parent):
            depth_N[node] = 1 if parent == ROOT else depth_N[parent] + 1
        return depth_N


@dataclass
class TreeBuilder:
    """Collects segments in any order in which parents come before children."""

    prompt_id: str
    policy: str
    seed: int
    prompt_tokens: list[int]
    parents: list[int] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    finishes: list[Finish] = field(default_factory=list)
    segments: list[list[int]] = field(default_factory=list)
    logratios: list[list[float]] = field(default_factory=list)

    def add(self, parent: int, cut: int, tokens: list[int], logratios: list[float], finish: Finish) -> int:
        """Append a segment and return its node number."""
        assert len(tokens) == len(logratios) > 0
        self.parents.append(parent)
        self.cuts.append(cut)
        self.finishes.append(finish)
        self.segments.append(tokens)
        self.logratios.append(logratios)
        return len(self.parents) - 1

    def build(self) -> Tree:
        return Tree(
            prompt_id=self.prompt_id,
            policy=self.policy,
            seed=self.seed,
            prompt_tokens=np.array(self.prompt_tokens, dtype=np.int32),
            node_parent=np.array(self.parents, dtype=np.int32),
            node_cut=np.array(self.cuts, dtype=np.int32),
            node_start=np.cumsum([0, *map(len, self.segments)], dtype=np.int32),
            node_finish=np.array(self.finishes, dtype=np.int8),
            tokens=np.concatenate([np.array(s, dtype=np.int32) for s in self.segments]),
            token_logratio=np.concatenate([np.array(s, dtype=np.float32) for s in self.logratios]),
        )


@dataclass(frozen=True, eq=False)
class Backup:
    """Means over the answers below every node, and below every cut inside a finished answer."""

    reward_N: np.ndarray  # Rbar, float64
    logratio_N: np.ndarray  # mean log-ratio of what follows the node, float64
    root: tuple[float, float]  # the same pair for the prompt
    cuts: dict[tuple[int, int], tuple[float, float]]  # (node, cut) -> the same pair for the state at the cut
    is_split_averaged: bool  # whether a cut's pair also holds for the tokens before it


def backup(tree: Tree, rewards: Mapping[int, float], average_split: bool = False) -> Backup:
    """Mean rewards and suffix log-ratios, from the leaves up. `rewards` holds one (standardised) score per leaf.

    An answer that was split keeps its own reward; its new children only determine the value of the cut. The answer was
    selected for having finished: averaging it with them (`average_split`, as published) biases the cut and its
    ancestors.
    """
    reward_N = np.zeros(tree.num_nodes)
    logratio_N = np.zeros(tree.num_nodes)
    children = tree.children()
    total_N = np.add.reduceat(tree.token_logratio.astype(np.float64), tree.node_start[:-1])

    def mean(nodes: list[int]) -> tuple[float, float]:
        return float(np.mean(reward_N[nodes])), float(np.mean(total_N[nodes] + logratio_N[nodes]))

    cuts: dict[tuple[int, int], tuple[float, float]] = {}
    for node in reversed(range(tree.num_nodes)):
        length = tree.length(node)
        if tree.node_finish[node] == Finish.OPEN:
            reward_N[node], logratio_N[node] = mean(children[node, length])
            continue
        reward_N[node] = rewards[node]
        for cut in range(1, length):
            if fresh := children.get((node, cut)):
                cuts[node, cut] = mean(fresh)
    if not average_split:
        return Backup(reward_N, logratio_N, mean(children[ROOT, 0]), cuts, False)
    # As published, the tokens after the cut count as one more child of the cut, and the cut represents the answer.
    pairs = {node: (reward_N[node], total_N[node] + logratio_N[node]) for node in children[ROOT, 0]}
    for (node, cut), (reward, logratio) in cuts.items():
        before, after = np.split(tree.logratios(node).astype(np.float64), [cut])
        count = len(children[node, cut])
        averaged = (
            (count * reward + reward_N[node]) / (count + 1),
            (count * logratio + float(after.sum())) / (count + 1),
        )
        cuts[node, cut] = averaged
        pairs[node] = (averaged[0], float(before.sum()) + averaged[1])
    root = np.mean([pairs[node] for node in children[ROOT, 0]], axis=0)
    return Backup(reward_N, logratio_N, (float(root[0]), float(root[1])), cuts, True)


@dataclass(frozen=True, eq=False)
class Targets:
    """Regression targets of the value model. `index` counts tokens of prompt and segments in storage order.

    The prompt's target is the first and that of the last token follows in storage order; then come those of cuts.
    """

    index_X: np.ndarray  # int64, into concatenate(prompt_tokens, tokens)
    value_X: np.ndarray  # float32, in standard deviations of the reward
    depth_X: np.ndarray  # int32, 0 for the prompt
    siblings_X: np.ndarray  # int64, the same number where alternatives of one state are compared; -1: with none


def targets(tree: Tree, means: Backup, zeta: float, every_token: bool = True) -> Targets:
    """Target of a token in a segment that ends in node n: the mean reward below n, minus zeta times the mean
    log-ratio of everything that follows the token. The prompt's last token carries the root's value.

    `every_token=False` keeps the last token of each segment, as published.
    """
    num_prompt = len(tree.prompt_tokens)
    depth_N = tree.depths()
    node_of_T = np.repeat(np.arange(tree.num_nodes), np.diff(tree.node_start))
    up_to_T = np.cumsum(tree.token_logratio.astype(np.float64))
    later_in_segment_T = up_to_T[tree.node_start[1:] - 1][node_of_T] - up_to_T
    value_T = means.reward_N[node_of_T] - zeta * (later_in_segment_T + means.logratio_N[node_of_T])
    for (node, cut), (reward, logratio) in means.cuts.items() if means.is_split_averaged else ():
        before = slice(tree.node_start[node], tree.node_start[node] + cut)
        value_T[before] = reward - zeta * (up_to_T[before][-1] - up_to_T[before] + logratio)
    kept_T = np.arange(len(tree.tokens)) if every_token else tree.node_start[1:] - 1

    index = [np.array([num_prompt - 1]), num_prompt + kept_T]
    value = [np.array([means.root[0] - zeta * means.root[1]]), value_T[kept_T]]
    depth = [np.array([0]), depth_N[node_of_T[kept_T]]]
    # A cut is not the end of a segment: it gets a target of its own, unless the token before it has the same one.
    for (node, cut), (reward, logratio) in ({} if every_token and means.is_split_averaged else means.cuts).items():
        index.append(np.array([num_prompt + tree.node_start[node] + cut - 1]))
        value.append(np.array([reward - zeta * logratio]))
        depth.append(np.array([depth_N[node]]))
    index_X = np.concatenate(index).astype(np.int64)
    return Targets(
        index_X,
        np.concatenate(value).astype(np.float32),
        np.concatenate(depth).astype(np.int32),
        _siblings(tree, index_X),
    )


def _siblings(tree: Tree, index_X: np.ndarray) -> np.ndarray:
    """Numbers of the groups of targets that are compared: those of the children of one state, after as many tokens."""
    # The first one of a token: those of cuts, which come last, belong to another state.
    place_of = {int(index): place for place, index in reversed(list(enumerate(index_X)))}
    siblings_X, number = np.full(len(index_X), -1, dtype=np.int64), 0
    for num_tokens in COMPARED_AFTER:
        for tokens in tree.siblings_after(num_tokens):
            indices = [len(tree.prompt_tokens) + token for token in tokens]
            places = [place_of[index] for index in indices if index in place_of]
            if len(places) > 1:
                siblings_X[places] = number
                number += 1
    return siblings_X


def depth_weights(all_targets: list[Targets], layers: int, cap: float = 4.0) -> np.ndarray:
    """One constant per depth over the whole training set, float64 [layers + 1].

    w_d = mean targets per tree / (layers * mean targets at depth d), at most `cap`: every layer has the same weight in
    the loss. Constants per tree would depend on where its answers happened to end, which biases the values.
    """
    count_D = np.bincount(np.concatenate([t.depth_X for t in all_targets]), minlength=layers + 1)
    return np.minimum(cap, count_D.sum() / (layers * np.maximum(count_D, 1)))

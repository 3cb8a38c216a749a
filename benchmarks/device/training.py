"""Training on packed trees against one sequence per branch: same trees, targets, loss, model and optimiser.

A step is forward, backward and AdamW in bfloat16 with parameters in float32, as `mavis_dist.train.engine` sets it up,
but without DeepSpeed. The batches are on the device before; how long the processor takes to pack them is reported
apart.

The trees are random: their shape is that of the configured ones, and their tokens mean nothing.

Shapes: B sequences, S tokens of the longest, X targets, M objectives, T tokens of a tree.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.device import machine
from benchmarks.device.decoding import make_prompts
from benchmarks.device.models import FIRST_TOKEN, Shape, value_model
from mavis_dist.core.packing import PackedBatch, pack, subtrees
from mavis_dist.core.tree import (
    ROOT,
    Finish,
    Targets,
    Tree,
    TreeBuilder,
    backup,
    depth_weights,
    segment_length,
    targets,
)
from mavis_dist.core.tree import Shape as Branching
from mavis_dist.models.masks import tree_inputs

NUM_TREES = 8
ROOT_SEGMENTS, CHILDREN, LAYERS = 4, 2, 3
PARTS_PER_BATCH = 8  # of trees that are split at the prompt: those of similar length share a batch
WARM_UP, STEPS = 2, 5
LEARNING_RATE, WEIGHT_DECAY, BETAS, CLIPPING = 1e-4, 0.01, (0.9, 0.95), 1.0

Rows = list[tuple[Tree, Targets]]


@dataclass(frozen=True, eq=False)
class Work:
    """What a step of a variant computes."""

    batches: list[PackedBatch]
    is_masked: bool  # False: plain causal attention, which needs no mask

    @property
    def num_tokens(self) -> int:
        """Of its forward passes, with padding."""
        return sum(batch.tokens_BS.numel() for batch in self.batches)

    def to(self, device: torch.device) -> Work:
        moved = [PackedBatch(**{name: x.to(device) for name, x in vars(batch).items()}) for batch in self.batches]
        return replace(self, batches=moved)


def measure(shape: Shape, tokens: int, device: torch.device, say: Callable[[str], None]) -> dict[str, Any]:
    """By variant: tokens of the trees per second, tokens computed for each of them, ms of packing, GiB at most."""
    trees = make_trees(shape.vocabulary, tokens)
    num_tokens = sum(len(tree.prompt_tokens) + len(tree.tokens) for tree, _ in trees)
    figures: dict[str, Any] = {
        "trees": len(trees),
        "tokens": num_tokens,
        "tokens_per_s": {},
        "computed_per_token": {},
        "packing_ms": {},
        "peak_gib": {},
    }
    model = value_model(shape, device, torch.float32).train()
    model.requires_grad_(True).backbone.get_input_embeddings().requires_grad_(False)
    for name, pack_all in {"packed": packed, "packed_split": packed_split, "branches": branch_by_branch}.items():
        machine.free(device)
        started = time.perf_counter()
        work = pack_all(trees)
        figures["packing_ms"][name] = 1000 * (time.perf_counter() - started)
        figures["tokens_per_s"][name] = num_tokens / step_seconds(model, work.to(device), device)
        figures["computed_per_token"][name] = work.num_tokens / num_tokens
        figures["peak_gib"][name] = machine.peak_gib(device)
        say(f"{name}: {figures['tokens_per_s'][name]:.0f} tokens/s")
    return figures


def step_seconds(model: Any, work: Work, device: torch.device) -> float:
    """Seconds of an optimiser step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS)
    total_weight = sum(batch.weight_BX.sum() for batch in work.batches)
    started = 0.0
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            machine.wait(device)
            started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = squared_error(model, work) / total_weight
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIPPING)
        optimiser.step()
        optimiser.zero_grad()
    machine.wait(device)
    return (time.perf_counter() - started) / STEPS


def squared_error(model: Any, work: Work) -> torch.Tensor:
    """Sum over all targets of weight * (V - target)^2, as `mavis_dist.train.fit` has it; a scalar."""
    total = torch.zeros((), device=work.batches[0].value_BX.device)
    for batch in work.batches:
        if work.is_masked:
            inputs = tree_inputs(model.backbone, batch.tokens_BS, batch.positions_BS, batch.mask_BSS)
        else:
            inputs = {"input_ids": batch.tokens_BS, "use_cache": False}
        values_BSM = model(**inputs)
        error_BX = values_BSM[..., 0].gather(1, batch.index_BX) - batch.value_BX
        total = total + (batch.weight_BX * error_BX**2).sum()
    return total


def packed(trees: Rows) -> Work:
    """Whole trees in one batch."""
    return Work([_pack(trees, _weights(trees))], is_masked=True)


def packed_split(trees: Rows) -> Work:
    """Trees split at the prompt, a part for every branch; training puts several branches in a part if they fit."""
    parts = [part for tree, found in trees for part in subtrees(tree, found)]
    parts.sort(key=lambda part: len(part[0].tokens) + len(part[0].prompt_tokens))
    groups = [parts[i : i + PARTS_PER_BATCH] for i in range(0, len(parts), PARTS_PER_BATCH)]
    return Work([_pack(group, _weights(trees)) for group in groups], is_masked=True)


def branch_by_branch(trees: Rows) -> Work:
    """One sequence per answer. Padding follows the tokens, so that causal attention never reaches it."""
    parts = [part for tree, found in trees for part in branches(tree, found)]
    return Work([_pack(parts, _weights(trees))], is_masked=False)


def branches(tree: Tree, found: Targets) -> Rows:
    """Every answer as a tree of one segment; a target that several share stays with the first of them."""
    num_prompt = len(tree.prompt_tokens)
    is_seen_T = np.zeros(num_prompt + len(tree.tokens), dtype=bool)
    parts = []
    for leaf in tree.leaves():
        place = _path(tree, int(leaf))
        number_T = np.full(len(is_seen_T), -1)  # of each token in the branch
        number_T[place] = np.arange(len(place))
        is_chosen_X = (number_T[found.index_X] >= 0) & ~is_seen_T[found.index_X]
        is_seen_T[place] = True
        answer = place[num_prompt:] - num_prompt
        branch = replace(
            tree,
            node_parent=np.array([ROOT], dtype=np.int32),
            node_cut=np.array([0], dtype=np.int32),
            node_start=np.array([0, len(answer)], dtype=np.int32),
            node_finish=tree.node_finish[[leaf]],
            tokens=tree.tokens[answer],
            token_logratio=tree.token_logratio[answer],
        )
        columns = (x[is_chosen_X] for x in (found.value_X, found.depth_X, found.siblings_X))
        chosen = Targets(number_T[found.index_X[is_chosen_X]], *columns)
        parts.append((branch, chosen))
    return parts


def _path(tree: Tree, node: int) -> np.ndarray:
    """Indices of prompt and answer down to a node, in storage order; no answer of the tree was split."""
    num_prompt = len(tree.prompt_tokens)
    parts: list[np.ndarray] = []
    while node != ROOT:
        parts.append(num_prompt + np.arange(tree.node_start[node], tree.node_start[node + 1]))
        node = int(tree.node_parent[node])
    return np.concatenate([np.arange(num_prompt), *parts[::-1]])


def make_trees(vocabulary: int, max_tokens: int) -> Rows:
    """Trees with random tokens, segments of random length and random rewards, and a target at every token."""
    source = np.random.default_rng(0)
    branching = Branching(ROOT_SEGMENTS, CHILDREN, LAYERS, max_tokens)
    trees = []
    for prompt in make_prompts(NUM_TREES, vocabulary):
        tree = _grow(source, branching, prompt, vocabulary)
        rewards = {int(leaf): source.normal() for leaf in tree.leaves()}
        trees.append((tree, targets(tree, backup(tree, rewards), zeta=0.0)))
    return trees


def _grow(source: np.random.Generator, shape: Branching, prompt: Sequence[int], vocabulary: int) -> Tree:
    builder = TreeBuilder("", "", 0, list(prompt))
    states = [(ROOT, 0)]  # nodes of the last layer, with the length of their segment and of the answer down to it
    ends = {ROOT: 0}
    for layer in range(shape.layers):
        following = []
        for parent, cut in states:
            for _ in range(shape.children if layer else shape.root):
                length = segment_length(shape, layer, shape.max_tokens - ends[parent], source.random())
                tokens = source.integers(FIRST_TOKEN, vocabulary, length).tolist()
                finish = Finish.LENGTH if layer == shape.layers - 1 else Finish.OPEN
                node = builder.add(parent, cut, tokens, [0.0] * length, finish)
                ends[node] = ends[parent] + length
                following.append((node, length))
        states = following
    return builder.build()


def _weights(trees: Rows) -> np.ndarray:
    return depth_weights([found for _, found in trees], LAYERS)


def _pack(rows: Rows, weight_by_depth: np.ndarray) -> PackedBatch:
    return pack([tree for tree, _ in rows], [found for _, found in rows], weight_by_depth)

"""The references for growing trees and training on them are equivalent to the fast implementations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.common.interleave import ratio, take_turns
from benchmarks.common.trees import Question, repetition_questions
from benchmarks.rollout.engine_trees import EncodingCounter, num_prefix_tokens
from benchmarks.rollout.naive import PlainGrower
from benchmarks.training import naive
from benchmarks.training.packed_trees import token_forwards
from mavis_dist.core.packing import visibility
from mavis_dist.core.tree import ROOT, Finish, Shape, Tree
from mavis_dist.decode import Engine, Request, SamplingParams
from mavis_dist.store.shards import Labels
from mavis_dist.train.data import TreeSet, tree_set
from mavis_dist.train.fit import squared_error
from mavis_dist.types import Prompt, RewardScale
from tests.fakes import EOS, tiny_base, tiny_value

BASE = tiny_base(seed=1, eos_boost=1.0)  # some answers end, some are cut
SHAPE = Shape(root=3, children=2, layers=3, max_tokens=12)
QUESTIONS = [Question(Prompt(str(i), ""), tuple(range(5, 8 + i))) for i in range(12)]


def plain_trees(shape: Shape = SHAPE, top_k: int = 40, per_child: bool = False) -> list[Tree]:
    grower = PlainGrower(BASE, shape, top_k, seed=0, per_child=per_child)
    return [grower.grow(question) for question in QUESTIONS]


def labelled(trees: list[Tree]) -> TreeSet:
    source = np.random.default_rng(0)
    pairs = [(tree, Labels(tree.prompt_id, tree.leaves(), source.normal(size=len(tree.leaves())))) for tree in trees]
    return tree_set(pairs, RewardScale(0.0, 1.0), zeta=0.0, layers=SHAPE.layers, every_token=False)


TREES = plain_trees()


def fresh(tree: Tree, node: int, cut: int) -> list[int]:
    """The children that continue a node after `cut` of its tokens."""
    return [n for n in range(tree.num_nodes) if (tree.node_parent[n], tree.node_cut[n]) == (node, cut)]


@pytest.mark.parametrize("trees", [TREES, plain_trees(per_child=True)], ids=["per node", "per child"])
def test_plain_trees_follow_the_growth_rule(trees: list[Tree]) -> None:
    num_splits = 0
    for tree in trees:
        depth_N = tree.depths()
        assert len(fresh(tree, ROOT, 0)) == SHAPE.root
        for node in range(tree.num_nodes):
            segment, finish = tree.segment(node).tolist(), tree.node_finish[node]
            assert segment.count(EOS) == (finish == Finish.STOP)
            assert EOS not in segment[:-1]
            assert tree.answer(node)[0] != EOS, "an answer has at least one token"
            assert (finish == Finish.LENGTH) == (len(tree.answer(node)) == SHAPE.max_tokens and segment[-1] != EOS)
            below = [n for n in range(tree.num_nodes) if tree.node_parent[n] == node]
            if finish == Finish.OPEN:
                assert below == fresh(tree, node, len(segment))
            is_split = finish == Finish.STOP and depth_N[node] == 1 and len(segment) > 1
            assert len(below) == (SHAPE.children if finish == Finish.OPEN or is_split else 0)
            assert len({int(tree.node_cut[n]) for n in below}) <= 1, "all children start at one place"
            assert len({tree.length(n) for n in below if tree.node_finish[n] != Finish.STOP}) <= 1, "at one length"
            num_splits += is_split
        assert depth_N.max() <= SHAPE.layers
    assert num_splits > 0


def test_plain_trees_are_split_only_with_dynamic_split() -> None:
    trees = plain_trees(Shape(3, 2, 3, 12, dynamic_split=False))
    assert not any(tree.is_split(node) for tree in trees for node in range(tree.num_nodes))


def test_plain_trees_follow_the_policy_of_the_engine() -> None:
    """With one candidate per token there is only one answer, and all paths are prefixes of it."""
    requests = [Request(q.prompt.id, q.tokens, params=SamplingParams(12, top_k=1)) for q in QUESTIONS]
    for tree, [choice] in zip(plain_trees(top_k=1), Engine(BASE).generate(requests), strict=True):
        for leaf in tree.leaves():
            assert tree.answer(int(leaf)).tolist() == choice.tokens


def test_the_reference_prefills_every_prefix() -> None:
    encoded = 0

    def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal encoded
        if kwargs["input_ids"].shape[1] > 1:  # decode steps have one token per row
            encoded += kwargs["input_ids"].numel()

    hook = BASE.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        trees = plain_trees()
    finally:
        hook.remove()
    assert encoded == sum(map(num_prefix_tokens, trees))


def test_prefilled_tokens_of_the_engine_are_counted() -> None:
    engine: Any = Engine(BASE)
    engine._base = counter = EncodingCounter(engine._base)
    engine.generate([Request(str(i), (5, 6, 7, 8), params=SamplingParams(3, seed=i)) for i in range(4)])
    assert counter.num_tokens == 3, (
        "the prompt once, except for its last token, which every row computes in its first step"
    )


def test_the_sequence_of_a_node_is_what_its_last_token_attends_to() -> None:
    for tree in TREES:
        tokens_S = np.concatenate([tree.prompt_tokens, tree.tokens])
        _, mask_SS = visibility(tree)
        for index in range(len(tree.prompt_tokens) - 1, len(tokens_S)):
            assert naive.sequence(tree, index).tolist() == tokens_S[mask_SS[index]].tolist()


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_packed_trees_and_single_sequences_have_the_same_loss(size: int) -> None:
    trees, model, indices = labelled(TREES), tiny_value(3), [1, 4, 7]
    batches = list(naive.batches(naive.examples(trees, indices), size, seed=2))
    plain = sum(float(naive.squared_error(model, batch)) for batch in batches)
    assert plain == pytest.approx(float(squared_error(model, trees, indices, "cpu")), rel=1e-5)
    assert sum(example.weight for batch in batches for example in batch) == pytest.approx(trees.total_weight(indices))


def test_packed_trees_and_single_sequences_have_the_same_gradient() -> None:
    trees, model, indices = labelled(TREES), tiny_value(3).requires_grad_(True), [0, 2]
    packed = torch.autograd.grad(squared_error(model, trees, indices, "cpu"), model.heads.weight)[0]
    [batch] = naive.batches(naive.examples(trees, indices), 1000, seed=2)
    plain = torch.autograd.grad(naive.squared_error(model, batch), model.heads.weight)[0]
    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-4)


def test_token_forwards_count_every_prefix_and_the_padding() -> None:
    trees = labelled(TREES[:2])
    tokens = token_forwards(trees, trees_per_step=2, seed=0)
    sizes = [len(tree.prompt_tokens) + len(tree.tokens) for tree in TREES[:2]]
    assert (tokens["packed"], tokens["packed_padded"]) == (sum(sizes), 2 * max(sizes))
    ends = [index + 1 for target in trees.targets for index in target.index_X]  # in storage order, so at least as long
    lengths = [len(example.tokens) for example in naive.examples(trees, range(2))]
    assert tokens["per_node"] == sum(lengths) < sum(ends)
    assert tokens["per_node_padded"] >= tokens["per_node"]


def test_variants_alternate_and_are_compared_within_a_repetition() -> None:
    order: list[tuple[str, int]] = []

    def variant(name: str) -> Any:
        return lambda repetition: order.append((name, repetition)) or sum(range(10_000))

    speeds = take_turns({name: variant(name) for name in "ab"}, 3)
    assert order == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert {name: len(found) for name, found in speeds.per_s.items()} == {"a": 3, "b": 3}
    assert ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == 3.0, "not 4 / 1, the ratio of the medians"


def test_every_repetition_has_its_own_questions() -> None:
    assert [q.prompt.id for q in repetition_questions(QUESTIONS, 1, 5)] == ["5", "6", "7", "8", "9"]
    assert [q.prompt.id for q in repetition_questions(QUESTIONS, 2, 5)] == ["10", "11", "0", "1", "2"]

"""What is counted is what the stages do."""

from __future__ import annotations

import numpy as np
import pytest

from mavis_dist import run_state
from mavis_dist.core.tree import Shape, segment_length
from mavis_dist.decode import engine
from mavis_dist.evaluate import base_answers, sweep
from mavis_dist.rollout import labels
from mavis_dist.sections import TreeShape
from mavis_dist.sizing import memory, workload
from mavis_dist.sizing.simulate import Gang
from mavis_dist.sizing.workload import Lengths, num_leaves, num_nodes, num_points, tree_tokens
from mavis_dist.train import checkpoints, data


def test_constants_are_those_of_the_stages() -> None:
    assert run_state.BATCH_SIZE == workload.BATCH_SIZE
    assert base_answers.BATCH == workload.LIMIT_BATCH
    assert run_state.SCORED_TOGETHER == workload.SCORED_TOGETHER
    assert labels.PREFIX_TOKENS == workload.PREFIX_TOKENS
    assert engine.PREFILL_TOKENS == memory.PREFILL_TOKENS
    assert data.WHOLE_TREE_TOKENS == memory.TREE_PART
    assert Gang.checkpoint_every_s == checkpoints.EVERY_S


@pytest.mark.parametrize(("num", "steps"), [(1, 3), (2, 3), (3, 6)])
def test_the_grid_has_as_many_points(num: int, steps: int) -> None:
    assert num_points(num, steps) == len(sweep.grid([f"o{number}" for number in range(num)], steps))


def test_a_tree_has_as_many_segments_and_tokens_as_the_growth_rule_gives_it() -> None:
    shape, max_tokens = TreeShape(root=3, children=2, layers=4), 128
    assert (num_nodes(shape), num_leaves(shape)) == (3 + 6 + 12 + 24, 24)
    rule, random = Shape(3, 2, 4, max_tokens), np.random.default_rng(0)

    def grown(layer: int, left: int) -> int:
        """Tokens below a state of the tree."""
        if layer == 4 or left == 0:
            return 0
        count = 3 if layer == 0 else 2
        length = segment_length(rule, layer, left, random.random())
        return sum(length + grown(layer + 1, left - length) for _ in range(count))

    mean = np.mean([grown(0, max_tokens) for _ in range(400)])
    assert tree_tokens(shape, max_tokens, Lengths()) == pytest.approx(mean, rel=0.1)

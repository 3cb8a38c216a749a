"""Heads in closed form: the exact minimum of the loss, from the parent, with the penalty that held-out trees prefer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mavis_dist.core.tree import depth_weights
from mavis_dist.models.value import ValueModel
from mavis_dist.train import fit, heads
from mavis_dist.train.data import TreeSet
from mavis_dist.train.heads import best_head, errors, fold_errors, head_of, minimum, set_head
from mavis_dist.train.worker_group import WorkerGroup
from tests.fakes import tiny_base, tiny_states
from tests.unit.train.test_metrics import trees_of

BASE = tiny_base()


def loss(model: ValueModel, trees: TreeSet, sibling_weight: float) -> float:
    """As a step of the other fit has it."""
    indices = list(range(len(trees)))
    with torch.no_grad():
        found = fit.errors(model, trees, indices, "cpu")
    return float(
        found.squared / trees.total_weight(indices) + sibling_weight * found.sibling / trees.num_siblings(indices)
    )


@pytest.mark.parametrize("sibling_weight", [0.0, 2.0])
def test_the_loss_is_that_of_other_value_models(sibling_weight: float) -> None:
    trees, model = trees_of(12), tiny_states(BASE, 3)
    whole = errors(model, trees, range(12))
    assert whole.loss(sibling_weight).at(head_of(model)) == pytest.approx(loss(model, trees, sibling_weight), rel=1e-5)


def test_no_head_has_a_smaller_loss() -> None:
    trees, model = trees_of(12), tiny_states(BASE, 3)
    best_J = minimum(errors(model, trees, range(12)), head_of(model), 1e-6, 1.0)
    set_head(model, best_J)
    least = loss(model, trees, 1.0)
    for seed in range(5):
        torch.manual_seed(seed)
        set_head(model, best_J + 0.02 * torch.randn_like(best_J))
        assert loss(model, trees, 1.0) > least


def test_a_strong_penalty_leaves_the_start_and_a_weak_one_the_smallest_loss() -> None:
    trees, model = trees_of(12), tiny_states(BASE, 3)
    whole, start_J = errors(model, trees, range(12)), head_of(model)
    distances = [float((minimum(whole, start_J, ridge, 0.0) - start_J)[:-1].norm()) for ridge in (1e9, 1.0, 1e-3)]
    assert distances[0] < 1e-6 < distances[1] < distances[2]


def test_the_folds_together_are_all_trees() -> None:
    trees, model = trees_of(13), tiny_states(BASE, 3)
    folds = fold_errors(model, trees, WorkerGroup(), "kind")
    assert folds is not None
    assert len(folds) == heads.FOLDS
    total = sum(float(fold.plain.weight) for fold in folds)
    assert total == pytest.approx(trees.total_weight(list(range(13))), rel=1e-6)
    assert sum(float(fold.sibling.weight) for fold in folds) == trees.num_siblings(list(range(13)))


def taught(count: int, noise: float, seed: int = 0) -> tuple[TreeSet, ValueModel]:
    """Trees whose targets are the values of a hidden head, with noise."""
    trees, teacher = trees_of(count), tiny_states(BASE, 17)
    rng = np.random.default_rng(seed)
    found = fit.predict(teacher, trees, "cpu").pred_X
    parts = np.split(found, np.cumsum([len(t.index_X) for t in trees.targets])[:-1])
    targets = [
        replace(t, value_X=(part + noise * rng.normal(size=len(part))).astype(np.float32))
        for t, part in zip(trees.targets, parts, strict=True)
    ]
    return TreeSet(trees.trees, targets, depth_weights(targets, 2)), teacher


def test_a_head_is_found_again_and_noise_asks_for_a_stronger_penalty() -> None:
    chosen = []
    for noise in (0.0, 3.0):
        trees, _ = taught(40, noise)
        model = tiny_states(BASE, 3, scale=0.0)
        folds = fold_errors(model, trees, WorkerGroup(), "kind")
        assert folds is not None
        head_J, metrics = best_head(folds, head_of(model), 0.5)
        chosen.append(min(metrics, key=lambda entry: entry["held_out_loss"])["ridge"])
        set_head(model, head_J)
        r2 = fit.validate(model, taught(20, 0.0)[0], "cpu")["explained_variance"]
        assert r2 > (0.99 if noise == 0 else 0.3)
    assert chosen[0] < chosen[1]


def test_training_starts_from_the_parent() -> None:
    """With nothing to gain, the parent's head stays."""
    trees, teacher = taught(40, 0.0)
    folds = fold_errors(teacher, trees, WorkerGroup(), "kind")
    assert folds is not None
    head_J, metrics = best_head(folds, head_of(teacher), 0.0)
    torch.testing.assert_close(head_J, head_of(teacher), atol=1e-4, rtol=1e-4)
    assert metrics[0]["loss"] < 1e-6


def test_one_tree_gives_the_strongest_penalty() -> None:
    trees, model = trees_of(1), tiny_states(BASE, 3, scale=0.0)
    folds = fold_errors(model, trees, WorkerGroup(), "kind")
    assert folds is not None
    head_J, metrics = best_head(folds, head_of(model), 0.0)
    assert "held_out_loss" not in metrics[0]
    torch.testing.assert_close(head_J, minimum(folds[0], head_of(model), heads.RIDGES[0], 0.0))


def test_a_stop_ends_the_fit() -> None:
    assert fold_errors(tiny_states(BASE, 3), trees_of(2), WorkerGroup(wants_stop=lambda: True), "kind") is None

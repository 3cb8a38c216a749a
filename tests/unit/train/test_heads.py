"""Heads in closed form: the exact minimum of the loss, from the parent, with the penalty that held-out trees prefer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mavis_dist.config import parse
from mavis_dist.core.tree import Shape, Tree, depth_weights
from mavis_dist.decode import Engine
from mavis_dist.models import value
from mavis_dist.models.load import load_base
from mavis_dist.models.value import ValueModel
from mavis_dist.rollout.trees import Sampling, TreeGrower
from mavis_dist.store import layout, values
from mavis_dist.store.files import Store
from mavis_dist.store.layout import label_folder, rollout_folder
from mavis_dist.store.shards import Labels, write_labels, write_trees
from mavis_dist.train import fit, heads
from mavis_dist.train.data import Fit, TreeSet
from mavis_dist.train.heads import best_head, errors, fold_errors, head_of, minimum, set_head
from mavis_dist.train.worker_group import WorkerGroup
from mavis_dist.types import Policy, Prompt, RewardScale, Stopped
from tests import tiny
from tests.fakes import tiny_base, tiny_states
from tests.unit.train.test_metrics import trees_of

BASE = tiny_base()


def loss(model: ValueModel, trees: TreeSet, sibling_weight: float) -> float:
    """As a step of the other fit has it."""
    indices = list(range(len(trees)))
    with torch.no_grad():
        found = fit.errors(model, [trees], indices, "cpu")
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
    assert len(folds) == heads.FOLDS
    total = sum(float(fold.plain.weight) for fold in folds)
    assert total == pytest.approx(trees.total_weight(list(range(13))), rel=1e-6)
    assert sum(float(fold.sibling.weight) for fold in folds) == trees.num_siblings(list(range(13)))


def taught(count: int, noise: float, seed: int = 0) -> tuple[TreeSet, ValueModel]:
    """Trees whose targets are the values of a hidden head, with noise."""
    trees, teacher = trees_of(count), tiny_states(BASE, 17)
    rng = np.random.default_rng(seed)
    found = fit.predict(teacher, [trees], "cpu")[0].pred_X
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
        head_J, metrics = best_head(folds, head_of(model), 0.5)
        chosen.append(min(metrics, key=lambda entry: entry["held_out_loss"])["ridge"])
        set_head(model, head_J)
        r2 = fit.validate(model, [taught(20, 0.0)[0]], "cpu")[0]["explained_variance"]
        assert r2 > (0.99 if noise == 0 else 0.3)
    assert chosen[0] < chosen[1]


def test_training_starts_from_the_parent() -> None:
    """With nothing to gain, the parent's head stays."""
    trees, teacher = taught(40, 0.0)
    folds = fold_errors(teacher, trees, WorkerGroup(), "kind")
    head_J, metrics = best_head(folds, head_of(teacher), 0.0)
    torch.testing.assert_close(head_J, head_of(teacher), atol=1e-4, rtol=1e-4)
    assert metrics[0]["loss"] < 1e-6


def test_one_tree_gives_the_strongest_penalty() -> None:
    trees, model = trees_of(1), tiny_states(BASE, 3, scale=0.0)
    folds = fold_errors(model, trees, WorkerGroup(), "kind")
    head_J, metrics = best_head(folds, head_of(model), 0.0)
    assert "held_out_loss" not in metrics[0]
    torch.testing.assert_close(head_J, minimum(folds[0], head_of(model), heads.RIDGES[0], 0.0))


def test_a_stop_ends_the_fit() -> None:
    with pytest.raises(Stopped):
        fold_errors(tiny_states(BASE, 3), trees_of(2), WorkerGroup(wants_stop=lambda: True), "kind")


# --- from stored trees to a stored model -------------------------------------------------------------------------


def test_a_stored_model_has_its_figures_and_a_later_iteration_starts_from_it(tmp_path: Path) -> None:
    base = load_base(str(tiny.write_base(tmp_path, eos_weight=1.0)))
    config = parse(
        {
            "run": "run",
            "storage": str(tmp_path / "runs"),
            "objectives": {"kind": {"reward": "sentiment"}},
            "base": {"model": base.name, "dtype": "float32"},
            "rollout": {"first": {"root": 2, "layers": 2}, "later": {"root": 2, "layers": 2}, "max_tokens": 12},
            "value": {"kind": "states", "layers": 1},
        }
    )
    store = Store(config.storage, "run")
    grower = TreeGrower(Engine(base), Shape(2, 2, 2, 12), Policy(), Sampling(), 0)
    trees = sorted(grower.grow([Prompt(f"p{i}", "") for i in range(24)], [[5 + i, 6] for i in range(24)]), key=id_of)
    for policy in (Policy(), Policy("kind", 1)):
        write_trees(store, f"{rollout_folder(policy)}/part-00000.parquet", trees)
        scores = [Labels(t.prompt_id, t.leaves(), np.sin(1.0 * t.leaves())) for t in trees]
        write_labels(store, f"{label_folder(policy, 'kind')}/part-00000.parquet", scores)
    held_out = frozenset(f"p{i}" for i in range(8))

    weights = []
    for iteration, parent in ((0, None), (1, 0)):
        heads.train(Fit(("kind",), iteration, parent, (RewardScale(0.0, 1.0),), held_out), config, store, WorkerGroup())
        folder = values.fetch(store, "kind", iteration)
        model, card = value.load(folder, base=base)
        assert (card.state_layer, card.iteration) == (1, iteration)
        assert card.base_fingerprint == base.fingerprint
        lines = [json.loads(line) for line in (folder / layout.METRICS_FILE).read_text().splitlines()]
        assert [line["loss"] for line in lines[:-1]] == sorted((line["loss"] for line in lines[:-1]), reverse=True)
        assert lines[-1]["explained_variance"] == card.r2
        weights.append(model.heads.weight.clone())
    assert card.parent == layout.value_folder("kind", 0)
    assert not torch.equal(*weights)
    assert float(weights[0].abs().max()) > 0


def id_of(tree: Tree) -> str:
    return tree.prompt_id

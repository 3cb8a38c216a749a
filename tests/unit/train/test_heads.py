"""Heads in closed form: the exact minimum of the loss, from the parent, with the penalty that held-out trees prefer.

Shapes: M objectives, J hidden size + 1.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mavis_dist.config import parse
from mavis_dist.core.tree import Shape, Tree, depth_weights
from mavis_dist.decode import Engine, LocalGuide
from mavis_dist.decode.load_guide import load_models
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
from mavis_dist.train.heads import best_heads, errors, fold_errors, heads_of, minimum, set_heads
from mavis_dist.train.journal import FIGURES, Metrics, metrics_of
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
    whole = errors(model, [trees], range(12))
    found = float(whole.loss(sibling_weight).at(heads_of(model)))
    assert found == pytest.approx(loss(model, trees, sibling_weight), rel=1e-5)


def test_no_head_has_a_smaller_loss() -> None:
    trees, model = trees_of(12), tiny_states(BASE, 3)
    best_JM = minimum(errors(model, [trees], range(12)), heads_of(model), 1e-6, 1.0)
    set_heads(model, best_JM)
    least = loss(model, trees, 1.0)
    for seed in range(5):
        torch.manual_seed(seed)
        set_heads(model, best_JM + 0.02 * torch.randn_like(best_JM))
        assert loss(model, trees, 1.0) > least


def test_a_strong_penalty_leaves_the_start_and_a_weak_one_the_smallest_loss() -> None:
    trees, model = trees_of(12), tiny_states(BASE, 3)
    whole, start_JM = errors(model, [trees], range(12)), heads_of(model)
    distances = [float((minimum(whole, start_JM, ridge, 0.0) - start_JM)[:-1].norm()) for ridge in (1e9, 1.0, 1e-3)]
    assert distances[0] < 1e-6 < distances[1] < distances[2]


def test_the_folds_together_are_all_trees() -> None:
    trees, model = trees_of(13), tiny_states(BASE, 3)
    folds = fold_errors(model, [trees], WorkerGroup(), "kind")
    assert len(folds) == heads.FOLDS
    total = sum(float(fold.plain.weight) for fold in folds)
    assert total == pytest.approx(trees.total_weight(list(range(13))), rel=1e-6)
    assert sum(float(fold.sibling.weight) for fold in folds) == trees.num_siblings(list(range(13)))


def taught(count: int, noise: float, seed: int = 0) -> tuple[TreeSet, ValueModel]:
    """Trees whose targets are the values of a hidden head, with noise."""
    trees, teacher = trees_of(count), tiny_states(BASE, 17)
    rng = np.random.default_rng(seed)
    found = fit.predict(teacher, [trees])[0].pred_X
    parts = np.split(found, np.cumsum([len(t.index_X) for t in trees.targets])[:-1])
    targets = [
        replace(t, value_X=(part + noise * rng.normal(size=len(part))).astype(np.float32))
        for t, part in zip(trees.targets, parts, strict=True)
    ]
    return TreeSet(trees.trees, targets, depth_weights(targets, 2)), teacher


def chosen_ridge(objective: str, metrics: list[Metrics]) -> float:
    return min(metrics_of(objective, metrics), key=lambda entry: entry["held_out_loss"])["ridge"]


def test_a_head_is_found_again_and_noise_asks_for_a_stronger_penalty() -> None:
    chosen = []
    for noise in (0.0, 3.0):
        trees, _ = taught(40, noise)
        model = tiny_states(BASE, 3, scale=0.0)
        folds = fold_errors(model, [trees], WorkerGroup(), "kind")
        head_JM, metrics = best_heads(folds, heads_of(model), 0.5, ("kind",))
        chosen.append(chosen_ridge("kind", metrics))
        set_heads(model, head_JM)
        r2 = fit.validate(model, [taught(20, 0.0)[0]])[0]["explained_variance"]
        assert r2 > (0.99 if noise == 0 else 0.3)
    assert chosen[0] < chosen[1]


def test_several_objectives_have_the_heads_and_penalties_that_each_has_alone() -> None:
    """And one pass of the backbone over the trees."""
    names, trees = ("clean", "noisy"), [taught(40, noise)[0] for noise in (0.0, 3.0)]
    model, passes = tiny_states(BASE, 3, num_objectives=2), list[int]()

    def fitted(objectives: slice) -> tuple[torch.Tensor, list[Metrics], int]:
        passes.clear()
        folds = fold_errors(model, trees[objectives], WorkerGroup(), "")
        return *best_heads(folds, heads_of(model)[:, objectives], 0.5, names[objectives]), len(passes)

    hook = model.backbone.register_forward_hook(lambda *_: passes.append(1))
    head_JM, metrics, num_passes = fitted(slice(2))
    chosen = []
    for m, name in enumerate(names):
        alone_JM, expected, num_alone = fitted(slice(m, m + 1))
        torch.testing.assert_close(head_JM[:, m : m + 1], alone_JM, atol=1e-6, rtol=1e-6)
        for line, other in zip(metrics_of(name, metrics), metrics_of(name, expected), strict=True):
            assert line == pytest.approx(other, rel=1e-6, abs=1e-9)
        assert num_passes == num_alone > 0
        chosen.append(chosen_ridge(name, metrics))
    hook.remove()
    assert chosen[0] < chosen[1]
    set_heads(model, head_JM)
    torch.testing.assert_close(heads_of(model), head_JM, atol=1e-5, rtol=1e-5)


def test_training_starts_from_the_parent() -> None:
    """With nothing to gain, the parent's head stays."""
    trees, teacher = taught(40, 0.0)
    folds = fold_errors(teacher, [trees], WorkerGroup(), "kind")
    head_JM, metrics = best_heads(folds, heads_of(teacher), 0.0, ("kind",))
    torch.testing.assert_close(head_JM, heads_of(teacher), atol=1e-4, rtol=1e-4)
    assert metrics[0][FIGURES]["kind"]["loss"] < 1e-6


def test_one_tree_gives_the_strongest_penalty() -> None:
    trees, model = trees_of(1), tiny_states(BASE, 3, scale=0.0)
    folds = fold_errors(model, [trees], WorkerGroup(), "kind")
    head_JM, metrics = best_heads(folds, heads_of(model), 0.0, ("kind",))
    assert "held_out_loss" not in metrics[0][FIGURES]["kind"]
    torch.testing.assert_close(head_JM, minimum(folds[0], heads_of(model), heads.RIDGES[0], 0.0))


def test_a_stop_ends_the_fit() -> None:
    with pytest.raises(Stopped):
        fold_errors(tiny_states(BASE, 3), [trees_of(2)], WorkerGroup(wants_stop=lambda: True), "kind")


# --- from stored trees to a stored model -------------------------------------------------------------------------


def test_stored_objectives_share_a_model_and_a_later_iteration_starts_from_its_own_head(tmp_path: Path) -> None:
    base, names = load_base(str(tiny.write_base(tmp_path, eos_weight=1.0))), ("kind", "brief")
    config = parse(
        {
            "run": "run",
            "storage": str(tmp_path / "runs"),
            "objectives": {name: {"reward": "sentiment"} for name in names},
            "base": {"model": base.name, "dtype": "float32"},
            "rollout": {"first": {"root": 2, "layers": 2}, "later": {"root": 2, "layers": 2}, "max_tokens": 12},
            "value": {"kind": "states", "layers": 1},
        }
    )
    store = Store(config.storage, "run")
    grower = TreeGrower(Engine(base), Shape(2, 2, 2, 12), Policy(), Sampling(), 0)
    trees = sorted(grower.grow([Prompt(f"p{i}", "") for i in range(24)], [[5 + i, 6] for i in range(24)]), key=id_of)
    for policy, labelled in ((Policy(), names), (Policy("brief", 1), ("brief",))):
        write_trees(store, f"{rollout_folder(policy)}/part-00000.parquet", trees)
        store.finish(rollout_folder(policy), {})
        for k, name in enumerate(labelled, 1):
            scores = [Labels(t.prompt_id, t.leaves(), np.sin(1.0 * k * t.leaves())) for t in trees]
            write_labels(store, f"{label_folder(policy, name)}/part-00000.parquet", scores)
            store.finish(label_folder(policy, name), {})
    held_out, scale = frozenset(f"p{i}" for i in range(8)), RewardScale(0.0, 1.0)

    heads.train(Fit(names, 0, None, (scale, scale), held_out), config, store, WorkerGroup())
    folders = {name: values.fetch(store, name, 0) for name in names}
    models = load_models(folders, base=base)
    assert len({id(model) for model, _ in models.values()}) == 1
    assert len(LocalGuide(models)._trunks) == 1
    card = value.load_card(folders["brief"])
    r2 = [check_metrics(store, name, 0) for name in names]
    assert (card.objectives, card.state_layer, card.r2) == (names, 1, pytest.approx(np.mean(r2)))
    assert card.base_fingerprint == base.fingerprint

    first, _ = value.load_objective(folders["brief"], "brief", base=base)
    assert float(first.heads.weight.abs().max()) > 0
    later = Fit(("brief",), 1, 0, (scale,), held_out)
    start, layer = heads.initial_model(later, config, store)
    assert layer == 1
    assert torch.equal(start.heads.weight, first.heads.weight)
    heads.train(later, config, store, WorkerGroup())
    second, card = value.load(values.fetch(store, "brief", 1), base=base)
    assert (card.iteration, card.parent) == (1, layout.value_folder("brief", 0))
    assert card.r2 == check_metrics(store, "brief", 1)
    assert not torch.equal(second.heads.weight, first.heads.weight)


def check_metrics(store: Store, name: str, iteration: int) -> float:
    """Losses fall with the penalty; returns R² of the validation trees, which comes last."""
    content = store.read_bytes(f"{layout.value_folder(name, iteration)}/{layout.METRICS_FILE}")
    *lines, last = [json.loads(line) for line in content.decode().splitlines()]
    assert [line["loss"] for line in lines] == sorted((line["loss"] for line in lines), reverse=True)
    assert all("held_out_loss" in line for line in lines)
    r2: float = last["explained_variance"]
    return r2


def id_of(tree: Tree) -> str:
    return tree.prompt_id

"""Metrics of predictions whose metrics are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mavis_dist.core.siblings import MIN_TREES
from mavis_dist.core.tree import Finish, Tree, TreeBuilder
from mavis_dist.models.value import ValueModel
from mavis_dist.store.shards import Labels
from mavis_dist.train import fit
from mavis_dist.train.checkpoints import State
from mavis_dist.train.data import TreeSet, tree_set
from mavis_dist.train.journal import Metrics, metrics_of
from mavis_dist.train.metrics import Predictions, calibration, ceilings, sibling_tests, squared_error, summary
from mavis_dist.train.worker_group import WorkerGroup
from mavis_dist.types import RewardScale
from tests.fakes import tiny_value

RANDOM = np.random.default_rng(0)
ENDS = ("", "_low", "_high")  # of the names of a figure and its bounds


def predictions(pred: np.ndarray, target: np.ndarray, depth: np.ndarray | None = None) -> Predictions:
    weight = RANDOM.uniform(0.5, 2.0, size=len(pred))
    return Predictions(pred, target, weight, np.ones(len(pred), dtype=int) if depth is None else depth)


def test_perfect_mean_and_useless_predictions() -> None:
    target = RANDOM.normal(size=5000)
    assert predictions(target, target).r2 == pytest.approx(1.0)
    p = predictions(np.zeros(5000), target)
    mean = np.average(target, weights=p.weight_X)
    assert Predictions(np.full(5000, mean), target, p.weight_X, p.depth_X).r2 == pytest.approx(0.0)
    assert predictions(-target, target).r2 == pytest.approx(-3.0, abs=0.05)


def test_errors_are_weighted() -> None:
    p = Predictions(np.array([1.0, 0.0]), np.array([0.0, 0.0]), np.array([3.0, 1.0]), np.array([1, 1]))
    assert squared_error(p) == pytest.approx(0.75)


def test_calibration_finds_slope_intercept_and_gap() -> None:
    pred = RANDOM.normal(size=20000)
    calibrated = calibration(predictions(pred, pred + RANDOM.normal(size=20000)))
    assert calibrated["slope"] == pytest.approx(1.0, abs=0.03)
    assert calibrated["gap"] < 0.04
    overconfident = calibration(predictions(pred, 0.5 * pred + 0.3))
    assert overconfident["slope"] == pytest.approx(0.5)
    assert overconfident["intercept"] == pytest.approx(0.3)
    assert overconfident["gap"] > 0.3


def test_depths_have_separate_figures() -> None:
    target, depth = RANDOM.normal(size=4000), np.repeat([0, 1, 2, 2], 1000)
    pred = np.where(depth == 2, target, 0.0)
    figures = summary(predictions(pred, target, depth))
    assert figures["explained_variance/depth_1"] == pytest.approx(0.0, abs=0.01)
    assert figures["explained_variance/depth_2"] == pytest.approx(1.0)
    assert "explained_variance/depth_0" not in figures
    assert {"validation_error", "explained_variance", "calibration/slope"} <= figures.keys()
    assert summary(predictions(np.array([]), np.array([]))) == {}


# --- figures that need siblings ----------------------------------------------------------------------------------


def random_tree(number: int, children: int = 3) -> Tree:
    """Two layers: one inner child of the prompt and leaves of two tokens, one of them cut."""
    rng = np.random.default_rng(number)
    builder = TreeBuilder(f"p{number}", "base", number, [1, 5, 7])

    def add(parent: int, cut: int, finish: Finish) -> int:
        return builder.add(parent, cut, rng.integers(3, 30, 2).tolist(), [0.0, 0.0], finish)

    tops = [add(-1, 0, Finish.OPEN if child == 0 else Finish.STOP) for child in range(children)]
    for parent, cut in [(tops[0], 2), (tops[-1], 1)]:
        for _ in range(children):
            add(parent, cut, Finish.STOP)
    return builder.build()


def trees_of(count: int, every_token: bool = True, children: int = 3) -> TreeSet:
    chosen = [random_tree(number, children) for number in range(count)]
    scores = [np.random.default_rng([number, 1]).normal(size=len(tree.leaves())) for number, tree in enumerate(chosen)]
    pairs = [(tree, Labels(tree.prompt_id, tree.leaves(), part)) for tree, part in zip(chosen, scores, strict=True)]
    return tree_set(pairs, RewardScale(0.0, 1.0), zeta=0.0, layers=2, every_token=every_token)


def predicted(trees: TreeSet, noise: float) -> Predictions:
    """The targets, with noise."""
    target_X = np.concatenate([found.value_X for found in trees.targets]).astype(float)
    depth_X = np.concatenate([found.depth_X for found in trees.targets])
    pred_X = target_X + noise * np.random.default_rng(7).normal(size=len(target_X))
    return Predictions(pred_X, target_X, trees.weight_by_depth[depth_X], depth_X)


def test_predictions_that_miss_by_the_noise_of_the_targets_have_the_ceiling_as_r2() -> None:
    """Overall with the weights of the loss, and by depth; the last layer has leaves only and no ceiling of its own."""
    trees = trees_of(40)
    p, noise_X = predicted(trees, 0.0), np.concatenate(trees.noise)
    p = Predictions(p.target_X + np.sqrt(noise_X), p.target_X, p.weight_X, p.depth_X)
    found, reached = ceilings(p, trees.noise), summary(p)
    assert found.keys() == {"r2_ceiling", "r2_ceiling/depth_0", "r2_ceiling/depth_1"}
    assert found["r2_ceiling"] == pytest.approx(reached["explained_variance"])
    assert found["r2_ceiling/depth_1"] == pytest.approx(reached["explained_variance/depth_1"])
    assert 0 < found["r2_ceiling"] < 1


def test_every_tree_keeps_its_own_predictions() -> None:
    """Targets as predictions have slope and correlation 1; noise in them lowers both."""
    trees = trees_of(40)
    exact = sibling_tests(predicted(trees, 0.0), trees.trees, trees.targets)
    noisy = sibling_tests(predicted(trees, 1.0), trees.trees, trees.targets)
    for name in ("sibling_slope", "sibling_corr"):
        for end in ENDS:
            assert exact[f"{name}/tokens_1{end}"] == pytest.approx(1.0)
        key = f"{name}/tokens_1"
        assert 0.2 < noisy[f"{key}_low"] < noisy[key] < noisy[f"{key}_high"] < 0.9
    assert {key.partition("tokens_")[2][0] for key in exact} == {"1", "2"}  # no segment is longer


def test_targets_at_nodes_allow_the_test_after_whole_segments_only() -> None:
    trees = trees_of(40, every_token=False)
    p = predicted(trees, 0.5)
    assert "r2_ceiling" in ceilings(p, trees.noise)
    figures = sibling_tests(p, trees.trees, trees.targets)
    assert {key.partition("tokens_")[2][0] for key in figures} == {"2"}


@pytest.mark.parametrize(("count", "children"), [(MIN_TREES - 1, 3), (40, 1)])
def test_too_few_trees_or_siblings_have_no_figures(count: int, children: int) -> None:
    trees = trees_of(count, children=children)
    p = predicted(trees, 1.0)
    assert ceilings(p, trees.noise) == {}
    assert sibling_tests(p, trees.trees, trees.targets) == {}


class IdleEngine:
    """A value model behind as much of DeepSpeed's engine as the end of an epoch uses."""

    def __init__(self, module: ValueModel) -> None:
        self.module, self.backbone, self.eval, self.train = module, module.backbone, module.eval, module.train

    def __call__(self, **inputs: torch.Tensor | bool) -> torch.Tensor:
        return self.module(**inputs)


class Recorder:
    """Keeps what a journal would write."""

    def __init__(self) -> None:
        self.entries: list[Metrics] = []

    def write(self, entry: Metrics) -> None:
        self.entries.append(entry)


def test_every_epoch_records_all_figures_and_keeps_those_of_the_best() -> None:
    """The ceiling belongs to the trees: it is the same for every model."""
    trees, state, recorder = trees_of(MIN_TREES), State(), Recorder()
    for epoch in range(2):
        fit.end_epoch(IdleEngine(tiny_value(epoch)), ["brief"], [trees], epoch, state, recorder, WorkerGroup())  # type: ignore[arg-type]
    entries = [entry["figures"]["brief"] for entry in recorder.entries]
    first, second = entries
    names = {f"{name}/tokens_{n}{end}" for name in ("sibling_slope", "sibling_corr") for n in (1, 2) for end in ENDS}
    assert names | {"explained_variance", "r2_ceiling", "r2_ceiling/depth_0"} <= first.keys() == second.keys()
    assert first["r2_ceiling"] == second["r2_ceiling"]
    assert first["sibling_slope/tokens_1"] != second["sibling_slope/tokens_1"]
    best = max(entries, key=lambda entry: entry["explained_variance"])
    assert state.best_figures == {"brief": best}
    assert state.metrics == recorder.entries
    lines = metrics_of("brief", [{"step": 1, "loss": 0.5}, *recorder.entries])
    assert lines == [{"step": 1, "loss": 0.5}, *({"step": 0, "epoch": e, **found} for e, found in enumerate(entries))]
    assert metrics_of("other", recorder.entries) == [{"step": 0, "epoch": 0}, {"step": 0, "epoch": 1}]

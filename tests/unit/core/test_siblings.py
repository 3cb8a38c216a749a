"""The ceiling of R² and the sibling test, on toy problems whose true values are known.

Shapes: X targets of a tree, T trees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from mavis_dist.core.siblings import MIN_TREES, SiblingTest, ceiling, noise, sibling_sums, sibling_test
from mavis_dist.core.tree import Finish, Shape, Targets, Tree, TreeBuilder, backup, targets
from mavis_dist.rollout.trees import Sampling, TreeGrower
from mavis_dist.types import Policy, Prompt
from tests.toy import ToyEngine, ToyMDP

NUM_PROMPTS, TREES_PER_PROMPT = 30, 40
SHAPE = Shape(root=3, children=2, layers=3, max_tokens=6)
ZETA = 1.0
RANDOM = np.random.default_rng(0)


@dataclass(frozen=True, eq=False)
class Grown:
    """A tree with its targets, and the true value of the state at each of them."""

    tree: Tree
    zeta: float
    rewards: dict[int, float]
    targets: Targets
    true_X: np.ndarray

    def with_targets_at_nodes(self) -> Grown:
        return with_targets(self.tree, self.zeta, self.rewards, self.true_X[: 1 + len(self.tree.tokens)], False)

    @property
    def noise_X(self) -> np.ndarray:
        return noise(self.tree, self.targets, self.zeta)


def with_targets(tree: Tree, zeta: float, rewards: dict[int, float], true_S: np.ndarray, every_token: bool) -> Grown:
    found = targets(tree, backup(tree, rewards), zeta, every_token)
    return Grown(tree, zeta, rewards, found, true_S[found.index_X])


def grow(mdp: ToyMDP, shape: Shape, zeta: float, count: int, level: float = 0.0, seed: int = 3) -> Iterator[Grown]:
    """Trees of the base policy, or of its tilt if a nat has a price; all rewards are raised by `level`."""
    zeros_SK = torch.zeros_like(mdp.base_SK)
    delta_SK = mdp.delta(mdp.values(zeros_SK, 0.0), beta=1.0)
    policy = Policy("toy", 1) if zeta else Policy()
    exact = mdp.values(mdp.ratio(delta_SK) if zeta else zeros_SK, zeta).numpy() + level
    grower = TreeGrower(ToyEngine(mdp, delta_SK), shape, policy, Sampling(beta=1.0), seed)
    for tree in grower.grow([Prompt(str(i), "") for i in range(count)], [[9]] * count):
        rewards = {int(leaf): float(exact[mdp.state(tree.answer(leaf))]) for leaf in tree.leaves()}
        yield with_targets(tree, zeta, rewards, exact[mdp.states_of_tokens(tree)], every_token=True)


@pytest.fixture(scope="module", params=[0.0, ZETA], ids=["base", "tilted"])
def grown(request: pytest.FixtureRequest) -> list[Grown]:
    """Trees of many prompts, whose rewards differ in level and in everything else."""
    levels = np.random.default_rng(1).normal(size=NUM_PROMPTS) / 2
    return [
        one
        for number, level in enumerate(levels)
        for one in grow(
            ToyMDP(number, horizon=6, stop_bonus=1.0), SHAPE, request.param, TREES_PER_PROMPT, level, number
        )
    ]


def standard_errors(sum_T: np.ndarray) -> float:
    """Distance of the sum from 0; trees are independent, targets within a tree are not."""
    return float(sum_T.sum() / np.sqrt((sum_T**2).sum()))


# --- the ceiling of R² -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", range(SHAPE.layers))
def test_noise_is_the_squared_distance_of_targets_from_true_values(grown: list[Grown], depth: int) -> None:
    """In the mean, at the ends of segments, of prompts and of cuts: within 3 standard errors."""
    nodes = [one.with_targets_at_nodes() for one in grown]
    errors = [
        ((one.targets.value_X - one.true_X) ** 2 - one.noise_X)[one.targets.depth_X == depth].sum() for one in nodes
    ]
    assert abs(standard_errors(np.array(errors))) < 3


def test_noise_at_cuts_is_that_of_the_fresh_children_and_not_of_the_finished_answer(grown: list[Grown]) -> None:
    errors = []
    for one in grown:
        num_plain = 1 + len(one.tree.tokens)
        error_X = (one.targets.value_X - one.true_X) ** 2 - one.noise_X
        errors.append(error_X[num_plain:].sum())
    assert np.count_nonzero(errors) > 100
    assert abs(standard_errors(np.array(errors))) < 3


def columns(grown: list[Grown], depth: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Targets, noise and true values at a depth of all trees."""
    chosen = [one.targets.depth_X == depth for one in grown]
    parts = [(one.targets.value_X[x], one.noise_X[x], one.true_X[x]) for one, x in zip(grown, chosen, strict=True)]
    value_X, noise_X, true_X = (np.concatenate(column) for column in zip(*parts, strict=True))
    return value_X, noise_X, true_X


@pytest.mark.parametrize("depth", range(SHAPE.layers))
def test_true_values_reach_the_ceiling_at_ends_of_segments_and_not_before(grown: list[Grown], depth: int) -> None:
    target_X, noise_X, true_X = columns([one.with_targets_at_nodes() for one in grown], depth)
    reached = 1 - np.mean((target_X - true_X) ** 2) / np.var(target_X)
    assert 0.2 < reached < 0.995
    assert ceiling(target_X, noise_X) == pytest.approx(reached, abs=0.03)
    target_X, noise_X, true_X = columns(grown, depth)
    assert ceiling(target_X, noise_X) > 1 - np.mean((target_X - true_X) ** 2) / np.var(target_X) - 0.02


def test_the_ceiling_is_the_variance_of_true_values_over_that_of_targets() -> None:
    """Whole answers below every prompt: both variances by enumeration of all answers."""
    shape, prompts = Shape(root=2, children=2, layers=1, max_tokens=4), range(25)
    trees, values, variances = [], [], []
    for number in prompts:
        mdp, level = ToyMDP(number), 0.5 * (-1) ** number
        trees += list(grow(mdp, shape, 0.0, 200, level, seed=number))
        probability_F = mdp.answer_logprobs(torch.zeros_like(mdp.base_SK)).exp()
        mean = float(probability_F @ mdp.reward_F)
        values.append(mean + level)
        variances.append(float(probability_F @ (mdp.reward_F - mean) ** 2))
    exact = np.var(values) / (np.var(values) + np.mean(variances) / shape.root)
    target_X, noise_X, _ = columns(trees, depth=0)
    assert ceiling(target_X, noise_X) == pytest.approx(exact, abs=0.03)
    # By its other definition: the covariance of two different children.
    first, second = np.array([[one.rewards[0], one.rewards[1]] for one in trees]).T
    covariance = np.mean(first * second) - np.mean((first + second) / 2) ** 2
    assert ceiling(target_X, noise_X) == pytest.approx(covariance / np.var(target_X), abs=1e-6)


def test_weights_count_in_the_ceiling() -> None:
    target_X, noise_X = RANDOM.normal(size=50), RANDOM.uniform(size=50)
    weight_X = RANDOM.integers(1, 4, 50)
    repeated = (np.repeat(column, weight_X) for column in (target_X, noise_X))
    assert ceiling(target_X, noise_X, weight_X) == pytest.approx(ceiling(*repeated))


def test_the_noise_of_a_state_with_one_child_is_unknown() -> None:
    builder = TreeBuilder("p", "base", 0, [1, 2])
    top = builder.add(-1, 0, [3, 4], [0.0, 0.0], Finish.OPEN)
    builder.add(-1, 0, [5], [0.0], Finish.STOP)
    builder.add(top, 2, [6], [0.0], Finish.STOP)
    tree = builder.build()
    found = targets(tree, backup(tree, {1: 3.0, 2: 1.0}), 0.0)
    np.testing.assert_array_equal(noise(tree, found, 0.0), [1.0, np.nan, np.nan, 0.0, 0.0])


# --- the sibling test --------------------------------------------------------------------------------------------


def measured(grown: list[Grown], predict: Callable[[Grown], np.ndarray], num_tokens: int = 1) -> SiblingTest:
    sums_T4 = np.array([sibling_sums(one.tree, one.targets, predict(one), num_tokens) for one in grown])
    result = sibling_test(sums_T4)
    assert result is not None
    return result


@pytest.mark.parametrize("num_tokens", [1, 2, 4])
def test_differences_of_true_values_have_slope_one(grown: list[Grown], num_tokens: int) -> None:
    slope, correlation = measured(grown, lambda one: one.true_X, num_tokens)
    assert abs(slope.value - 1) < 3 * (slope.high - slope.low) / 3.92 + 1e-6  # standard errors, and rounding of targets
    assert slope.high - slope.low < 0.3
    assert 0 < correlation.low < correlation.value < correlation.high <= 1


@pytest.mark.parametrize("factor", [0.25, 3.0, -1.0])
def test_the_slope_says_by_how_much_differences_are_too_large(grown: list[Grown], factor: float) -> None:
    true, scaled = (measured(grown, lambda one, f=f: f * one.true_X) for f in (1.0, factor))  # type: ignore[misc]
    assert scaled.slope.value == pytest.approx(true.slope.value / factor)
    assert scaled.correlation.value == pytest.approx(np.sign(factor) * true.correlation.value)


def test_noise_has_slope_zero(grown: list[Grown]) -> None:
    slope, correlation = measured(grown, lambda one: RANDOM.normal(size=len(one.true_X)))
    assert slope.low < 0 < slope.high
    assert correlation.low < 0 < correlation.high
    assert abs(slope.value) < 0.05


def test_noise_in_the_values_lowers_the_slope_by_its_share_of_their_variance(grown: list[Grown]) -> None:
    """Noise as large as the differences of true values: half of the differences found are true."""
    spread = np.sqrt(variance_within_states(grown))
    slope, _ = measured(grown, lambda one: one.true_X + spread * RANDOM.normal(size=len(one.true_X)))
    assert slope.value == pytest.approx(0.5, abs=0.08)


def variance_within_states(grown: list[Grown]) -> float:
    """Of the true value after the first token of each child, over the children of a state."""
    parts = []
    for one in grown:
        for nodes in one.tree.children().values():
            true = one.true_X[1 + one.tree.node_start[nodes]]
            parts.append((((true - true.mean()) ** 2).sum(), len(nodes) - 1))
    squares, degrees = np.sum(parts, axis=0)
    return float(squares / degrees)


def test_errors_that_the_siblings_share_do_not_count(grown: list[Grown]) -> None:
    """An error of the prompt, however large, and one of each state: the test sees differences only."""

    def with_errors(one: Grown) -> np.ndarray:
        pred_X = one.true_X + 10 * RANDOM.normal()
        for nodes in one.tree.children().values():
            error = RANDOM.normal()
            for node in nodes:
                pred_X[1 + one.tree.node_start[node] : 1 + one.tree.node_start[node + 1]] += error
        return pred_X

    for ours, plain in zip(measured(grown, with_errors), measured(grown, lambda one: one.true_X), strict=True):
        np.testing.assert_allclose(ours, plain)


def test_intervals_cover_the_true_slope_as_often_as_they_say(grown: list[Grown]) -> None:
    """Thirty sets of forty trees; one of twenty intervals may miss, and the bootstrap is a little too narrow."""
    order = np.random.default_rng(5).permutation(len(grown))
    sets = [measured([grown[i] for i in part], lambda one: one.true_X) for part in np.array_split(order, 30)]
    assert sum(one.slope.low < 1 < one.slope.high for one in sets) >= 25
    assert any(one.slope.low > 0.8 or one.slope.high < 1.2 for one in sets)


def test_leaves_count_with_their_reward_and_short_children_are_left_out() -> None:
    """Written out: one state with children of 1, 2 and 3 tokens and an inner child."""
    builder = TreeBuilder("p", "base", 0, [1, 2])
    for tokens in ([3], [4, 5], [6, 7, 8]):
        builder.add(-1, 0, tokens, [0.0] * len(tokens), Finish.STOP)
    inner = builder.add(-1, 0, [9, 9], [0.0] * 2, Finish.OPEN)
    for token in (3, 4):
        builder.add(inner, 2, [token], [0.0], Finish.STOP)
    tree = builder.build()
    found = targets(tree, backup(tree, {0: 1.0, 1: 2.0, 2: 4.0, 4: 0.0, 5: 6.0}), 0.0)
    pred_X = np.arange(len(found.index_X), dtype=float) ** 2
    # Predictions after two tokens of the children with 2, 3 and 2 tokens, and their rewards, 3 = (0 + 6) / 2.
    v, y = np.array([9.0, 25.0, 64.0]), np.array([2.0, 4.0, 3.0])
    v, y = v - v.mean(), y - y.mean()
    np.testing.assert_allclose(sibling_sums(tree, found, pred_X, 2), [v @ y, v @ v, y @ y, 1])
    assert not sibling_sums(tree, found, pred_X, 3).any()


def test_without_targets_at_every_token_only_segments_of_that_length_count(grown: list[Grown]) -> None:
    for one in grown[:50]:
        nodes = one.with_targets_at_nodes()
        families = [[one.tree.length(n) for n in group] for group in one.tree.children().values()]
        is_available = any(lengths.count(2) > 1 for lengths in families)
        assert sibling_sums(one.tree, nodes.targets, RANDOM.normal(size=len(nodes.true_X)), 2).any() == is_available


def test_few_trees_and_constant_values_have_no_figures() -> None:
    sums_T4 = RANDOM.uniform(0.1, 1.0, size=(MIN_TREES, 4))
    assert sibling_test(sums_T4) is not None
    assert sibling_test(sums_T4) == sibling_test(sums_T4)  # the resampling is fixed
    assert sibling_test(sums_T4[1:]) is None
    assert sibling_test(np.vstack([sums_T4[1:], np.zeros((20, 4))])) is None  # trees without siblings do not count
    assert sibling_test(sums_T4 * [1e-20, 1e-20, 1, 1]) is None  # rounding errors of equal values

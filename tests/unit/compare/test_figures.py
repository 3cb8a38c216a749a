"""Figures of a made-up comparison whose answers are known."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from mavis_dist.compare.cells import weight_vectors
from mavis_dist.compare.figures import summarise
from mavis_dist.compare.measured import Measured, nearest_answers
from mavis_dist.compare.results import Comparison, MethodResult, TrainingCost, table, where_measured
from mavis_dist.types import RewardScale
from tests.unit.compare.made_up import BASE_PN, SCALES, VECTORS, cells_of, made_up

TRAINING = TrainingCost(60.0, 20.0, 9000, 3000, ["a GPU"])


@pytest.fixture(scope="module")
def measured() -> Measured:
    return made_up()


@pytest.fixture(scope="module")
def comparison(measured: Measured) -> Comparison:
    return summarise(measured, dict.fromkeys(measured.methods, TRAINING), {"base model": "a tiny one"})


def row(comparison: Comparison, method: str) -> MethodResult:
    return next(row for row in comparison.methods if row.method == method)


def test_seeds_are_averaged_before_prompts_are_resampled(comparison: Comparison) -> None:
    """Noise that cancels between the two seeds of a prompt leaves no interval."""
    one = next(s for s in comparison.settings if (s.method, s.name) == ("mavis", "a"))
    assert one.gain["a"] is not None
    assert [one.gain["a"].mean, one.gain["a"].low, one.gain["a"].high] == pytest.approx([1.0] * 3)
    assert one.strengths[2].gain["a"].mean == pytest.approx(2.0)
    assert one.strengths[2].divergence == 4.0
    assert one.spent == 2.0


def test_hypervolumes_and_ratios_by_hand(comparison: Comparison) -> None:
    """Fronts (1, 0), (1/2, 1/2), (0, 1): a box of 1/4; half the gains make a sixteenth."""
    mavis, weak = row(comparison, "mavis"), row(comparison, "weak")
    assert mavis.hypervolume is not None
    assert mavis.hypervolume.mean == pytest.approx(0.25)
    assert weak.hypervolume_ratio is not None
    assert [weak.hypervolume_ratio.mean, weak.hypervolume_ratio.low] == pytest.approx([4.0, 4.0])
    assert mavis.hypervolume_ratio is None
    assert mavis.hypervolume_anywhere is not None
    assert mavis.hypervolume_anywhere.mean == pytest.approx(1.0)  # at strength 4 gains are 2
    assert row(comparison, "unknown").hypervolume_anywhere is not None
    assert row(comparison, "base").hypervolume_ratio is None  # nothing to divide by


def test_weighted_gains_differences_and_winners(comparison: Comparison) -> None:
    """At the corners the weighted gain is 1, in the middle 1/4 + 1/4."""
    mavis, weak = row(comparison, "mavis"), row(comparison, "weak")
    assert mavis.weighted is not None
    assert weak.behind is not None
    assert mavis.weighted.mean == pytest.approx(2.5 / 3)
    assert weak.behind.mean == pytest.approx(1.25 / 3)
    assert comparison.reference == "mavis"
    assert comparison.winners["weighted"] is None  # `short` gains as much
    assert row(comparison, "unknown").weighted is None


def test_a_method_that_spends_less_is_judged_by_the_limit_there(comparison: Comparison) -> None:
    mavis, short = row(comparison, "mavis"), row(comparison, "short")
    assert mavis.share is not None
    assert short.share is not None
    assert short.share.mean > 1.2 * mavis.share.mean
    assert comparison.winners["share"] == "short"
    assert row(comparison, "base").share is None


def test_correlations_cost_and_text(comparison: Comparison) -> None:
    mavis = row(comparison, "mavis")
    assert mavis.spearman == pytest.approx(1.0)
    assert (mavis.cost.generated, mavis.cost.reward_calls, mavis.cost.tokens_per_s) == (20, 3, 5)
    assert mavis.cost.training == TRAINING
    assert mavis.text.perplexity == pytest.approx(np.e)
    assert mavis.text.distinct_2 < row(comparison, "base").text.distinct_2


def test_speeds_are_those_of_the_machine_that_most_methods_ran_on(measured: Measured) -> None:
    """A method that ran on another machine alone has no speed; one that ran on both has that of the common one."""
    elsewhere = {"weak": (0, 1), "short": (1,)}  # method -> seeds computed on a faster machine
    cells = {
        cell: replace(found, machine="fast", seconds=found.seconds / 100)
        if cell.seed in elsewhere.get(cell.method, ())
        else replace(found, machine="slow")
        for cell, found in measured.cells.items()
    }
    mixed = replace(measured, cells=cells)
    training = dict.fromkeys(measured.methods, TRAINING) | {"mavis": TrainingCost(machines=["slow"])}
    comparison = summarise(mixed, training, {})
    assert comparison.timed_on == "slow"
    assert [row(comparison, name).cost.tokens_per_s for name in ("mavis", "weak", "short")] == [5, None, 5]
    assert where_measured(comparison) == [
        "Speeds are those of slow.",
        "What base, weak, short, unknown steer with was trained on a GPU.",
    ]


def test_limits_are_those_of_the_kl(measured: Measured) -> None:
    at = {kl: replace(measured, kl=kl).settings["mavis", VECTORS[0]] for kl in (1.0, 2.0)}
    limit = {kl: (setting.weighted_R / setting.share_R)[0] for kl, setting in at.items()}
    assert limit[1.0] < 0.8 * limit[2.0]


def test_the_nearest_strength(measured: Measured) -> None:
    for method, strength in (("mavis", 2.0), ("short", 4.0), ("unknown", 1.0)):
        found = nearest_answers(measured, method, VECTORS[0])
        assert found == measured.by_strength(method, VECTORS[0])[strength]


def test_json_has_the_main_figures_first_and_no_infinities(comparison: Comparison) -> None:
    found = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert list(found)[:3] == ["hypervolume_ratio", "share_of_limit", "cost"]
    assert found["hypervolume_ratio"]["weak"]["mean"] == pytest.approx(4.0)
    assert found["hypervolume_ratio"]["unknown"] is None


def test_the_table_has_a_line_per_method(comparison: Comparison) -> None:
    lines = table(comparison).splitlines()
    assert [line.split()[0] for line in lines[2:-2]] == ["base", "mavis", "weak", "short", "unknown"]
    assert "4.00 [4.00, 4.00]" in lines[4]


def test_a_method_without_some_weights_is_compared_on_the_common_ones() -> None:
    """The corner of a and the middle, with half the gains of mavis there."""
    whole = made_up()
    some = [VECTORS[0], VECTORS[2]]
    cells = {**whole.cells, **cells_of("some", some, lambda s: s / 4, lambda s: s)}
    comparison = summarise(replace(whole, cells=cells), dict.fromkeys([*whole.methods, "some"], TrainingCost()), {})
    found, mavis = row(comparison, "some"), row(comparison, "mavis")
    assert (found.num_weights, mavis.num_weights, comparison.num_weights) == (2, 3, 3)
    for figure, expected in (
        (found.weighted, (0.5 + 0.25) / 2),
        (found.behind, (0.5 + 0.25) / 2),
        (found.hypervolume, 1 / 16),
        (found.hypervolume_ratio, 4.0),
        (mavis.weighted, 2.5 / 3),
    ):
        assert figure is not None
        assert figure.mean == pytest.approx(expected)
    assert found.share is not None
    assert found.share_behind is not None
    assert found.share_behind.mean == pytest.approx(found.share.mean)  # gains of mavis are twice as large
    group = next(group for group in comparison.groups if group.method == "some")
    assert group.ratio is not None
    assert group.ratio.mean == pytest.approx(4.0)
    assert [s.name for s in comparison.settings if s.method == "some"] == ["a", "0.5 a + 0.5 b"]
    assert "of 3 weights, these methods have fewer: some 2" in table(comparison)


def test_ranks_are_those_of_pairs_that_a_method_has() -> None:
    """Of three objectives it has one pair: a corner of each of the others says nothing."""
    base = {cell: found for cell, found in made_up().cells.items() if cell.method == "base"}
    whole = cells_of("mavis", weight_vectors(["a", "b", "c"], 3), lambda s: s / 2, lambda s: s)
    cells = {**base, **whole, **cells_of("some", VECTORS, lambda s: s / 4, lambda s: s)}
    base_c_P = BASE_PN["a"].mean(axis=1)
    third = {
        cell: replace(found, reward={**found.reward, "c": cell.strength * dict(cell.weights).get("c", 0.0) + base_c_P})
        for cell, found in cells.items()
    }
    measured = Measured(third, {**BASE_PN, "c": BASE_PN["a"]}, {**SCALES, "c": RewardScale(0, 1)}, kl=2.0)
    found = summarise(measured, dict.fromkeys(measured.methods, TrainingCost()), {})
    assert row(found, "some").num_weights == 3
    assert row(found, "some").spearman == row(found, "mavis").spearman == pytest.approx(1.0)


def test_corners_alone_are_no_front() -> None:
    whole = made_up()
    cells = {**whole.cells, **cells_of("corners", [VECTORS[0], VECTORS[1]], lambda s: s / 4, lambda s: s)}
    training = dict.fromkeys([*whole.methods, "corners"], TrainingCost())
    found = row(summarise(replace(whole, cells=cells), training, {}), "corners")
    assert found.num_weights == 2
    assert found.weighted is not None
    assert (found.hypervolume, found.hypervolume_anywhere, found.hypervolume_ratio) == (None, None, None)


def test_a_method_that_is_not_steered_has_the_same_answers_for_all_weights() -> None:
    whole = made_up()
    constant = {
        replace(cell, method="constant", path=f"constant{cell.seed}"): found
        for cell, found in whole.cells.items()
        if cell.method == "base"
    }
    measured = replace(whole, cells={**whole.cells, **constant})
    found = row(summarise(measured, dict.fromkeys([*whole.methods, "constant"], (0.0, 0.0)), {}), "constant")
    assert found.num_weights == 3
    assert found.weighted is not None
    assert found.weighted.mean == pytest.approx(0.0)

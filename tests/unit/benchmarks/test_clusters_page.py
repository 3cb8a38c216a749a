"""docs/clusters.md shows the recorded figures."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.common import figures
from benchmarks.machines import __main__ as machines
from benchmarks.scaling import __main__ as scaling
from benchmarks.sharding import __main__ as sharding
from benchmarks.sizing import __main__ as sizing

PAGE = (figures.DOCS / "clusters.md").read_text()


def read(name: str) -> dict:
    return figures.read(figures.default_file(name))


@pytest.mark.parametrize(
    "render",
    [
        lambda: sharding.render(read(sharding.NAME)),
        lambda: machines.render(read(machines.NAME)),
        lambda: machines.render(read(machines.OF_MODEL)),
        lambda: scaling.render(read(scaling.NAME)),
        lambda: sizing.render(sizing.read()),
    ],
    ids=["sharding", "machines", "machines-model", "scaling", "sizing"],
)
def test_a_part_is_rendered_from_its_figures(render: Callable[[], str]) -> None:
    assert render() in PAGE


def test_a_group_answers_as_one_process() -> None:
    found = read(sharding.NAME)
    assert found["greedy_answers_equal"] == found["greedy_answers"]
    assert found["trees_equal"] == found["trees"]
    assert found["lost_process"]["is_same"]
    assert found["lost_process"]["longest_wait_s"] < 20
    assert found["beyond_weights_mib"] < 0.25 * found["memory_mib"][0]["weights"]


def test_the_simulation_is_within_its_aim() -> None:
    for one in read(scaling.NAME)["nodes"].values():
        measured, predicted = (sum(one[kind].values()) for kind in ("measured", "predicted"))
        assert abs(predicted / measured - 1) < scaling.AIM


@pytest.mark.parametrize("name", [machines.NAME, machines.OF_MODEL])
def test_whatever_is_lost_the_results_are_the_same(name: str) -> None:
    found = read(name)
    assert found["same_on_all_counts"]
    assert len(found["scenarios"]) == 9
    assert all(scenario["same"] for scenario in found["scenarios"])

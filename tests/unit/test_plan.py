"""Resource planning before anything is placed."""

from __future__ import annotations

from typing import Any

import pytest

from mavis_dist.config import parse
from mavis_dist.plan import Node, PlanError, check_serving, make_plan, tasks_of


def config(**sections: Any) -> Any:
    objectives = {name: {"reward": "sentiment"} for name in ("a", "b", "c")}
    return parse({"run": "r", "objectives": objectives, **sections})


def test_everything_that_fits_runs_at_once() -> None:
    plan = make_plan(config(rollout={"actors": 3, "cpus_per_actor": 2}), [Node(4), Node(2)])
    assert plan.fits_at_once == 3
    assert plan.notes == ()


def test_actors_do_not_span_machines() -> None:
    plan = make_plan(config(rollout={"actors": 3, "cpus_per_actor": 2}), [Node(3), Node(3)])
    assert "2 fit" in plan.notes[0]


def test_objectives_queue_when_there_is_no_room() -> None:
    plan = make_plan(config(train={"workers": 2, "trees_per_step": 2}), [Node(4)])
    assert plan.fits_at_once == 2
    assert "2 of 3 objectives" in plan.notes[0]


@pytest.mark.parametrize("kind", ["shared", "states"])
def test_objectives_of_one_model_do_not_queue(kind: str) -> None:
    train, shared = {"workers": 2, "trees_per_step": 2}, {"kind": kind}
    assert make_plan(config(train=train, value=shared), [Node(2)]).notes == ()
    [note] = make_plan(config(train=train, value=shared, iterations=2), [Node(2)]).notes
    assert "1 of 3 objectives" in note  # later iterations train a model each


def test_a_group_of_processes_may_span_machines_and_counts_as_one_actor() -> None:
    shared = config(base={"tensor_parallel": 3}, rollout={"actors": 3, "cpus_per_actor": 2})
    assert "2 fit" in make_plan(shared, [Node(8), Node(5)]).notes[0]
    check_serving(
        config(base={"tensor_parallel": 3}, serve={"cpus_per_replica": 1, "placement": "colocated"}), [Node(4)]
    )
    with pytest.raises(PlanError, match=r"needs 8 CPU .* 7 processes with models .* base.tensor_parallel"):
        check_serving(config(base={"tensor_parallel": 4}, serve={"cpus_per_replica": 1}), [Node(4)])


@pytest.mark.parametrize("section", ["rollout", "serve"])
def test_processes_of_a_group_do_not_share_a_gpu(section: str) -> None:
    key = {"rollout": "gpus_per_actor", "serve": "gpus_per_replica"}[section]
    for device, gpus in (("cuda", 0.5), ("cuda:1", 1)):
        shared = config(base={"tensor_parallel": 2, "device": device}, **{section: {key: gpus}})
        with pytest.raises(PlanError, match=f"{section}.{key}={gpus:g}: each process needs a GPU of its own"):
            (make_plan if section == "rollout" else check_serving)(shared, [Node(8, 8)])


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"base": {"tensor_parallel": 5}}, "base.tensor_parallel=5"),
        ({"rollout": {"cpus_per_actor": 8}}, "rollout.cpus_per_actor=8"),
        ({"rollout": {"gpus_per_actor": 1}}, "rollout.gpus_per_actor=1"),
        ({"train": {"workers": 5, "trees_per_step": 5}}, "train.workers=5"),
    ],
)
def test_a_cluster_that_is_too_small_is_named(sections: dict[str, Any], key: str) -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(config(**sections), [Node(2), Node(2)])
    assert key in str(caught.value)
    assert "2 CPU + 0 GPU" in str(caught.value)
    assert "lower" in str(caught.value)


def test_a_service_that_can_never_be_placed_is_named() -> None:
    check_serving(config(serve={"cpus_per_replica": 0.4}), [Node(2)])
    with pytest.raises(PlanError, match=r"needs 2\.5 CPU .* lower serve\.cpus_per_replica"):
        check_serving(config(serve={"cpus_per_replica": 0.5}), [Node(2)])
    with pytest.raises(PlanError, match=r"needs 2\.4 CPU .* for 5 processes"):
        check_serving(config(serve={"cpus_per_replica": 0.4}), [Node(2)], num_objectives=4)


def test_a_service_is_placed_machine_by_machine() -> None:
    shared = config(base={"tensor_parallel": 2}, serve={"cpus_per_replica": 1, "placement": "colocated"})
    check_serving(shared, [Node(2.5), Node(1.5)])
    with pytest.raises(PlanError, match=r"needs 3 CPU .* the cluster has 1\.5 CPU"):
        check_serving(shared, [Node(1.5), Node(1.5)])
    on_gpus = {"cpus_per_replica": 1, "gpus_per_replica": 0.6, "base_replicas": 3, "placement": "colocated"}
    check_serving(config(serve=on_gpus), [Node(4, 3)])  # which has room for one process per GPU
    for too_few in ([Node(8, 1), Node(8, 1)], [Node(8, 2)]):
        with pytest.raises(PlanError, match="3 processes with models"):
            check_serving(config(serve=on_gpus), too_few)
    check_serving(config(serve={**on_gpus, "gpus_per_replica": 0.3}), [Node(4, 1)])
    check_serving(config(serve={**on_gpus, "base_replicas": 2}), [Node(1, 1), Node(1, 1), Node(1)])
    with pytest.raises(PlanError, match="and a gateway"):
        check_serving(config(serve={**on_gpus, "base_replicas": 2}), [Node(1, 1), Node(1, 1)])


def test_only_the_lower_end_of_a_range_must_fit() -> None:
    several = {"base_replicas": {"min": 1, "max": 9}, "value_replicas": {"min": 1, "max": 9}, "cpus_per_replica": 0.4}
    check_serving(config(serve=several), [Node(2)])
    with pytest.raises(PlanError, match=r"serve\.base_replicas"):
        check_serving(config(serve={**several, "base_replicas": {"min": 9, "max": 9}}), [Node(2)])


@pytest.mark.parametrize(
    ("num_shards", "num_sets", "cores", "expected"),
    [(8, 1, 4, [2, 2, 2, 2]), (5, 2, 4, [2, 3]), (3, 1, 64, [1, 1, 1]), (4, 6, 2, [4]), (1, 1, 8, [1])],
)
def test_labels_are_scored_on_all_cores(num_shards: int, num_sets: int, cores: int, expected: list[int]) -> None:
    shards = [f"part-{n}" for n in range(num_shards)]
    parts = tasks_of(shards, num_sets, [Node(cores - 1), Node(1.5)])
    assert [shard for part in parts for shard in part] == shards
    assert sorted(map(len, parts)) == expected

"""Functions that run elsewhere on the cluster: a task for every item, or one on every machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any, TypeVar

from mavis_dist import environment as environment  # isort: split

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mavis_dist.cluster import check_stop
from mavis_dist.failures import failure_of
from mavis_dist.progress import Meter
from mavis_dist.types import UserError

Result = TypeVar("Result")

POLL_S = 1.0


def map_tasks(
    function: Callable[..., Result],
    items: Sequence[tuple[Any, ...]],
    stage: str,
    unit: str,
    are_actors_idle: bool = False,
) -> list[Result]:
    """`function(*item)` for every item as a Ray task of one core; results in the order of the items.

    Args:
        are_actors_idle: actors hold cores that they do not use meanwhile: as many tasks as a machine has cores run
            there, whoever holds them. There should be no more items than cores of the cluster.

    Raises:
        UserError: what a task has raised, at once; the others are cancelled. Ray repeats those whose process is lost.
    """
    meter = Meter(stage, unit)
    task = ray.remote(function)
    places = _core_places() if are_actors_idle else [{"num_cpus": 1}]
    refs = [task.options(**places[n % len(places)]).remote(*item) for n, item in enumerate(items)]
    results, left = dict[ray.ObjectRef[Any], Result](), refs
    try:
        while left:
            check_stop()
            ready, left = ray.wait(left, timeout=POLL_S)
            results |= {ref: ray.get(ref) for ref in ready}
            meter.show(len(results), len(refs))
    except ray.exceptions.RayError as error:
        raise failure_of(stage, error) from error
    finally:
        for ref in left:
            ray.cancel(ref)
    meter.show(len(refs), len(refs), final=True)
    return [results[ref] for ref in refs]


def on_every_machine(
    function: Callable[..., object], *arguments: object, stage: str, limit_s: float | None = None
) -> None:
    """`function(*arguments)` in a process on every machine that has cores for work, with lines of progress.

    Args:
        limit_s: seconds that a machine has for it; None for code of the user, which takes as long as it takes.

    Raises:
        UserError: what one of them has raised, at once, or the machine that does not answer within the limit.
    """
    task = ray.remote(function)
    calls = {task.options(**_on(node)).remote(*arguments): node["NodeManagerAddress"] for node in _machines()}
    meter, began, late = Meter(stage, "machines"), time.monotonic(), list(calls)
    try:
        while late:
            check_stop()
            ready, late = ray.wait(late, timeout=POLL_S)
            for ref in ready:
                _get(ref, f"{stage} on machine {calls[ref]}")
            if late and limit_s is not None and time.monotonic() - began > limit_s:
                raise UserError(
                    f"{stage}: machine {calls[late[0]]} does not answer within {limit_s:g} s: check its Ray process "
                    "and its mounts"
                )
            meter.show(len(calls) - len(late), len(calls))
    finally:
        for ref in late:
            ray.cancel(ref, force=True)  # a process that waits for storage does not hear anything else


def _machines() -> list[dict[str, Any]]:
    """The machines that have cores for work."""
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]


def _on(machine: dict[str, Any]) -> dict[str, Any]:
    """Options of a task that runs on a machine, without a core of its own; elsewhere if the machine is lost."""
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(machine["NodeID"], soft=True)}


def _core_places() -> list[dict[str, Any]]:
    """Options of a task for every core of the cluster, machines in turns."""
    machines = _machines()
    most = ceil(max(machine["Resources"]["CPU"] for machine in machines))
    return [_on(machine) for core in range(most) for machine in machines if core < machine["Resources"]["CPU"]]


def _get(ref: ray.ObjectRef[Any], stage: str) -> object:
    try:
        return ray.get(ref)
    except ray.exceptions.RayError as error:
        raise failure_of(stage, error) from error

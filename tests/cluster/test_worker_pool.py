"""The worker pool, with actors that die on purpose."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import ray

from mavis_dist import cluster
from mavis_dist.actors import Turn, WorkerPool, WorkerPoolError

pytestmark = pytest.mark.usefixtures("ray_address")


@ray.remote(num_cpus=0)
class Multiplier:
    """Multiplies lists of numbers, one per call, up to `most` lists in turn; dies once with a single number left, or at
    once if doomed.
    """

    def __init__(self, death_file: str, is_doomed: bool = False, most: int = 1):
        self.death_file, self.is_doomed, self.most = Path(death_file), is_doomed, most
        self.left: dict[int, list[int]] = {}

    def work(self, factor: int, item: tuple[int, list[int]] | None) -> Turn[tuple[int, int]]:
        if item is not None:
            self.left[item[0]] = list(item[1])
        assert len(self.left) <= self.most
        last = max(self.left)  # later ones may be finished first
        if self.is_doomed or (len(self.left[last]) == 1 and not self.death_file.exists()):
            self.death_file.touch()
            os._exit(1)
        number, *self.left[last] = self.left[last]
        self.left = {n: numbers for n, numbers in self.left.items() if numbers}
        return Turn([(number, number * factor)], frozenset(self.left), len(self.left) < self.most)


@ray.remote(num_cpus=0)
class Unstartable:
    def __init__(self) -> None:
        raise ValueError("no such model")

    def work(self, factor: int, numbers: list[int] | None) -> None: ...


@pytest.mark.parametrize("most", [1, 3])
def test_the_items_of_a_dead_actor_are_restarted(tmp_path: Path, most: int) -> None:
    pool = WorkerPool(lambda: Multiplier.remote(str(tmp_path / "death"), most=most), 2)
    try:
        results = list(pool.run("first", 2, [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(7)]))
        assert set(results) == {(number, 2 * number) for number in range(21)}
        assert len(results) > 21  # some arrive twice
        assert (tmp_path / "death").exists()
        assert dict(pool.run("second", 5, [[7]])) == {7: 35}
        assert list(pool.run("nothing", 5, [])) == []
    finally:
        pool.release()


def test_actors_that_keep_dying_are_an_error(tmp_path: Path) -> None:
    pool = WorkerPool(lambda: Multiplier.remote(str(tmp_path / "death"), True), 1)
    try:
        with pytest.raises(WorkerPoolError, match="died in a row without any result"):
            list(pool.run("doomed", 2, [[1]]))
    finally:
        pool.release()


def test_an_actor_that_cannot_start_is_an_error_at_once() -> None:
    pool = WorkerPool(Unstartable.remote, 1)
    try:
        with pytest.raises(ray.exceptions.RayActorError, match="no such model"):
            list(pool.run("unstartable", 2, [[1]]))
    finally:
        pool.release()


def test_an_actor_counts_the_cores_of_its_machine():
    [node] = cluster.nodes()
    assert ray.get(ray.remote(num_cpus=0)(cluster.cores_here).remote()) == node.cpus

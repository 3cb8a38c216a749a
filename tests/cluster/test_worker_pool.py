"""The queue that actors share, with actors that die on purpose."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import ray

from mavis_dist.actors import WorkerPool, WorkerPoolError

pytestmark = pytest.mark.usefixtures("ray_address")


@ray.remote(num_cpus=0)
class Doubler:
    """Doubles a list of numbers, one per call; dies once in the middle of a list, or whenever it has begun one."""

    def __init__(self, grave: str, is_doomed: bool = False):
        self.grave, self.is_doomed, self.left = Path(grave), is_doomed, []

    def work(self, factor: int, numbers: list[int] | None) -> tuple[list[tuple[int, int]], bool]:
        if numbers is not None:
            self.left = list(numbers)
        if self.is_doomed or (len(self.left) == 1 and not self.grave.exists()):
            self.grave.touch()
            os._exit(1)
        number, *self.left = self.left
        return [(number, number * factor)], not self.left


@ray.remote(num_cpus=0)
class Stillborn:
    def __init__(self) -> None:
        raise ValueError("no such model")

    def work(self, factor: int, numbers: list[int] | None) -> None: ...


def test_what_a_dead_actor_had_begun_is_begun_again(tmp_path: Path) -> None:
    crew = WorkerPool(lambda: Doubler.remote(str(tmp_path / "grave")), 2)
    try:
        results = list(crew.run("first", 2, [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(7)]))
        assert set(results) == {(number, 2 * number) for number in range(21)}
        assert len(results) > 21  # some came again
        assert (tmp_path / "grave").exists()
        assert dict(crew.run("second", 5, [[7]])) == {7: 35}
        assert list(crew.run("nothing", 5, [])) == []
    finally:
        crew.release()


def test_actors_that_die_again_and_again_are_an_error(tmp_path: Path) -> None:
    crew = WorkerPool(lambda: Doubler.remote(str(tmp_path / "grave"), True), 1)
    try:
        with pytest.raises(WorkerPoolError, match="died in a row without any result"):
            list(crew.run("doomed", 2, [[1]]))
    finally:
        crew.release()


def test_an_actor_that_cannot_start_is_an_error_at_once() -> None:
    crew = WorkerPool(Stillborn.remote, 1)
    try:
        with pytest.raises(ray.exceptions.RayActorError, match="no such model"):
            list(crew.run("stillborn", 2, [[1]]))
    finally:
        crew.release()

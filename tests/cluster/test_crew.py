"""The queue that actors share, with actors that die on purpose."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

from mavis_dist.cluster import Crew, CrewError

pytestmark = pytest.mark.usefixtures("ray_address")


@dataclass(frozen=True)
class Number:
    key: int


@ray.remote(num_cpus=0)
class Doubler:
    """Holds a few numbers at a time and doubles one per call; dies once, or whenever it has something to do."""

    def __init__(self, grave: str, is_doomed: bool = False):
        self.grave, self.is_doomed, self.held = Path(grave), is_doomed, []

    def work(self, settings: int, items: list[Number]) -> tuple[list[tuple[int, int]], int]:
        self.held += items
        if self.held and (self.is_doomed or not self.grave.exists()):
            self.grave.touch()
            os._exit(1)
        done = [(item.key, item.key * settings) for item in self.held[:1]]
        self.held = self.held[1:]
        return done, max(0, 3 - len(self.held))


@ray.remote(num_cpus=0)
class Stillborn:
    def __init__(self) -> None:
        raise ValueError("no such model")

    def work(self, settings: int, items: list[Number]) -> None: ...


def test_what_a_dead_actor_held_is_done_by_the_others_and_everything_comes_once(tmp_path: Path) -> None:
    crew = Crew(lambda: Doubler.remote(str(tmp_path / "grave")), 2)
    try:
        results = list(crew.run("first", 2, [Number(key) for key in range(20)]))
        assert Counter(results) == Counter((key, 2 * key) for key in range(20))
        assert (tmp_path / "grave").exists()
        assert dict(crew.run("second", 5, [Number(7)])) == {7: 35}
        assert list(crew.run("nothing", 5, [])) == []
    finally:
        crew.release()


def test_actors_that_die_again_and_again_are_an_error(tmp_path: Path) -> None:
    crew = Crew(lambda: Doubler.remote(str(tmp_path / "grave"), True), 1)
    try:
        with pytest.raises(CrewError, match="died one after the other and finished nothing"):
            list(crew.run("doomed", 2, [Number(1)]))
    finally:
        crew.release()


def test_an_actor_that_cannot_start_is_an_error_at_once() -> None:
    crew = Crew(Stillborn.remote, 1)
    try:
        with pytest.raises(ray.exceptions.RayActorError, match="no such model"):
            list(crew.run("stillborn", 2, [Number(1)]))
    finally:
        crew.release()

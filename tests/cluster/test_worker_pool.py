"""The worker pool, with actors that die on purpose."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mavis_dist import cluster
from mavis_dist.actors import Turn, WorkerPool, WorkerPoolError
from mavis_dist.models.directory import ModelError
from mavis_dist.progress import Meter
from mavis_dist.rewards import RewardError
from mavis_dist.tasks import map_tasks, on_every_machine
from mavis_dist.types import StageError, UserError

pytestmark = pytest.mark.usefixtures("ray_address")


GONE = ray.NodeID.from_random().hex()  # no machine of the cluster


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
class Refusing:
    """Raises an error when it starts, or when it is to work."""

    def __init__(self, error: Exception, is_at_start: bool) -> None:
        self._error = error
        if is_at_start:
            raise error

    def work(self, factor: int, numbers: tuple[int, list[int]] | None) -> None:
        raise self._error


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


@pytest.mark.parametrize("is_at_start", [True, False])
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ModelError("model 'x' does not exist: give one"), r"^model 'x' does not exist: give one$"),
        (ValueError("no such\nmodel"), r"^doomed: ValueError: no such.* \(.*test_worker_pool\.py:\d+\)$"),
    ],
)
def test_what_an_actor_raises_is_raised_at_once_in_one_line(error: Exception, line: str, is_at_start: bool) -> None:
    pool = WorkerPool(lambda: Refusing.remote(error, is_at_start), 1)
    try:
        with pytest.raises(UserError, match=line):
            list(pool.run("doomed", 2, [[1]]))
    finally:
        pool.release()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"runtime_env": {"working_dir": "file:///no/such/archive.zip"}}, r"^doomed: .*No such file"),
        ({"scheduling_strategy": NodeAffinitySchedulingStrategy(GONE, soft=False)}, r"^doomed: .*schedul"),
    ],
)
def test_an_actor_that_cannot_start_is_one_line(tmp_path: Path, options: dict[str, Any], line: str) -> None:
    pool = WorkerPool(lambda: Multiplier.options(**options).remote(str(tmp_path / "death")), 1)
    try:
        with pytest.raises(StageError, match=line) as refused:
            list(pool.run("doomed", 2, [[1]]))
        assert "\n" not in str(refused.value)
    finally:
        pool.release()


@pytest.mark.parametrize("kind", [OutOfMemoryError, NodeDiedError])
def test_a_machine_that_runs_out_of_memory_or_dies_is_a_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[RayError]
) -> None:
    (tmp_path / "death").touch()
    get, errors = ray.get, [kind("lost")]

    def get_once_lost(ref: Any, **options: Any) -> Any:
        result = get(ref, **options)
        if isinstance(result, Turn) and errors:
            raise errors.pop()
        return result

    monkeypatch.setattr("ray.get", get_once_lost)
    pool = WorkerPool(lambda: Multiplier.remote(str(tmp_path / "death")), 1)
    try:
        assert set(pool.run("lost", 2, [[1, 2]])) == {(1, 2), (2, 4)}
        assert not errors
    finally:
        pool.release()


def scored(error: Exception | None, wait_s: float = 0) -> float:
    time.sleep(wait_s)
    if error is not None:
        raise error
    return wait_s


def test_what_a_task_raises_is_raised_before_the_others_end() -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=r"^reward 'x' is broken: mend it$"):
        map_tasks(scored, [(None, 60.0), (RewardError("reward 'x' is broken: mend it"),)], "labels", "sets")
    with pytest.raises(StageError, match=r"^labels: KeyError: 'x' \(.*\)$"):
        map_tasks(scored, [(KeyError("x"),)], "labels", "sets")
    assert time.monotonic() - began < 60
    assert map_tasks(scored, [(None, 0.2), (None, 0.1)], "labels", "sets") == [0.2, 0.1]


@ray.remote
class Idle:
    """Holds cores."""


def test_tasks_run_beside_idle_actors_that_hold_all_cores() -> None:
    free = ray.available_resources().get("CPU", 0.0)  # other tests may have left something that ends by itself
    holder = Idle.options(num_cpus=free).remote()  # type: ignore[attr-defined]
    try:
        ray.get(holder.__ray_ready__.remote(), timeout=60)
        assert map_tasks(scored, [(None, 0.2), (None, 0.1)], "labels", "sets", are_actors_idle=True) == [0.2, 0.1]
    finally:
        ray.kill(holder)


def refused_here(text: str) -> None:
    raise UserError(text)


def test_a_check_on_every_machine_names_what_is_wrong() -> None:
    on_every_machine(scored, None, stage="check")
    with pytest.raises(UserError, match=r"^not here: elsewhere$"):
        on_every_machine(refused_here, "not here: elsewhere", stage="check")
    with pytest.raises(StageError, match=r"^check on machine [\d.]+: KeyError: 'x' \("):
        on_every_machine(scored, KeyError("x"), stage="check")


def touch_later(file: Path, wait_s: float) -> None:
    time.sleep(wait_s)
    file.touch()


def test_a_machine_that_does_not_answer_is_named_and_its_task_cancelled(tmp_path: Path) -> None:
    on_every_machine(touch_later, tmp_path / "in time", 0.1, stage="check", limit_s=60.0)
    assert (tmp_path / "in time").exists()
    with pytest.raises(UserError, match=r"check: machine [\d.]+ does not answer within 1 s"):
        on_every_machine(touch_later, tmp_path / "late", 4.0, stage="check", limit_s=1.0)
    time.sleep(5)
    assert not (tmp_path / "late").exists()


def test_code_without_a_limit_shows_that_it_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mavis_dist.tasks.Meter", partial(Meter, every_s=0.0))
    on_every_machine(scored, None, 3.0, stage="check rewards")
    assert "0/1 machines" in capsys.readouterr().err


def test_an_actor_counts_the_cores_of_its_machine():
    [node] = cluster.nodes()
    assert ray.get(ray.remote(num_cpus=0)(cluster.cores_here).remote()) == node.cpus

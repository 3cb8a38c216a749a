"""A training under Ray Train: what workers raise ends it at once; only lost processes are replaced."""

from __future__ import annotations

import inspect
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import get_current_placement_group, placement_group_table

from mavis_dist.actors import start_progress_actor
from mavis_dist.config import Config, parse
from mavis_dist.models.value import ValueModelError
from mavis_dist.train import launch
from mavis_dist.train.launch import Launch
from mavis_dist.train.worker_group import WorkerGroup
from mavis_dist.types import StageError, Stopped, UserError

pytestmark = pytest.mark.usefixtures("ray_address")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    settings = {"train": {"cpus_per_worker": 0.5}, "objectives": {"brief": {"reward": "brevity"}}}
    return parse({"run": "r", "storage": str(tmp_path), **settings})


def work(attempts: Path, errors: list[Exception | None], group: WorkerGroup) -> None:
    """Fails as the next of the errors says; None: the process dies."""
    with attempts.open("a") as file:
        file.write("x")
    number = attempts.stat().st_size
    if number <= len(errors):
        error = errors[number - 1]
        if error is None:
            os._exit(1)
        raise error


def attempt(config: Config, tmp_path: Path, errors: list[Exception | None]) -> None:
    """Launch work that fails so; tmp_path/attempts grows by a byte whenever it begins."""
    attempts = tmp_path / "attempts"
    try:
        launch.run(Launch("train i0 x", "train i0", partial(work, attempts, errors), config, start_progress_actor()))
    finally:
        assert attempts.stat().st_size <= len(errors) + 1


@pytest.mark.long
def test_lost_workers_and_connections_are_replaced_and_an_exception_is_not(config: Config, tmp_path: Path) -> None:
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:4711")
    with pytest.raises(StageError, match=r"^train i0 x: ValueError: no SDPA here \(.*\)$"):
        attempt(config, tmp_path, [None, lost, ValueError("no SDPA\nhere"), None])
    assert (tmp_path / "attempts").stat().st_size == 3


class Fatal:
    """Ends a process that unpickles it: once the controller, or once a worker while it is handed its work."""

    def __init__(self, death_file: Path, of_controller: bool):
        self.death_file, self.of_controller = death_file, of_controller

    def __reduce__(self) -> tuple[object, ...]:
        return unpickled, (self.death_file, self.of_controller)


def unpickled(death_file: Path, of_controller: bool) -> Fatal:
    is_handed_work = any(frame.function == "run_train_fn" for frame in inspect.stack())
    is_worker = get_current_placement_group() is not None
    is_fatal = not is_worker if of_controller else is_handed_work
    if is_fatal and not death_file.exists():
        death_file.touch()
        os._exit(1)
    return Fatal(death_file, of_controller)


def finish(fatal: Fatal, group: WorkerGroup) -> None:
    assert fatal.death_file.exists()


@pytest.mark.long
@pytest.mark.parametrize("of_controller", [False, True])
def test_a_process_that_is_lost_before_the_work_begins_leaves_no_cores_behind(
    config: Config, tmp_path: Path, of_controller: bool
) -> None:
    fatal = Fatal(tmp_path / "death", of_controller)
    launch.run(Launch("train i0 x", "train i0", partial(finish, fatal), config, start_progress_actor()))
    assert fatal.death_file.exists()
    deadline = time.monotonic() + 60
    while any(group["state"] != "REMOVED" for group in placement_group_table().values()):
        assert time.monotonic() < deadline, placement_group_table()
        time.sleep(0.2)


def test_a_training_without_room_says_so_until_it_is_stopped(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    large = config.model_copy(update={"train": config.train.model_copy(update={"cpus_per_worker": 1000.0})})
    progress, told = start_progress_actor(), ""
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(
            launch.run, Launch("train i0 x", "train i0", partial(work, tmp_path / "attempts", []), large, progress)
        )
        deadline = time.monotonic() + 60
        while "waits for room for 1 workers" not in told:
            assert time.monotonic() < deadline
            assert not running.done()
            time.sleep(0.1)
            told += capsys.readouterr().err
        ray.get(progress.stop.remote())
        running.result(timeout=60)
    assert not (tmp_path / "attempts").exists()


def test_a_worker_that_was_asked_to_stop_is_no_failure_of_its_own(config: Config, tmp_path: Path) -> None:
    attempt(config, tmp_path, [Stopped(), None])
    assert (tmp_path / "attempts").stat().st_size == 1


def test_a_user_error_of_a_worker_keeps_its_line(config: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^value\.layers is 9 but there are 2: use 2$"):
        attempt(config, tmp_path, [ValueModelError("value.layers is 9 but there are 2: use 2"), None])
    assert (tmp_path / "attempts").stat().st_size == 1

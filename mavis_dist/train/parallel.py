"""All objectives at the same time: one Ray Train run each, started from threads of the driver."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from mavis_dist import cluster
from mavis_dist.cluster import Watch, wait_for
from mavis_dist.config import Config
from mavis_dist.store.files import Store
from mavis_dist.train.course import Course
from mavis_dist.train.data import Fit
from mavis_dist.types import Stopped, UserError

DEATHS = 3  # of workers, from which one training recovers


def fit_all(fits: Sequence[Fit], config: Config, at_once: int, board: Any) -> None:
    """Train every value model, `at_once` at a time; the first failure is raised when all have ended."""
    stage = f"train i{fits[0].iteration}"

    def fit(item: Fit) -> None:
        arguments = {"fit": item, "config": config, "stage": stage, "board": board}
        run(_fit, arguments, f"{stage} {item.objective}", config)

    with ThreadPoolExecutor(at_once, thread_name_prefix="fit") as pool:
        wait_for([pool.submit(fit, item) for item in fits], Watch(board, stage, "steps"))


def distill(course: Course, board: Any) -> None:
    """One distillation, with its progress on stderr. It keeps nothing when it is stopped."""
    stage = "distill"
    with ThreadPoolExecutor(1, thread_name_prefix=stage) as pool:
        future = pool.submit(run, _distill, {"course": course, "board": board, "stage": stage}, stage, course.config)
        wait_for([future], Watch(board, stage, "steps"))


def run(function: Callable[[Any], None], argument: Any, name: str, config: Config) -> None:
    """`function(argument)` on `train.workers` workers in a process group; again if one of them dies.

    What is done again must go on by itself from what it has stored. Input that cannot be used is raised at once.
    """
    for deaths in range(DEATHS + 1):
        cluster.check_stop()
        try:
            _run_once({"function": function, "argument": argument, "config": config}, config)
            return
        except TrainingFailedError as error:
            cluster.check_stop()
            failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else ()
            if refused := next((failure for failure in failures if isinstance(failure, UserError)), None):
                raise refused from None
            if deaths == DEATHS:
                raise
            cluster.say(name, "a worker died; going on from the newest checkpoint")


def _run_once(arguments: dict[str, Any], config: Config) -> None:
    # Checkpoints go to the project's own store. Ray Train's folder holds bookkeeping only, in a new place every time:
    # it is not written atomically, and a torn file would stop the next attempt.
    folder, name = "train/.ray", uuid.uuid4().hex
    store, train = Store(config.storage, config.run), config.train
    trainer = TorchTrainer(
        _call,
        train_loop_config=arguments,
        scaling_config=ScalingConfig(
            num_workers=train.workers,
            use_gpu=train.gpus_per_worker > 0,
            resources_per_worker={"CPU": train.cpus_per_worker, "GPU": train.gpus_per_worker},
        ),
        torch_config=TorchConfig(backend="nccl" if train.gpus_per_worker > 0 else "gloo"),
        run_config=RunConfig(name=name, storage_path=store.uri(folder)),
    )
    try:
        trainer.fit()
    finally:
        store.delete(f"{folder}/{name}")


def _call(arguments: dict[str, Any]) -> None:
    """What every worker does first: its share of the cores, and DeepSpeed's knowledge of who is on the same machine."""
    import torch

    torch.set_num_threads(max(1, int(arguments["config"].train.cpus_per_worker)))
    os.environ.setdefault("LOCAL_SIZE", str(ray.train.get_context().get_local_world_size()))
    arguments["function"](arguments["argument"])


def _fit(arguments: dict[str, Any]) -> None:
    from mavis_dist.train.fit import train

    fit, config, board, stage = (arguments[key] for key in ("fit", "config", "board", "stage"))
    train(fit, config, Store(config.storage, config.run), make_team(board, stage, fit.objective))


def _distill(arguments: dict[str, Any]) -> None:
    from mavis_dist.train import course

    board, stage, is_first = arguments["board"], arguments["stage"], ray.train.get_context().get_world_rank() == 0

    def progress(part: str, done: int, total: int, text: str) -> None:
        if ray.get(board.is_stopping.remote(), timeout=60):
            raise Stopped
        if is_first:
            board.post.remote(stage, part, done, total, text)

    course.distill(arguments["course"], progress)


def make_team(board: Any, stage: str, part: str) -> Any:
    """This Ray Train worker's place among the others, with the board as its voice and ear."""
    from mavis_dist.train.team import Team

    context = ray.train.get_context()
    rank = context.get_world_rank()

    def progress(done: int, total: int, text: str) -> None:
        if rank == 0:
            board.post.remote(stage, part, done, total, text)

    return Team(rank, context.get_world_size(), progress, lambda: ray.get(board.is_stopping.remote(), timeout=60))

"""All objectives at the same time: one Ray Train run each, started from threads of the driver."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import WorkerGroupError

from mavis_dist.cluster import Watch, wait_for
from mavis_dist.config import Config
from mavis_dist.train.fit import Fit
from mavis_dist.types import UserError


def fit_all(fits: Sequence[Fit], config: Config, at_once: int, board: Any) -> None:
    """Train every value model, `at_once` at a time; the first failure is raised when all have ended."""
    stage = f"train i{fits[0].iteration}"
    with ThreadPoolExecutor(at_once, thread_name_prefix="fit") as pool:
        wait_for([pool.submit(_fit, fit, config, stage, board) for fit in fits], Watch(board, stage, "steps"))


def _fit(fit: Fit, config: Config, stage: str, board: Any) -> None:
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"fit": fit, "config": config, "stage": stage, "board": board},
        scaling_config=ScalingConfig(
            num_workers=config.train.workers,
            use_gpu=config.train.gpus_per_worker > 0,
            resources_per_worker={"CPU": config.train.cpus_per_worker, "GPU": config.train.gpus_per_worker},
        ),
        torch_config=TorchConfig(backend="nccl" if config.train.gpus_per_worker > 0 else "gloo"),
        # Checkpoints of this project go to its own store: Ray Train's own folder holds bookkeeping only.
        run_config=RunConfig(
            name=f"{config.run}-{fit.objective}-i{fit.iteration}", storage_path=_bookkeeping_folder(config)
        ),
    )
    try:
        trainer.fit()
    except WorkerGroupError as error:
        for failure in error.worker_failures.values():
            if isinstance(failure, UserError):
                raise failure from None
        raise


def _bookkeeping_folder(config: Config) -> str:
    return f"{config.storage.rstrip('/')}/{config.run}/train/.ray"


def _worker(arguments: dict[str, Any]) -> None:
    import torch

    from mavis_dist.store.files import Store
    from mavis_dist.train.fit import train

    fit, config, board = arguments["fit"], arguments["config"], arguments["board"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    torch.set_num_threads(max(1, int(config.train.cpus_per_worker)))
    os.environ.setdefault("LOCAL_SIZE", str(context.get_local_world_size()))

    def progress(done: int, total: int, text: str) -> None:
        if rank == 0:
            board.post.remote(arguments["stage"], fit.objective, done, total, text)

    train(fit, config, Store(config.storage, config.run), rank, context.get_world_size(), progress)


def run(function: Callable[[Any], None], arguments: Any, name: str, config: Config) -> None:
    """Call `function(arguments)` on every training worker of one process group; the first failure is raised."""
    trainer = TorchTrainer(
        _call,
        train_loop_config={"function": function, "arguments": arguments, "config": config},
        scaling_config=ScalingConfig(
            num_workers=config.train.workers,
            use_gpu=config.train.gpus_per_worker > 0,
            resources_per_worker={"CPU": config.train.cpus_per_worker, "GPU": config.train.gpus_per_worker},
        ),
        torch_config=TorchConfig(backend="nccl" if config.train.gpus_per_worker > 0 else "gloo"),
        run_config=RunConfig(name=f"{config.run}-{name}", storage_path=_bookkeeping_folder(config)),
    )
    try:
        trainer.fit()
    except WorkerGroupError as error:
        for failure in error.worker_failures.values():
            if isinstance(failure, UserError):
                raise failure from None
        raise


def _call(arguments: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(max(1, int(arguments["config"].train.cpus_per_worker)))
    os.environ.setdefault("LOCAL_SIZE", str(ray.train.get_context().get_local_world_size()))
    arguments["function"](arguments["arguments"])

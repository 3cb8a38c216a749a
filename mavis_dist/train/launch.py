"""Training under Ray Train: one run per value model or distillation, started from threads of the driver."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import ray
import ray.train
from ray.core.generated.gcs_pb2 import ActorTableData  # type: ignore[attr-defined]  # its module is made at run time
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import RayTrainError, WorkerGroupStartupTimeoutError
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from torch.distributed import DistError

from mavis_dist import cluster
from mavis_dist.actors import Progress, ProgressReader, wait_for
from mavis_dist.config import Config
from mavis_dist.failures import failure_of, last_words
from mavis_dist.progress import say
from mavis_dist.store import layout
from mavis_dist.store.files import Store
from mavis_dist.train.data import Fit
from mavis_dist.train.distill.job import DistillJob
from mavis_dist.train.worker_group import WorkerGroup
from mavis_dist.types import Stopped, UserError

MAX_DEATHS = 3  # of workers, after which one launch gives up
# NCCL reports these where another attempt would be the same, such as two workers on one GPU.
MISUSE = re.compile(r"nccl.*(invalid ?usage|invalid ?argument|duplicate gpu)", re.IGNORECASE | re.DOTALL)
CONNECTION = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out", re.IGNORECASE)


class TrainingLost(UserError):
    """A training whose workers keep being lost."""


@dataclass(frozen=True)
class Launch:
    """One Ray Train run: `train.workers` workers in a process group, which all call `work`."""

    name: str  # in messages
    stage: str  # whose progress the workers post
    work: Callable[[WorkerGroup], object]  # crosses processes; must resume by itself from what it has stored
    config: Config
    progress: Progress


def fit_all(fits: Sequence[Fit], config: Config, at_once: int, progress: Progress) -> None:
    """Train every value model, `at_once` at a time; raises the first failure once all have ended."""
    stage = f"train i{fits[0].iteration}"
    run_all(
        [Launch(f"{stage} {fit.name}", stage, partial(_fit, fit, config), config, progress) for fit in fits],
        at_once,
    )


def distill(job: DistillJob, progress: Progress) -> None:
    """Run one distillation, with progress on stderr."""
    run_all([Launch("distill", "distill", partial(_distill, job), job.config, progress)], at_once=1)


def run_all(launches: Sequence[Launch], at_once: int) -> None:
    """Run launches of one stage, `at_once` at a time, and print their progress until all have ended."""
    reader = ProgressReader(launches[0].progress, launches[0].stage, "steps")
    with ThreadPoolExecutor(at_once, thread_name_prefix="launch") as threads:
        futures: list[Future[None]] = [threads.submit(run, launch) for launch in launches]
        wait_for(futures, reader)


def run(launch: Launch) -> None:
    """Run until the work is done, restarting after the loss of a worker, or until the others are asked to stop.

    Raises:
        UserError: what a worker has raised, at once, or workers that keep being lost.
    """
    deaths = 0
    while not ray.get(launch.progress.is_stopping.remote()):
        cluster.check_stop()
        try:
            _run_once(launch)
            return
        except (TrainingFailedError, ray.exceptions.RayActorError) as error:  # the second: its controller is lost
            free_cores_of_dead_workers()
            cluster.check_stop()
            failures = failures_of(error)
            if any(isinstance(failure, Stopped) for failure in failures):
                return  # since another launch has failed, whose reason is the one to tell
            if any(isinstance(failure, WorkerGroupStartupTimeoutError) for failure in failures):
                say(launch.name, f"waits for room for {launch.config.train.workers} workers")
                continue
            if (raised := raised_by_workers(error)) is not None:
                raise failure_of(launch.name, raised, str(error)) from error
            deaths += 1
            if deaths > MAX_DEATHS:
                raise TrainingLost(
                    f"{launch.name}: workers were lost {deaths} times ({last_words(error)}): give them more memory, or "
                    "lower train.trees_per_step, and run again; what is finished stays"
                ) from error
            say(launch.name, "a worker died; resuming from the newest checkpoint")


def free_cores_of_dead_workers() -> None:
    """Remove the placement groups of this job's Ray Train runs that have no living worker.

    Ray Train itself forgets the group of workers that are lost while it hands them their work; where no cores are left
    beside it, the next attempt would wait forever.
    """
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    # From the control store itself: the State API is of the dashboard, which not every cluster runs.
    rows = ray._private.state.state._connect_and_get_accessor().get_actor_table(job, None)
    workers = [actor for actor in map(ActorTableData.FromString, rows) if actor.class_name == "RayTrainWorker"]
    held = {worker.placement_group_id for worker in workers}
    used = {worker.placement_group_id for worker in workers if worker.state != ActorTableData.DEAD}
    for found in held - used:
        group = PlacementGroup(ray.PlacementGroupID(found))
        if placement_group_table(group).get("state") != "REMOVED":
            remove_placement_group(group)


def raised_by_workers(error: TrainingFailedError | ray.exceptions.RayActorError) -> Exception | None:
    """The exception that ended a training and would end it again; None: processes or machines were lost, or the
    connections between them, which is how workers notice the loss of another one.
    """
    failures = failures_of(error)
    if refused := next((failure for failure in failures if isinstance(failure, UserError)), None):
        return refused
    return None if not failures or any(map(_is_loss, failures)) else failures[0]


def failures_of(error: TrainingFailedError | ray.exceptions.RayActorError) -> list[Exception]:
    """What the workers, or the controller, of a training have ended with."""
    if isinstance(error, WorkerGroupError):
        return list(error.worker_failures.values())
    return [error.controller_failure] if isinstance(error, ControllerError) else []


def _is_loss(failure: Exception) -> bool:
    if isinstance(failure, ray.exceptions.RayTaskError):
        return _is_loss(failure.cause) if isinstance(failure.cause, Exception) else False
    if MISUSE.search(str(failure)):
        return False
    if isinstance(failure, (ray.exceptions.RayError, RayTrainError, ConnectionError, DistError)):
        return True
    # Gloo raises plain RuntimeErrors.
    return isinstance(failure, RuntimeError) and CONNECTION.search(str(failure)) is not None


def _run_once(launch: Launch) -> None:
    # Checkpoints go to the project's own store. Ray Train's folder holds bookkeeping only, in a new place each time:
    # it is not written atomically, and a torn file would stop the next attempt.
    name, train = uuid.uuid4().hex, launch.config.train
    store = Store(launch.config.storage, launch.config.run)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"launch": launch},
        scaling_config=ScalingConfig(
            num_workers=train.workers,
            use_gpu=train.gpus_per_worker > 0,
            resources_per_worker={"CPU": train.cpus_per_worker, "GPU": train.gpus_per_worker},
        ),
        torch_config=TorchConfig(backend="nccl" if train.gpus_per_worker > 0 else "gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=store.uri(layout.RAY_TRAIN_FOLDER),
            # Ray Train itself would wait for room without end, and without hearing a stop.
            failure_config=FailureConfig(controller_failure_limit=0),
        ),
    )
    try:
        trainer.fit()
    finally:
        store.delete(f"{layout.RAY_TRAIN_FOLDER}/{name}")


def _work(arguments: dict[str, Launch]) -> None:
    """Entry point of a worker: sets its share of the cores and the local size that DeepSpeed reads, then works."""
    import torch

    launch = arguments["launch"]
    torch.set_num_threads(max(1, int(launch.config.train.cpus_per_worker)))
    os.environ.setdefault("LOCAL_SIZE", str(ray.train.get_context().get_local_world_size()))
    launch.work(_worker_group(launch))


def _worker_group(launch: Launch) -> WorkerGroup:
    """This worker's view of the group; worker 0 posts the progress."""
    context, actor = ray.train.get_context(), launch.progress
    rank = context.get_world_rank()

    def post(part: str, done: int, total: int, text: str) -> None:
        if rank == 0:
            actor.post.remote(launch.stage, part, done, total, text)

    def wants_stop() -> bool:
        return bool(ray.get(actor.is_stopping.remote(), timeout=60))

    return WorkerGroup(rank, context.get_world_size(), post, wants_stop)


# These import in the workers: the driver needs neither DeepSpeed nor the training code.


def _fit(fit: Fit, config: Config, group: WorkerGroup) -> None:
    from mavis_dist.train import fit as models
    from mavis_dist.train import heads

    train = heads.train if config.value.kind == "states" else models.train
    train(fit, config, Store(config.storage, config.run), group)


def _distill(job: DistillJob, group: WorkerGroup) -> None:
    from mavis_dist.train.distill.job import distill

    distill(job, group)

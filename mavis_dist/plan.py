"""Resource planning before anything is placed: config and cluster resources -> what runs at the same time.

No torch, no ray: a plan can be made for a cluster that does not exist yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from mavis_dist.config import Config
from mavis_dist.sections import bounds
from mavis_dist.types import UserError

Shard = TypeVar("Shard")

MANY = 1_000_000  # workers that need nothing


class PlanError(UserError):
    """A cluster that is too small for the config."""


@dataclass(frozen=True)
class Node:
    """One machine's resources, as Ray counts them."""

    cpus: float
    gpus: float = 0.0

    def slots(self, cpus: float, gpus: float) -> int:
        """How many workers of this size fit on the machine."""
        by_cpus = _times(self.cpus, cpus)
        # Ray splits a GPU among workers, but not a worker's fraction among GPUs.
        by_gpus = int(self.gpus) * _times(1, gpus) if 0 < gpus < 1 else _times(self.gpus, gpus)
        return min(by_cpus, by_gpus)


@dataclass(frozen=True)
class Plan:
    fits_at_once: int  # objectives that train at the same time
    notes: tuple[str, ...]  # what does not fit at once, and what happens instead


def make_plan(config: Config, nodes: Sequence[Node]) -> Plan:
    """Raises PlanError with the key, its value and the remedy if something can never run on these machines."""
    has, rollout, size = _has(nodes), config.rollout, config.base.tensor_parallel

    _check_gpus(config, rollout.gpus_per_actor, "rollout.gpus_per_actor")
    processes = sum(node.slots(rollout.cpus_per_actor, rollout.gpus_per_actor) for node in nodes)
    if 0 < processes < size:
        raise PlanError(
            f"base.tensor_parallel={size} processes with {rollout.cpus_per_actor:g} CPU + {rollout.gpus_per_actor:g} "
            f"GPU each (rollout.cpus_per_actor, rollout.gpus_per_actor) do not fit on the cluster ({has}, room for "
            f"{processes}): lower one of the keys or add machines"
        )
    actors = processes // size
    if actors < 1:
        raise PlanError(
            f"rollout.cpus_per_actor={rollout.cpus_per_actor:g} and rollout.gpus_per_actor={rollout.gpus_per_actor:g} "
            f"fit on no machine of the cluster ({has}): lower them or add a machine"
        )
    at_once, notes = check_training(config, nodes), []
    if actors < rollout.actors:
        notes.append(f"rollout.actors is {rollout.actors} but {actors} fit: the others start when there is room")
    fits_at_once = min(at_once, len(config.objectives))
    is_one_fit = config.value.is_joint and config.iterations == 1
    if fits_at_once < len(config.objectives) and not is_one_fit:
        notes.append(f"{fits_at_once} of {len(config.objectives)} objectives train at the same time, the others wait")
    return Plan(fits_at_once, tuple(notes))


def check_training(config: Config, nodes: Sequence[Node]) -> int:
    """How many trainings have room at the same time; raises PlanError if none has."""
    train = config.train
    workers = sum(node.slots(train.cpus_per_worker, train.gpus_per_worker) for node in nodes)
    if workers < train.workers:
        raise PlanError(
            f"train.workers={train.workers} with {train.cpus_per_worker:g} CPU + {train.gpus_per_worker:g} GPU each do "
            f"not fit on the cluster ({_has(nodes)}, room for {workers}): lower train.workers or add machines"
        )
    return workers // train.workers


def tasks_of(shards: Sequence[Shard], num_sets: int, nodes: Sequence[Node]) -> list[Sequence[Shard]]:
    """The shards of one of several sets, in as few parts as let tasks of one core keep all machines busy: each task
    loads the model behind its reward.
    """
    cores = sum(int(node.cpus) for node in nodes)
    num_parts = max(1, min(len(shards), -(-cores // num_sets)))
    ends = [part * len(shards) // num_parts for part in range(num_parts + 1)]
    return [shards[start:end] for start, end in pairwise(ends)]


def check_serving(config: Config, nodes: Sequence[Node], num_objectives: int | None = None) -> None:
    """Raises PlanError if the replicas that the service starts with can never be placed.

    Only the lower end of a range counts: the cluster may grow before more replicas are needed.

    Args:
        num_objectives: published ones, which may be others than those of the config; None: as many.
    """
    serve = config.serve
    _check_gpus(config, serve.gpus_per_replica, "serve.gpus_per_replica")
    num_models = bounds(serve.base_replicas).min * config.base.tensor_parallel
    if serve.placement == "replicas":
        count = len(config.objectives) if num_objectives is None else num_objectives
        num_models += bounds(serve.value_replicas).min * count
    cpus, gpus = (num_models + 1) * serve.cpus_per_replica, num_models * serve.gpus_per_replica
    slots = [node.slots(serve.cpus_per_replica, serve.gpus_per_replica) for node in nodes]
    # For models, with the gateway on each of the machines that have room for it.
    rooms = [
        sum(slots) - slot + min(slot, room - 1)
        for node, slot in zip(nodes, slots, strict=True)
        if (room := node.slots(serve.cpus_per_replica, 0)) > 0
    ]
    if num_models > max(rooms, default=-1):
        remedy = ", base.tensor_parallel" if config.base.tensor_parallel > 1 else ""
        raise PlanError(
            f"the service needs {cpus:g} CPU + {gpus:g} GPU for {num_models} processes with models and a gateway, the "
            f"cluster has {_has(nodes)}: lower serve.cpus_per_replica, serve.base_replicas{remedy} or "
            "serve.value_replicas, or add machines"
        )


def _times(have: float, need: float) -> int:
    """How often there is as much as needed: 0.1 three times in 0.3."""
    return int(round(have / need, 6)) if need > 0 else MANY


def _has(nodes: Sequence[Node]) -> str:
    return ", ".join(f"{n.cpus:g} CPU + {n.gpus:g} GPU" for n in nodes) or "no machine"


def _check_gpus(config: Config, gpus: float, key: str) -> None:
    """Raises PlanError if processes that share a model would have to share a GPU, which NCCL refuses."""
    base = config.base
    if base.tensor_parallel > 1 and base.device.startswith("cuda") and (gpus < 1 or base.device != "cuda"):
        raise PlanError(
            f"base.tensor_parallel={base.tensor_parallel} with base.device={base.device} and {key}={gpus:g}: each "
            f"process needs a GPU of its own, set base.device=cuda and {key}=1"
        )

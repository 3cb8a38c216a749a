"""Groups of processes that share one base model: their placement, start and health. One process alone is a group, too.

The leader is the actor or replica that uses the model; it starts the others beside it, in its placement group, so that
Ray ends them with it. A leader whose group is lost ends its process: whoever waits for it treats that as a lost actor.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from mavis_dist import environment  # isort: split

import ray
import torch
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from mavis_dist.config import Config
from mavis_dist.failures import failure_of, last_words
from mavis_dist.models.load import BaseModel, fingerprints, load_base, load_skeleton
from mavis_dist.models.lockstep import GroupLost, Leader, Place, Shard, check_shards, meeting_point
from mavis_dist.types import UserError

HEALTH_S = 5.0  # that a follower has to answer when Serve asks
WATCH_S = 30.0  # and when its leader does: a follower that reads weights may answer late
STRATEGY = "PACK"  # on one machine, if it has room
STAGE = "base model"
FINGERPRINT, TOKENIZER = "the fingerprint of base.model", "the fingerprint of its tokenizer"
Alike = tuple[str, Mapping[str, str]]  # a machine, and what has to be the same on all machines

logger = logging.getLogger(__name__)


@ray.remote(concurrency_groups={"health": 1})  # type: ignore[call-overload]
class Follower:
    """A process of a group, other than the leader."""

    def __init__(self, cpus: float):
        torch.set_num_threads(max(1, int(cpus)))
        self._shard: Shard | None = None

    def versions(self) -> Alike:
        """Of this process."""
        return platform.node(), environment.versions()

    def join(self, place: Place, model: str, dtype: str, device: str) -> Alike:
        """Load the shard of this place; the fingerprint of the model's files."""
        _hide_gpus(device)
        self._shard = Shard(place, device)
        base = load_base(model, dtype, device, place.size)
        self._shard.hold(base.model)
        return platform.node(), files_of(base)

    def follow(self) -> None:
        """Make the leader's calls until the group ends; the process ends with it."""
        assert self._shard is not None
        try:
            self._shard.follow()
        except Exception:  # the leader has ended, or this process's part of a call has failed
            logger.exception("the group has ended")
        os._exit(1)

    @ray.method(concurrency_group="health")
    def check(self) -> None:
        """Returns at once."""


class BaseGroup:
    """A base model, computed by this process alone or as the leader of a group."""

    base: BaseModel

    def __init__(
        self,
        model: str,
        dtype: str,
        device: str,
        *,
        size: int = 1,
        cpus: float = 1.0,
        gpus: float = 0.0,
        engine: str = "builtin",
        rows: int = 1,
    ):
        """Load it; `cpus` and `gpus` are those of every process, `rows` the most that vLLM computes at a time.

        Raises:
            UserError: so many processes cannot share the model, or a machine has another one, or other versions of
                what computes it.
        """
        self._followers: list[ActorHandle[Follower]] = []
        if engine == "vllm":
            from mavis_dist.vllm.rows import load_base as load_for_vllm  # needs packages that only vLLM's users have

            self.base = load_for_vllm(model, dtype, device, rows)
            return
        if size == 1:
            self.base = load_base(model, dtype, device)
            return
        _hide_gpus(device)
        self._followers = [_follower(rank, cpus, gpus) for rank in range(1, size)]
        check_shards(load_skeleton(model, dtype).model, model, size)  # while the others start
        try:
            _check_alike(environment.versions(), _get([one.versions.remote() for one in self._followers]))
            threading.Thread(target=self._watch, name="followers", daemon=True).start()
            self._gather(model, dtype, device, size)
        except ray.exceptions.RayActorError as error:
            _end(GroupLost(f"a process of the group has died while it started ({last_words(error)})"))
        for follower in self._followers:
            follower.follow.remote()

    async def check(self) -> None:
        """Raises GroupLost unless all processes answer."""
        try:
            await asyncio.wait_for(asyncio.gather(*(one.check.remote() for one in self._followers)), HEALTH_S)
        except (ray.exceptions.RayError, asyncio.TimeoutError) as error:
            raise GroupLost(f"a process of the base model's group does not answer ({last_words(error)})") from error

    def _gather(self, model: str, dtype: str, device: str, size: int) -> None:
        """Load all shards at the same time, each in its process."""
        host = ray.util.get_node_ip_address()
        if host.startswith("127."):  # a cluster of one machine: nobody else has to connect
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = meeting_point(host, size)
        first, *others = (Place(rank, size, host, store.port) for rank in range(size))
        joining = [
            follower.join.remote(place, model, dtype, device)
            for follower, place in zip(self._followers, others, strict=True)
        ]
        try:
            shard = Shard(first, device, store)
            self.base = load_base(model, dtype, device, size)
        except (RuntimeError, UserError):
            _get(joining)  # where another process has failed first, its reason is the better one
            raise
        _check_alike(files_of(self.base), _get(joining))
        Leader(shard, self.base.model, _end)

    def _watch(self) -> None:
        """End this process once a follower does not answer: it may be waiting for it without a limit."""
        while True:
            try:
                ray.get([one.check.remote() for one in self._followers], timeout=WATCH_S)
            except ray.exceptions.RayError as error:
                _end(GroupLost(f"a process of the group does not answer ({last_words(error)})"))
            time.sleep(HEALTH_S)


def files_of(base: BaseModel) -> dict[str, str]:
    """What has to be the same of a model on all machines."""
    return {FINGERPRINT: base.fingerprint, TOKENIZER: base.tokenizer_fingerprint}


def rollout_group(config: Config, driver: Alike) -> BaseGroup:
    """The base model of an actor that works for a run; raises UserError if the driver has another one."""
    base, rollout = config.base, config.rollout
    torch.set_num_threads(max(1, int(rollout.cpus_per_actor)))
    group = BaseGroup(
        base.model,
        base.dtype,
        base.device,
        size=base.tensor_parallel,
        cpus=rollout.cpus_per_actor,
        gpus=rollout.gpus_per_actor,
        engine=base.engine,
        rows=rollout.rows,
    )
    _check_alike({**environment.versions(), **files_of(group.base)}, [driver])
    return group


class LeaderStarter:
    """Starts actors that use `rollout_group`, each in a placement group of its own, and ends them with it."""

    def __init__(self, actor: Any, config: Config):
        """`actor`: a Ray actor class that takes what `rollout_group` does."""
        self._actor, self._config = actor, config
        files = dict(zip((FINGERPRINT, TOKENIZER), fingerprints(config.base.model), strict=True))
        self._driver: Alike = platform.node(), {**environment.versions(), **files}
        self._placed: dict[ActorHandle[Any], PlacementGroup] = {}

    def start(self) -> ActorHandle[Any]:
        size, rollout = self._config.base.tensor_parallel, self._config.rollout
        options: dict[str, Any] = {"num_cpus": rollout.cpus_per_actor, "num_gpus": rollout.gpus_per_actor}
        placed = None
        if size > 1:
            placed = placement_group(bundles(size, rollout.cpus_per_actor, rollout.gpus_per_actor), strategy=STRATEGY)
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                placed, 0, placement_group_capture_child_tasks=True
            )
        actor: ActorHandle[Any] = self._actor.options(**options).remote(self._config, self._driver)
        if placed is not None:
            self._placed[actor] = placed
        return actor

    def stop(self, actor: ActorHandle[Any]) -> None:
        ray.kill(actor)
        if (placed := self._placed.pop(actor, None)) is not None:
            remove_placement_group(placed)


def bundles(size: int, cpus: float, gpus: float) -> list[dict[str, float]]:
    """What a group reserves, a bundle for each of its processes."""
    one = {name: count for name, count in (("CPU", cpus), ("GPU", gpus)) if count > 0}
    return [one or {"CPU": 0.001}] * size  # Ray refuses empty ones


def _check_alike(own: Mapping[str, str], others: Sequence[Alike]) -> None:
    """Raises UserError unless all processes have the same as this one."""
    for machine, theirs in others:
        for topic, value in own.items():
            if theirs[topic] != value:
                raise UserError(
                    f"{topic} is {value} on machine {platform.node()}, and {theirs[topic]} on machine {machine}: make "
                    "them the same"
                )


def _follower(rank: int, cpus: float, gpus: float) -> ActorHandle[Follower]:
    """The process of a rank, in the bundle of this rank where the leader has a placement group."""
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus}
    if (placed := ray.util.get_current_placement_group()) is not None:
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(placed, rank)
    return Follower.options(**options).remote(cpus)  # type: ignore[attr-defined]


def _hide_gpus(device: str) -> None:
    """transformers shards a model over the accelerators that it finds, whatever the device is."""
    if torch.device(device).type == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _get(refs: Sequence[ray.ObjectRef[Any]]) -> list[Any]:
    try:
        return ray.get([*refs])
    except ray.exceptions.RayTaskError as error:
        raise failure_of(STAGE, error) from error


def _end(lost: GroupLost) -> NoReturn:
    """End this process: what it holds is of no use without the others."""
    logger.error("%s; this process ends, to be started again with a new group", lost)
    os._exit(1)

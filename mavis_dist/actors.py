"""Ray actors of the driver: the worker pool, and progress across processes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count as count_up
from typing import Any, Generic, TypeAlias, TypeVar, cast

from mavis_dist import environment as environment  # isort: split

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mavis_dist.cluster import check_stop, is_stopping
from mavis_dist.failures import failure_of
from mavis_dist.progress import Meter, StallWarning, say
from mavis_dist.types import UserError

Settings = TypeVar("Settings")
Item = TypeVar("Item")
Result = TypeVar("Result")

POLL_S = 1.0
DEATHS_WITHOUT_RESULT = 5
# An actor, its machine, or what it returned. All others, as an environment that cannot be set up, would come again.
LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
)


class WorkerPoolError(UserError):
    """Actors that keep dying."""


@ray.remote(num_cpus=0)
class ProgressActor:
    """Collects the progress of workers for the driver, and relays its stop request to them."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[str, tuple[int, int, str]]] = {}
        self._is_stopping = False

    def stop(self) -> None:
        """Ask all workers to save and stop."""
        self._is_stopping = True

    def is_stopping(self) -> bool:
        return self._is_stopping

    def post(self, stage: str, part: str, done: int, total: int, text: str = "") -> None:
        self._parts.setdefault(stage, {})[part] = (done, total, text)

    def read(self, stage: str) -> dict[str, tuple[int, int, str]]:
        return dict(self._parts.get(stage, {}))


Progress: TypeAlias = ActorHandle[ProgressActor]


def start_progress_actor() -> Progress:
    """Start the actor on the driver's machine, so that losing another machine does not take it away."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ProgressActor.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


class ProgressReader:
    """Prints the progress that workers post for one stage."""

    def __init__(self, actor: Progress, stage: str, unit: str):
        self.actor, self._stage = actor, stage
        self._meter = Meter(stage, unit)

    def show(self, final: bool = False) -> None:
        parts = cast("dict[str, tuple[int, int, str]]", ray.get(self.actor.read.remote(self._stage), timeout=60))
        if total := sum(part[1] for part in parts.values()):
            text = ", ".join(f"{name} {part[2]}" for name, part in parts.items() if part[2])
            self._meter.show(sum(part[0] for part in parts.values()), total, text, final)


@dataclass(frozen=True)
class Turn(Generic[Result]):
    """What an actor returns from a call."""

    results: list[Result]
    unfinished: frozenset[int]  # numbers of its items with further results
    has_room: bool  # for another item


class WorkerPool(Generic[Settings, Item, Result]):
    """Actors that work on one queue, each on as many items as it has room for. Actors may start late or die; others
    restart the items of a dead one. An item must give the same results on every actor and in every attempt.

    Ray's own ActorPool neither replaces dead actors nor streams the results of an item.
    """

    def __init__(
        self,
        start: Callable[[], ActorHandle[Any]],
        count: int,
        stop: Callable[[ActorHandle[Any]], None] = ray.kill,
    ):
        """`start` creates an actor with a method `work(settings: Settings, item: tuple[int, Item] | None) -> Turn`. It
        starts a numbered item, or continues what it has if given None, until there is a result. `stop` ends one, also
        after its death.
        """
        self._start, self._stop = start, stop
        self._calls: dict[ray.ObjectRef[Any], ActorHandle[Any]] = {}  # under way
        self._idle: list[ActorHandle[Any]] = []  # actors that have loaded their models
        self._busy: dict[ActorHandle[Any], dict[int, Item]] = {}  # their unfinished items by number
        self._numbers = count_up()
        self._num_deaths = 0  # since the last result
        for _ in range(count):
            self._add_actor()

    def run(self, stage: str, settings: Settings, items: Iterable[Item]) -> Iterator[Result]:
        """All results of all items as they arrive; those of a restarted item arrive again.

        Raises:
            UserError: what an actor has raised, at once: another one would raise it again.
            WorkerPoolError: actors keep dying and no item makes progress.
        """
        queue, stall = deque(items), StallWarning(stage)
        while queue or self._busy:
            check_stop()
            while queue and self._idle:
                self._continue(self._idle.pop(), settings, queue)
            ready, _ = ray.wait(list(self._calls), timeout=POLL_S)
            stall.check(
                bool(ready), f"{len(self._busy)} of {len(self._actors)} actors are working, the others load or wait"
            )
            for ref in ready:
                actor = self._calls.pop(ref)
                try:
                    outcome = ray.get(ref)
                except LOST as error:
                    queue.extendleft(reversed(self._busy.pop(actor, {}).values()))
                    self._replace(stage, actor, error)
                    continue
                except ray.exceptions.RayError as error:
                    self._idle.append(actor)  # to be released
                    raise failure_of(stage, error) from error
                if actor not in self._busy:  # it has loaded
                    self._idle.append(actor)
                    continue
                self._num_deaths = 0
                yield from outcome.results
                self._busy[actor] = {n: self._busy[actor][n] for n in sorted(outcome.unfinished)}
                if outcome.unfinished:
                    self._continue(actor, settings, queue if outcome.has_room else deque())
                else:
                    del self._busy[actor]
                    self._idle.append(actor)

    def _continue(self, actor: ActorHandle[Any], settings: Settings, queue: deque[Item]) -> None:
        """Let an actor work on, with another item if there is one."""
        item = (next(self._numbers), queue.popleft()) if queue else None
        if item is not None:
            self._busy.setdefault(actor, {})[item[0]] = item[1]
        self._calls[actor.work.remote(settings, item)] = actor

    def wait_until_loaded(self, limit_s: float = 600.0) -> None:
        """Wait until all actors are ready; raises GetTimeoutError."""
        ray.get([actor.__ray_ready__.remote() for actor in self._actors], timeout=limit_s)

    def release(self) -> None:
        """Kill the actors to free their cores."""
        for actor in self._actors:
            self._stop(actor)

    @property
    def _actors(self) -> list[ActorHandle[Any]]:
        return [*self._idle, *self._calls.values()]

    def _add_actor(self) -> None:
        """Start an actor. It gets its first item once it is ready; without room on the cluster it never is."""
        actor = self._start()
        self._calls[actor.__ray_ready__.remote()] = actor

    def _replace(self, stage: str, actor: ActorHandle[Any], error: ray.exceptions.RayError) -> None:
        """Replace a dead actor."""
        self._num_deaths += 1
        self._stop(actor)  # an unreachable one may still be alive
        if getattr(error, "actor_init_failed", False):
            raise failure_of(stage, error) from error
        if self._num_deaths > DEATHS_WITHOUT_RESULT:
            raise WorkerPoolError(
                f"{stage}: {self._num_deaths} actors died in a row without any result "
                f"({' '.join(str(error).split())[:300]}): give them more memory, or lower rollout.rows"
            ) from error
        say(stage, "an actor died; its items are started again")
        self._add_actor()


def wait_for(futures: Sequence[Future[Any]], reader: ProgressReader) -> None:
    """Wait for threads of the driver, printing progress; raises the first failure once all have ended.

    A stop of the job, or a failure, is passed on to the progress actor; workers poll it, save their work and end early.
    """
    is_stop_sent = False
    while not all(future.done() for future in futures):
        time.sleep(POLL_S)
        reader.show()
        if not is_stop_sent and (is_stopping() or any(map(_has_failed, futures))):
            is_stop_sent = True
            ray.get(reader.actor.stop.remote(), timeout=60)
            for future in futures:
                future.cancel()  # has no effect on those that have begun
    for future in futures:
        if not future.cancelled():
            future.result()
    check_stop()
    reader.show(final=True)


def _has_failed(future: Future[Any]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is not None

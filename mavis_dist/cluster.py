"""Ray, for the driver: connecting, and waits that have a name, a limit and a voice."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from mavis_dist.environment import ENVIRONMENT  # isort: split

import ray
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mavis_dist.plan import Node
from mavis_dist.types import Stopped, UserError

POLL_S = 1.0
DEATHS_WITHOUT_RESULT = 5


class CrewError(UserError):
    """Actors that cannot do their work."""


_is_stopping = threading.Event()


def connect() -> None:
    """Join the cluster at RAY_ADDRESS, or start a local one that ends with this process."""
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
    if "RAY_ADDRESS" not in os.environ:
        # Said, or Ray would join whatever cluster was started last on this machine.
        options |= {"address": "local", "dashboard_host": "127.0.0.1"}
    ray.init(runtime_env={"env_vars": forwarded_variables()}, **options)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def forwarded_variables() -> dict[str, str]:
    """What processes on all machines shall find in their environment, as this one does."""
    # Those that the job was submitted with reach them anyway, and Ray refuses to be told of a variable twice.
    submitted = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}")).get("runtime_env", {}).get("env_vars", {})
    names = (*ENVIRONMENT, "MAVIS_CACHE", "HF_HOME")
    return {name: os.environ[name] for name in names if name in os.environ and name not in submitted}


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """SIGTERM and SIGINT ask what runs in here to save what it has and to stop (`check_stop`); a second one ends the
    process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        _is_stopping.set()
        # Ray's own handler, which was there before, waits for all threads.
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _is_stopping.clear()


def check_stop() -> None:
    """Raises Stopped once a signal has asked for it."""
    if _is_stopping.is_set():
        raise Stopped


def say(stage: str, text: str) -> None:
    """One line of progress."""
    print(f"{stage:<24} {text}", file=sys.stderr, flush=True)


def nodes() -> list[Node]:
    """The machines of the cluster that are alive."""
    return [Node(n["Resources"].get("CPU", 0.0), n["Resources"].get("GPU", 0.0)) for n in ray.nodes() if n["Alive"]]


class Meter:
    """Says on stderr how far a stage is: done/total, rate, time left."""

    def __init__(self, stage: str, unit: str, every_s: float = 5.0):
        self._stage, self._unit, self._every_s = stage, unit, every_s
        self._started = self._last = time.monotonic()

    def show(self, done: int, total: int, text: str = "", final: bool = False) -> None:
        now = time.monotonic()
        if not final and now - self._last < self._every_s:
            return
        self._last = now
        elapsed = now - self._started
        rate = done / elapsed if elapsed > 0 else 0.0
        time_left = f"{(total - done) / rate:.0f} s left" if rate > 0 and not final else f"{elapsed:.0f} s"
        say(self._stage, f"{done}/{total} {self._unit}, {rate:.2f}/s, {time_left}  {text}".rstrip())


@ray.remote(num_cpus=0)
class Board:
    """Where workers write how far they are; the driver reads it."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[str, tuple[int, int, str]]] = {}
        self._is_stopping = False

    def stop(self) -> None:
        """Tell all who look that the driver wants them to save and to stop."""
        self._is_stopping = True

    def is_stopping(self) -> bool:
        return self._is_stopping

    def post(self, stage: str, part: str, done: int, total: int, text: str = "") -> None:
        self._parts.setdefault(stage, {})[part] = (done, total, text)

    def read(self, stage: str) -> dict[str, tuple[int, int, str]]:
        return dict(self._parts.get(stage, {}))


def make_board() -> Any:
    """A board on the driver's machine: no other machine's loss takes it away."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


class Watch:
    """Shows the progress that workers post for one stage."""

    def __init__(self, board: Any, stage: str, unit: str):
        self.board, self._stage = board, stage
        self._meter = Meter(stage, unit)

    def look(self, final: bool = False) -> None:
        parts = ray.get(self.board.read.remote(self._stage), timeout=60)
        if total := sum(part[1] for part in parts.values()):
            text = ", ".join(f"{name} {part[2]}" for name, part in parts.items() if part[2])
            self._meter.show(sum(part[0] for part in parts.values()), total, text, final)


class Silence:
    """Speaks up when nothing has been heard for a while."""

    def __init__(self, stage: str, after_s: float = 60.0):
        self._stage, self._after_s = stage, after_s
        self._since = self._spoken = time.monotonic()

    def heard(self, anything: bool, explanation: str) -> None:
        now = time.monotonic()
        if anything:
            self._since = self._spoken = now
        elif now - self._spoken >= self._after_s:
            self._spoken = now
            say(self._stage, f"nothing finished for {now - self._since:.0f} s: {explanation}")


class Crew:
    """Actors that work on one queue, an item each at a time. They may come late, and die: the item of a dead one is
    begun again by another. An item must give the same results whoever works on it, and however often it is begun.
    """

    def __init__(self, start: Callable[[], Any], count: int):
        """`start` makes an actor whose `work(settings, item)` begins an item, or goes on with it if given None, and
        returns (results so far, whether the item is finished).
        """
        self._start = start
        self._calls: dict[Any, Any] = {}  # under way -> actor
        self._idle: list[Any] = []  # actors that have loaded their models
        self._busy: dict[Any, Any] = {}  # actor -> what it works on
        self._num_deaths = 0  # since anything was finished
        for _ in range(count):
            self._hire()

    def run(self, stage: str, settings: Any, items: Iterable[Any]) -> Iterator[Any]:
        """All results of all items, in the order in which they come; those of an item that was begun again come again.

        Raises:
            CrewError: actors die again and again, and nothing gets finished.
        """
        queue, silence = deque(items), Silence(stage)
        while queue or self._busy:
            check_stop()
            while queue and self._idle:
                actor = self._idle.pop()
                self._busy[actor] = queue.popleft()
                self._calls[actor.work.remote(settings, self._busy[actor])] = actor
            ready, _ = ray.wait(list(self._calls), timeout=POLL_S)
            silence.heard(bool(ready), f"{len(self._busy)} of {len(self._actors)} actors work, the others load or wait")
            for ref in ready:
                actor = self._calls.pop(ref)
                try:
                    outcome = ray.get(ref)
                except ray.exceptions.RayActorError as error:
                    if actor in self._busy:
                        queue.appendleft(self._busy.pop(actor))
                    self._replace(stage, actor, error)
                    continue
                if actor not in self._busy:  # it is ready for its first item
                    self._idle.append(actor)
                    continue
                results, is_finished = outcome
                self._num_deaths = 0
                yield from results
                if is_finished:
                    del self._busy[actor]
                    self._idle.append(actor)
                else:
                    self._calls[actor.work.remote(settings, None)] = actor

    def wait_until_loaded(self, limit_s: float = 600.0) -> None:
        """Until all actors can work; raises GetTimeoutError."""
        ray.get([actor.__ray_ready__.remote() for actor in self._actors], timeout=limit_s)

    def release(self) -> None:
        """End the actors, so that the next stage finds their cores free."""
        for actor in self._actors:
            ray.kill(actor)

    @property
    def _actors(self) -> list[Any]:
        return [*self._idle, *self._calls.values()]

    def _hire(self) -> None:
        """Start an actor. It gets nothing to do before it is there: one without room may never be."""
        actor = self._start()
        self._calls[actor.__ray_ready__.remote()] = actor

    def _replace(self, stage: str, actor: Any, error: ray.exceptions.RayActorError) -> None:
        """A new actor in the place of a dead one."""
        self._num_deaths += 1
        ray.kill(actor)  # one that cannot be reached may still be alive
        if error.actor_init_failed:
            raise error
        if self._num_deaths > DEATHS_WITHOUT_RESULT:
            raise CrewError(
                f"{stage}: {self._num_deaths} actors died one after the other and finished nothing "
                f"({' '.join(str(error).split())[:300]}): give them more memory, or lower rollout.rows"
            ) from error
        say(stage, "an actor died; what it worked on is begun again")
        self._hire()


def map_tasks(function: Callable[..., Any], items: Sequence[tuple[Any, ...]], stage: str, unit: str) -> list[Any]:
    """`function(*item)` for every item as a Ray task of one core; results in the order of the items."""
    meter = Meter(stage, unit)
    task = ray.remote(function)
    refs = [task.options(num_cpus=1).remote(*item) for item in items]
    left = refs
    while left:
        check_stop()
        _, left = ray.wait(left, num_returns=len(left), timeout=POLL_S)
        meter.show(len(refs) - len(left), len(refs))
    meter.show(len(refs), len(refs), final=True)
    return ray.get(refs)


def wait_for(futures: Sequence[Future[Any]], watch: Watch) -> None:
    """Wait for threads of the driver; the first failure is raised once all have ended.

    When the job is to stop, the board says so, and those who read it end early.
    """
    is_told = False
    while not all(future.done() for future in futures):
        time.sleep(POLL_S)
        watch.look()
        if _is_stopping.is_set() and not is_told:
            is_told = True
            ray.get(watch.board.stop.remote(), timeout=60)
    for future in futures:
        future.result()
    check_stop()
    watch.look(final=True)

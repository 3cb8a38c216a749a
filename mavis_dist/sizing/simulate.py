"""A discrete-event simulation of a stage on many machines, with slow and failing ones. Knows no models and no config.

`Queue` is the worker pool: actors take items from one queue, those of a lost actor go back to its front and start
again. `Gang` is training: all workers of a fit make every step together, and a lost one sends all back to the newest
checkpoint. Deterministic: a machine's speed and failures are drawn from the seed, its number and the stage.

An actor works on one item at a time here. In truth the next one fills the rows that the last ones of an item leave.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from math import inf
from random import Random

from mavis_dist.types import UserError

MAX_RESTARTS = 100  # of an item or an actor, on average


@dataclass(frozen=True)
class Faults:
    """What goes wrong. The default is nothing."""

    seed: int = 0
    slow_share: float = 0.0  # probability that a machine is slow
    slowdown: float = 1.0  # of a slow machine: factor on the seconds of its work
    mtbf_s: float = inf  # mean time between failures of one machine
    restart_s: float = 0.0  # until a failed machine, or its replacement, is there again

    def slowness(self, machine: int) -> float:
        """Factor on the seconds of a machine's work."""
        return self.slowdown if Random(f"{self.seed}/speed/{machine}").random() < self.slow_share else 1.0


class Failures:
    """The times at which one machine fails within a stage."""

    def __init__(self, faults: Faults, stage: str, machine: int):
        self._faults, self._random = faults, Random(f"{faults.seed}/{stage}/{machine}")
        self._times = [self._draw(0.0)]

    def after(self, time: float) -> float:
        """The first failure that is later than `time`."""
        while self._times[-1] <= time:
            self._times.append(self._draw(self._times[-1] + self._faults.restart_s))
        return self._times[bisect_right(self._times, time)]

    def _draw(self, start: float) -> float:
        if self._faults.mtbf_s == inf:
            return inf
        return start + self._random.expovariate(1 / self._faults.mtbf_s)


@dataclass(frozen=True)
class Queue:
    """Items and the actors that take them."""

    name: str
    item_s: Sequence[float]  # seconds of each item on an actor of normal speed, in the order of the queue
    machine_of: Sequence[int]  # the machine of each actor
    start_s: float = 0.0  # until an actor is ready for its first item


@dataclass(frozen=True)
class Gang:
    """Fits of the same length, some of which run at the same time."""

    name: str
    num_fits: int
    machines_of: Sequence[frozenset[int]]  # of the workers of each fit that runs at the same time
    steps: int
    step_s: float  # of all workers together, without a slow one
    start_s: float = 0.0  # of the workers of a fit, also after a loss
    checkpoint_every_s: float = 60.0


@dataclass(frozen=True)
class Ran:
    """How a stage went."""

    name: str
    seconds: float
    busy_s: float  # of all actors, or of all places for fits, with work that counted
    places: int  # actors, or fits at the same time
    restarts: int = 0  # of items or fits
    lost_s: float = 0.0  # work that was done again

    @property
    def utilisation(self) -> float:
        """Share of the places' time with work that counted."""
        return self.busy_s / (self.seconds * self.places) if self.seconds else 1.0


def simulate(stage: Queue | Gang, faults: Faults) -> Ran:
    """Raises UserError if machines fail too often for the stage to end."""
    return _Pool(stage, faults).run() if isinstance(stage, Queue) else _run_gang(stage, faults)


@dataclass
class _Pool:
    """A worker pool while it works."""

    stage: Queue
    faults: Faults
    restarts: int = 0
    lost_s: float = 0.0
    busy_s: float = 0.0
    _idle: list[int] = field(default_factory=list)
    _working: dict[int, tuple[int, float]] = field(default_factory=dict)  # actor -> item, when it began
    _events: list[tuple[float, int, str, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        stage, faults = self.stage, self.faults
        self._numbers, self._lost_starts = count(), 0
        self._queue = deque(range(len(stage.item_s)))
        self._lives = [0] * len(stage.machine_of)  # of actors: what a dead one would have done does not happen
        self._actors_of: dict[int, list[int]] = {}
        for actor, machine in enumerate(stage.machine_of):
            self._actors_of.setdefault(machine, []).append(actor)
        self._slowness = {machine: faults.slowness(machine) for machine in self._actors_of}
        self._failures = {machine: Failures(faults, stage.name, machine) for machine in self._actors_of}
        for actor in range(len(stage.machine_of)):
            self._at(stage.start_s, "ready", actor)
        for machine in self._actors_of:
            self._at(self._failures[machine].after(0.0), "fails", machine)

    def run(self) -> Ran:
        left, now = len(self.stage.item_s), 0.0
        while left:
            now, _, kind, who, life = heapq.heappop(self._events)
            if kind == "fails":
                self._fail(now, who)
            elif life == self._lives[who]:
                if who in self._working:
                    del self._working[who]
                    left -= 1
                self._idle.append(who)
            self._give(now)
        self.busy_s = sum(self.stage.item_s)
        return Ran(self.stage.name, now, self.busy_s, len(self._lives), self.restarts, self.lost_s)

    def _give(self, now: float) -> None:
        """Give items to actors that have none."""
        while self._queue and self._idle:
            actor, item = self._idle.pop(0), self._queue.popleft()
            self._working[actor] = item, now
            slowness = self._slowness[self.stage.machine_of[actor]]
            self._at(now + self.stage.item_s[item] * slowness, "ready", actor)

    def _fail(self, now: float, machine: int) -> None:
        """Put the items of a machine's actors back, and start the actors again."""
        actors = self._actors_of[machine]
        lost = sorted(self._working.pop(actor) for actor in actors if actor in self._working)
        self._queue.extendleft(item for item, _ in reversed(lost))
        self.restarts += len(lost)
        self.lost_s += sum(now - began for _, began in lost)
        self._lost_starts += len(actors) - len(lost)
        _check(
            self.restarts + self._lost_starts, len(self.stage.item_s) + len(self._lives), self.stage.name, self.faults
        )
        self._idle = [actor for actor in self._idle if actor not in actors]
        back = now + self.faults.restart_s
        for actor in actors:
            self._lives[actor] += 1
            self._at(back + self.stage.start_s, "ready", actor)
        self._at(self._failures[machine].after(back), "fails", machine)

    def _at(self, time: float, kind: str, who: int) -> None:
        life = self._lives[who] if kind == "ready" else 0
        if time < inf:
            heapq.heappush(self._events, (time, next(self._numbers), kind, who, life))


def _run_gang(stage: Gang, faults: Faults) -> Ran:
    """Fits one after the other in every place, each in the place that is free first."""
    failures = {m: Failures(faults, stage.name, m) for machines in stage.machines_of for m in machines}
    free = [(0.0, place) for place in range(len(stage.machines_of))]
    end, restarts, lost_s = 0.0, 0, 0.0
    for _ in range(stage.num_fits):
        now, place = heapq.heappop(free)
        machines = stage.machines_of[place]
        step_s = stage.step_s * max(map(faults.slowness, machines))
        left = stage.steps
        while True:
            failed = min(failures[machine].after(now) for machine in machines)
            done = now + stage.start_s + left * step_s
            if done <= failed:
                break
            trained = max(0.0, failed - now - stage.start_s)
            kept = int(trained // stage.checkpoint_every_s * stage.checkpoint_every_s / step_s) if step_s else 0
            left -= kept
            restarts, lost_s = restarts + 1, lost_s + trained - kept * step_s
            _check(restarts, stage.num_fits, stage.name, faults)
            now = failed + faults.restart_s
        end = max(end, done)
        heapq.heappush(free, (done, place))
    busy_s = stage.num_fits * stage.steps * stage.step_s
    return Ran(stage.name, end, busy_s, len(stage.machines_of), restarts, lost_s)


def _check(restarts: int, num_items: int, stage: str, faults: Faults) -> None:
    if restarts > MAX_RESTARTS * num_items:
        raise UserError(
            f"--mtbf-hours {faults.mtbf_s / 3600:g}: machines fail so often that {stage} does not end, give a longer "
            "time"
        )

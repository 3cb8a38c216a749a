"""Who may wait for rows of a base replica, and whose turn it is. Plain data: knows no engine, no thread and no Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from serve.messages import Admission

Item = TypeVar("Item")

KEPT_S = 1.0  # those who follow come at once, or went to another base replica


@dataclass
class _Queue(Generic[Item]):
    """What one key waits for."""

    served: float  # rows handed out to it, on a scale that all keys share
    waiting: dict[str, tuple[int, Item]] = field(default_factory=dict)  # request id -> rows, item; first come first

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self.waiting.values())


@dataclass
class _Kept:
    """Room for those who follow one that was let in."""

    key: str
    rows: int
    until: float


class FairQueue(Generic[Item]):
    """Requests that wait for rows, in one queue per key.

    The next turn is the key's to which the fewest rows were handed out while it waited; a key that comes anew starts
    level with the one that has had least. So while a key waits, no other gets more rows than it does, but for one
    request, however many it has in line. Nobody overtakes the one whose turn it is, so that many rows are found, too.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic):
        """`limit`: rows that may wait, of all keys together."""
        self._limit, self._clock = limit, clock
        self._kept: dict[str, _Kept] = {}  # by group
        self._queues: dict[str | None, _Queue[Item]] = {}  # None: resumed requests, whose turn it always is

    @property
    def rows(self) -> int:
        return sum(queue.rows for queue in self._queues.values())

    def admits(self, entry: Admission, rows: int) -> bool:
        """Whether a request that takes so many rows is let in; what it asks for beyond them is kept for its group."""
        if entry.room == 0:
            if entry.group in self._kept:
                self._kept[entry.group].rows -= rows
            return True
        asked = rows if entry.room is None else entry.room
        if not self.has_room(entry.key, asked):
            return False
        if asked > rows:
            self._kept[entry.group] = _Kept(entry.key, asked - rows, self._clock() + KEPT_S)
        return True

    def has_room(self, key: str, rows: int) -> bool:
        """Whether a key's request may wait, too.

        A key may wait for as many rows as are left to all others, so one alone gets half of the limit, and newcomers
        find room. Who finds nobody waiting is let in however many rows it needs: later it would fare no better.
        """
        now = self._clock()
        self._kept = {group: kept for group, kept in self._kept.items() if kept.rows > 0 and kept.until > now}
        waiting = self.rows + sum(kept.rows for kept in self._kept.values())
        own = self._queues[key].rows if key in self._queues else 0
        own += sum(kept.rows for kept in self._kept.values() if kept.key == key)
        return not waiting or own + rows <= self._limit - waiting

    def add(self, key: str | None, request_id: str, rows: int, item: Item) -> None:
        """Let a request wait, behind others of its key; key None: before all others."""
        level = self._level()
        # What a key has had is forgotten once all who wait have had as much.
        self._queues = {name: queue for name, queue in self._queues.items() if queue.waiting or queue.served > level}
        start = -math.inf if key is None else level if math.isfinite(level) else 0
        self._queues.setdefault(key, _Queue(start)).waiting[request_id] = (rows, item)

    def head(self) -> Item | None:
        """Whose turn it is."""
        queue = self._next()
        return next(iter(queue.waiting.values()))[1] if queue else None

    def pop(self) -> None:
        """Take out whose turn it is."""
        queue = self._next()
        assert queue is not None
        rows, _ = queue.waiting.pop(next(iter(queue.waiting)))
        queue.served += rows

    def remove(self, request_id: str) -> bool:
        """Take out a request that does not want to wait any more; whether it was waiting."""
        return any(queue.waiting.pop(request_id, None) for queue in self._queues.values())

    def _next(self) -> _Queue[Item] | None:
        return min((q for q in self._queues.values() if q.waiting), key=lambda queue: queue.served, default=None)

    def _level(self) -> float:
        """What the key that has had least has had; infinite if none waits."""
        waiting = (queue.served for key, queue in self._queues.items() if key is not None and queue.waiting)
        return min(waiting, default=math.inf)

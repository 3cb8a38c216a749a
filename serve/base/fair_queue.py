"""The queue for rows of a base replica: admission, and whose turn it is.

By hand, since Ray Serve admits by the number of requests, first come first served: here a request takes one row or
many, and the keys of callers take turns. Plain data: knows nothing of engines, threads or Ray.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from serve.messages import Admission

Item = TypeVar("Item")

RESERVED_S = 1.0  # following requests come at once, or went to another base replica


@dataclass
class _Queue(Generic[Item]):
    """The waiting requests of one key."""

    served: float  # rows given to it, on a scale that all keys share
    waiting: dict[str, tuple[int, Item]] = field(default_factory=dict)  # request id -> rows, item; in order of arrival

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self.waiting.values())


@dataclass
class _Reserved:
    """Rows for the requests that follow an admitted one."""

    key: str
    rows: int
    until: float


class FairQueue(Generic[Item]):
    """Requests that wait for rows, in one queue per key.

    The next turn goes to the key that was given the fewest rows while it waited; a new key starts level with the one
    that had the fewest. So while a key waits, no other key gets more rows than it does, except for one request,
    however many it has waiting. No request overtakes the one whose turn it is, so that large ones are served, too.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic):
        """`limit`: rows that may wait, of all keys together."""
        self._limit, self._clock = limit, clock
        self._reserved: dict[str, _Reserved] = {}  # by group
        self._queues: dict[str | None, _Queue[Item]] = {}  # None: resumed requests, whose turn it always is

    @property
    def rows(self) -> int:
        return sum(queue.rows for queue in self._queues.values())

    def admits(self, admission: Admission, rows: int) -> bool:
        """Whether a request of so many rows is admitted; what it asks for beyond them is reserved for its group."""
        if admission.rows == 0:
            if admission.group in self._reserved:
                self._reserved[admission.group].rows -= rows
            return True
        asked = rows if admission.rows is None else admission.rows
        if not self.has_room(admission.key, asked):
            return False
        if asked > rows:
            self._reserved[admission.group] = _Reserved(admission.key, asked - rows, self._clock() + RESERVED_S)
        return True

    def has_room(self, key: str, rows: int) -> bool:
        """Whether a request of a key may wait.

        A key may have as many rows waiting as remain for all others, so a single key gets half of the limit, and new
        keys find room. If nobody waits, a request of any size is admitted: later it would be no better off.
        """
        now = self._clock()
        self._reserved = {group: one for group, one in self._reserved.items() if one.rows > 0 and one.until > now}
        waiting = self.rows + sum(one.rows for one in self._reserved.values())
        own = self._queues[key].rows if key in self._queues else 0
        own += sum(one.rows for one in self._reserved.values() if one.key == key)
        return not waiting or own + rows <= self._limit - waiting

    def add(self, key: str | None, request_id: str, rows: int, item: Item) -> None:
        """Add a request behind others of its key; key None: before all others."""
        level = self._level()
        # The count of a key is forgotten once all waiting keys have had as much.
        self._queues = {name: queue for name, queue in self._queues.items() if queue.waiting or queue.served > level}
        start = -math.inf if key is None else level if math.isfinite(level) else 0
        self._queues.setdefault(key, _Queue(start)).waiting[request_id] = (rows, item)

    def head(self) -> Item | None:
        """The request whose turn it is."""
        queue = self._next()
        return next(iter(queue.waiting.values()))[1] if queue else None

    def pop(self) -> None:
        """Remove the request whose turn it is."""
        queue = self._next()
        assert queue is not None
        rows, _ = queue.waiting.pop(next(iter(queue.waiting)))
        queue.served += rows

    def remove(self, request_id: str) -> bool:
        """Remove a waiting request; whether it was waiting."""
        return any(queue.waiting.pop(request_id, None) for queue in self._queues.values())

    def _next(self) -> _Queue[Item] | None:
        return min((q for q in self._queues.values() if q.waiting), key=lambda queue: queue.served, default=None)

    def _level(self) -> float:
        """The fewest rows given to a waiting key; infinite if none waits."""
        waiting = (queue.served for key, queue in self._queues.items() if key is not None and queue.waiting)
        return min(waiting, default=math.inf)

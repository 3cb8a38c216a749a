"""Passes updates from an engine's thread to an event loop. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Sequence
from itertools import chain

from mavis_dist.decode import Update
from serve.timeouts import Signal


class Mailbox:
    """The updates of one request, taken in bundles: a message to another process costs more than the tokens in it.

    Bundles leave at the ticks of a clock that all mailboxes share, so that the processes on their way wake up once for
    all streams, not once for each. Created and read in an event loop; any thread may put.
    """

    def __init__(self, interval_s: float = 0.0):
        """`interval_s`: between two ticks. The first update and the last one are not held back."""
        self._events = asyncio.get_running_loop()
        self._interval_s, self._next_at = interval_s, 0.0
        self._updates: deque[Update] = deque()
        self._is_announced = False  # the event loop knows that there are updates
        self._has_some, self._has_end = Signal(), Signal()

    def put(self, update: Update) -> None:
        """Raises RuntimeError if the event loop is closed."""
        self._updates.append(update)
        is_end = update.finished is not None
        if is_end or not self._is_announced:
            self._is_announced = True
            self._events.call_soon_threadsafe(self._announce, is_end)

    async def take(self, limit_s: float) -> list[Update]:
        """All updates so far, as one per choice; empty if none comes within `limit_s`."""
        if not await self._has_some.wait(limit_s):
            return []
        if (pause := self._next_at - time.monotonic()) > 0:
            await self._has_end.wait(pause)
        self._has_some.clear()
        self._has_end.clear()
        self._next_at = self._tick_after(time.monotonic())
        self._is_announced = False  # before the updates are taken: one that comes now is announced again
        return joined([self._updates.popleft() for _ in range(len(self._updates))])

    def _tick_after(self, now: float) -> float:
        return (math.floor(now / self._interval_s) + 1) * self._interval_s if self._interval_s else now

    def _announce(self, is_end: bool) -> None:
        if self._updates:  # otherwise it was taken with an earlier bundle
            self._has_some.set()
            if is_end:
                self._has_end.set()


def joined(updates: Sequence[Update]) -> list[Update]:
    """Successive updates of a request as one per choice."""
    choices: dict[int, list[Update]] = {}
    for update in updates:
        choices.setdefault(update.index, []).append(update)
    return [
        Update(
            parts[0].request_id,
            index,
            parts[0].start,
            tuple(chain.from_iterable(part.tokens for part in parts)),
            parts[-1].finished,
            tuple(chain.from_iterable(part.logprobs for part in parts)),
        )
        for index, parts in choices.items()
    ]

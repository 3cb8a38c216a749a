"""Passes updates from an engine's thread to an event loop. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from mavis_dist.decode import Update
from serve.timeouts import within


class Mailbox:
    """The updates of one request, taken in bundles: a message to another process costs more than the tokens in it.

    Created and read in an event loop; any thread may put.
    """

    def __init__(self, interval_s: float = 0.0):
        """`interval_s`: least time between two bundles; the last one of an answer is not held back."""
        self._events = asyncio.get_running_loop()
        self._interval_s, self._next_at = interval_s, 0.0
        self._updates: deque[Update] = deque()
        self._has_some, self._has_end = asyncio.Event(), asyncio.Event()

    def put(self, update: Update) -> None:
        """Raises RuntimeError if the event loop is closed."""
        self._updates.append(update)
        self._events.call_soon_threadsafe(self._announce, update.finished is not None)

    async def take(self, limit_s: float) -> list[Update]:
        """All updates so far; empty if none comes within `limit_s`."""
        if not await _is_set(self._has_some, limit_s):
            return []
        if (pause := self._next_at - time.monotonic()) > 0:
            await _is_set(self._has_end, pause)
        self._has_some.clear()
        self._has_end.clear()
        self._next_at = time.monotonic() + self._interval_s
        return [self._updates.popleft() for _ in range(len(self._updates))]

    def _announce(self, is_end: bool) -> None:
        if self._updates:  # otherwise it was taken with an earlier bundle
            self._has_some.set()
            if is_end:
                self._has_end.set()


async def _is_set(event: asyncio.Event, limit_s: float) -> bool:
    if not event.is_set():
        try:
            await within(limit_s, event.wait())
        except asyncio.TimeoutError:
            return False
    return True

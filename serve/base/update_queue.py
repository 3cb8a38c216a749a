"""Passes updates from an engine's thread to an event loop. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Sequence
from itertools import chain

from mavis_dist.decode import Update
from serve.timeouts import Signal


class Mailbox:
    """The updates of one or several requests, taken in bundles: a message to another process costs more than the tokens
    in it.

    Bundles leave at the ticks of a clock that all mailboxes share, so that the processes on their way wake up once for
    all streams, not once for each. Created and read in an event loop; any thread may put.
    """

    def __init__(self, interval_s: float = 0.0):
        """`interval_s`: between two ticks. The first and last tokens of a request leave before the next tick."""
        self._events = asyncio.get_running_loop()
        self._interval_s, self._next_at = interval_s, 0.0
        self._lock = threading.Lock()  # guards the next two
        self._updates: list[Update] = []
        self._is_announced = False  # the event loop knows that there are some, or is being told
        self._begun: set[str] = set()  # requests that have had a bundle, and are not finished
        self._has_some, self._has_urgent = Signal(), Signal()

    def put(self, update: Update) -> None:
        """Raises RuntimeError if the event loop is closed."""
        is_urgent = self._is_urgent(update)
        with self._lock:
            self._updates.append(update)
            is_known, self._is_announced = self._is_announced, True
        if is_urgent or not is_known:
            self._events.call_soon_threadsafe(self._announce, is_urgent)

    async def take(self, limit_s: float) -> list[Update]:
        """The updates so far, as one per choice; empty if none comes within `limit_s`.

        Before the next tick only those of requests that cannot wait for it.
        """
        updates: list[Update] = []
        while not updates:  # one that was announced as urgent may have left with an earlier bundle
            if not await self._has_some.wait(limit_s):
                return []
            pause = self._next_at - time.monotonic()
            is_early = pause > 0 and await self._has_urgent.wait(pause)
            updates = self._taken()
            if is_early:
                updates = self._urgent(updates)
            else:
                self._next_at = self._tick_after(max(time.monotonic(), self._next_at))
        for update in updates:
            (self._begun.add if update.finished is None else self._begun.discard)(update.request_id)
        return joined(updates)

    def forget(self, request_id: str) -> None:
        """Drop a request that was cancelled."""
        self._begun.discard(request_id)

    def _taken(self) -> list[Update]:
        self._has_some.clear()
        self._has_urgent.clear()
        with self._lock:
            updates, self._updates, self._is_announced = self._updates, [], False
        return updates

    def _is_urgent(self, update: Update) -> bool:
        return update.finished is not None or update.request_id not in self._begun

    def _urgent(self, updates: Sequence[Update]) -> list[Update]:
        """Those of requests that cannot wait; the others stay."""
        ids = {update.request_id for update in updates if self._is_urgent(update)}
        others = [update for update in updates if update.request_id not in ids]
        if others:
            with self._lock:
                self._updates, self._is_announced = [*others, *self._updates], True
            self._has_some.set()
        return [update for update in updates if update.request_id in ids]

    def _tick_after(self, now: float) -> float:
        return (math.floor(now / self._interval_s) + 1) * self._interval_s if self._interval_s else now

    def _announce(self, is_urgent: bool) -> None:
        if self._updates:  # otherwise it was taken with an earlier bundle
            self._has_some.set()
            if is_urgent:
                self._has_urgent.set()


def joined(updates: Sequence[Update]) -> list[Update]:
    """Successive updates as one per choice."""
    choices: dict[tuple[str, int], list[Update]] = {}
    for update in updates:
        choices.setdefault((update.request_id, update.index), []).append(update)
    return [
        Update(
            request_id,
            index,
            parts[0].start,
            tuple(chain.from_iterable(part.tokens for part in parts)),
            parts[-1].finished,
            tuple(chain.from_iterable(part.logprobs for part in parts)),
        )
        for (request_id, index), parts in choices.items()
    ]

"""Refusals under overload, and the gateway's short memory of them. Plain data: knows nothing of Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

MAX_MEMORY_S = 0.25
MEMORY_SHARE = 1 / 8  # of the time until all waiting requests have begun


class Overloaded(Exception):
    """No base replica that was asked has room. `wait_s`: seconds after which a retry is worthwhile."""

    def __init__(self, wait_s: float):
        super().__init__(wait_s)
        self.wait_s = wait_s

    def __str__(self) -> str:
        return f"all rows are taken and the queue is full; try again in about {math.ceil(self.wait_s)} s"


class Refusals:
    """The gateway's memory of refused keys: for a moment, another such request is refused without asking a replica.

    Under overload most requests are refused, and each refusal takes time from the answers. The moment is too short for
    the queues to run empty.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._refused: dict[str, tuple[int, float, float]] = {}  # key -> rows, earliest retry, useful retry

    @contextmanager
    def remembered(self, key: str, rows: int) -> Iterator[None]:
        """Wraps an attempt at admission; raises Overloaded before it if the key was just refused as many rows."""
        refused, until, retry_at = self._refused.get(key, (0, -math.inf, -math.inf))
        now = self._clock()
        if now < until and rows >= refused:
            raise Overloaded(retry_at - now)
        try:
            yield
        except Overloaded as error:
            now = self._clock()
            self._refused = {name: refusal for name, refusal in self._refused.items() if refusal[1] > now}
            self._refused[key] = (rows, now + min(MAX_MEMORY_S, error.wait_s * MEMORY_SHARE), now + error.wait_s)
            raise

"""Models by name: loaded in a thread on first use, dropped when unused and no longer published. Knows nothing of Ray.

By hand, since serve.multiplexed evicts by count, least recently used first, whether or not a model is in use or still
published, and cannot load into an engine between two of its steps.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOADERS = 4  # threads, so that a model that loads slowly or never does not delay others
RETRY_S = 5.0  # for this long a failure is repeated instead of retried


class Unavailable(Exception):
    """A model that cannot be loaded."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name} cannot be loaded: {self.reason}"


@dataclass(eq=False)
class _Item(Generic[T]):
    loading: Future[T]
    began: float
    used_at: float
    num_users: int = 0

    def is_loaded(self) -> bool:
        return self.loading.done() and self.loading.exception() is None


class ModelCache(Generic[T]):
    """Holds the models that are in use, were used lately, or are wanted in any case."""

    def __init__(
        self,
        load: Callable[[str], T],
        wanted: Callable[[], Collection[str]],
        drop: Callable[[T], object] = lambda item: None,
        idle_s: float = 300.0,
    ):
        """
        Args:
            load: called in a thread, once for all concurrent users of a name.
            wanted: names of models that stay though unused; called in a thread.
            drop: called with a model that is dropped; must return at once.
            idle_s: seconds that an unwanted model stays after its last use, and at most a quarter longer.
        """
        self._load, self._wanted, self._drop, self._idle_s = load, wanted, drop, idle_s
        self._items: dict[str, _Item[T]] = {}
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(LOADERS, thread_name_prefix="model-cache")
        threading.Thread(target=self._tidy, name="model-cache-tidy", daemon=True).start()

    def __contains__(self, name: str) -> bool:
        """Whether a model is loaded."""
        with self._lock:
            return name in self._items and self._items[name].is_loaded()

    @contextmanager
    def hold(self, names: Collection[str]) -> Iterator[list[Future[T]]]:
        """Models that stay until the end of the context; missing ones begin to load.

        The futures raise Unavailable; wait for them with `loaded`.
        """
        now = time.monotonic()
        with self._lock:
            items = [self._item(name, now) for name in names]
            for item in items:
                item.num_users += 1
        try:
            yield [item.loading for item in items]
        finally:
            now = time.monotonic()
            with self._lock:
                for item in items:
                    item.num_users -= 1
                    item.used_at = now

    def _item(self, name: str, now: float) -> _Item[T]:
        item = self._items.get(name)
        if item is None or (item.loading.done() and not item.is_loaded() and now - item.began > RETRY_S):
            item = self._items[name] = _Item(self._threads.submit(self._load_one, name), now, now)
        return item

    def _load_one(self, name: str) -> T:
        try:
            return self._load(name)
        # Any failure must reach those who wait for this model, and nobody else.
        except Exception as error:
            logger.exception("%s cannot be loaded", name)
            raise Unavailable(name, str(error) or type(error).__name__) from None

    def _tidy(self) -> None:
        """Drop idle models, also when no requests come."""
        while True:
            time.sleep(self._idle_s / 4)
            now = time.monotonic()
            with self._lock:
                is_any_idle = any(self._is_idle(item, now) for item in self._items.values())
            if is_any_idle:
                self._drop_idle()

    def _is_idle(self, item: _Item[T], now: float) -> bool:
        return not item.num_users and item.loading.done() and now - item.used_at > self._idle_s

    def _drop_idle(self) -> None:
        try:
            wanted = self._wanted()
        except Exception as error:  # of an unreachable store: nothing is dropped on a guess
            logger.warning("no model is dropped, since what is published is unknown: %s", error)
            return
        now = time.monotonic()
        with self._lock:
            idle = [name for name, item in self._items.items() if name not in wanted and self._is_idle(item, now)]
            for name in idle:
                item = self._items.pop(name)
                if item.is_loaded():
                    logger.info("%s is dropped", name)
                    self._drop(item.loading.result())


async def loaded(loads: Sequence[Future[T]], limit_s: float | None = None) -> bool:
    """Whether models are loaded within a time; raises Unavailable if one cannot be loaded.

    A waiter that gives up does not stop the loading: others may wait for it.
    """
    waiting = [asyncio.wrap_future(load) for load in loads if not load.done()]
    if waiting:
        done, _ = await asyncio.wait(waiting, timeout=limit_s)
        for future in done:
            future.result()
    for load in loads:
        if load.done():
            load.result()
    return all(load.done() for load in loads)

"""Things by name: loaded in a thread when first asked for, dropped when nobody wants them. Knows nothing of Ray."""

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

LOADERS = 4  # so that a thing that loads slowly, or not at all, holds up no others
RETRY_S = 5.0  # for so long a failure is told again instead of tried again


class Unavailable(Exception):
    """Something that cannot be loaded."""

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

    def is_there(self) -> bool:
        return self.loading.done() and self.loading.exception() is None


class ModelCache(Generic[T]):
    """Holds what is in use, what was used lately, and what is wanted in any case."""

    def __init__(
        self,
        load: Callable[[str], T],
        wanted: Callable[[], Collection[str]],
        drop: Callable[[T], object] = lambda thing: None,
        idle_s: float = 300.0,
    ):
        """
        Args:
            load: called in a thread, once for all who ask for the same name.
            wanted: names of things that stay though nobody uses them; called in a thread.
            drop: told of a thing that leaves; must return at once.
            idle_s: how long a thing that is not wanted stays after its last use, and at most a quarter longer.
        """
        self._load, self._wanted, self._drop, self._idle_s = load, wanted, drop, idle_s
        self._items: dict[str, _Item[T]] = {}
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(LOADERS, thread_name_prefix="shelf")
        threading.Thread(target=self._tidy, name="shelf-tidy", daemon=True).start()

    def __contains__(self, name: str) -> bool:
        """Whether a thing is loaded."""
        with self._lock:
            return name in self._items and self._items[name].is_there()

    @contextmanager
    def hold(self, names: Collection[str]) -> Iterator[list[Future[T]]]:
        """Things that stay until the end of the context; those that are not there begin to load.

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
        if item is None or (item.loading.done() and not item.is_there() and now - item.began > RETRY_S):
            item = self._items[name] = _Item(self._threads.submit(self._bring, name), now, now)
        return item

    def _bring(self, name: str) -> T:
        try:
            return self._load(name)
        # Whatever went wrong, those who wait for it must hear of it, and nobody else.
        except Exception as error:
            logger.exception("%s cannot be loaded", name)
            raise Unavailable(name, str(error) or type(error).__name__) from None

    def _tidy(self) -> None:
        """Drop idle things, also where nothing is used any more."""
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
        except Exception as error:  # of a store that is out of reach: nothing is dropped on a guess
            logger.warning("nothing is dropped, since it is not known what is wanted: %s", error)
            return
        now = time.monotonic()
        with self._lock:
            idle = [name for name, item in self._items.items() if name not in wanted and self._is_idle(item, now)]
            for name in idle:
                item = self._items.pop(name)
                if item.is_there():
                    logger.info("%s is dropped", name)
                    self._drop(item.loading.result())


async def loaded(loads: Sequence[Future[T]], limit_s: float | None = None) -> bool:
    """Whether things are there within a time; raises Unavailable if one cannot be loaded.

    Who stops waiting does not stop the loading: others wait for it, too.
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

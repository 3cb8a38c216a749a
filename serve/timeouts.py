"""Waiting with a time limit that never loses a cancellation. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class Signal:
    """An asyncio.Event for one reader, whose wait with a time limit costs no task."""

    def __init__(self) -> None:
        self._is_set = False
        self._reader: asyncio.Future[None] | None = None

    def set(self) -> None:
        self._is_set = True
        self._wake()

    def clear(self) -> None:
        self._is_set = False

    async def wait(self, limit_s: float) -> bool:
        """Whether it is set within `limit_s`."""
        if not self._is_set:
            loop = asyncio.get_running_loop()
            self._reader = loop.create_future()
            timer = loop.call_later(limit_s, self._wake)
            try:
                await self._reader
            finally:
                timer.cancel()
        return self._is_set

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


async def within(limit_s: float, work: Awaitable[T]) -> T:
    """The result of `work`; raises TimeoutError.

    If a cancellation comes together with the result, it wins. (In Python 3.11 asyncio.wait_for loses it, and an answer
    would be generated to its end for a client that has left.)
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task,), timeout=limit_s)
        is_late = not task.done()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))  # an iterator must not be closed while it runs
    if is_late:
        raise asyncio.TimeoutError
    return task.result()

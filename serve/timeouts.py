"""A time limit that never loses a cancellation. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


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

"""Feeds of gateways: the updates of all their answers on a base replica, in common messages. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from mavis_dist.decode import Request, Update
from serve.base.engine_loop import EngineLoop, stream, submitted
from serve.base.update_queue import Mailbox
from serve.messages import Accepted, Admission, Feed, Message


class _OpenFeed:
    """A feed that a gateway is reading."""

    def __init__(self, name: str, interval_s: float):
        self.name, self.updates = name, Mailbox(interval_s)
        self.num_streams = 0  # requests whose updates it carries


class Feeds:
    """Streams of requests, whose updates go to the feed of their gateway if it has opened one."""

    def __init__(self, loop: EngineLoop, replica: str, interval_s: float = 0.0, heartbeat_s: float = 5.0):
        """`interval_s`: least time between two messages in the middle of an answer."""
        self._loop, self._replica = loop, replica
        self._interval_s, self._heartbeat_s = interval_s, heartbeat_s
        self._open: dict[str, _OpenFeed] = {}  # by gateway

    async def read(self, feed: Feed) -> AsyncGenerator[list[Update], None]:
        """The updates of a gateway's answers; an empty list means: nothing new. Ends when there are no answers."""
        if feed.replica != self._replica:
            return
        opened = self._open[feed.gateway] = _OpenFeed(feed.name, self._interval_s)
        try:
            while (updates := await opened.updates.take(self._heartbeat_s)) or opened.num_streams:
                yield updates
        finally:
            if self._open.get(feed.gateway) is opened:
                del self._open[feed.gateway]

    async def stream(self, request: Request, admission: Admission) -> AsyncGenerator[Message, None]:
        """As engine_loop.stream; gateways get the accepted request with the name of the feed, if it has its updates."""
        feed = self._open.get(admission.gateway)
        if feed is not None:
            messages = self._fed(feed, request, admission)
        else:
            messages = stream(self._loop, request, admission, self._heartbeat_s, self._interval_s)
        async with aclosing(messages):
            async for message in messages:
                if isinstance(message, Request) and admission.gateway:
                    yield Accepted(message, self._replica, feed.name if feed else "")
                else:
                    yield message

    async def _fed(self, feed: _OpenFeed, request: Request, admission: Admission) -> AsyncGenerator[Message, None]:
        """Yields nothing after the accepted request, and ends with it; closing it early cancels the request."""
        events, ended, left = asyncio.get_running_loop(), asyncio.Event(), request.params.n

        def put(update: Update) -> None:
            nonlocal left
            feed.updates.put(update)
            left -= update.finished is not None
            if not left:
                events.call_soon_threadsafe(ended.set)

        accepted = submitted(self._loop, request, put, admission)
        if not isinstance(accepted, Request):
            yield accepted
            return
        feed.num_streams += 1
        try:
            yield accepted
            await ended.wait()
        finally:
            feed.num_streams -= 1
            if not ended.is_set():
                feed.updates.forget(accepted.id)
                self._loop.cancel(accepted.id)

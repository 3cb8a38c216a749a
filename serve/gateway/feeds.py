"""Reads the updates of all answers of a base replica from one feed. Knows nothing of Ray or HTTP."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from contextvars import Context
from dataclasses import dataclass, field, replace

from mavis_dist.decode import Request, Update
from serve.messages import Accepted, Admission, AnswerFailed, BaseLost, Feed, Message, OpenFeed, OpenStream

HEARTBEAT_S = 5.0


@dataclass
class _Reader:
    """A request that waits for updates of a feed."""

    feed: str = ""  # none: it has not been accepted yet
    items: asyncio.Queue[list[Update] | BaseLost] = field(default_factory=asyncio.Queue)


class Feeds:
    """Streams of requests, each of which submits and cancels its request, while updates come over feeds.

    A feed is opened when a base replica accepts a request, and carries the updates of later ones: one message per base
    replica instead of one per answer. With it end all its streams, whose requests continue elsewhere.
    """

    def __init__(self, open_stream: OpenStream, open_feed: OpenFeed):
        self._open_stream, self._open_feed = open_stream, open_feed
        self._gateway = uuid.uuid4().hex
        self._feeds: dict[str, asyncio.Task[None]] = {}  # by name
        self._replicas: dict[str, str] = {}  # base replica -> name of its feed
        self._readers: dict[str, _Reader] = {}  # by id of the request

    async def stream(self, request: Request, admission: Admission) -> AsyncGenerator[Message, None]:
        """The messages of some base replica; raises BaseLost."""
        reader = self._readers[request.id] = _Reader()
        admission = replace(admission, gateway=self._gateway)
        try:
            async with aclosing(self._open_stream(request, admission)) as messages:
                async for message in messages:
                    if not isinstance(message, Accepted):
                        yield message
                    elif message.feed:
                        yield message.request
                        async for updates in self._fed(reader, message.feed):
                            yield updates
                    else:
                        self._open(message.replica)
                        yield message.request
        finally:
            del self._readers[request.id]

    async def _fed(self, reader: _Reader, feed: str) -> AsyncGenerator[list[Update], None]:
        """Does not end by itself."""
        if feed not in self._feeds:
            raise BaseLost("its feed was lost")
        reader.feed = feed
        while True:
            item = await reader.items.get()
            if isinstance(item, BaseLost):
                raise item
            yield item

    def _open(self, replica: str) -> None:
        if replica not in self._replicas:
            feed = Feed(self._gateway, uuid.uuid4().hex, replica)
            self._replicas[replica] = feed.name
            # In a context of its own: it belongs to no request, and must outlive the one that opens it.
            self._feeds[feed.name] = Context().run(asyncio.create_task, self._read(feed))

    async def _read(self, feed: Feed) -> None:
        reason = "its feed ended"
        try:
            async with aclosing(self._open_feed(feed)) as bundles:
                beat_at = time.monotonic()
                async for updates in bundles:
                    self._distribute(updates)
                    if time.monotonic() >= beat_at:  # the base replica lives, also for those that wait
                        self._put(feed.name, [])
                        beat_at = time.monotonic() + HEARTBEAT_S
        except (BaseLost, AnswerFailed) as error:
            reason = str(error)
        finally:
            del self._feeds[feed.name], self._replicas[feed.replica]
            self._put(feed.name, BaseLost(reason))

    def _distribute(self, updates: Sequence[Update]) -> None:
        for update in updates:
            if (reader := self._readers.get(update.request_id)) is not None:
                reader.items.put_nowait([update])

    def _put(self, feed: str, item: list[Update] | BaseLost) -> None:
        """To all readers of a feed."""
        for reader in self._readers.values():
            if reader.feed == feed:
                reader.items.put_nowait(item)

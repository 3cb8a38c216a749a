"""The layers between a base replica's messages and one answer, composed in one place. Knows nothing of Ray or HTTP."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING

from mavis_dist.decode import Request
from mavis_dist.sections import Limits
from serve.gateway.failover import Piece, another_if_full, follow, timed
from serve.gateway.versions import pinned
from serve.messages import ANYBODY, Admission, Message, OpenStream

if TYPE_CHECKING:  # its module imports Ray
    from serve.metrics import Record


def answer_stream(
    request: Request,
    open_stream: OpenStream,
    limits: Limits,
    admission: Admission = ANYBODY,
    versions: Mapping[str, str] | None = None,
    record: Record | None = None,
) -> AsyncGenerator[Request | Piece, None]:
    """One answer, from its acceptance to its end. The layers, from inside to outside:

    1. `open_stream`: the messages of one base replica; through Ray, serve.gateway.feeds.Feeds.stream.
    2. watched_streams: measures times and counts ends; with `record` only.
    3. pinned: replaces objectives by `versions`, objective -> version; without them the request names versions.
    4. another_if_full: asks a second base replica if the first one is full.
    5. timed: counts a base replica that sends nothing as lost.
    6. follow: turns messages into pieces, and resumes the answer on another base replica when one is lost.

    serve.gateway.write_response merges the answers of one completion. A base replica's own layers are listed in
    serve.base.replica.Base.stream. Raises what `follow` raises.
    """
    ends_at = time.monotonic() + limits.deadline_s
    if record is not None:
        open_stream = watched_streams(open_stream, record)
    if versions is not None:
        open_stream = pinned(open_stream, versions)
    open_stream = timed(another_if_full(open_stream), limits.stall_s, ends_at)
    return follow(request, open_stream, admission, limits.deadline_s, ends_at)


def watched_streams(open_stream: OpenStream, record: Record) -> OpenStream:
    """The same streams, with their times and ends recorded."""

    async def watched(request: Request, admission: Admission) -> AsyncGenerator[Message, None]:
        began, first, last, num_tokens = time.perf_counter(), 0.0, 0.0, 0
        if request.answer:
            record("mavis_failovers", 1)
        try:
            async with aclosing(open_stream(request, admission)) as messages:
                async for message in messages:
                    for update in message if isinstance(message, list) else ():
                        last = time.perf_counter()
                        if update.tokens and not num_tokens:
                            first = last
                            if not request.answer:
                                record("mavis_first_token_seconds", first - began)
                        num_tokens += len(update.tokens)
                        if update.finished is not None and update.finished.finish is not None:
                            record("mavis_answers", 1, finish=update.finished.finish.value)
                    yield message
        finally:
            if num_tokens > 1:
                record("mavis_token_seconds", (last - first) / (num_tokens - 1))

    return watched

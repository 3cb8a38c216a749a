"""An answer is followed across base replicas, from its acceptance to its end. Knows nothing of Ray or HTTP."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TypeVar

from mavis_dist.decode import Choice, FinishReason, Request, RequestError, TokenLogprobs, Update
from mavis_dist.sections import Limits
from serve.gateway.refusals import Overloaded
from serve.messages import ANYBODY, Admission, AnswerFailed, AnswerLate, BaseLost, Full, OpenStream, Refused
from serve.timeouts import within

logger = logging.getLogger(__name__)

RETRY_PAUSE_S = 0.2

Item = TypeVar("Item")


@dataclass(frozen=True)
class Piece:
    """What one chunk added to an answer."""

    tokens: tuple[int, ...]
    finished: Choice | None = None
    resumed: bool = False  # `finished` counts only what the last base replica wrote
    logprobs: tuple[TokenLogprobs, ...] = ()  # of the tokens, where the request asks


async def follow(
    request: Request, open_stream: OpenStream, limits: Limits, entry: Admission = ANYBODY
) -> AsyncGenerator[Request | Piece, None]:
    """One answer from its acceptance to its end, on as many base replicas as it takes.

    The first item is the accepted request. When a base replica is lost, falls silent or stops early, the request is
    sent again with the tokens so far and the same seed, and goes on with the very tokens it would have had. It was let
    in then, and waits for room instead of being refused.

    Raises:
        RequestError: the engine refuses the request.
        Overloaded: two base replicas, or the only one, have no room for it.
        AnswerFailed: the engine failed.
        AnswerLate: no base replica completed the answer in time.
    """
    assert request.params.n == 1
    assert request.params.seed is not None
    tokens = list(request.answer)
    deadline = time.monotonic() + limits.deadline_s
    accepted, attempt, reason = False, 0, ""
    while time.monotonic() < deadline:
        current = replace(request, id=f"{request.id}-{attempt}", answer=tuple(tokens))
        try:
            async with aclosing(_messages(_let_in(current, open_stream, entry), limits.stall_s, deadline)) as messages:
                async for message in messages:
                    if isinstance(message, Refused):
                        raise RequestError(message.field, message.message)
                    if isinstance(message, Request):
                        if not accepted:
                            accepted = True
                            entry = replace(entry, room=0, group="", is_resumed=True)
                            yield message
                        continue
                    piece = _piece(tokens, message, attempt > 0)
                    if piece.tokens or piece.finished:
                        yield piece
                    if piece.finished:
                        return
            reason = "its stream ended early"
        except BaseLost as error:
            reason = str(error)
        except asyncio.TimeoutError:
            reason = f"no sign of life for {limits.stall_s:g} s"
        attempt += 1
        logger.warning("request %s is sent again after %d tokens: %s", request.id, len(tokens), reason)
        await asyncio.sleep(RETRY_PAUSE_S)
    because = f" ({reason})" if reason else ""
    raise AnswerLate(f"the answer was not complete within {limits.deadline_s:g} s{because}")


async def _let_in(
    request: Request, open_stream: OpenStream, entry: Admission
) -> AsyncGenerator[Request | Refused | list[Update], None]:
    """The stream of a base replica or, if it is full, of another one; raises Overloaded if that is full, too."""
    refusals: list[Full] = []
    while len(refusals) < 2:
        async with aclosing(open_stream(request, entry)) as messages:
            async for message in messages:
                if isinstance(message, Full):
                    refusals.append(message)
                    entry = replace(entry, avoid=message.replica)
                    break
                yield message
            else:
                return
    raise Overloaded(min(full.wait_s for full in refusals))


def _piece(tokens: list[int], updates: list[Update], resumed: bool) -> Piece:
    """Extend `tokens` by what is new in the updates of one answer."""
    known, finished = len(tokens), None
    logprobs: list[TokenLogprobs] = []
    for update in updates:
        if update.start > len(tokens):
            raise BaseLost(f"tokens {len(tokens)} to {update.start} are missing")
        logprobs.extend(update.logprobs[len(tokens) - update.start :])
        tokens.extend(update.tokens[len(tokens) - update.start :])
        finished = update.finished
        if finished is not None and finished.finish is FinishReason.ABORT:
            raise BaseLost("the engine gave the answer up")
        if finished is not None and finished.finish is FinishReason.ERROR:
            raise AnswerFailed(finished.error or "the engine failed")
    return Piece(tuple(tokens[known:]), finished, resumed, tuple(logprobs))


async def _messages(source: AsyncGenerator[Item, None], stall_s: float, deadline: float) -> AsyncGenerator[Item, None]:
    """The same messages; raises TimeoutError where the next one does not come in time, and closes the source."""
    try:
        while True:
            limit = min(stall_s, max(deadline - time.monotonic(), 0.001))
            try:
                message = await within(limit, anext(source))
            except StopAsyncIteration:
                return
            yield message
    finally:
        await source.aclose()

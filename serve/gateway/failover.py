"""Follows an answer across base replicas, from its acceptance to its end. Knows nothing of Ray or HTTP.

The layers are composed in serve.gateway.streams.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

from mavis_dist.decode import Choice, FinishReason, LengthError, Request, RequestError, TokenLogprobs, Update
from serve.gateway.refusals import Overloaded
from serve.messages import Admission, AnswerFailed, AnswerLate, BaseLost, Full, Message, OpenStream, Refused
from serve.timeouts import within

logger = logging.getLogger(__name__)

RETRY_PAUSE_S = 0.2


@dataclass(frozen=True)
class Piece:
    """What one message added to an answer."""

    tokens: tuple[int, ...]
    finished: Choice | None = None
    resumed: bool = False  # `finished` covers only the tokens of the last base replica
    logprobs: tuple[TokenLogprobs, ...] = ()  # of the tokens, if the request asks for them


def another_if_full(open_stream: OpenStream) -> OpenStream:
    """The stream of a base replica or, if it is full, of another one; raises Overloaded if that is full, too."""

    async def opened(request: Request, admission: Admission) -> AsyncGenerator[Message, None]:
        refusals: list[Full] = []
        while len(refusals) < 2:
            async with aclosing(open_stream(request, admission)) as messages:
                async for message in messages:
                    if isinstance(message, Full):
                        refusals.append(message)
                        admission = replace(admission, avoid=message.replica)
                        break
                    yield message
                else:
                    return
        raise Overloaded(min(full.wait_s for full in refusals))

    return opened


def timed(open_stream: OpenStream, stall_s: float, ends_at: float) -> OpenStream:
    """The same messages; raises BaseLost if none comes for `stall_s` seconds, or before time.monotonic() is `ends_at`.

    A base replica that waits for a free row, or for a model to load, sends empty lists: silence means trouble.
    """

    async def opened(request: Request, admission: Admission) -> AsyncGenerator[Message, None]:
        async with aclosing(open_stream(request, admission)) as messages:
            while True:
                limit_s = min(stall_s, max(ends_at - time.monotonic(), 0.001))
                try:
                    message = await within(limit_s, anext(messages))
                except StopAsyncIteration:
                    return
                except asyncio.TimeoutError:
                    raise BaseLost(f"no message for {round(limit_s, 3):g} s") from None
                yield message

    return opened


async def follow(
    request: Request, open_stream: OpenStream, admission: Admission, deadline_s: float, ends_at: float
) -> AsyncGenerator[Request | Piece, None]:
    """One answer from its acceptance to its end, on as many base replicas as it takes.

    The first item is the accepted request. When a base replica is lost, sends nothing or stops early, the request is
    sent again with the tokens so far and the same seed, and continues with the tokens it would have had anyway. It was
    admitted before, so it waits for room instead of being refused.

    Raises:
        RequestError: the engine refuses the request.
        Overloaded: two base replicas, or the only one, have no room for it.
        AnswerFailed: the engine failed.
        AnswerLate: no base replica completed the answer within `deadline_s`, that is until `ends_at`.
    """
    assert request.params.n == 1
    assert request.params.seed is not None
    tokens = list(request.answer)
    accepted, attempt, reason = False, 0, ""
    while time.monotonic() < ends_at:
        current = replace(request, id=f"{request.id}-{attempt}", answer=tuple(tokens))
        try:
            async with aclosing(open_stream(current, admission)) as messages:
                async for message in messages:
                    if isinstance(message, Refused):
                        error = LengthError if message.is_length else RequestError
                        raise error(message.field, message.message)
                    if isinstance(message, Request):
                        if not accepted:
                            accepted = True
                            admission = replace(admission, rows=0, group="", is_resumed=True)
                            yield message
                        continue
                    assert isinstance(message, list)  # another_if_full keeps Full to itself
                    piece = _piece(tokens, message, attempt > 0)
                    if piece.tokens or piece.finished:
                        yield piece
                    if piece.finished:
                        return
            reason = "its stream ended early"
        except BaseLost as error:
            reason = str(error)
        attempt += 1
        logger.warning("request %s is sent again after %d tokens: %s", request.id, len(tokens), reason)
        await asyncio.sleep(RETRY_PAUSE_S)
    because = f" ({reason})" if reason else ""
    raise AnswerLate(f"the answer was not complete within {deadline_s:g} s{because}")


def _piece(tokens: list[int], updates: list[Update], resumed: bool) -> Piece:
    """Extend `tokens` by the new tokens in the updates of one answer."""
    known, finished = len(tokens), None
    logprobs: list[TokenLogprobs] = []
    for update in updates:
        if update.start > len(tokens):
            raise BaseLost(f"tokens {len(tokens)} to {update.start} are missing")
        logprobs.extend(update.logprobs[len(tokens) - update.start :])
        tokens.extend(update.tokens[len(tokens) - update.start :])
        finished = update.finished
        if finished is not None and finished.finish is FinishReason.ABORT:
            raise BaseLost("the engine aborted the answer")
        if finished is not None and finished.finish is FinishReason.ERROR:
            raise AnswerFailed(finished.error or "the engine failed")
    return Piece(tuple(tokens[known:]), finished, resumed, tuple(logprobs))

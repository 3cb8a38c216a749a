"""How streams end while processes are killed, and which ends are failures. Plain values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum

from benchmarks.common.http_load import Outcome


class StreamOutcome(str, Enum):
    WHOLE = "whole"  # ended with exactly the expected text
    BROKEN = "visibly broken"  # the connection failed after a correct beginning
    ERROR = "ended in an error event"  # after a correct beginning
    REFUSED = "refused"  # no connection or an error status: no stream was open
    HUNG = "hung"  # the client timed out
    TRUNCATED = "silently truncated"  # a regular end with text missing
    WRONG = "wrong tokens"


FORBIDDEN = (StreamOutcome.HUNG, StreamOutcome.TRUNCATED, StreamOutcome.WRONG)


def classify(outcome: Outcome, expected: str) -> StreamOutcome:
    if outcome.status != 200:
        return StreamOutcome.HUNG if outcome.timed_out else StreamOutcome.REFUSED
    if not expected.startswith(outcome.text):
        return StreamOutcome.WRONG
    if outcome.is_whole:
        return StreamOutcome.WHOLE if outcome.text == expected else StreamOutcome.TRUNCATED
    if outcome.error is not None:
        return StreamOutcome.ERROR
    if outcome.broken is not None:
        return StreamOutcome.BROKEN
    return StreamOutcome.HUNG if outcome.timed_out else StreamOutcome.TRUNCATED


def count_outcomes(outcomes: Iterable[Outcome], expected: Sequence[str]) -> Counter[StreamOutcome]:
    """Streams by outcome; `expected[i]` is the text of body i."""
    return Counter(classify(outcome, expected[outcome.body_index]) for outcome in outcomes)


def is_kept(counts: Mapping[StreamOutcome, int]) -> bool:
    """Whether no stream hung, was truncated silently or had wrong tokens."""
    return not any(counts.get(outcome, 0) for outcome in FORBIDDEN)

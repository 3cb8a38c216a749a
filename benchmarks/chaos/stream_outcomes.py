"""What became of a stream while processes were killed, and what of that may be. Plain values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum

from benchmarks.common.http_load import Outcome


class Verdict(str, Enum):
    WHOLE = "whole"  # the very text that it would have had, and its end
    BROKEN = "visibly broken"  # the connection failed; what had come was right
    ERROR = "ended in an error event"  # what had come was right
    REFUSED = "turned away"  # no connection, or a status that says so: no stream was open
    HUNG = "hung"  # the client lost patience
    TRUNCATED = "silently truncated"  # a clean end that is none
    WRONG = "wrong tokens"


NEVER = (Verdict.HUNG, Verdict.TRUNCATED, Verdict.WRONG)


def judge(outcome: Outcome, expected: str) -> Verdict:
    if outcome.status != 200:
        return Verdict.HUNG if outcome.has_left else Verdict.REFUSED
    if not expected.startswith(outcome.text):
        return Verdict.WRONG
    if outcome.is_whole:
        return Verdict.WHOLE if outcome.text == expected else Verdict.TRUNCATED
    if outcome.error is not None:
        return Verdict.ERROR
    if outcome.broken is not None:
        return Verdict.BROKEN
    return Verdict.HUNG if outcome.has_left else Verdict.TRUNCATED


def tally(outcomes: Iterable[Outcome], expected: Sequence[str]) -> Counter[Verdict]:
    """How many of each; `expected` by the body that was asked."""
    return Counter(judge(outcome, expected[outcome.asked]) for outcome in outcomes)


def is_kept(verdicts: Mapping[Verdict, int]) -> bool:
    """Whether nobody was misled."""
    return not any(verdicts.get(verdict, 0) for verdict in NEVER)

"""Everything that passes between the processes of the service: frozen values and picklable errors, free of Ray.

The gateway sends a Request with its Admission to a base replica and reads Messages, and the updates of all its answers
from a Feed; a base replica sends Calls to value replicas and reads Replies.

Shapes: B rows, N tokens of all rows side by side.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from mavis_dist.decode import GuideRow, Request, Update

# --- gateway and base replica -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Admission:
    """The terms on which a request asks for admission to a base replica."""

    key: str = ""  # the caller; keys take turns
    rows: int | None = None  # rows to reserve; none: the request's own; 0: it was admitted before
    group: str = ""  # name under which rows are reserved for the requests that follow this one
    is_resumed: bool = False  # its reader waits in the middle of an answer, so it precedes all others
    avoid: str = ""  # name of the base replica that was full
    gateway: str = ""  # name of the gateway, if it can read the updates from its feed


ANYBODY = Admission()


@dataclass(frozen=True)
class Feed:
    """Asks a base replica for the updates of all answers of a gateway, which then arrive together."""

    gateway: str
    name: str  # of this feed: a gateway opens another one when it is lost
    replica: str  # the base replica that is asked


@dataclass(frozen=True)
class Accepted:
    """A base replica has accepted a request of a gateway; its updates come over the gateway's feed, if there is one."""

    request: Request  # validated
    replica: str
    feed: str = ""  # empty: over the request's own stream


@dataclass(frozen=True)
class Full:
    """A base replica has no room for a request; a value, because it crosses processes."""

    replica: str
    wait_s: float  # estimated waiting time there


@dataclass(frozen=True)
class Refused:
    """The engine refuses a request; a value, because it crosses processes."""

    field: str
    message: str
    is_length: bool = False  # there is no room for so many tokens


Message = Request | Accepted | Refused | Full | list[Update]
OpenStream = Callable[[Request, Admission], AsyncGenerator[Message, None]]
OpenFeed = Callable[[Feed], AsyncGenerator[list[Update], None]]


class BaseLost(Exception):
    """The base replica behind a stream died, or could not be reached."""


class AnswerFailed(Exception):
    """An answer that cannot be completed."""


class AnswerLate(AnswerFailed):
    """An answer that was not complete in time."""


class EngineStopped(RuntimeError):
    """The engine thread has ended, or hangs."""


# --- base replica and value replica -----------------------------------------------------------------------------------


class Kept(NamedTuple):
    """A candidate becomes the row's next token."""

    row: int
    length: int  # tokens of the row before
    token: int


@dataclass(frozen=True)
class RowTokens:
    """Token ids of several rows, those of a row side by side."""

    rows: tuple[int, ...]
    lengths: tuple[int, ...]  # tokens of each row before them
    counts: tuple[int, ...]  # ids of each row
    ids_N: np.ndarray  # int32

    def by_row(self) -> list[list[int]]:
        """The ids of each row."""
        return [ids.tolist() for ids in np.split(self.ids_N, np.cumsum(self.counts)[:-1])]

    def places(self, chosen: Sequence[int]) -> np.ndarray:
        """The indices n of the ids of some rows, given by ascending b."""
        is_chosen_B = np.zeros(len(self.rows), dtype=bool)
        is_chosen_B[chosen] = True
        return np.repeat(is_chosen_B, self.counts).nonzero()[0]

    def part(self, chosen: Sequence[int]) -> RowTokens:
        """Some rows, given by ascending b."""
        rows, lengths, counts = (tuple(column[b] for b in chosen) for column in (self.rows, self.lengths, self.counts))
        return RowTokens(rows, lengths, counts, self.ids_N[self.places(chosen)])


@dataclass(frozen=True)
class Question:
    """What to value: opened rows, extended rows, or candidates of rows that may have to be opened first."""

    open: tuple[GuideRow, ...] = ()  # none, or all rows of the question
    extend: RowTokens | None = None  # appended; valued at each row's last one
    score: RowTokens | None = None  # alternative next tokens; all of them valued

    @property
    def rows(self) -> tuple[int, ...]:
        tokens = self.score or self.extend
        return tokens.rows if tokens else tuple(row.row for row in self.open)

    @property
    def num_values(self) -> int:
        return len(self.score.ids_N) if self.score else len(self.rows)

    def places(self, chosen: Sequence[int]) -> np.ndarray:
        """Where the values of some rows, given by ascending b, are among those of all."""
        return self.score.places(chosen) if self.score else np.array(chosen)

    def part(self, chosen: Sequence[int]) -> Question:
        """Some rows, given by ascending b."""
        return Question(
            tuple(self.open[b] for b in chosen) if self.open else (),
            self.extend.part(chosen) if self.extend else None,
            self.score.part(chosen) if self.score else None,
        )


@dataclass(frozen=True)
class Call:
    """One round trip: keep, close, then value. `session` names one engine's rows, `version` the model to use."""

    session: str
    keep: tuple[Kept, ...] = ()
    close: tuple[int, ...] = ()
    question: Question = Question()
    version: str = ""


@dataclass(frozen=True)
class Reply:
    """Values [N] of candidates, or [B] of rows; nan for unknown rows."""

    values: np.ndarray  # float32
    unknown: tuple[int, ...] = ()
    error: str | None = None  # why the model cannot answer, now or later


class ReplicaLost(Exception):
    """The replica behind a call died, or could not be reached, or cannot answer."""


class Pending(Protocol):
    """A call under way."""

    def result(self, timeout_s: float) -> Reply:
        """Raises ReplicaLost or TimeoutError."""
        ...


class Transport(Protocol):
    """Starts a call to a value replica of an objective: the same one for the same session, as long as it lives."""

    def __call__(self, objective: str, session: str, call: Call) -> Pending: ...

"""Which answers are written now: admission, prefix sharing, release. Plain data; never touches a tensor."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from mavis_dist.decode.request import Choice, Request, stream_of


@dataclass(eq=False)
class Row:
    """One answer in the running batch."""

    number: int  # unique in the life of the engine; the name that models and guides know it by
    request: Request
    choice: Choice
    stream: int
    tokens: list[int]  # prompt and answer

    @property
    def position(self) -> int:
        """Index in the answer of the next token."""
        return len(self.tokens) - len(self.request.prompt)


@dataclass(frozen=True)
class Admission:
    """A row that starts now, and the row it shares its first tokens with."""

    row: Row
    source: Row | None
    shared: int


class Scheduler:
    """First come, first served, up to `max_rows` answers at a time.

    A finished row stays until the next admission, so that the answers which continue it find its keys and values.
    """

    def __init__(self, max_rows: int):
        self.max_rows = max_rows
        self.running: list[Row] = []
        self._waiting: deque[Row] = deque()
        self._finished: list[Row] = []
        self._next_number = 0

    @property
    def is_idle(self) -> bool:
        return not (self.running or self._waiting)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def has(self, request_id: str) -> bool:
        """Whether any choice of a request is running or waiting."""
        return any(row.request.id == request_id for row in (*self.running, *self._waiting))

    def submit(self, request: Request, first: bool = False) -> None:
        """Queue every choice of a prepared request, `first` before all others."""
        rows = []
        for index in range(request.params.n):
            tokens = [*request.prompt, *request.answer]
            rows.append(Row(self._next_number, request, Choice(index), stream_of(request, index), tokens))
            self._next_number += 1
        if first:
            self._waiting.extendleft(reversed(rows))
        else:
            self._waiting.extend(rows)

    def admit(self) -> list[Admission]:
        """Move waiting rows into the batch while there is room."""
        admissions: list[Admission] = []
        while self._waiting and len(self.running) < self.max_rows:
            row = self._waiting.popleft()
            # Rows admitted in this very call have no keys and values yet.
            sources = [*self._finished, *self.running[: len(self.running) - len(admissions)]]
            source, shared = _best_source(row, sources)
            admissions.append(Admission(row, source, shared))
            self.running.append(row)
        return admissions

    def release(self) -> list[Row]:
        """The rows that finished before the latest admission; nobody can share with them any more."""
        released, self._finished = self._finished, []
        return released

    def finish(self, rows: Iterable[Row]) -> None:
        """Take rows out of the batch."""
        gone = set(rows)
        self._finished.extend(row for row in self.running if row in gone)
        self.running = [row for row in self.running if row not in gone]

    def cancel(self, request_id: str) -> list[Row]:
        """Drop a request's waiting rows; returns its running ones, which the caller finishes, and the dropped."""
        dropped = [row for row in self._waiting if row.request.id == request_id]
        self._waiting = deque(row for row in self._waiting if row.request.id != request_id)
        running = [row for row in self.running if row.request.id == request_id]
        self.finish(running)
        return running + dropped


def _best_source(row: Row, sources: list[Row]) -> tuple[Row | None, int]:
    best, best_shared = None, 0
    for source in sources:
        shared = _common_prefix(row.tokens, source.tokens, best_shared)
        if shared > best_shared:
            best, best_shared = source, shared
    return best, best_shared


def _common_prefix(a: list[int], b: list[int], at_least: int) -> int:
    """Length of the common prefix, or 0 if it is not longer than `at_least`."""
    if a[: at_least + 1] != b[: at_least + 1]:
        return 0
    length = min(len(a), len(b))
    return next((i for i in range(at_least, length) if a[i] != b[i]), length)

"""Which answers are written now, and what has to be encoded first. Plain data; never touches a tensor.

A row waits, is opened (its tokens are encoded piece by piece), runs (a token a step), and is finished. A finished row
stays until the next admission, so that the answers which continue it find its keys and values.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mavis_dist.decode.request import Choice, Request, stream_of
from mavis_dist.decode.text import StoppedText

# Tokens shared with a row that is still being encoded, from which on waiting for them beats encoding them again.
WORTH_WAITING_FOR = 32


@dataclass(eq=False)
class Row:
    """One answer."""

    number: int  # unique in the life of the engine; the name that models and guides know it by
    request: Request
    choice: Choice
    stream: int
    tokens: list[int]  # prompt and answer
    num_encoded: int | None = None  # tokens whose keys and values the base model has; none: not opened
    text: StoppedText | None = None  # followed only where stop strings are looked for

    @property
    def position(self) -> int:
        """Index in the answer of the next token."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def is_encoded(self) -> bool:
        """Whether only the last token is missing, whose logits the next step computes."""
        return self.num_encoded is not None and self.num_encoded >= len(self.tokens) - 1

    @property
    def reserved(self) -> int:
        """The tokens that the row may grow to."""
        return len(self.request.prompt) + self.request.params.max_tokens


@dataclass(frozen=True)
class Piece:
    """Tokens of a row to encode now: [start, end). The first piece opens the row, sharing tokens with another."""

    row: Row
    start: int
    end: int
    is_first: bool
    source: Row | None = None

    @property
    def is_last(self) -> bool:
        return self.end == len(self.row.tokens) - 1


class Scheduler:
    """First come, first served, up to `max_rows` answers at a time, in a cache of `cache_tokens` tokens.

    The cache is rectangular: rows side by side take as many tokens each as the longest of them may grow to.
    """

    def __init__(self, max_rows: int, cache_tokens: int | None = None):
        self.max_rows, self.cache_tokens = max_rows, cache_tokens
        self.running: list[Row] = []
        self._waiting: deque[Row] = deque()
        self._opening: list[Row] = []
        self._finished: list[Row] = []
        self._next_number = 0

    @property
    def is_idle(self) -> bool:
        return not (self.running or self._opening or self._waiting)

    @property
    def num_admitted(self) -> int:
        return len(self.running) + len(self._opening)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def has(self, request_id: str) -> bool:
        """Whether any choice of a request is not finished yet."""
        return any(row.request.id == request_id for row in (*self.running, *self._opening, *self._waiting))

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

    def admit(self) -> None:
        """Let waiting rows in while there is room."""
        while self._waiting and self.num_admitted < self.max_rows and self._fits(self._waiting[0]):
            self._opening.append(self._waiting.popleft())

    def pieces(self, budget: int) -> list[Piece]:
        """What to encode next, at most `budget` tokens, first come first served. The caller reports it as `encoded`."""
        pieces: list[Piece] = []
        for row in self._opening:
            if budget == 0:
                break
            if row.num_encoded is not None:
                piece = Piece(row, row.num_encoded, min(row.num_encoded + budget, len(row.tokens) - 1), False)
            else:
                source, shared = self._best_source(row)
                if self._is_worth_waiting(row, shared):
                    continue
                piece = Piece(row, shared, min(shared + budget, len(row.tokens) - 1), True, source)
            pieces.append(piece)
            budget -= piece.end - piece.start
        return pieces

    def encoded(self, pieces: Iterable[Piece]) -> None:
        """Take note of encoded pieces; rows that are complete run."""
        for piece in pieces:
            piece.row.num_encoded = piece.end
        ready = [row for row in self._opening if row.is_encoded]
        self.running.extend(ready)
        self._opening = [row for row in self._opening if not row.is_encoded]

    def release(self) -> list[Row]:
        """The rows that finished before the latest admission; nobody can share with them any more."""
        released, self._finished = self._finished, []
        return released

    def finish(self, rows: Iterable[Row]) -> None:
        """Take rows out of the batch."""
        gone = set(rows)
        self._finished.extend(row for row in self._resident() if row in gone)
        self.running = [row for row in self.running if row not in gone]
        self._opening = [row for row in self._opening if row not in gone]

    def cancel(self, request_id: str) -> list[Row]:
        """Drop all rows of a request that are not finished; returns them."""
        dropped = [row for row in self._waiting if row.request.id == request_id]
        self._waiting = deque(row for row in self._waiting if row.request.id != request_id)
        admitted = [row for row in (*self.running, *self._opening) if row.request.id == request_id]
        self.finish(admitted)
        return admitted + dropped

    def _resident(self) -> Iterator[Row]:
        """The rows that have, or may have, keys and values, but for the finished ones."""
        yield from self.running
        yield from self._opening

    def _fits(self, row: Row) -> bool:
        if self.cache_tokens is None:
            return True
        rows = [row, *self._resident(), *self._finished]
        return len(rows) * max(r.reserved for r in rows) <= self.cache_tokens

    def _best_source(self, row: Row) -> tuple[Row | None, int]:
        """The row that shares most encoded tokens, all but the last at most."""
        best, best_shared = None, 0
        for source in (*self._finished, *self._resident()):
            if source.num_encoded is not None:
                shared = min(_common_prefix(row.tokens, source.tokens, best_shared), source.num_encoded)
                shared = min(shared, len(row.tokens) - 1)
                if shared > best_shared:
                    best, best_shared = source, shared
        return best, best_shared

    def _is_worth_waiting(self, row: Row, shared: int) -> bool:
        """Whether a row before this one is about to encode many more of its tokens."""
        for other in self._opening:
            if other is row:
                return False
            common = min(_common_prefix(row.tokens, other.tokens, shared), len(other.tokens) - 1, len(row.tokens) - 1)
            if common - shared >= WORTH_WAITING_FOR or (common > shared and common == len(row.tokens) - 1):
                return True
        return False


def _common_prefix(a: list[int], b: list[int], at_least: int) -> int:
    """Length of the common prefix, or 0 if it is not longer than `at_least`."""
    if a[: at_least + 1] != b[: at_least + 1]:
        return 0
    length = min(len(a), len(b))
    return next((i for i in range(at_least, length) if a[i] != b[i]), length)

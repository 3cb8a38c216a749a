"""Which answers run, and what is encoded next. Plain data; never touches a tensor.

A row waits, is opened (its tokens are encoded in pieces), runs (one token per step), and finishes. A finished row stays
until the next admission, so that answers that continue it can reuse its keys and values. A row with preferences is
several rows of the base model: its variants differ in the prompt and share the answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from mavis_dist.core.preferences import RewardTracker
from mavis_dist.decode.request import Choice, Request, stream_of
from mavis_dist.decode.text import StoppedText

# At least so many tokens shared with a variant in encoding are worth waiting for instead of encoding them again.
WORTH_WAITING_FOR = 32


@dataclass(eq=False)
class PromptVariant:
    """A row of the base model: the plain prompt, or the one with a preference in it, and the answer so far."""

    number: int  # unique within the engine; identifies the row in models and guides
    prompt_length: int
    tokens: list[int]  # prompt and answer
    max_shared: int  # tokens that may be copied from another variant instead of being encoded
    num_encoded: int | None = None  # tokens whose keys and values the base model has; None: not opened
    logprobs: list[float] = field(default_factory=list)  # of the answer's tokens, where preferences reward them

    @property
    def is_encoded(self) -> bool:
        """Whether only the last token is missing, whose logits the next step computes."""
        return self.num_encoded is not None and self.num_encoded >= len(self.tokens) - 1


@dataclass(eq=False)
class Row:
    """One answer."""

    request: Request
    choice: Choice
    stream: int
    variants: list[PromptVariant]  # the plain one, then one per preference
    text: StoppedText | None = None  # only with stop strings
    reward_tracker: RewardTracker | None = None  # only with preferences

    @property
    def number(self) -> int:
        """The number of its plain variant."""
        return self.variants[0].number

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer."""
        return self.variants[0].tokens

    @property
    def position(self) -> int:
        """Index in the answer of the next token."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def is_encoded(self) -> bool:
        return all(variant.is_encoded for variant in self.variants)

    @property
    def reserved(self) -> int:
        """The maximum length of its longest variant, in tokens."""
        return max(variant.prompt_length for variant in self.variants) + self.request.params.max_tokens

    def append(self, token: int) -> None:
        """Add a token to the answer, after a step that encoded the previous one."""
        for variant in self.variants:
            variant.num_encoded = len(variant.tokens)
            variant.tokens.append(token)


@dataclass(frozen=True)
class Piece:
    """Tokens of a variant to encode now: [start, end). The first piece opens the variant, which may share tokens."""

    row: Row
    variant: PromptVariant
    start: int
    end: int
    is_first: bool
    source: PromptVariant | None = None

    @property
    def is_last(self) -> bool:
        return self.end == len(self.variant.tokens) - 1

    @property
    def rewarded(self) -> list[int]:
        """The answer tokens that follow the tokens of the piece, where preferences reward them."""
        if not self.row.request.preferences:
            return []
        first = max(self.start + 1, self.variant.prompt_length)
        return self.variant.tokens[first : self.end + 1]


class Scheduler:
    """First come, first served, up to `max_rows` variants at a time, in a cache of `cache_tokens` tokens.

    The cache is rectangular: every variant takes as many tokens as the longest one may grow to.
    """

    def __init__(self, max_rows: int, cache_tokens: int | None = None):
        self.max_rows, self.cache_tokens = max_rows, cache_tokens
        self.running: list[Row] = []
        self._waiting: deque[Row] = deque()
        self._opening: list[Row] = []
        self._finished: list[Row] = []
        self._next_number, self._num_preference_variants = 0, 0

    @property
    def is_idle(self) -> bool:
        return not (self.running or self._opening or self._waiting)

    @property
    def num_admitted(self) -> int:
        """Variants that are opened or running."""
        return _num_variants((*self.running, *self._opening))

    @property
    def num_waiting(self) -> int:
        return _num_variants(self._waiting)

    def has(self, request_id: str) -> bool:
        """Whether any choice of a request is unfinished."""
        return any(row.request.id == request_id for row in (*self.running, *self._opening, *self._waiting))

    def submit(self, request: Request, first: bool = False) -> None:
        """Queue every choice of a validated request; with `first` before all others."""
        rows = []
        for index in range(request.params.n):
            with_preferences = [self._variant(request, preference.prompt) for preference in request.preferences]
            variants = [self._variant(request, request.prompt, self._next_number), *with_preferences]
            self._next_number += 1
            rows.append(Row(request, Choice(index), stream_of(request, index), variants))
        if first:
            self._waiting.extendleft(reversed(rows))
        else:
            self._waiting.extend(rows)

    def _variant(self, request: Request, prompt: Sequence[int], number: int | None = None) -> PromptVariant:
        """Plain variants are numbered 0, 1, ..., so that guides can distribute them; the others negatively."""
        if number is None:
            self._num_preference_variants += 1
            number = -self._num_preference_variants
        tokens = [*prompt, *request.answer]
        # The rewards of existing answer tokens are computed where these are encoded: they must not be copied.
        is_rewarded = bool(request.preferences and request.answer)
        return PromptVariant(number, len(prompt), tokens, (len(prompt) if is_rewarded else len(tokens)) - 1)

    def admit(self) -> None:
        """Admit waiting rows while there is room."""
        while self._waiting and self._fits(self._waiting[0]):
            self._opening.append(self._waiting.popleft())

    def pieces(self, budget: int) -> list[Piece]:
        """The pieces to encode next, at most `budget` tokens, first come first served. The caller calls `encoded`."""
        pieces: list[Piece] = []
        for row in self._opening:
            for variant in row.variants:
                if budget == 0:
                    break
                if variant.is_encoded:
                    continue
                if variant.num_encoded is not None:
                    end = min(variant.num_encoded + budget, len(variant.tokens) - 1)
                    piece = Piece(row, variant, variant.num_encoded, end, False)
                else:
                    source, shared = self._best_source(variant)
                    if self._is_worth_waiting(variant, shared):
                        continue
                    end = min(shared + budget, len(variant.tokens) - 1)
                    piece = Piece(row, variant, shared, end, True, source)
                pieces.append(piece)
                budget -= piece.end - piece.start
        return pieces

    def encoded(self, pieces: Iterable[Piece]) -> None:
        """Mark pieces as encoded; complete rows start to run."""
        for piece in pieces:
            piece.variant.num_encoded = piece.end
        ready = [row for row in self._opening if row.is_encoded]
        self.running.extend(ready)
        self._opening = [row for row in self._opening if not row.is_encoded]

    def release(self) -> list[Row]:
        """The rows that finished before the latest admission; no row can share their tokens any more."""
        released, self._finished = self._finished, []
        return released

    def finish(self, rows: Iterable[Row]) -> None:
        """Take rows out of the batch."""
        gone = set(rows)
        self._finished.extend(row for row in self._resident() if row in gone)
        self.running = [row for row in self.running if row not in gone]
        self._opening = [row for row in self._opening if row not in gone]

    def cancel(self, request_id: str) -> list[Row]:
        """Drop all unfinished rows of a request; returns them."""
        dropped = [row for row in self._waiting if row.request.id == request_id]
        self._waiting = deque(row for row in self._waiting if row.request.id != request_id)
        admitted = [row for row in (*self.running, *self._opening) if row.request.id == request_id]
        self.finish(admitted)
        return admitted + dropped

    def _resident(self) -> Iterator[Row]:
        """The rows that have, or may have, keys and values, except finished ones."""
        yield from self.running
        yield from self._opening

    def _fits(self, row: Row) -> bool:
        if self.num_admitted + len(row.variants) > self.max_rows:
            return False
        if self.cache_tokens is None:
            return True
        rows = [row, *self._resident(), *self._finished]
        return _num_variants(rows) * max(r.reserved for r in rows) <= self.cache_tokens

    def _best_source(self, variant: PromptVariant) -> tuple[PromptVariant | None, int]:
        """The variant that shares most encoded tokens, and how many of them may be copied."""
        best, best_shared = None, 0
        for source in _variants((*self._finished, *self._resident())):
            if source.num_encoded is not None:
                shared = min(_common_prefix(variant.tokens, source.tokens, best_shared), source.num_encoded)
                shared = min(shared, variant.max_shared)
                if shared > best_shared:
                    best, best_shared = source, shared
        return best, best_shared

    def _is_worth_waiting(self, variant: PromptVariant, shared: int) -> bool:
        """Whether an earlier variant is about to encode many more of its tokens."""
        for other in _variants(self._opening):
            if other is variant:
                return False
            common = min(
                _common_prefix(variant.tokens, other.tokens, shared), len(other.tokens) - 1, variant.max_shared
            )
            if common - shared >= WORTH_WAITING_FOR or (common > shared and common == variant.max_shared):
                return True
        return False


def variants_of(rows: Sequence[Row]) -> list[PromptVariant]:
    """The plain variant of every row, then all others, row by row."""
    return [*(row.variants[0] for row in rows), *(variant for row in rows for variant in row.variants[1:])]


def _variants(rows: Iterable[Row]) -> Iterator[PromptVariant]:
    for row in rows:
        yield from row.variants


def _num_variants(rows: Iterable[Row]) -> int:
    return sum(len(row.variants) for row in rows)


def _common_prefix(a: list[int], b: list[int], at_least: int) -> int:
    """Length of the common prefix, or 0 if it is not longer than `at_least`."""
    if a[: at_least + 1] != b[: at_least + 1]:
        return 0
    length = min(len(a), len(b))
    return next((i for i in range(at_least, length) if a[i] != b[i]), length)

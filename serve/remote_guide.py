"""A guide whose value models live in other processes. Knows nothing of Ray: calls go through a transport.

All objectives are asked at once, and kept and closed rows travel with the next call, so that an engine step costs one
round trip. Replicas may die, hang, restart or lose rows at any time: rows are opened again from their token ids.

Shapes: B rows, K candidates, M objectives.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from mavis_dist.decode import GuideRow
from serve.sessions import Call, Kept, Reply

logger = logging.getLogger(__name__)

RETRY_PAUSE_S = 0.1


class ReplicaLost(Exception):
    """The replica behind a call died, or could not be reached."""


class Pending(Protocol):
    """A call under way."""

    def result(self, timeout_s: float) -> Reply:
        """Raises ReplicaLost or TimeoutError."""
        ...


class Transport(Protocol):
    """Starts a call of one objective's value replicas, the same replica for the same session while it can."""

    def __call__(self, objective: str, session: str, call: Call) -> Pending: ...


@dataclass
class _Row:
    tokens: list[int]
    objectives: frozenset[str]
    candidates: list[int] = field(default_factory=list)  # asked for since the last token


class _Line:
    """The calls to one objective for one share of the rows, under one session at a time."""

    def __init__(self, objective: str, name: str, transport: Transport):
        self.objective = objective
        self._name, self._transport = name, transport
        self._generation = 0
        self._keep: list[Kept] = []
        self._close: list[int] = []

    def keep(self, kept: Kept) -> None:
        self._keep.append(kept)

    def close(self, row: int) -> None:
        self._close.append(row)

    def send(self, question: _Question) -> Pending:
        session = f"{self._name}-{self._generation}"
        call = Call(
            session,
            tuple(self._keep),
            tuple(self._close),
            tuple(question.opening),
            tuple(question.rows),
            tuple(question.lengths),
            tuple(question.offsets),
            question.candidates_BK,
        )
        self._keep, self._close = [], []
        return self._transport(self.objective, session, call)

    def move(self) -> None:
        """Ask under a new session, which another replica may serve; nothing of the old one counts any more."""
        self._generation += 1


@dataclass
class _Question:
    """What one line is asked in one round trip. Without candidates, the rows are asked for as they are opened."""

    places: list[int]  # b of each row
    rows: list[int]
    lengths: list[int]
    offsets: list[int]
    opening: list[GuideRow]
    candidates_BK: np.ndarray | None


class RemoteGuide:
    """Implements mavis_dist.decode.Guide.

    An objective that stays out of reach for `limit_s` gets nan, which ends the answers that use it and no others.
    """

    def __init__(
        self,
        objectives: Sequence[str],
        transport: Transport,
        num_sessions: int = 1,
        timeout_s: float = 10.0,
        limit_s: float = 90.0,
    ):
        """Rows are spread over `num_sessions` sessions, so that several replicas can work on one step."""
        self._objectives = tuple(objectives)
        self._timeout_s, self._limit_s = timeout_s, limit_s
        self._rows: dict[int, _Row] = {}
        engine = uuid.uuid4().hex
        self._lines = {
            name: [_Line(name, f"{engine}-{s}", transport) for s in range(num_sessions)] for name in self._objectives
        }
        self._num_sessions = num_sessions
        self._out_of_reach: set[str] = set()  # objectives that get one attempt, so that they delay no others

    @property
    def objectives(self) -> tuple[str, ...]:
        return self._objectives

    def open(self, rows: Sequence[GuideRow]) -> torch.Tensor:
        self._rows.update({row.row: _Row(list(row.tokens), row.objectives) for row in rows})
        return self._ask([row.row for row in rows], None, rows)

    def score(self, rows: Sequence[int], candidates_BK: torch.Tensor) -> torch.Tensor:
        candidates = candidates_BK.cpu().numpy()
        values = self._ask(rows, candidates, ())
        for row, ids_K in zip(rows, candidates.tolist(), strict=True):
            self._rows[row].candidates += ids_K
        return values

    def keep(self, rows: Sequence[int], index_B: torch.Tensor) -> None:
        for number, index in zip(rows, index_B.tolist(), strict=True):
            row = self._rows[number]
            for name in row.objectives:
                self._line(name, number).keep(Kept(number, index, len(row.tokens)))
            row.tokens.append(row.candidates[index])
            row.candidates = []

    def close(self, rows: Sequence[int]) -> None:
        for number in rows:
            row = self._rows.pop(number, None)
            for name in row.objectives if row else ():
                self._line(name, number).close(number)

    def _line(self, objective: str, row: int) -> _Line:
        return self._lines[objective][row % self._num_sessions]

    def _ask(self, rows: Sequence[int], candidates_BK: np.ndarray | None, opening: Sequence[GuideRow]) -> torch.Tensor:
        """Values [B, M] of opened rows or [B, K, M] of candidates; every line is asked before any is waited for."""
        shape = (len(rows),) if candidates_BK is None else candidates_BK.shape
        values = np.full((*shape, len(self._objectives)), np.nan, dtype=np.float32)
        asked = []
        for m, name in enumerate(self._objectives):
            used = [b for b, row in enumerate(rows) if name in self._rows[row].objectives]
            for line in self._lines[name]:
                places = [b for b in used if self._line(name, rows[b]) is line]
                if places:
                    question = self._question(places, rows, candidates_BK, opening)
                    asked.append((m, line, question, line.send(question)))
        for m, line, question, pending in asked:
            self._settle(line, question, pending, values[..., m])
        return torch.from_numpy(values)

    def _question(
        self, places: list[int], rows: Sequence[int], candidates_BK: np.ndarray | None, opening: Sequence[GuideRow]
    ) -> _Question:
        numbers = [rows[b] for b in places]
        lengths = [len(self._rows[row].tokens) for row in numbers]
        offsets = [len(self._rows[row].candidates) for row in numbers]
        opened = [opening[b] for b in places] if opening else []
        candidates = None if candidates_BK is None else candidates_BK[places]
        return _Question(places, numbers, lengths, offsets, opened, candidates)

    def _settle(self, line: _Line, question: _Question, pending: Pending, values: np.ndarray) -> None:
        """Wait for a line's values, opening rows again that its replicas do not know, until all are there."""
        deadline = time.monotonic() + (0 if line.objective in self._out_of_reach else self._limit_s)
        while True:
            try:
                reply = pending.result(self._timeout_s)
            except (ReplicaLost, TimeoutError) as error:
                if time.monotonic() > deadline:
                    logger.error("objective %r is out of reach: %s", line.objective, error or "no answer")
                    self._out_of_reach.add(line.objective)
                    line.move()
                    return
                logger.warning("objective %r: %s; its rows are opened again", line.objective, error or "no answer")
                line.move()
                time.sleep(RETRY_PAUSE_S)
                missing = question.rows
            else:
                self._out_of_reach.discard(line.objective)
                values[question.places] = reply.values
                missing = list(reply.unknown)
                if not missing:
                    return
            question = self._reopening(line, question, missing)
            pending = line.send(question)

    def _reopening(self, line: _Line, question: _Question, missing: list[int]) -> _Question:
        """The part of a question that concerns `missing` rows, with the rows opened from their token ids."""
        part = [i for i, row in enumerate(question.rows) if row in missing]
        tokens = [tuple(self._rows[question.rows[i]].tokens) for i in part]
        wanted = frozenset({line.objective})
        return _Question(
            [question.places[i] for i in part],
            [question.rows[i] for i in part],
            [question.lengths[i] for i in part],
            [question.offsets[i] for i in part],
            [GuideRow(question.rows[i], ids, wanted) for i, ids in zip(part, tokens, strict=True)],
            None if question.candidates_BK is None else question.candidates_BK[part],
        )

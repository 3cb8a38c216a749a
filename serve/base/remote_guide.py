"""A guide whose value models live in other processes. Knows nothing of Ray: calls go through a transport.

All objectives are asked at once, and kept and closed rows travel with the next call, so that an engine step costs one
round trip. Replicas may die, hang, restart or lose rows at any time: rows are opened again from their token ids.

Shapes: B rows, N candidates of all rows side by side, M objectives.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mavis_dist.decode import GuideRow
from serve.messages import Call, Kept, Pending, Question, ReplicaLost, Reply, RowTokens, Transport

logger = logging.getLogger(__name__)

RETRY_PAUSE_S = 0.1


@dataclass
class _Row:
    tokens: list[int]
    objectives: frozenset[str]
    candidates: list[int] = field(default_factory=list)  # asked for since the last token


class _Channel:
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

    def send(self, question: Question) -> Pending:
        session = f"{self._name}-{self._generation}"
        call = Call(session, tuple(self._keep), tuple(self._close), question, self.objective)
        self._keep, self._close = [], []
        return self._transport(self.objective, session, call)

    def move(self) -> None:
        """Ask under a new session, which another replica may serve; nothing of the old one counts any more."""
        self._generation += 1


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
        self._transport, self._num_sessions = transport, num_sessions
        self._timeout_s, self._limit_s = timeout_s, limit_s
        self._engine = uuid.uuid4().hex
        self._rows: dict[int, _Row] = {}
        self._objectives: tuple[str, ...] = ()
        self._lines: dict[str, list[_Channel]] = {}
        self._out_of_reach: set[str] = set()  # objectives that get one attempt, so that they delay no others
        self.add(objectives)

    def add(self, objectives: Sequence[str]) -> None:
        """Ask for further objectives, between two steps of the engine."""
        assert not self._lines.keys() & set(objectives)
        self._lines |= {name: self._new_lines(name) for name in objectives}
        self._objectives = tuple(self._lines)

    def remove(self, objectives: Collection[str]) -> None:
        """Ask for objectives no more, between two steps of the engine."""
        self._lines = {name: lines for name, lines in self._lines.items() if name not in objectives}
        self._objectives = tuple(self._lines)
        self._out_of_reach.difference_update(objectives)

    def reach(self, objective: str) -> None:
        """Wait until value replicas are ready to value an objective that is to be added, so that no step has to.

        Any thread may call this.

        Raises:
            ReplicaLost: if they cannot, or do not answer within `limit_s`.
        """
        deadline = time.monotonic() + self._limit_s
        asked = [(line, line.send(Question())) for line in self._new_lines(objective)]
        for line, pending in asked:
            while (reply := self._reply(pending, deadline)) is None:
                time.sleep(RETRY_PAUSE_S)
                pending = line.send(Question())
            if reply.error is not None:
                raise ReplicaLost(reply.error)

    def _reply(self, pending: Pending, deadline: float) -> Reply | None:
        try:
            return pending.result(self._timeout_s)
        except (ReplicaLost, TimeoutError) as error:
            if time.monotonic() < deadline:
                return None
            reason = str(error) or "no answer"
            raise ReplicaLost(f"its value replicas are out of reach ({reason}): deploy their application") from None

    def _new_lines(self, objective: str) -> list[_Channel]:
        return [_Channel(objective, f"{self._engine}-{s}", self._transport) for s in range(self._num_sessions)]

    @property
    def objectives(self) -> tuple[str, ...]:
        return self._objectives

    @property
    def predicted(self) -> tuple[str, ...]:
        return ()  # a student's predictions are a gather: no call is worth it

    def open(self, rows: Sequence[GuideRow]) -> torch.Tensor:
        self._rows.update({row.row: _Row(list(row.tokens), row.objectives) for row in rows})
        return self._ask(Question(open=tuple(rows)))

    def extend(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        new = self._row_tokens(rows, [len(ids) for ids in tokens], [id for ids in tokens for id in ids])
        for number, ids in zip(rows, tokens, strict=True):
            row = self._rows[number]
            row.tokens += ids
            row.candidates = []
        return self._ask(Question(extend=new))

    def score(self, rows: Sequence[int], counts: Sequence[int], candidates_N: torch.Tensor) -> torch.Tensor:
        asked = self._row_tokens(rows, counts, candidates_N.cpu())
        values_NM = self._ask(Question(score=asked))
        for number, ids in zip(rows, asked.by_row(), strict=True):
            self._rows[number].candidates += ids
        return values_NM

    def keep(self, rows: Sequence[int], index_B: torch.Tensor) -> None:
        for number, index in zip(rows, index_B.tolist(), strict=True):
            row = self._rows[number]
            for name in row.objectives & self._lines.keys():
                self._line(name, number).keep(Kept(number, len(row.tokens), row.candidates[index]))
            row.tokens.append(row.candidates[index])
            row.candidates = []

    def close(self, rows: Sequence[int]) -> None:
        for number in rows:
            row = self._rows.pop(number, None)
            for name in row.objectives & self._lines.keys() if row else ():
                self._line(name, number).close(number)

    def _line(self, objective: str, row: int) -> _Channel:
        return self._lines[objective][row % self._num_sessions]

    def _row_tokens(self, rows: Sequence[int], counts: Sequence[int], ids_N: Sequence[int] | torch.Tensor) -> RowTokens:
        lengths = tuple(len(self._rows[row].tokens) for row in rows)
        return RowTokens(tuple(rows), lengths, tuple(counts), np.asarray(ids_N, dtype=np.int32))

    def _ask(self, question: Question) -> torch.Tensor:
        """The values [B or N, M] asked for; every line is asked before any is waited for."""
        values = np.full((question.num_values, len(self._objectives)), np.nan, dtype=np.float32)
        asked = []
        for m, name in enumerate(self._objectives):
            used = [b for b, row in enumerate(question.rows) if name in self._rows[row].objectives]
            for line in self._lines[name]:
                chosen = [b for b in used if self._line(name, question.rows[b]) is line]
                if chosen:
                    part = question.part(chosen)
                    asked.append((line, part, line.send(part), question.places(chosen), m))
        for line, part, pending, places, m in asked:
            values[places, m] = self._settle(line, part, pending)
        return torch.from_numpy(values)

    def _settle(self, line: _Channel, question: Question, pending: Pending) -> np.ndarray:
        """Wait for a line's values, opening rows again that its replicas do not know, until all are there."""
        values = np.full(question.num_values, np.nan, dtype=np.float32)
        places = np.arange(question.num_values)  # of what is still asked for
        deadline = time.monotonic() + (0 if line.objective in self._out_of_reach else self._limit_s)
        while True:
            try:
                reply = pending.result(self._timeout_s)
            except (ReplicaLost, TimeoutError) as error:
                if time.monotonic() > deadline:
                    logger.error("objective %r is out of reach: %s", line.objective, error or "no answer")
                    self._out_of_reach.add(line.objective)
                    line.move()
                    return values
                logger.warning("objective %r: %s; its rows are opened again", line.objective, error or "no answer")
                line.move()
                time.sleep(RETRY_PAUSE_S)
                missing = list(range(len(question.rows)))
            else:
                self._out_of_reach.discard(line.objective)
                if reply.error is not None:
                    logger.error("objective %r: %s", line.objective, reply.error)
                    return values
                values[places] = reply.values
                missing = [b for b, row in enumerate(question.rows) if row in reply.unknown]
                if not missing:
                    return values
            places = places[question.places(missing)]
            question = self._reopening(line, question, missing)
            pending = line.send(question)

    def _reopening(self, line: _Channel, question: Question, missing: Sequence[int]) -> Question:
        """The part of a question that concerns `missing` rows, with the rows opened from their token ids."""
        wanted = frozenset({line.objective})
        rows = [question.rows[b] for b in missing]
        opening = tuple(GuideRow(row, tuple(self._rows[row].tokens), wanted) for row in rows)
        return Question(opening, score=question.score.part(missing) if question.score else None)

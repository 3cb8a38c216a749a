"""A guide whose value models live in other processes. Knows nothing of Ray: calls go through a transport.

All objectives are asked at once, and kept and closed rows are sent with the next call, so that an engine step costs one
round trip. Replicas may die, hang, restart or lose rows at any time: rows are reopened from their token ids.

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
    candidates: list[int] = field(default_factory=list)  # scored since the last token


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
        """Use a new session, which another replica may serve; the state of the old one is void."""
        self._generation += 1


class RemoteGuide:
    """Implements mavis_dist.decode.Guide.

    An objective that is unreachable for `limit_s` gets nan, which ends the answers that use it and no others.
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
        self._channels: dict[str, list[_Channel]] = {}
        self._unreachable: set[str] = set()  # objectives that get one attempt only, so that they do not delay others
        self.add(objectives)

    def add(self, objectives: Sequence[str]) -> None:
        """Add objectives, between two steps of the engine."""
        assert not self._channels.keys() & set(objectives)
        self._channels |= {name: self._new_channels(name) for name in objectives}
        # By name: sums over objectives must not depend on the order in which models were loaded.
        self._channels = dict(sorted(self._channels.items()))
        self._objectives = tuple(self._channels)

    def remove(self, objectives: Collection[str]) -> None:
        """Remove objectives, between two steps of the engine."""
        self._channels = {name: channels for name, channels in self._channels.items() if name not in objectives}
        self._objectives = tuple(self._channels)
        self._unreachable.difference_update(objectives)

    def wait_until_ready(self, objective: str) -> None:
        """Wait until value replicas are ready for an objective to be added, so that no step of the engine has to wait.

        Any thread may call this.

        Raises:
            ReplicaLost: if they cannot serve it, or do not answer within `limit_s`.
        """
        deadline = time.monotonic() + self._limit_s
        asked = [(channel, channel.send(Question())) for channel in self._new_channels(objective)]
        for channel, pending in asked:
            while (reply := self._reply(pending, deadline)) is None:
                time.sleep(RETRY_PAUSE_S)
                pending = channel.send(Question())
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

    def _new_channels(self, objective: str) -> list[_Channel]:
        return [_Channel(objective, f"{self._engine}-{s}", self._transport) for s in range(self._num_sessions)]

    @property
    def objectives(self) -> tuple[str, ...]:
        return self._objectives

    @property
    def static_shapes(self) -> bool:
        return False  # calls carry what is needed, and nothing else

    @property
    def predicted(self) -> tuple[str, ...]:
        return ()  # a student's predictions are a gather: not worth a call

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

    def predict(self, rows: Sequence[int], candidates_BK: torch.Tensor) -> torch.Tensor:
        raise AssertionError("no objective is predicted")

    def score(self, rows: Sequence[int], counts: Sequence[int], candidates_N: torch.Tensor) -> torch.Tensor:
        asked = self._row_tokens(rows, counts, candidates_N.cpu())
        values_NM = self._ask(Question(score=asked))
        for number, ids in zip(rows, asked.by_row(), strict=True):
            self._rows[number].candidates += ids
        return values_NM

    def keep(self, rows: Sequence[int], index_B: torch.Tensor) -> None:
        for number, index in zip(rows, index_B.tolist(), strict=True):
            row = self._rows[number]
            for name in row.objectives & self._channels.keys():
                self._channel(name, number).keep(Kept(number, len(row.tokens), row.candidates[index]))
            row.tokens.append(row.candidates[index])
            row.candidates = []

    def close(self, rows: Sequence[int]) -> None:
        for number in rows:
            row = self._rows.pop(number, None)
            for name in row.objectives & self._channels.keys() if row else ():
                self._channel(name, number).close(number)

    def _channel(self, objective: str, row: int) -> _Channel:
        return self._channels[objective][row % self._num_sessions]

    def _row_tokens(self, rows: Sequence[int], counts: Sequence[int], ids_N: Sequence[int] | torch.Tensor) -> RowTokens:
        lengths = tuple(len(self._rows[row].tokens) for row in rows)
        return RowTokens(tuple(rows), lengths, tuple(counts), np.asarray(ids_N, dtype=np.int32))

    def _ask(self, question: Question) -> torch.Tensor:
        """The values [B or N, M]; all channels are asked before the first reply is awaited."""
        values = np.full((question.num_values, len(self._objectives)), np.nan, dtype=np.float32)
        asked = []
        for m, name in enumerate(self._objectives):
            used = [b for b, row in enumerate(question.rows) if name in self._rows[row].objectives]
            for channel in self._channels[name]:
                chosen = [b for b in used if self._channel(name, question.rows[b]) is channel]
                if chosen:
                    part = question.part(chosen)
                    asked.append((channel, part, channel.send(part), question.places(chosen), m))
        for channel, part, pending, places, m in asked:
            values[places, m] = self._settle(channel, part, pending)
        return torch.from_numpy(values)

    def _settle(self, channel: _Channel, question: Question, pending: Pending) -> np.ndarray:
        """Wait for all of a channel's values, reopening rows that its replicas do not know."""
        values = np.full(question.num_values, np.nan, dtype=np.float32)
        places = np.arange(question.num_values)  # of the values still missing
        deadline = time.monotonic() + (0 if channel.objective in self._unreachable else self._limit_s)
        while True:
            try:
                reply = pending.result(self._timeout_s)
            except (ReplicaLost, TimeoutError) as error:
                if time.monotonic() > deadline:
                    logger.error("objective %r is out of reach: %s", channel.objective, error or "no answer")
                    self._unreachable.add(channel.objective)
                    channel.move()
                    return values
                logger.warning("objective %r: %s; its rows are opened again", channel.objective, error or "no answer")
                channel.move()
                time.sleep(RETRY_PAUSE_S)
                missing = list(range(len(question.rows)))
            else:
                self._unreachable.discard(channel.objective)
                if reply.error is not None:
                    logger.error("objective %r: %s", channel.objective, reply.error)
                    return values
                values[places] = reply.values
                missing = [b for b, row in enumerate(question.rows) if row in reply.unknown]
                if not missing:
                    return values
            places = places[question.places(missing)]
            question = self._reopening(channel, question, missing)
            pending = channel.send(question)

    def _reopening(self, channel: _Channel, question: Question, missing: Sequence[int]) -> Question:
        """The part of a question about `missing` rows, with the rows reopened from their token ids."""
        wanted = frozenset({channel.objective})
        rows = [question.rows[b] for b in missing]
        opening = tuple(GuideRow(row, tuple(self._rows[row].tokens), wanted) for row in rows)
        return Question(opening, score=question.score.part(missing) if question.score else None)

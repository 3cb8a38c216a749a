"""The value replica's side of remote guidance: rows of many engines, in separate sessions. Knows nothing of Ray.

The state here is a cache, a function of the caller's token ids. Every call states the expected length of a row; a row
that is not held at this length is reported as unknown, and the caller reopens it from its token ids. So a lost,
repeated or misdirected call changes no value.

Shapes: B rows, N tokens of all rows side by side.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mavis_dist.decode import GuideRow, LocalGuide
from mavis_dist.models.value import ValueModel
from serve.messages import Call, Kept, Question, Reply, RowTokens


@dataclass
class _Held:
    length: int
    candidates: list[int] = field(default_factory=list)  # cached as alternatives, in this order


class _Session:
    def __init__(self, objective: str, model: ValueModel | tuple[ValueModel, int]):
        self._guide = LocalGuide({objective: model})
        self._held: dict[int, _Held] = {}
        self.used_at = 0.0

    def keep(self, kept: Sequence[Kept]) -> None:
        rows, indices = [], []
        for row, length, token in kept:
            held = self._held.get(row)
            # Otherwise the row's length will differ from that in the next question about it.
            if held and held.length == length and token in held.candidates:
                rows.append(row)
                indices.append(held.candidates.index(token))
                self._held[row] = _Held(length + 1)
        if rows:
            self._guide.keep(rows, torch.tensor(indices))

    def close(self, rows: Sequence[int]) -> None:
        self._guide.close([row for row in rows if self._held.pop(row, None)])

    def answer(self, question: Question) -> Reply:
        opened_B = self._open(question.open)
        if question.score:
            return self._score(question.score)
        if question.extend:
            return self._extend(question.extend)
        return Reply(opened_B)

    def _open(self, rows: Sequence[GuideRow]) -> np.ndarray:
        self.close([row.row for row in rows])
        self._held.update({row.row: _Held(len(row.tokens)) for row in rows})
        return _column(self._guide.open(rows))

    def _extend(self, new: RowTokens) -> Reply:
        known, unknown = self._known(new)
        values_B = np.full(len(new.rows), np.nan, dtype=np.float32)
        if known:
            part = new.part(known)
            values_B[known] = _column(self._guide.extend(part.rows, part.by_row()))
            for row, length, count in zip(part.rows, part.lengths, part.counts, strict=True):
                self._held[row] = _Held(length + count)
        return Reply(values_B, unknown)

    def _score(self, asked: RowTokens) -> Reply:
        known, unknown = self._known(asked)
        values_N = np.full(len(asked.ids_N), np.nan, dtype=np.float32)
        if known:
            part = asked.part(known)
            candidates_N = torch.from_numpy(part.ids_N.astype(np.int64))
            values_N[asked.places(known)] = _column(self._guide.score(part.rows, part.counts, candidates_N))
            for row, ids in zip(part.rows, part.by_row(), strict=True):
                self._held[row].candidates += ids
        return Reply(values_N, unknown)

    def _known(self, tokens: RowTokens) -> tuple[list[int], tuple[int, ...]]:
        """The rows held at the expected length, by b; the numbers of the others."""
        held = [self._held.get(row) for row in tokens.rows]
        known = [b for b, length in enumerate(tokens.lengths) if (row := held[b]) and row.length == length]
        return known, tuple(row for b, row in enumerate(tokens.rows) if b not in known)


class Sessions:
    """One objective's value model with the rows of every engine."""

    def __init__(self, objective: str, model: ValueModel | tuple[ValueModel, int], idle_limit_s: float = 300.0):
        self._objective, self._model, self._idle_limit_s = objective, model, idle_limit_s
        self._sessions: dict[str, _Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def answer(self, call: Call) -> Reply:
        """Execute a call; calls come one at a time."""
        if call.session not in self._sessions:
            self._sessions[call.session] = _Session(self._objective, self._model)
        session = self._sessions[call.session]
        self._forget_idle(time.monotonic(), session)
        try:
            session.keep(call.keep)
            session.close(call.close)
            return session.answer(call.question)
        except BaseException:
            del self._sessions[call.session]  # half done: its state is unreliable
            raise

    def _forget_idle(self, now: float, current: _Session) -> None:
        """Drop engines that are gone: their rows are a cache, so a wrong guess only costs time."""
        current.used_at = now
        for name in [name for name, s in self._sessions.items() if now - s.used_at > self._idle_limit_s]:
            del self._sessions[name]


def _column(values_X1: torch.Tensor) -> np.ndarray:
    """The values of a guide with one objective."""
    return values_X1[:, 0].float().cpu().numpy()

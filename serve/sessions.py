"""The value replica's side of remote guidance: rows of many engines, each engine's kept apart. Knows nothing of Ray.

What is held here is a cache. A row whose state is not exactly what the caller expects is dropped and reported as
unknown, and the caller opens it again from its token ids: a lost, repeated or misdirected call changes no value.

Shapes: B rows, K candidates.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from mavis_dist.decode import GuideRow, LocalGuide
from mavis_dist.models.value import ValueModel


@dataclass(frozen=True)
class Kept:
    """A candidate becomes the row's next token."""

    row: int
    index: int  # over all candidates since the row's last token
    length: int  # tokens of the row before


@dataclass(frozen=True)
class Call:
    """One round trip: keep, close, open, then value. `session` names one engine's rows."""

    session: str
    keep: tuple[Kept, ...] = ()
    close: tuple[int, ...] = ()
    open: tuple[GuideRow, ...] = ()
    # Rows whose candidates are asked for; none: the values at the opened rows' last tokens.
    rows: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()  # tokens of each row
    offsets: tuple[int, ...] = ()  # candidates of each row that were asked for before, since its last token
    candidates_BK: np.ndarray | None = None


@dataclass(frozen=True)
class Reply:
    values: np.ndarray  # [B, K] for candidates, [B] for opened rows; nan for unknown rows
    unknown: tuple[int, ...] = ()


@dataclass
class _Held:
    length: int
    first: int = 0  # index of the first candidate held here: those before it went with another replica
    end: int = 0  # index behind the last one


class _Session:
    def __init__(self, objective: str, model: ValueModel):
        # A guide of its own: closing a row moves others, and must not do so between a branch and its keep.
        self.guide = LocalGuide({objective: model})
        self.held: dict[int, _Held] = {}
        self.used_at = 0.0

    def close(self, rows: list[int]) -> None:
        present = [row for row in rows if self.held.pop(row, None) is not None]
        self.guide.close(present)

    def keep(self, kept: tuple[Kept, ...]) -> None:
        valid: list[Kept] = []
        for item in kept:
            held = self.held.get(item.row)
            if held and held.length == item.length and held.first <= item.index < held.end:
                valid.append(replace(item, index=item.index - held.first))
                self.held[item.row] = _Held(held.length + 1)
            else:
                self.close([item.row])
        if valid:
            self.guide.keep([item.row for item in valid], torch.tensor([item.index for item in valid]))

    def open(self, rows: tuple[GuideRow, ...]) -> np.ndarray:
        self.close([row.row for row in rows])
        values_B1 = self.guide.open(rows)
        self.held.update({row.row: _Held(len(row.tokens)) for row in rows})
        return values_B1[:, 0].numpy()

    def score(self, call: Call, candidates_BK: np.ndarray) -> Reply:
        rows = call.rows
        known = [b for b, row in enumerate(rows) if self._continues(row, call.lengths[b], call.offsets[b])]
        unknown = [row for b, row in enumerate(rows) if b not in known]
        self.close(unknown)
        values_BK = np.full(candidates_BK.shape, np.nan, dtype=np.float32)
        if known:
            values_BK1 = self.guide.score([rows[b] for b in known], torch.from_numpy(candidates_BK[known]))
            values_BK[known] = values_BK1[:, :, 0].numpy()
        for b in known:
            held = self.held[rows[b]]
            if held.first == held.end:
                held.first = held.end = call.offsets[b]
            held.end += candidates_BK.shape[1]
        return Reply(values_BK, tuple(unknown))

    def _continues(self, row: int, length: int, offset: int) -> bool:
        """Whether the state held for a row is the one that the caller asks about."""
        held = self.held.get(row)
        return held is not None and held.length == length and (held.first == held.end or held.end == offset)


class Sessions:
    """One objective's value model with the rows of every engine that asks."""

    def __init__(self, objective: str, model: ValueModel, idle_limit_s: float = 300.0):
        self._objective, self._model, self._idle_limit_s = objective, model, idle_limit_s
        self._sessions: dict[str, _Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def answer(self, call: Call) -> Reply:
        """Carry out a call; calls come one at a time."""
        if call.session not in self._sessions:
            self._sessions[call.session] = _Session(self._objective, self._model)
        session = self._sessions[call.session]
        self._forget_idle(time.monotonic(), session)
        try:
            return self._carry_out(session, call)
        except BaseException:
            del self._sessions[call.session]  # half done: nothing in it can be relied on
            raise

    @staticmethod
    def _carry_out(session: _Session, call: Call) -> Reply:
        session.keep(call.keep)
        session.close(list(call.close))
        opened_B = session.open(call.open) if call.open else np.empty(0, dtype=np.float32)
        if call.candidates_BK is None:
            return Reply(opened_B)
        return session.score(call, call.candidates_BK)

    def _forget_idle(self, now: float, current: _Session) -> None:
        """Drop engines that have gone: their rows are a cache, so a wrong guess costs time only."""
        current.used_at = now
        for name in [name for name, s in self._sessions.items() if now - s.used_at > self._idle_limit_s]:
            del self._sessions[name]

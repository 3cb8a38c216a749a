"""What a guide is: it scores the engine's candidate tokens with value models.

A guide holds key-value caches for the engine's rows, but no other state: the engine owns the token ids, and can send
them again to a guide that lost its caches.

Shapes: B rows, K candidates of a row, N candidates of all rows, concatenated, M objectives in the order of
`Guide.objectives`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch

ABSENT = -1  # the number of no row


class Valuation(Enum):
    """How the candidates of a row get their values."""

    EVALUATED = "evaluated"  # by value models, in a forward pass over each
    PREDICTED = "predicted"  # by a student, from the state; tokens are extended, never kept
    CHECKED = "checked"  # evaluated like that by a student's own value model; the student predicts them on request


@dataclass(frozen=True)
class GuideRow:
    """A row for the guide to follow."""

    row: int
    tokens: tuple[int, ...]  # prompt and answer so far, or the first part of them
    objectives: frozenset[str]  # those with a positive weight; the others cost nothing
    source: int | None = None  # a row whose first `shared` tokens are the same
    shared: int = 0
    valuation: Valuation = Valuation.EVALUATED


class Guide(Protocol):
    """Calls come in the order open, extend*, (predict?, score+, keep or extend, extend*)*, close; rows are the engine's
    numbers.

    Values of objectives that a row does not use are undefined. Objectives may be added, removed and reordered between
    two steps of the engine; rows that use a removed objective have no values any more.

    With `static_shapes`, `score` and `keep` may be called with rows whose number is `ABSENT`, so that the shapes of
    calls do not depend on the rows: their values are undefined. `predict` may be called so always.
    """

    @property
    def static_shapes(self) -> bool: ...

    @property
    def objectives(self) -> tuple[str, ...]: ...

    @property
    def predicted(self) -> tuple[str, ...]:
        """The objectives that a student predicts: the only ones of rows that are PREDICTED or CHECKED."""
        ...

    def open(self, rows: Sequence[GuideRow]) -> torch.Tensor:
        """Start following rows; V_m(s) at their last tokens [B, M]."""
        ...

    def extend(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append tokens that were not scored; V_m(s) at the last ones [B, M]."""
        ...

    def predict(self, rows: Sequence[int], candidates_BK: torch.Tensor) -> torch.Tensor:
        """V_m(s∘a) - V_m(s) of alternative next tokens [B, K, M], as a student predicts it; only of CHECKED rows."""
        ...

    def score(self, rows: Sequence[int], counts: Sequence[int], candidates_N: torch.Tensor) -> torch.Tensor:
        """V_m(s∘a) of alternative next tokens [N, M], `counts[b]` of them for row b, grouped by row.

        A row may be scored several times before one token is kept.
        """
        ...

    def keep(self, rows: Sequence[int], index_B: torch.Tensor) -> None:
        """Append one of the candidates scored since the row's last token; they are numbered over all calls."""
        ...

    def close(self, rows: Sequence[int]) -> None:
        """Stop following rows; unknown ones are ignored."""
        ...

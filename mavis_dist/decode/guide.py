"""Guides: who tells the engine what the candidates are worth.

A guide keeps key-value caches for the engine's rows, but only as a cache: the engine owns the token ids, and a guide
that lost its state can be given them again.

Shapes: B rows, K candidates, M objectives in the order of `Guide.objectives`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from mavis_dist.models.kv import SlotModel
from mavis_dist.models.value import ValueModel


@dataclass(frozen=True)
class GuideRow:
    """A row that the guide is to follow."""

    row: int
    tokens: tuple[int, ...]  # prompt and answer so far
    objectives: frozenset[str]  # those with a positive weight; the others cost nothing
    source: int | None = None  # a row whose first `shared` tokens are the same
    shared: int = 0


class Guide(Protocol):
    """Calls come in the order open, (score+, keep)*, close; rows are the engine's numbers."""

    @property
    def objectives(self) -> tuple[str, ...]: ...

    def open(self, rows: Sequence[GuideRow]) -> torch.Tensor:
        """Start following rows; V_m(s) at their last tokens [B, M], nan where a row does not use an objective."""
        ...

    def score(self, rows: Sequence[int], candidates_BK: torch.Tensor) -> torch.Tensor:
        """V_m(s∘a) of alternative next tokens [B, K, M], nan where a row does not use an objective.

        A row may be asked about several times before one token is kept.
        """
        ...

    def keep(self, rows: Sequence[int], index_B: torch.Tensor) -> None:
        """Append one of the candidates scored since the row's last token; they are counted over all those calls."""
        ...

    def close(self, rows: Sequence[int]) -> None:
        """Forget rows."""
        ...


class LocalGuide:
    """Value models in this process, one forward pass per objective and call."""

    def __init__(self, models: Mapping[str, ValueModel]):
        """`models` maps each objective to a model whose first head values it."""
        self._models = {name: SlotModel(model, model.backbone) for name, model in models.items()}

    @property
    def objectives(self) -> tuple[str, ...]:
        return tuple(self._models)

    def open(self, rows: Sequence[GuideRow]) -> torch.Tensor:
        values_BM = torch.full((len(rows), len(self._models)), float("nan"))
        for m, (name, model) in enumerate(self._models.items()):
            used = [b for b, row in enumerate(rows) if name in row.objectives]
            if not used:
                continue
            missing = []
            for b in used:
                # The last token is always computed anew: it is the one whose value is asked for.
                shared = min(rows[b].shared, len(rows[b].tokens) - 1)
                missing.append(rows[b].tokens[model.open(rows[b].row, rows[b].source, shared) :])
            out_BO = model.extend([rows[b].row for b in used], missing)
            assert out_BO is not None
            values_BM[used, m] = out_BO[:, 0].float().cpu()
        return values_BM

    def score(self, rows: Sequence[int], candidates_BK: torch.Tensor) -> torch.Tensor:
        values_BKM = torch.full((*candidates_BK.shape, len(self._models)), float("nan"))
        for m, model in enumerate(self._models.values()):
            used = [b for b, row in enumerate(rows) if row in model]
            if used:
                out_BKO = model.branch([rows[b] for b in used], candidates_BK[used])
                values_BKM[used, :, m] = out_BKO[:, :, 0].float().cpu()
        return values_BKM

    def keep(self, rows: Sequence[int], index_B: torch.Tensor) -> None:
        for model in self._models.values():
            used = [b for b, row in enumerate(rows) if row in model]
            if used:
                model.keep([rows[b] for b in used], index_B[used])

    def close(self, rows: Sequence[int]) -> None:
        for model in self._models.values():
            for row in rows:
                if row in model:
                    model.close(row)

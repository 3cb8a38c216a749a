"""The models of a guide, each with the rows that it follows.

Shapes: B rows, K candidates of a row, N candidates of all rows, concatenated, M objectives of the guide, O outputs of a
model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mavis_dist.decode.guide import GuideRow, Valuation
from mavis_dist.models.decoder import states_reader, student_decoder, update_values, value_decoder
from mavis_dist.models.kv import Layout, SlotModel
from mavis_dist.models.qhead import Student, predicted
from mavis_dist.models.value import ValueModel, joined


class Trunk:
    """The value models on one backbone, which share its forward passes, with the rows that they follow."""

    valuation = Valuation.EVALUATED

    def __init__(self, owner: ValueModel | Student, static_shapes: bool):
        self.heads: dict[str, tuple[Any, int]] = {}  # objective of the guide -> a model on this trunk, one of its heads
        self._columns: list[tuple[int, int]] = []  # column of the guide's values, head among all those of the trunk
        self._owners: list[Any] = [owner]
        self._start(owner, static_shapes)

    def _start(self, owner: Any, static_shapes: bool) -> None:
        self._model = joined([owner])
        self._decoder = value_decoder(self._model)
        self.slots = SlotModel(self._decoder, static_shapes)

    def __contains__(self, row: int) -> bool:
        return row in self.slots

    @property
    def is_batch_invariant(self) -> bool:
        return self.slots.is_batch_invariant

    def serves(self, owner: ValueModel | Student) -> bool:
        """Whether the heads of a model can be evaluated here."""
        return isinstance(owner, ValueModel) and owner.backbone is self._model.backbone

    def arrange(self, objectives: Sequence[str]) -> None:
        """Set the order of the guide's objectives; their models may be others than before."""
        owners = list({id(owner): owner for owner, _ in self.heads.values()}.values())
        if [*map(id, owners)] != [*map(id, self._owners)]:
            self._model.heads = joined(owners).heads
            update_values(self._decoder, self._model)
            self._owners = owners
        start, first = 0, {}
        for owner in owners:
            first[id(owner)], start = start, start + owner.num_objectives
        self._columns = [
            (objectives.index(name), first[id(owner)] + head) for name, (owner, head) in self.heads.items()
        ]

    def open(self, rows: Sequence[GuideRow]) -> torch.Tensor | None:
        """All heads' values at the last tokens, [B, O]; None: not known yet."""
        missing = []
        for row in rows:
            # The last token is always computed, because its value is returned.
            shared = min(row.shared, len(row.tokens) - 1)
            missing.append(row.tokens[self.slots.open(row.row, row.source, shared) :])
        return self.extend([row.row for row in rows], missing)

    def extend(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> torch.Tensor | None:
        """All heads' values at the last tokens, [B, O]; None: not known yet."""
        return self.slots.extend(rows, tokens)

    def fill_known(
        self, values_NM: torch.Tensor, rows: Sequence[int], counts: Sequence[int], out_NO: torch.Tensor
    ) -> None:
        """Write head outputs of candidates into the columns of the guide's objectives, for the rows that it follows."""
        is_known_N = self._is_known(rows, counts)
        for m, head in self._columns:
            new_N = out_NO[:, head].to(values_NM)
            values_NM[:, m] = new_N if is_known_N is None else torch.where(is_known_N, new_N, values_NM[:, m])

    def _is_known(self, rows: Sequence[int], counts: Sequence[int]) -> torch.Tensor | None:
        """Of each candidate, whether its row is followed here, [N]; None: all are."""
        return self.slots.layout(rows, counts).is_known_C

    def keep(self, rows: Sequence[int], index_B: torch.Tensor) -> None:
        self.slots.keep(rows, index_B)

    def close(self, rows: Sequence[int]) -> None:
        for row in rows:
            self.slots.close(row)

    def fill(self, values_BM: torch.Tensor, places: Sequence[int], out_BO: torch.Tensor | None) -> None:
        """Write head outputs of some rows, if known, into the columns of the guide's objectives."""
        if out_BO is None:
            return
        for m, head in self._columns:
            values_BM[list(places), m] = out_BO[:, head].to(values_BM)


class Predictor(Trunk):
    """One student with the rows that it follows: V(s∘a) = V(s) + predicted delta, without a forward pass."""

    valuation = Valuation.PREDICTED

    def _start(self, owner: Any, static_shapes: bool) -> None:
        self._student: Student = owner
        self.known: dict[int, torch.Tensor] = {}  # outputs [O] at each row's last token
        self.slots = SlotModel(student_decoder(owner), static_shapes)

    def serves(self, owner: ValueModel | Student) -> bool:
        return owner is self._student

    def extend(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> torch.Tensor | None:
        return self._learn(rows, self.slots.extend(rows, tokens))

    def _learn(self, rows: Sequence[int], out_BO: torch.Tensor) -> torch.Tensor:
        """Keep the student's outputs at the last tokens of rows; returns the values there."""
        self.known.update(zip(rows, out_BO, strict=True))
        return self._student.split(out_BO)[0]

    def keep(self, rows: Sequence[int], index_B: torch.Tensor) -> None:
        raise AssertionError("rows of a student are extended: the next state needs a forward pass anyway")

    def close(self, rows: Sequence[int]) -> None:
        super().close(rows)
        for row in rows:
            self.known.pop(row, None)

    @torch.inference_mode()
    def predicted(self, rows: Sequence[int], counts: Sequence[int], candidates_N: torch.Tensor) -> torch.Tensor:
        """All objectives' predicted values, [N, O]; undefined for rows that it does not follow."""
        values_BO, queries_BOR = self._state(rows)
        counts_B = torch.tensor(counts, device=values_BO.device)
        row_N = torch.arange(len(rows), device=values_BO.device).repeat_interleave(counts_B, output_size=sum(counts))
        factors_NR = self._student.token_factors(candidates_N.to(values_BO.device))
        return values_BO[row_N] + predicted(queries_BOR[row_N], factors_NR)

    def _state(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """V(s) [B, O] and q(s) [B, O, R] of all objectives; 0 for rows that it does not follow."""
        unknown_O = torch.zeros_like(next(iter(self.known.values())))
        return self._student.split(torch.stack([self.known.get(row, unknown_O) for row in rows]))


class StatesPredictor(Predictor):
    """A student on states that the engine's base model computes in any case: no forward pass, no keys and values."""

    is_batch_invariant = True  # as far as the states are

    def _start(self, owner: Any, static_shapes: bool) -> None:
        self._student, self.known = owner, {}
        self._read, self._rows = states_reader(owner), set[int]()

    def __contains__(self, row: int) -> bool:
        return row in self._rows

    def open(self, rows: Sequence[GuideRow]) -> None:
        self._rows.update(row.row for row in rows)

    def extend(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """The states come with the base model's next step."""

    def observe(self, rows: Sequence[int], states_BH: torch.Tensor) -> torch.Tensor:
        return self._learn(rows, self._read(states_BH))

    def close(self, rows: Sequence[int]) -> None:
        self._rows.difference_update(rows)
        for row in rows:
            self.known.pop(row, None)

    def _is_known(self, rows: Sequence[int], counts: Sequence[int]) -> torch.Tensor | None:
        known = [row in self._rows for row, count in zip(rows, counts, strict=True) for _ in range(count)]
        return None if all(known) else torch.tensor(known, device=self._student.device)


class CheckedPredictor(Predictor):
    """One student with the rows that it follows, whose own value model evaluates candidates; they may be kept.

    The forward pass over a candidate yields its predictions as well, so that a token costs no other one.
    """

    valuation = Valuation.CHECKED

    def _start(self, owner: Any, static_shapes: bool) -> None:
        super()._start(owner, static_shapes)
        self._scored: list[tuple[Layout, torch.Tensor]] = []  # calls since a token was kept, with their outputs

    def extend(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> torch.Tensor | None:
        self._scored = []
        return super().extend(rows, tokens)

    def close(self, rows: Sequence[int]) -> None:
        self._scored = []
        super().close(rows)

    def remember(self, rows: Sequence[int], counts: Sequence[int], out_NO: torch.Tensor) -> None:
        """The outputs of candidates, of which one per row may be kept; heads are not recorded, so they stay valid."""
        self._scored.append((self.slots.layout(rows, counts), out_NO))

    @torch.inference_mode()
    def keep(self, rows: Sequence[int], index_B: torch.Tensor) -> None:
        self.slots.keep(rows, index_B)
        kept = self.slots.layout(rows, [1] * len(rows))
        left_X = kept.spread(index_B.to(kept.slot_N.device))  # how many of a row's candidates come before the kept one
        place_X, start = torch.zeros_like(left_X), 0
        for layout, out_NO in self._scored:
            place_X = torch.where(left_X < 0, place_X, start + layout.start_Z[kept.slot_N] + left_X)
            left_X = left_X - layout.count_Z[kept.slot_N]
            start += len(out_NO)
        out_BO = torch.cat([out_NO for _, out_NO in self._scored])[place_X[kept.read_C]]
        self.known.update((row, out_O) for row, out_O in zip(rows, out_BO.unbind(), strict=True) if row in self.known)
        self._scored = []

    @torch.inference_mode()
    def deltas(self, rows: Sequence[int], candidates_BK: torch.Tensor) -> torch.Tensor:
        """All objectives' predicted V(s∘a) - V(s), [B, K, O]; 0 for rows that it does not follow."""
        _, queries_BOR = self._state(rows)
        return predicted(queries_BOR[:, None], self._student.token_factors(candidates_BK.to(queries_BOR.device)))

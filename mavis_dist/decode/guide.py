"""Guides: they score the engine's candidate tokens with value models.

A guide holds key-value caches for the engine's rows, but no other state: the engine owns the token ids, and can send
them again to a guide that lost its caches.

Shapes: B rows, K candidates of a row, N candidates of all rows, concatenated, M objectives in the order of
`Guide.objectives`, O outputs of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch

from mavis_dist.models.decoder import states_reader, student_decoder, update_values, value_decoder
from mavis_dist.models.kv import Layout, SlotModel, branch_all
from mavis_dist.models.qhead import Student, predicted
from mavis_dist.models.value import ValueModel, joined

ABSENT = -1  # the number of no row

# From now on return the states behind so many layers as well, None: no more; False: that is not possible.
ReadStates = Callable[[int | None], bool]


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


class LocalGuide:
    """Value models in this process; one forward pass per backbone and call, for all heads on it."""

    def __init__(
        self,
        models: Mapping[str, ValueModel | tuple[ValueModel, int]],
        students: Mapping[str, tuple[Student, int]] | None = None,
        static_shapes: bool | None = None,
    ):
        """
        Args:
            models: of each objective its value model, or one of several heads of a value model, by index.
            students: of some of them one of the objectives of a student.
            static_shapes: the shapes of forward passes depend on buckets only. None: on all devices but CPUs.
        """
        self._objectives: tuple[str, ...] = ()
        self._predicted: tuple[str, ...] = ()
        self._device: torch.device | None = None
        self._trunks: list[_Trunk] = []
        self._static_shapes = static_shapes
        self._read_states: ReadStates | None = None
        self._state_layer: int | None = None  # whose states the engine's base model returns
        self.add(models, students)

    @property
    def static_shapes(self) -> bool:
        is_default = self._static_shapes is None
        return self._device is not None and self._device.type != "cpu" if is_default else bool(self._static_shapes)

    @property
    def objectives(self) -> tuple[str, ...]:
        return self._objectives

    @property
    def predicted(self) -> tuple[str, ...]:
        return self._predicted

    @property
    def is_batch_invariant(self) -> bool:
        """Whether no row's values depend on the other rows, to the last bit."""
        return all(trunk.is_batch_invariant for trunk in self._trunks)

    def add(
        self,
        models: Mapping[str, ValueModel | tuple[ValueModel, int]],
        students: Mapping[str, tuple[Student, int]] | None = None,
    ) -> None:
        """Add objectives, between two steps of the engine; arguments as in the constructor.

        Heads of a model that is already in use share it.
        """
        heads = {name: model if isinstance(model, tuple) else _only_head(name, model) for name, model in models.items()}
        students = students or {}
        assert not heads.keys() & set(self._objectives)
        assert heads.keys() >= students.keys()
        if self._device is None:
            self._device = next((model.heads.weight.device for model, _ in heads.values()), None)
        for name, (model, head) in heads.items():
            self._trunk_of(_Trunk, model).heads[name] = model, head
        for name, (student, head) in students.items():
            for kind in (self._predicting(student), _CheckedStudent):
                self._trunk_of(kind, student).heads[name] = student, head
        self._arrange((*self._objectives, *heads), (*self._predicted, *students))

    def remove(self, objectives: Collection[str]) -> None:
        """Remove objectives, between two steps of the engine, and models that no other objective uses."""
        for trunk in self._trunks:
            trunk.heads = {name: head for name, head in trunk.heads.items() if name not in objectives}
        self._trunks = [trunk for trunk in self._trunks if trunk.heads]
        if self._read_states is not None and self._state_layer is not None and not self.reads_states:
            self._read_states(None)
            self._state_layer = None
        kept, predicted = (
            tuple(name for name in names if name not in objectives) for names in (self._objectives, self._predicted)
        )
        self._arrange(kept, predicted)

    def _arrange(self, objectives: tuple[str, ...], predicted: tuple[str, ...]) -> None:
        # By name: sums over objectives must not depend on the order in which models were loaded.
        objectives, predicted = tuple(sorted(objectives)), tuple(sorted(predicted))
        for trunk in self._trunks:
            trunk.arrange(objectives)
        self._objectives, self._predicted = objectives, predicted  # replaced, not changed: other threads read them

    def _trunk_of(self, kind: type[_Trunk], owner: ValueModel | Student) -> _Trunk:
        """The trunk of this kind for a model; created if there is none."""
        for trunk in self._trunks:
            if type(trunk) is kind and trunk.serves(owner):
                return trunk
        self._trunks.append(kind(owner, self.static_shapes))
        return self._trunks[-1]

    def _predicting(self, student: Student) -> type[_Student]:
        """How a student predicts: from the states of the engine's base model, if that returns them; it can return those
        of one layer.
        """
        layer = student.state_layer
        if layer is None or self._read_states is None or self._state_layer not in (None, layer):
            return _Student
        self._state_layer = layer if self._read_states(layer) else None
        return _Student if self._state_layer is None else _StatesStudent

    def accept_states(self, read_states: ReadStates) -> None:
        """Let the students that read states of the base model have them from the engine's steps, where that is
        possible; for an engine without rows. Each `score` then comes after `observe`.
        """
        self._read_states, self._state_layer = read_states, None
        for trunk in [trunk for trunk in self._trunks if trunk.valuation is Valuation.PREDICTED]:
            for name, (student, head) in [*trunk.heads.items()]:
                del trunk.heads[name]
                self._trunk_of(self._predicting(student), student).heads[name] = student, head
        self._trunks = [trunk for trunk in self._trunks if trunk.heads]
        self._arrange(self._objectives, self._predicted)

    @property
    def reads_states(self) -> bool:
        """Whether any student reads the states of the engine's steps."""
        return any(isinstance(trunk, _StatesStudent) for trunk in self._trunks)

    def observe(self, rows: Sequence[int], states_BH: torch.Tensor) -> torch.Tensor:
        """The states at the last tokens of rows; V_m(s) there [B, M], nan where no student reads them."""
        values_BM = self._unknown(len(rows))
        for trunk, used in self._users(rows):
            if isinstance(trunk, _StatesStudent):
                trunk.fill(values_BM, used, trunk.observe([rows[b] for b in used], states_BH[used]))
        return values_BM

    def open(self, rows: Sequence[GuideRow]) -> torch.Tensor:
        values_BM = self._unknown(len(rows))
        for trunk in self._trunks:
            used = [
                b
                for b, row in enumerate(rows)
                if trunk.valuation is row.valuation and trunk.heads.keys() & row.objectives
            ]
            if used:
                trunk.fill(values_BM, used, trunk.open([rows[b] for b in used]))
        return values_BM

    def extend(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        values_BM = self._unknown(len(rows))
        for trunk, used in self._users(rows):
            trunk.fill(values_BM, used, trunk.extend([rows[b] for b in used], [tokens[b] for b in used]))
        return values_BM

    def predict(self, rows: Sequence[int], candidates_BK: torch.Tensor) -> torch.Tensor:
        deltas_NM, counts = self._unknown(candidates_BK.numel()), [candidates_BK.shape[1]] * len(rows)
        for trunk, _ in self._users(rows):
            if isinstance(trunk, _CheckedStudent):
                trunk.fill_known(deltas_NM, rows, counts, trunk.deltas(rows, candidates_BK).flatten(0, 1))
        return deltas_NM.unflatten(0, candidates_BK.shape)

    def score(self, rows: Sequence[int], counts: Sequence[int], candidates_N: torch.Tensor) -> torch.Tensor:
        values_NM = self._unknown(len(candidates_N))
        trunks = [trunk for trunk, _ in self._users(rows)]
        evaluating = [trunk for trunk in trunks if trunk.valuation is not Valuation.PREDICTED]
        if evaluating:
            outputs = branch_all([trunk.slots for trunk in evaluating], rows, counts, candidates_N)
            for trunk, out_NO in zip(evaluating, outputs, strict=True):
                trunk.fill_known(values_NM, rows, counts, out_NO)
                if isinstance(trunk, _CheckedStudent):
                    trunk.remember(rows, counts, out_NO)
        for trunk in trunks:
            if trunk.valuation is Valuation.PREDICTED:
                assert isinstance(trunk, _Student)
                trunk.fill_known(values_NM, rows, counts, trunk.predicted(rows, counts, candidates_N))
        return values_NM

    def keep(self, rows: Sequence[int], index_B: torch.Tensor) -> None:
        for trunk, _ in self._users(rows):
            trunk.keep(rows, index_B)

    def close(self, rows: Sequence[int]) -> None:
        for trunk, used in self._users(rows):
            trunk.close([rows[b] for b in used])

    def _users(self, rows: Sequence[int]) -> Iterator[tuple[_Trunk, list[int]]]:
        """Every model that follows any of the rows, with their indices."""
        for trunk in self._trunks:
            used = [b for b, row in enumerate(rows) if row in trunk]
            if used:
                yield trunk, used

    def _unknown(self, count: int) -> torch.Tensor:
        return torch.full((count, len(self._objectives)), float("nan"), device=self._device)


def _only_head(name: str, model: ValueModel) -> tuple[ValueModel, int]:
    if model.heads.out_features != 1:
        raise ValueError(f"the value model of {name!r} has {model.heads.out_features} heads: give (model, index)")
    return model, 0


class _Trunk:
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


class _Student(_Trunk):
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


class _StatesStudent(_Student):
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


class _CheckedStudent(_Student):
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

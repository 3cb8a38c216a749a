"""The guide in the engine's process.

Shapes: B rows, K candidates of a row, N candidates of all rows, concatenated, M objectives in the order of
`Guide.objectives`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch

from mavis_dist.decode.guide import GuideRow, Valuation
from mavis_dist.decode.trunks import CheckedPredictor, Predictor, StatesPredictor, Trunk
from mavis_dist.models.kv import branch_all
from mavis_dist.models.qhead import Student
from mavis_dist.models.value import ValueModel

# From now on return the states behind so many layers as well, None: no more; False: that is not possible.
ReadStates = Callable[[int | None], bool]


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
        self._trunks: list[Trunk] = []
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
            self._trunk_of(Trunk, model).heads[name] = model, head
        for name, (student, head) in students.items():
            for kind in (self._predicting(student), CheckedPredictor):
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

    def _trunk_of(self, kind: type[Trunk], owner: ValueModel | Student) -> Trunk:
        """The trunk of this kind for a model; created if there is none."""
        for trunk in self._trunks:
            if type(trunk) is kind and trunk.serves(owner):
                return trunk
        self._trunks.append(kind(owner, self.static_shapes))
        return self._trunks[-1]

    def _predicting(self, student: Student) -> type[Predictor]:
        """How a student predicts: from the states of the engine's base model, if that returns them; it can return those
        of one layer.
        """
        layer = student.state_layer
        if layer is None or self._read_states is None or self._state_layer not in (None, layer):
            return Predictor
        self._state_layer = layer if self._read_states(layer) else None
        return Predictor if self._state_layer is None else StatesPredictor

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
        return any(isinstance(trunk, StatesPredictor) for trunk in self._trunks)

    def observe(self, rows: Sequence[int], states_BH: torch.Tensor) -> torch.Tensor:
        """The states at the last tokens of rows; V_m(s) there [B, M], nan where no student reads them."""
        values_BM = self._unknown(len(rows))
        for trunk, used in self._users(rows):
            if isinstance(trunk, StatesPredictor):
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
            if isinstance(trunk, CheckedPredictor):
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
                if isinstance(trunk, CheckedPredictor):
                    trunk.remember(rows, counts, out_NO)
        for trunk in trunks:
            if trunk.valuation is Valuation.PREDICTED:
                assert isinstance(trunk, Predictor)
                trunk.fill_known(values_NM, rows, counts, trunk.predicted(rows, counts, candidates_N))
        return values_NM

    def keep(self, rows: Sequence[int], index_B: torch.Tensor) -> None:
        for trunk, _ in self._users(rows):
            trunk.keep(rows, index_B)

    def close(self, rows: Sequence[int]) -> None:
        for trunk, used in self._users(rows):
            trunk.close([rows[b] for b in used])

    def _users(self, rows: Sequence[int]) -> Iterator[tuple[Trunk, list[int]]]:
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

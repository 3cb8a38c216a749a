"""The running rows as tensors: everything that stays the same between steps while the same rows run.

Shapes: B rows, R variants of all rows, N candidates of a call of the guide, K candidates, M objectives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from mavis_dist.core.tilt import Filters
from mavis_dist.decode.guide import ABSENT
from mavis_dist.decode.request import Scorer
from mavis_dist.decode.scheduler import Row, variants_of
from mavis_dist.decode.scorer import Query, Steering, first_chunk, width_unread
from mavis_dist.models.kv import bucket

Values = dict[str, float]  # objective -> V of a row's last token

T = TypeVar("T")


class Batch:
    """Rebuilt when a row or an objective is added or removed; lists and tensors are in the order of `rows`.

    With static shapes, tensors have as many rows as the bucket: what they hold beyond `rows` is never read.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        objectives: Sequence[str],
        known: Mapping[int, Values],
        eos: torch.Tensor,
        vocabulary: int,
        static_shapes: bool = False,
        static_calls: bool = False,
    ):
        """
        Args:
            known: V_m(s) by row number, for guided rows.
            eos: ids of the end-of-answer tokens.
            static_calls: the guide too is called with the same shapes in every step.
        """
        self.rows, self.objectives, self.eos = list(rows), tuple(objectives), eos
        self.static_shapes, self._static_calls, self._device = static_shapes, static_calls, eos.device
        self.numbers = [row.number for row in rows]
        self.has_preferences = any(row.request.preferences for row in rows)
        # The rows of a batch with preferences have any number of variants: there is no bucket of them.
        self._size = bucket(len(rows)) if static_shapes and not self.has_preferences else len(rows)
        variants = variants_of(rows)
        self.variants = [v.number for v in variants] + [ABSENT] * (self._size - len(rows))
        self.last_R = torch.tensor(self._padded([v.tokens[-1] for v in variants], 0), device=self._device)
        self._owner_R = torch.tensor([b for b, row in enumerate(rows) for _ in row.variants[1:]], device=self._device)
        self.positions_B = self._column([row.position for row in rows], 0, torch.int64)
        self.starting = [b for b, row in enumerate(rows) if row.position == 0]  # rows without any token yet
        self.stream_B = self._column([row.stream for row in rows], 0, torch.int64)
        self.filters = self._filters(vocabulary)
        requests = [row.request for row in rows]
        self.top_logprobs = {b: r.top_logprobs for b, r in enumerate(requests) if r.top_logprobs is not None}
        self.has_draws = any(r.draws is not None for r in requests)
        self.is_guided = [r.is_guided for r in requests]
        # A weight without a column would steer a request by less than it asks for.
        self.missing = [next((m for m in r.weights if r.is_guided and m not in objectives), None) for r in requests]
        self._is_predicted = [r.is_guided and r.scorer is Scorer.PREDICTED for r in requests]
        caps = [_cap(r.tilt_cap) for r in requests]
        residual_caps = [_cap(r.residual_cap) if r.scorer is Scorer.PREDICTED else math.inf for r in requests]
        # Without a cap no candidate can be omitted.
        is_capped = [min(both) < math.inf for both in zip(caps, residual_caps, strict=True)]
        lazy = (Scorer.LAZY, Scorer.PREDICTED)
        self._is_lazy = [r.scorer in lazy and capped for r, capped in zip(requests, is_capped, strict=True)]
        num_first = [
            first_chunk(is_predicted, not static_calls) if is_lazy else self.filters.num_candidates
            for is_predicted, is_lazy in zip(self._is_predicted, self._is_lazy, strict=True)
        ]
        # The guide evaluates candidates in order, and log-probabilities that are equal are listed in it.
        self.is_ordered = any(self.is_guided) or bool(self.top_logprobs)
        self._ever_guided = [b for b, is_guided in enumerate(self.is_guided) if is_guided]
        self._guide_every = [r.guide_every for r in requests]
        self._guide_every_B = self._column(self._guide_every, 1, torch.int64)
        self._queries: dict[tuple[int, ...], Query] = {}
        weights = [[r.weights.get(m, 0.0) for m in objectives] for r in requests]
        baseline = [[known.get(number, {}).get(m, math.nan) for m in objectives] for number in self.numbers]
        unused = [0.0 for _ in objectives]
        self._steering = Steering(
            self._column(self.is_guided, False, torch.bool),
            self._column(num_first, 0, torch.int64),
            self._column(weights, unused, torch.float64),
            self._column(baseline, unused, torch.float32),
            self._column([r.beta for r in requests], 1.0, torch.float64),
            self._column(caps, 1.0, torch.float64),
            self._column(self._is_predicted, False, torch.bool),
            self._column(residual_caps, 1.0, torch.float64),
        )

    @property
    def baseline_BM(self) -> torch.Tensor:
        """V_m(s)."""
        return self._steering.baseline_BM

    @baseline_BM.setter
    def baseline_BM(self, values_BM: torch.Tensor) -> None:
        self._steering = replace(self._steering, baseline_BM=values_BM)

    def baselines(self) -> dict[int, Values]:
        """V_m(s) by row number."""
        return dict(zip(self.numbers, named(self.objectives, self.baseline_BM), strict=False))

    def advance(self, tokens_B: torch.Tensor) -> None:
        """Every row has one more token."""
        self.last_R = torch.cat([tokens_B, tokens_B[self._owner_R]]) if self.has_preferences else tokens_B
        self.positions_B += 1
        self.starting = []

    def guided(self) -> list[int]:
        """The rows whose next token is tilted."""
        if max(self._guide_every) == 1:
            return self._ever_guided
        return [b for b in self._ever_guided if self.rows[b].position % self._guide_every[b] == 0]

    def steering(self) -> Steering:
        """The steering of the next token."""
        if max(self._guide_every) == 1:
            return self._steering
        is_turn_B = self.positions_B % self._guide_every_B == 0
        return replace(self._steering, is_guided_B=self._steering.is_guided_B & is_turn_B)

    def predicted(self, guided: Sequence[int]) -> list[int] | None:
        """The numbers of all rows, those that are not predicted as absent; None if none is."""
        predicted = {b for b in guided if self._is_predicted[b]}
        if not predicted:
            return None
        return self._padded([number if b in predicted else ABSENT for b, number in enumerate(self.numbers)], ABSENT)

    def followed(self, rows: Sequence[int], index_B: torch.Tensor) -> tuple[list[int], torch.Tensor]:
        """The numbers of some rows, and their part of a column, for a call of the guide."""
        if self._static_calls:
            chosen = set(rows)
            numbers = [number if b in chosen else ABSENT for b, number in enumerate(self.numbers)]
            return self._padded(numbers, ABSENT), index_B
        return [self.numbers[b] for b in rows], index_B if len(rows) == len(index_B) else index_B[list(rows)]

    def static_query(self, guided: Sequence[int]) -> Query | None:
        """As many of the first candidates for all rows as any of the guided ones needs in its first call; None unless
        calls have static shapes.
        """
        if not (self._static_calls and guided):
            return None
        guided = tuple(guided)
        if guided not in self._queries:
            numbers, index_B = self.followed(guided, self.positions_B)
            num_candidates, num_rows = self.filters.num_candidates, len(index_B)
            are_all_lazy = all(self._is_lazy[b] for b in guided)
            width = width_unread(num_candidates, len(self.eos), are_all_lazy)
            index_BK = torch.arange(num_rows * num_candidates, device=self._device).view(num_rows, num_candidates)
            self._queries[guided] = Query(numbers, [width] * num_rows, index_BK[:, :width].flatten())
        return self._queries[guided]

    def _filters(self, vocabulary: int) -> Filters:
        # Which filters are in use must not depend on the rows that are missing: these are like the last one.
        params = self._padded([row.request.params for row in self.rows], self.rows[-1].request.params)
        return Filters.of(
            [min(p.top_k, vocabulary) for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
            [p.temperature for p in params],
            self._device,
        )

    def _padded(self, column: Sequence[T], filling: T) -> list[T]:
        return [*column, *[filling] * (self._size - len(self.rows))]

    def _column(self, column: Sequence[T], filling: T, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(self._padded(column, filling), dtype=dtype, device=self._device)


def _cap(cap: float | None) -> float:
    return math.inf if cap is None else cap


def named(objectives: Sequence[str], values_BM: torch.Tensor) -> list[Values]:
    """The values of every row by objective: they stay valid when the guide's objectives change their order."""
    return [dict(zip(objectives, values, strict=True)) for values in values_BM.tolist()]

"""The running rows as tensors: everything that stays the same between steps while the same rows run.

Shapes: B rows, M objectives.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from mavis_dist.decode.request import Scorer
from mavis_dist.decode.scheduler import Row, variants_of
from mavis_dist.decode.scorer import Steering

Values = dict[str, float]  # objective -> V of a row's last token


class Batch:
    """Rebuilt when a row or an objective is added or removed; lists and tensors are in the order of `rows`."""

    def __init__(
        self, rows: Sequence[Row], objectives: Sequence[str], known: Mapping[int, Values], device: torch.device
    ):
        """`known` holds V_m(s) by row number, for guided rows."""
        self.rows, self.objectives, self._device = list(rows), tuple(objectives), device
        self.numbers = [row.number for row in rows]
        self.variants = variants_of(rows)
        self.has_preferences = any(row.request.preferences for row in rows)
        requests = [row.request for row in rows]
        params = [request.params for request in requests]
        self.top_k_B = torch.tensor([p.top_k for p in params], device=device)
        self.top_p_B, self.min_p_B, self.temperature_B, self._beta_B, self._cap_B = (
            self._numbers(column)
            for column in (
                [p.top_p for p in params],
                [p.min_p for p in params],
                [p.temperature for p in params],
                [r.beta for r in requests],
                [float("inf") if r.tilt_cap is None else r.tilt_cap for r in requests],
            )
        )
        self.top_logprobs = {b: r.top_logprobs for b, r in enumerate(requests) if r.top_logprobs is not None}
        self.stream_B = torch.tensor([row.stream for row in rows], device=device)
        self._guide_every_B = torch.tensor([r.guide_every for r in requests], device=device)
        self.is_guided = [r.is_guided for r in requests]
        self._is_guided_B = torch.tensor(self.is_guided, device=device)
        self._is_lazy_B = torch.tensor([r.scorer is Scorer.LAZY for r in requests], device=device)
        self._weights_BM = self._numbers([r.weights.get(m, 0.0) for r in requests for m in objectives])
        self._weights_BM = self._weights_BM.reshape(len(rows), len(objectives))
        baseline = [[known.get(number, {}).get(m, math.nan) for m in objectives] for number in self.numbers]
        self.baseline_BM = torch.tensor(baseline, dtype=torch.float32, device=device)
        # A weight without a column would steer a request by less than it asks for.
        self.missing = [next((m for m in r.weights if r.is_guided and m not in objectives), None) for r in requests]

    def positions_B(self) -> torch.Tensor:
        """Index in the answer of the next token."""
        return torch.tensor([row.position for row in self.rows], device=self._device)

    def steering(self, positions_B: torch.Tensor) -> Steering:
        """The steering of the next token."""
        return Steering(
            self.numbers,
            self._is_guided_B & (positions_B % self._guide_every_B == 0),
            self._is_lazy_B,
            self._weights_BM,
            self.baseline_BM,
            self._beta_B,
            self._cap_B,
        )

    def baselines(self) -> dict[int, Values]:
        """V_m(s) by row number."""
        return dict(zip(self.numbers, named(self.objectives, self.baseline_BM), strict=True))

    def _numbers(self, column: Iterable[float]) -> torch.Tensor:
        return torch.tensor(list(column), dtype=torch.float64, device=self._device)


def named(objectives: Sequence[str], values_BM: torch.Tensor) -> list[Values]:
    """The values of every row by objective: they stay valid when the guide's objectives change their order."""
    return [dict(zip(objectives, values, strict=True)) for values in values_BM.tolist()]

"""Sentences in the decode loop: what they make of a step's logits, and what the tokens have earned them.

Shapes: B rows, R views of all rows (first the plain one of every row, then the others, row by row), V vocabulary, K
sentences or, beside B, candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mavis_dist.core.preferences import Earned, adapted_weights, worded_shift
from mavis_dist.decode.scheduler import Row, View


def views_of(rows: Sequence[Row]) -> list[View]:
    """All views, in the order of their logits."""
    return [*(row.views[0] for row in rows), *(view for row in rows for view in row.views[1:])]


def begin(row: Row) -> None:
    """Count what the tokens have earned that a continued answer brings along."""
    params = row.request.preference_params
    plain, *worded = (view.logprobs for view in row.views)
    row.earned = Earned(params.accumulation, params.decay, params.clip, [0.0] * len(worded))
    for t, logprob in enumerate(plain):
        row.earned.add([logprobs[t] - logprob for logprobs in worded])


def weights(row: Row) -> list[float]:
    """w_k of a row's next token."""
    assert row.earned is not None
    params, initial = row.request.preference_params, [p.weight for p in row.request.preferences]
    return adapted_weights(initial, row.earned.amounts(), params.tau) if params.adapt else initial


class Wording:
    """One step of rows of which some have sentences."""

    def __init__(self, rows: Sequence[Row], logits_RV: torch.Tensor):
        logits_RV = logits_RV.float()
        self._plain_BV = logits_RV[: len(rows)]
        self.logits_BV = self._plain_BV.clone()  # of the merged distributions, not normalised
        self.weights: dict[int, list[float]] = {}  # w_k by b
        self._views: dict[int, torch.Tensor] = {}  # logits [1 + K, V], the plain ones first
        self._log_z: dict[int, list[float]] = {}
        first = len(rows)
        for b, row in enumerate(rows):
            if not row.request.preferences:
                continue
            if row.earned is None:
                begin(row)
            num = len(row.views) - 1
            views = torch.cat([self._plain_BV[b : b + 1], logits_RV[first : first + num]])
            first += num
            self.weights[b], self._views[b] = weights(row), views
            self._log_z[b] = views.logsumexp(-1).tolist()
            params = row.request.preference_params
            self.logits_BV[b] += worded_shift(
                views[0], views[1:], self._log_z[b], self.weights[b], params.strength, params.top_p
            )

    def rewards(self, b: int, token: int) -> list[float]:
        """g_k of a token of a row."""
        plain, *worded = (logit - z for logit, z in zip(self._views[b][:, token].tolist(), self._log_z[b], strict=True))
        return [logprob - plain for logprob in worded]

    def logratio_BK(self, ids_BK: torch.Tensor, logprobs_BK: torch.Tensor, temperature_B: torch.Tensor) -> torch.Tensor:
        """log p'_T - log p_T of the candidates, p' and p the merged and the plain distribution on them; 0 for T = 0."""
        is_worded_B1 = torch.zeros_like(temperature_B, dtype=torch.bool)[:, None]
        is_worded_B1[list(self.weights)] = True
        temperature_B1, is_candidate_BK = temperature_B[:, None], logprobs_BK > float("-inf")
        divisor_B1 = torch.where(temperature_B1 > 0, temperature_B1, 1.0)
        plain_BK = self._plain_BV.gather(1, ids_BK).double().masked_fill(~is_candidate_BK, float("-inf"))
        logratio_BK = torch.log_softmax(logprobs_BK / divisor_B1, -1) - torch.log_softmax(plain_BK / divisor_B1, -1)
        return torch.where(is_worded_B1 & is_candidate_BK & (temperature_B1 > 0), logratio_BK, 0.0)

"""Sentences in the decode loop: what they make of a step's logits, and what the tokens have earned them.

Shapes: B rows, R variants of all rows (first the plain one of every row, then the others, row by row), X rows with
sentences, V vocabulary, K candidates of the merged distribution, C of the plain one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mavis_dist.core.merge import anchor, guarded
from mavis_dist.core.preferences import RewardTracker, adapted_weights
from mavis_dist.decode.preferences import PreferenceParams
from mavis_dist.decode.scheduler import PromptVariant, Row


def variants_of(rows: Sequence[Row]) -> list[PromptVariant]:
    """All variants, in the order of their logits."""
    return [*(row.variants[0] for row in rows), *(variant for row in rows for variant in row.variants[1:])]


def _start_tracking(row: Row) -> None:
    """Count what the tokens have earned that a continued answer brings along."""
    params = row.request.preference_params
    plain, *preferences = (variant.logprobs for variant in row.variants)
    row.reward_tracker = RewardTracker(params.accumulation, params.decay, params.clip, [0.0] * len(preferences))
    for t, logprob in enumerate(plain):
        row.reward_tracker.add([logprobs[t] - logprob for logprobs in preferences])


def _current_weights(row: Row) -> list[float]:
    """w_k of a row's next token."""
    assert row.reward_tracker is not None
    params, initial = row.request.preference_params, [p.weight for p in row.request.preferences]
    return adapted_weights(initial, row.reward_tracker.accumulated(), params.tau) if params.adapt else initial


class PreferenceStep:
    """One step of all rows, of which some may have sentences."""

    def __init__(self, rows: Sequence[Row], logits_RV: torch.Tensor):
        """May change the logits."""
        self.logits_BV = logits_RV[: len(rows)].float()  # merged where there are sentences, not normalised
        self.weights: dict[int, list[float]] = {}  # w_k by b
        self._variants: dict[int, range] = {}  # r of the variants with a sentence, by b
        first = len(rows)
        for b, row in enumerate(rows):
            if row.request.preferences:
                if row.reward_tracker is None:
                    _start_tracking(row)
                self.weights[b], self._variants[b] = _current_weights(row), range(first, first + len(row.variants) - 1)
                first = self._variants[b].stop
        if self.rows:
            self._merge(logits_RV, [rows[b].request.preference_params for b in self.rows])

    def _merge(self, logits_RV: torch.Tensor, params: Sequence[PreferenceParams]) -> None:
        self._logprobs_RV = logits_RV.log_softmax(-1, dtype=torch.float32)
        self.plain_XV = self.logits_BV[self.rows]  # without a sentence, not normalised
        plain_XV = self._logprobs_RV[self.rows]
        variants = (self._logprobs_RV[r.start : r.stop] for r in self._variants.values())
        anchors = [anchor(*row) for row in zip(plain_XV, variants, self.weights.values(), strict=True)]
        c_X, top_p_X = (
            torch.tensor(column, device=logits_RV.device)
            for column in ([p.strength for p in params], [p.top_p for p in params])
        )
        self.logits_BV[self.rows] += guarded(plain_XV, torch.stack(anchors), c_X, top_p_X)

    @property
    def rows(self) -> list[int]:
        """b of the rows with sentences."""
        return list(self.weights)

    def rewards(self, b: int, token: int) -> list[float]:
        """g_k of a token of a row."""
        plain, *preferences = self._logprobs_RV[[b, *self._variants[b]], token].tolist()
        return [logprob - plain for logprob in preferences]

    def logratio_BK(
        self,
        ids_BK: torch.Tensor,
        merged_BK: torch.Tensor,
        temperature_B: torch.Tensor,
        plain_ids_XC: torch.Tensor,
        plain_XC: torch.Tensor,
    ) -> torch.Tensor:
        """log p'_T - log p_T of the candidates: what sentences make of the reference policy. 0 without any; for
        T = 0 as for T = 1. Where p' has candidates that p has not, p goes on beyond its own set with the same
        normaliser.

        Args:
            merged_BK: log p' on the candidates, -inf where a row has no such candidate.
            plain_XC: log p on the candidates `plain_ids_XC` that `plain_XV` has by itself.
        """
        logratio_BK = torch.zeros_like(merged_BK)
        merged_XK, temperature_X1 = merged_BK[self.rows], temperature_B[self.rows, None]
        divisor_X1 = torch.where(temperature_X1 > 0, temperature_X1, 1.0)
        log_z_X1 = self.plain_XV.gather(1, plain_ids_XC[:, :1]).double() - plain_XC[:, :1]  # at temperature 1
        plain_XK = (self.plain_XV.gather(1, ids_BK[self.rows]).double() - log_z_X1) / divisor_X1
        plain_XK -= (plain_XC / divisor_X1).logsumexp(-1, keepdim=True)
        ratio_XK = (merged_XK / divisor_X1).log_softmax(-1) - plain_XK
        logratio_BK[self.rows] = torch.where(merged_XK > float("-inf"), ratio_XK, 0.0)
        return logratio_BK

"""Preferences in the decode loop: what they make of a step's logits, and the rewards of the drawn tokens.

Shapes: B rows, R variants of all rows (first the plain one of every row, then the others, row by row), X rows with
preferences, V vocabulary, K candidates of the merged distribution, C of the plain one.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch

from mavis_dist.core.merge import anchor, guarded
from mavis_dist.core.preferences import RewardTracker, adapted_weights
from mavis_dist.decode.scheduler import Row


class PreferenceStep:
    """One step of a batch in which some rows have preferences; a batch without any needs no such step."""

    def __init__(self, rows: Sequence[Row], logits_RV: torch.Tensor):
        """May change the logits."""
        self._rows = {b: row for b, row in enumerate(rows) if row.request.preferences}
        self._weights = {b: _current_weights(row) for b, row in self._rows.items()}  # w_k by b
        self._variants: dict[int, range] = {}  # r of the variants with a preference, by b
        first = len(rows)
        for b, row in self._rows.items():
            self._variants[b] = range(first, first + len(row.variants) - 1)
            first = self._variants[b].stop
        self._logprobs_RV = logits_RV.log_softmax(-1, dtype=torch.float32)
        self.logits_BV = logits_RV[: len(rows)].float()  # merged where there are preferences, not normalised
        self.plain_XV = self.logits_BV[self.rows]  # without preferences, not normalised
        self.logits_BV[self.rows] += self._shift_XV()

    @property
    def rows(self) -> list[int]:
        """b of the rows with preferences."""
        return list(self._rows)

    def _shift_XV(self) -> torch.Tensor:
        """log p' - log p, not normalised."""
        params, device = [row.request.preference_params for row in self._rows.values()], self.logits_BV.device
        plain_XV = self._logprobs_RV[self.rows]
        variants = (self._logprobs_RV[r.start : r.stop] for r in self._variants.values())
        anchors = [anchor(*row) for row in zip(plain_XV, variants, self._weights.values(), strict=True)]
        c_X = torch.tensor([p.strength for p in params], device=device)
        top_p_X = torch.tensor([p.top_p for p in params], device=device)
        return guarded(plain_XV, torch.stack(anchors), c_X, top_p_X)

    def logratio_BK(
        self,
        ids_BK: torch.Tensor,
        merged_BK: torch.Tensor,
        temperature_B: torch.Tensor,
        plain_ids_XC: torch.Tensor,
        plain_XC: torch.Tensor,
    ) -> torch.Tensor:
        """log p'_T - log p_T of the candidates: the preferences' part of the log-ratio to the reference policy.

        0 in rows without preferences; for T = 0 as for T = 1. Where p' has candidates that p does not have, p is
        extended beyond its own set with the same normaliser.

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

    def record(self, tokens: Sequence[int], divergences: Sequence[float], faults: Container[int]) -> None:
        """Add the drawn tokens' rewards and the figures of the step to the answers; rows with a fault get none.

        Args:
            divergences: the preferences' part of KL(pi || pi_ref), nats.
            faults: b of the rows that fail.
        """
        for b, row in self._rows.items():
            if b not in faults:
                rewards = self._rewards(b, tokens[b])
                _tracker(row).add(rewards)
                row.choice.preference_weights.append(self._weights[b])
                row.choice.preference_rewards.append(rewards)
                row.choice.preference_divergences.append(divergences[b])

    def _rewards(self, b: int, token: int) -> list[float]:
        """g_k of a token of a row."""
        plain, *others = self._logprobs_RV[[b, *self._variants[b]], token].tolist()
        return [logprob - plain for logprob in others]


def _current_weights(row: Row) -> list[float]:
    """w_k of a row's next token."""
    params, initial = row.request.preference_params, [p.weight for p in row.request.preferences]
    return adapted_weights(initial, _tracker(row).accumulated(), params.tau) if params.adapt else initial


def _tracker(row: Row) -> RewardTracker:
    """A row's rewards so far; at first those of the tokens that a continued answer starts with."""
    if row.reward_tracker is None:
        params = row.request.preference_params
        plain, *others = (variant.logprobs for variant in row.variants)
        row.reward_tracker = RewardTracker(params.accumulation, params.decay, params.clip, [0.0] * len(others))
        for t, logprob in enumerate(plain):
            row.reward_tracker.add([logprobs[t] - logprob for logprobs in others])
    return row.reward_tracker

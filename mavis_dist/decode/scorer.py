"""Scorers: which candidates the value models evaluate before a token is chosen.

`full` evaluates all of C, as published. `lazy` evaluates the few that are most likely to win, and then those that can
still win: the ones that would reach the best so far with the maximum tilt that the cap allows. This chooses the same
token as `full` with the same cap, for a fraction of the work. `qhead` scores all of C with a guide that predicts: a
gather, no forward pass. Rows of all kinds share the calls of the guide, at most two per step.

Shapes: B rows, K candidates in evaluation order, N candidates of all rows, concatenated, M objectives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mavis_dist.core.tilt import estimate_distribution, tilt
from mavis_dist.decode.guide import Guide

# Candidates of a row in a step's first call, besides the end-of-answer tokens. On a GPU a few more cost little.
FIRST_CHUNK = {"cpu": 3, "cuda": 16}


@dataclass(frozen=True)
class Drafts:
    """The candidates of all rows in evaluation order: an index is also the index among the evaluated ones."""

    ids_BK: torch.Tensor
    logprobs_BK: torch.Tensor  # -inf where a row has no such candidate
    phi_BK: torch.Tensor  # log p + T * G
    is_eos_BK: torch.Tensor
    temperature_B: torch.Tensor
    preference_logratio_BK: torch.Tensor | None = None  # log p'_T - log p_T (T = 0 as T = 1), with preferences


@dataclass(frozen=True)
class Steering:
    """The steering of all rows."""

    numbers: Sequence[int]  # of the rows, for the guide
    is_guided_B: torch.Tensor  # the others have no tilt
    is_lazy_B: torch.Tensor
    weights_BM: torch.Tensor
    baseline_BM: torch.Tensor  # V_m(s)
    beta_B: torch.Tensor
    cap_B: torch.Tensor


@dataclass(frozen=True)
class Scores:
    """The tilt of all rows, and the values it was computed from."""

    delta_BK: torch.Tensor  # -inf where not evaluated: such a candidate cannot win
    values_BKM: torch.Tensor  # nan where not evaluated
    num_evaluated_B: torch.Tensor
    is_sound_B: torch.Tensor  # all evaluated values were finite
    divergence_B: torch.Tensor  # KL(pi || pi_ref), nats; estimated where not all candidates were evaluated
    preference_divergence_B: torch.Tensor | None  # the preferences' part of it, where there are any
    logratio_BK: torch.Tensor  # log pi(a) - log pi_ref(a), 0 at T = 0; estimated likewise, and only where evaluated


def score(drafts: Drafts, steering: Steering, guide: Guide | None) -> Scores:
    """Query the guide according to each row's scorer; rows without guidance have no tilt."""
    search = _Search(drafts, steering)
    for is_queried_BK in search.queries():
        assert guide is not None
        counts_B = is_queried_BK.sum(-1)
        rows = counts_B.nonzero()[:, 0].tolist()
        numbers = [steering.numbers[b] for b in rows]
        values_NM = guide.score(numbers, counts_B[rows].tolist(), drafts.ids_BK[is_queried_BK])
        search.absorb(is_queried_BK, values_NM)
    # Without guidance the tilt is known to be 0 for all.
    is_known_BK = search.is_evaluated_BK | ~steering.is_guided_B[:, None]
    distribution = estimate_distribution(
        drafts.logprobs_BK, drafts.phi_BK, search.delta_BK, is_known_BK, drafts.temperature_B, drafts.is_eos_BK
    )
    divisor_B1 = torch.where(drafts.temperature_B > 0, drafts.temperature_B, float("inf"))[:, None]
    logratio_BK = search.delta_BK / divisor_B1 - distribution.log_partition_B[:, None]
    divergence_B, preference_divergence_B = distribution.divergence_B, None
    if drafts.preference_logratio_BK is not None:
        mean_B = (distribution.pi_BK * drafts.preference_logratio_BK).sum(-1)
        preference_divergence_B = torch.where(drafts.temperature_B > 0, mean_B, float("nan"))
        divergence_B = divergence_B + preference_divergence_B
        logratio_BK = logratio_BK + torch.where(drafts.temperature_B[:, None] > 0, drafts.preference_logratio_BK, 0.0)
    return Scores(
        search.delta_BK,
        search.values_BKM,
        search.is_evaluated_BK.sum(-1),
        search.is_sound_B,
        divergence_B,
        preference_divergence_B,
        logratio_BK,
    )


class _Search:
    """The search for the winners of all rows: the evaluated candidates, and those that can still win."""

    def __init__(self, drafts: Drafts, steering: Steering):
        self._drafts, self._steering = drafts, steering
        is_guided_B1 = steering.is_guided_B[:, None]
        # Without a cap no candidate can be omitted, and a single call for all is best.
        self._is_lazy_B1 = (steering.is_lazy_B & (steering.cap_B < float("inf")))[:, None]
        self._is_used_B1M = (steering.weights_BM != 0)[:, None]
        self._is_open_BK = (drafts.logprobs_BK > float("-inf")) & is_guided_B1  # not evaluated, and may win
        self.delta_BK = torch.zeros_like(drafts.phi_BK).masked_fill(is_guided_B1, float("-inf"))
        shape = (*drafts.ids_BK.shape, steering.weights_BM.shape[1])
        self.values_BKM = torch.full(shape, float("nan"), device=drafts.phi_BK.device)
        self.is_evaluated_BK = torch.zeros_like(self._is_open_BK)
        self.is_sound_B = torch.ones_like(steering.is_guided_B)

    def queries(self) -> Iterator[torch.Tensor]:
        """The candidates [B, K] to evaluate, in one or two calls; the second depends on the results of the first."""
        if self._is_open_BK.any():
            yield self._first(FIRST_CHUNK.get(self._is_open_BK.device.type, FIRST_CHUNK["cuda"]))
        if self._is_open_BK.any():
            yield self._is_open_BK

    def absorb(self, is_queried_BK: torch.Tensor, values_NM: torch.Tensor) -> None:
        """Store the values of the evaluated candidates, and exclude those that cannot win any more."""
        drafts, steering = self._drafts, self._steering
        self.values_BKM[is_queried_BK] = values_NM.to(self.values_BKM)
        tilt_BK = tilt(
            self.values_BKM,
            steering.baseline_BM,
            steering.weights_BM,
            steering.beta_B,
            steering.cap_B,
            drafts.is_eos_BK,
        )
        # A V(s) that is not finite shows in the tilt; the cap may hide an infinite V(s∘a).
        is_fine_BK = (self.values_BKM.isfinite() | ~self._is_used_B1M).all(-1) & tilt_BK.isfinite()
        self.is_sound_B &= (is_fine_BK | ~is_queried_BK).all(-1)
        self.delta_BK = torch.where(is_queried_BK, tilt_BK, self.delta_BK)
        self.is_evaluated_BK = self.is_evaluated_BK | is_queried_BK
        # Including equality: among equal scores the smaller token id wins, which may be theirs.
        best_B1 = (drafts.phi_BK + self.delta_BK).amax(-1, keepdim=True)
        can_win_BK = drafts.phi_BK + steering.cap_B[:, None] >= best_B1
        self._is_open_BK = self._is_open_BK & can_win_BK & ~self.is_evaluated_BK & self.is_sound_B[:, None]

    def _first(self, size: int) -> torch.Tensor:
        """End-of-answer tokens, whose tilt is unbounded, and the first others; all where the scorer is `full`."""
        others_BK = self._is_open_BK & ~self._drafts.is_eos_BK
        return self._is_open_BK & (self._drafts.is_eos_BK | (others_BK.cumsum(-1) <= size) | ~self._is_lazy_B1)

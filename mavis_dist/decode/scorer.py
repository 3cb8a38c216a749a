"""Scorers: which candidates are given to the value models before a token is chosen.

`full` evaluates all of C, as published. `lazy` evaluates the few that are most likely to win, and then those that can
still win: who, with all the tilt that the cap allows, reaches the best so far. That gives the token of `full` with the
same cap, for a fraction of the work. `qhead` asks for all of C as well, of a guide that predicts: a gather, no forward
pass. Rows of any kind share every call of the guide, two in a step at most.

Shapes: B rows, K candidates in evaluation order, N candidates of all rows side by side, M objectives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mavis_dist.core.tilt import estimate_distribution, tilt
from mavis_dist.decode.guide import Guide

# Candidates of a row in a step's first call, beside the end-of-answer tokens. A GPU hardly notices a few more.
FIRST_CHUNK = {"cpu": 3, "cuda": 16}


@dataclass(frozen=True)
class Drafts:
    """The candidates of all rows in evaluation order, so that an index is also the place among those asked about."""

    ids_BK: torch.Tensor
    logprobs_BK: torch.Tensor  # -inf where a row has no such candidate
    phi_BK: torch.Tensor  # log p + T * G
    is_eos_BK: torch.Tensor
    temperature_B: torch.Tensor
    preference_logratio_BK: torch.Tensor | None = None  # log p'_T - log p_T (T = 0 as T = 1), with preferences


@dataclass(frozen=True)
class Steering:
    """What steers the rows."""

    numbers: Sequence[int]  # the guide's names for the rows
    is_guided_B: torch.Tensor  # the others have no tilt
    is_lazy_B: torch.Tensor
    weights_BM: torch.Tensor
    baseline_BM: torch.Tensor  # V_m(s)
    beta_B: torch.Tensor
    cap_B: torch.Tensor


@dataclass(frozen=True)
class Scores:
    """The tilt of all rows, and what it was computed from."""

    delta_BK: torch.Tensor  # -inf where not evaluated: such a candidate cannot win
    values_BKM: torch.Tensor  # nan where not evaluated
    num_evaluated_B: torch.Tensor
    is_sound_B: torch.Tensor  # every value asked for was finite
    divergence_B: torch.Tensor  # KL(pi || pi_ref), nats; estimated where not all candidates were evaluated
    preference_divergence_B: torch.Tensor | None  # the preferences' part of it, where there are any
    logratio_BK: torch.Tensor  # log pi(a) - log pi_ref(a), 0 at T = 0; estimated likewise, and only where evaluated


def score(drafts: Drafts, steering: Steering, guide: Guide | None) -> Scores:
    """Ask the guide as each row's scorer wants; rows without guidance have no tilt."""
    search = _Search(drafts, steering)
    for is_asked_BK in search.questions():
        assert guide is not None
        counts_B = is_asked_BK.sum(-1)
        rows = counts_B.nonzero()[:, 0].tolist()
        numbers = [steering.numbers[b] for b in rows]
        values_NM = guide.score(numbers, counts_B[rows].tolist(), drafts.ids_BK[is_asked_BK])
        search.absorb(is_asked_BK, values_NM)
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
    """The search for the winners of all rows: what is known of their candidates, and who can still win."""

    def __init__(self, drafts: Drafts, steering: Steering):
        self._drafts, self._steering = drafts, steering
        is_guided_B1 = steering.is_guided_B[:, None]
        # Without a cap nothing may be left out, and it is best to ask for everything at once.
        self._is_lazy_B1 = (steering.is_lazy_B & (steering.cap_B < float("inf")))[:, None]
        self._is_used_B1M = (steering.weights_BM != 0)[:, None]
        self._is_open_BK = (drafts.logprobs_BK > float("-inf")) & is_guided_B1  # not evaluated, and may win
        self.delta_BK = torch.zeros_like(drafts.phi_BK).masked_fill(is_guided_B1, float("-inf"))
        shape = (*drafts.ids_BK.shape, steering.weights_BM.shape[1])
        self.values_BKM = torch.full(shape, float("nan"), device=drafts.phi_BK.device)
        self.is_evaluated_BK = torch.zeros_like(self._is_open_BK)
        self.is_sound_B = torch.ones_like(steering.is_guided_B)

    def questions(self) -> Iterator[torch.Tensor]:
        """The candidates [B, K] to ask for; what is learned in between decides about the second time."""
        if self._is_open_BK.any():
            yield self._first(FIRST_CHUNK.get(self._is_open_BK.device.type, FIRST_CHUNK["cuda"]))
        if self._is_open_BK.any():
            yield self._is_open_BK

    def absorb(self, is_asked_BK: torch.Tensor, values_NM: torch.Tensor) -> None:
        """Take note of the values of the candidates that were asked for, and rule out who cannot win any more."""
        drafts, steering = self._drafts, self._steering
        self.values_BKM[is_asked_BK] = values_NM.to(self.values_BKM)
        tilt_BK = tilt(
            self.values_BKM,
            steering.baseline_BM,
            steering.weights_BM,
            steering.beta_B,
            steering.cap_B,
            drafts.is_eos_BK,
        )
        # The tilt shows a V(s) that is not finite; an infinite V(s∘a) may hide behind the cap.
        is_fine_BK = (self.values_BKM.isfinite() | ~self._is_used_B1M).all(-1) & tilt_BK.isfinite()
        self.is_sound_B &= (is_fine_BK | ~is_asked_BK).all(-1)
        self.delta_BK = torch.where(is_asked_BK, tilt_BK, self.delta_BK)
        self.is_evaluated_BK = self.is_evaluated_BK | is_asked_BK
        # Equal counts as reached: where scores are equal the smaller token id wins, and it may be theirs.
        best_B1 = (drafts.phi_BK + self.delta_BK).amax(-1, keepdim=True)
        can_win_BK = drafts.phi_BK + steering.cap_B[:, None] >= best_B1
        self._is_open_BK = self._is_open_BK & can_win_BK & ~self.is_evaluated_BK & self.is_sound_B[:, None]

    def _first(self, size: int) -> torch.Tensor:
        """End-of-answer tokens, whose tilt has no bound, and the first others; all where the scorer is `full`."""
        others_BK = self._is_open_BK & ~self._drafts.is_eos_BK
        return self._is_open_BK & (self._drafts.is_eos_BK | (others_BK.cumsum(-1) <= size) | ~self._is_lazy_B1)

"""Scorers: which candidates the value models evaluate before a token is chosen.

`full` evaluates all of C, as published. `lazy` evaluates the few that are most likely to win, and then those that can
still win: the ones that would reach the best so far with the maximum tilt that the cap allows. This chooses the same
token as `full` with the same cap, for a fraction of the work. `qhead` scores all of C with a guide that predicts: a
gather, no forward pass. Rows of all kinds share the calls of the guide, at most two per step.

The first call either asks for exactly the candidates that the scorers name, which the host has to read, or for the same
number of every row, whose superfluous ones are ignored: then shapes never change, and nothing waits for the device.

Shapes: B rows, K candidates in evaluation order, N candidates of all rows, concatenated, M objectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mavis_dist.core.tilt import capped, estimate_distribution, uncapped_tilt
from mavis_dist.decode.guide import Guide

# Candidates of a row in a step's first call, besides the end-of-answer tokens: few where reading the results is free,
# more where it costs as much as evaluating them.
FIRST_CHUNK, FIRST_CHUNK_UNREAD = 3, 16


def width_unread(num_candidates: int, num_eos: int, are_all_lazy: bool) -> int:
    """Candidates per row, the first in evaluation order, that contain every row's first chunk."""
    return min(num_candidates, num_eos + FIRST_CHUNK_UNREAD) if are_all_lazy else num_candidates


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
class Query:
    """Candidates for the guide to evaluate."""

    numbers: Sequence[int]  # of the rows
    counts: Sequence[int]  # candidates of each row
    index_N: torch.Tensor  # of the candidates among all B * K


@dataclass(frozen=True)
class Steering:
    """The steering of all rows."""

    numbers: Sequence[int]  # of the rows, for the guide
    is_guided_B: torch.Tensor  # the others have no tilt
    is_lazy_B: torch.Tensor  # guided or not; not where the tilt has no cap, since no candidate can be omitted then
    weights_BM: torch.Tensor
    baseline_BM: torch.Tensor  # V_m(s)
    beta_B: torch.Tensor
    cap_B: torch.Tensor
    first: Query | None = None  # the first call, the same in every step; None: exactly the candidates that it needs


@dataclass(frozen=True)
class Scores:
    """The tilt of all rows, and the values it was computed from."""

    delta_BK: torch.Tensor  # -inf where not evaluated: such a candidate cannot win
    values_BKM: torch.Tensor  # nan where not evaluated
    num_evaluated_B: torch.Tensor
    soundness_B: torch.Tensor  # finite where all evaluated values were
    is_open_B: torch.Tensor  # candidates that were not evaluated may win
    divergence_B: torch.Tensor  # KL(pi || pi_ref), nats; estimated where not all candidates were evaluated
    preference_divergence_B: torch.Tensor | None  # the preferences' part of it, where there are any
    logratio_BK: torch.Tensor  # log pi(a) - log pi_ref(a), 0 at T = 0; estimated likewise, and only where evaluated


def unsearched(drafts: Drafts, num_objectives: int) -> Scores:
    """The scores where no row is guided: there is no tilt."""
    none_B, none_BK = torch.zeros_like(drafts.temperature_B), torch.zeros_like(drafts.phi_BK)
    unknown_BKM = drafts.phi_BK.new_full((), float("nan")).expand(*drafts.phi_BK.shape, num_objectives)
    if drafts.preference_logratio_BK is None:
        reported = _Reported(torch.where(drafts.temperature_B > 0, 0.0, float("nan")), None, none_BK)
    else:
        reported = _reported(drafts, none_BK, torch.ones_like(drafts.is_eos_BK))
    return Scores(none_BK, unknown_BKM, none_B, none_B, none_B, *reported)


class Search:
    """The search for the winners of all rows: the evaluated candidates, and those that can still win.

    It calls the guide at once, and again if it knows that it has to. While `scores` are open, `proceed` makes the
    second call.
    """

    def __init__(self, drafts: Drafts, steering: Steering, guide: Guide | None):
        self._drafts, self._steering, self._guide = drafts, steering, guide
        is_guided_B1 = steering.is_guided_B[:, None]
        self._is_open_BK = (drafts.logprobs_BK > float("-inf")) & is_guided_B1  # not evaluated, and may win
        self._is_evaluated_BK = torch.zeros_like(self._is_open_BK)
        self._delta_BK = torch.zeros_like(drafts.phi_BK).masked_fill(is_guided_B1, float("-inf"))
        shape = (*drafts.ids_BK.shape, steering.weights_BM.shape[1])
        self._values_BKM = torch.full(shape, float("nan"), device=drafts.phi_BK.device)
        self._soundness_B = torch.zeros_like(steering.beta_B)
        self._begin()

    def proceed(self) -> None:
        """Evaluate all candidates that may win."""
        self._ask(self._exactly(self._is_open_BK & self._is_unasked_BK()))
        self._tilt(self._is_open_BK)
        self._is_open_BK = torch.zeros_like(self._is_open_BK)

    def scores(self) -> Scores:
        # Without guidance the tilt is known to be 0 for all.
        is_known_BK = self._is_evaluated_BK | ~self._steering.is_guided_B[:, None]
        return Scores(
            self._delta_BK,
            self._values_BKM,
            self._is_evaluated_BK.sum(-1),
            self._soundness_B,
            self._is_open_BK.any(-1),
            *_reported(self._drafts, self._delta_BK, is_known_BK),
        )

    def _begin(self) -> None:
        first, is_first_BK = self._steering.first, self._first_chunk()
        self._ask(first or self._exactly(is_first_BK))
        self._tilt(is_first_BK)
        self._exclude()
        if first is None and self._is_open_BK.any():
            self.proceed()

    def _first_chunk(self) -> torch.Tensor:
        """End-of-answer tokens, whose tilt is unbounded, and the first others; all where the scorer is `full`."""
        size = FIRST_CHUNK if self._steering.first is None else FIRST_CHUNK_UNREAD
        num_eos_B = (self._is_open_BK & self._drafts.is_eos_BK).sum(-1)
        num_first_B = torch.where(self._steering.is_lazy_B, num_eos_B + size, self._is_open_BK.shape[1])
        return self._is_open_BK & (self._column_K() < num_first_B[:, None])

    def _is_unasked_BK(self) -> torch.Tensor:
        """Candidates whose values are not known: the first call may have asked for more than the scorers named."""
        if self._steering.first is None:
            return ~self._is_evaluated_BK
        return self._column_K() >= max(self._steering.first.counts)

    def _column_K(self) -> torch.Tensor:
        return torch.arange(self._is_open_BK.shape[1], device=self._is_open_BK.device)

    def _exactly(self, is_queried_BK: torch.Tensor) -> Query:
        """Waits for the device."""
        counts, numbers = is_queried_BK.sum(-1).tolist(), self._steering.numbers
        rows = [b for b, count in enumerate(counts) if count]
        index_N = is_queried_BK.flatten().nonzero()[:, 0]
        return Query([numbers[b] for b in rows], [counts[b] for b in rows], index_N)

    def _ask(self, query: Query) -> None:
        if not query.numbers:
            return
        assert self._guide is not None
        candidates_N = self._drafts.ids_BK.flatten()[query.index_N]
        values_NM = self._guide.score(query.numbers, query.counts, candidates_N)
        self._values_BKM.flatten(0, 1).index_copy_(0, query.index_N, values_NM.to(self._values_BKM))

    def _tilt(self, is_queried_BK: torch.Tensor) -> None:
        """Tilt the candidates whose values are known now."""
        steering = self._steering
        gain_BK = uncapped_tilt(self._values_BKM, steering.baseline_BM, steering.weights_BM, steering.beta_B)
        self._soundness_B = self._soundness_B + torch.where(is_queried_BK, gain_BK, 0.0).sum(-1)
        tilt_BK = capped(gain_BK, steering.cap_B, self._drafts.is_eos_BK)
        self._delta_BK = torch.where(is_queried_BK, tilt_BK, self._delta_BK)
        self._is_evaluated_BK = self._is_evaluated_BK | is_queried_BK

    def _exclude(self) -> None:
        """Exclude the candidates that cannot win any more."""
        best_B1 = (self._drafts.phi_BK + self._delta_BK).amax(-1, keepdim=True)
        # Including equality: among equal scores the smaller token id wins, which may be theirs.
        can_win_BK = self._drafts.phi_BK + self._steering.cap_B[:, None] >= best_B1
        self._is_open_BK = self._is_open_BK & can_win_BK & ~self._is_evaluated_BK


class _Reported(NamedTuple):
    divergence_B: torch.Tensor
    preference_divergence_B: torch.Tensor | None
    logratio_BK: torch.Tensor


def _reported(drafts: Drafts, delta_BK: torch.Tensor, is_known_BK: torch.Tensor) -> _Reported:
    """What follows from the tilts that are known."""
    is_drawn_B, preference_BK = drafts.temperature_B > 0, drafts.preference_logratio_BK
    distribution = estimate_distribution(
        drafts.logprobs_BK, drafts.phi_BK, delta_BK, is_known_BK, drafts.temperature_B, drafts.is_eos_BK
    )
    divisor_B = torch.where(is_drawn_B, drafts.temperature_B, float("inf"))
    logratio_BK = delta_BK / divisor_B[:, None] - distribution.log_partition_B[:, None]
    if preference_BK is None:
        return _Reported(distribution.divergence_B, None, logratio_BK)
    preference_B = torch.where(is_drawn_B, (distribution.pi_BK * preference_BK).sum(-1), float("nan"))
    logratio_BK = logratio_BK + torch.where(is_drawn_B[:, None], preference_BK, 0.0)
    return _Reported(distribution.divergence_B + preference_B, preference_B, logratio_BK)

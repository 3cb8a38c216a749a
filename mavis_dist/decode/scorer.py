"""Scorers: which candidates the value models evaluate before a token is chosen.

`full` evaluates all of C, as published. `lazy` evaluates the few that are most likely to win, and then those that can
still win: the ones that would reach the best so far with the maximum tilt that the cap allows. This chooses the same
token as `full` with the same cap, for a fraction of the work. `predicted` is `lazy` with a cap for each candidate, not
far above what a student predicts of it. `qhead` scores all of C with a guide that predicts: a gather, no forward pass.
Rows of all kinds share the calls of the guide, at most two per step.

The first call either asks for exactly the candidates that the scorers name, which the host has to read, or for the same
number of every row, whose superfluous ones are ignored: then shapes never change, and nothing waits for the device.

Shapes: B rows, K candidates in evaluation order, N candidates of all rows, concatenated, M objectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch

from mavis_dist.core.tilt import capped, estimate_distribution, evaluation_order, uncapped_tilt
from mavis_dist.decode.guide import Guide
from mavis_dist.models.replay import tree

# Candidates of a row in a step's first call, besides the end-of-answer tokens: few where reading the results is free,
# more where it costs as much as evaluating them.
FIRST_CHUNK, FIRST_CHUNK_UNREAD = 3, 16
# Of predicted rows, where reading is free, only those that can win even if the best of them is so many nats below its
# prediction: about one candidate more, for a second call in hardly any step.
SLACK = 0.5


def first_chunk(is_predicted: bool, is_read: bool) -> int:
    """Candidates of a lazy row in a step's first call, besides the end-of-answer tokens; at most, where predicted."""
    return FIRST_CHUNK if is_read and not is_predicted else FIRST_CHUNK_UNREAD


def width_unread(num_candidates: int, num_eos: int, are_all_lazy: bool) -> int:
    """Candidates per row, the first in evaluation order, that contain every row's first chunk."""
    return min(num_candidates, num_eos + FIRST_CHUNK_UNREAD) if are_all_lazy else num_candidates


@tree
@dataclass(frozen=True)
class Drafts:
    """The candidates of all rows in evaluation order: an index is also the index among the evaluated ones."""

    ids_BK: torch.Tensor
    logprobs_BK: torch.Tensor  # -inf where a row has no such candidate
    phi_BK: torch.Tensor  # log p + T * G
    is_eos_BK: torch.Tensor
    temperature_B: torch.Tensor
    preference_logratio_BK: torch.Tensor | None = None  # log p'_T - log p_T (T = 0 as T = 1), with preferences
    # Where rows are predicted:
    cap_BK: torch.Tensor | None = None  # of the tilt, the end-of-answer tokens excepted
    predicted_BK: torch.Tensor | None = None  # the tilt; -inf where it is not predicted

    def reordered(self, order_BK: torch.Tensor) -> Drafts:
        columns = {field.name: getattr(self, field.name) for field in fields(self) if field.name.endswith("_BK")}
        return replace(self, **{name: x.gather(-1, order_BK) for name, x in columns.items() if x is not None})


@dataclass(frozen=True)
class Query:
    """Candidates for the guide to evaluate."""

    numbers: Sequence[int]  # of the rows
    counts: Sequence[int]  # candidates of each row
    index_N: torch.Tensor  # of the candidates among all B * K


@tree
@dataclass(frozen=True)
class Steering:
    """The steering of all rows."""

    is_guided_B: torch.Tensor  # the others have no tilt
    num_first_B: torch.Tensor  # candidates of the first call, besides the end-of-answer tokens
    weights_BM: torch.Tensor
    baseline_BM: torch.Tensor  # V_m(s)
    beta_B: torch.Tensor
    cap_B: torch.Tensor
    is_predicted_B: torch.Tensor  # a student predicts the candidates' tilt
    residual_cap_B: torch.Tensor  # of the part of the tilt that it does not predict


@tree
@dataclass(frozen=True)
class Scores:
    """The tilt of all rows, and the values it was computed from."""

    delta_BK: torch.Tensor  # where not evaluated as predicted, or -inf: such a candidate cannot win
    values_BKM: torch.Tensor  # nan where not evaluated
    num_evaluated_B: torch.Tensor
    soundness_B: torch.Tensor  # finite where all evaluated values were
    is_open_B: torch.Tensor  # candidates that were not evaluated may win
    divergence_B: torch.Tensor  # KL(pi || pi_ref), nats; estimated where not all candidates were evaluated
    preference_divergence_B: torch.Tensor | None  # the preferences' part of it, where there are any
    logratio_BK: torch.Tensor  # log pi(a) - log pi_ref(a), 0 at T = 0; estimated likewise, and only where evaluated


@tree
@dataclass(frozen=True)
class State:
    """How far the search for the winners of all rows has come."""

    is_open_BK: torch.Tensor  # not evaluated, and may win
    is_evaluated_BK: torch.Tensor
    delta_BK: torch.Tensor
    values_BKM: torch.Tensor
    soundness_B: torch.Tensor


def with_predictions(drafts: Drafts, steering: Steering, deltas_BKM: torch.Tensor) -> Drafts:
    """The drafts with the caps that follow from predictions of V_m(s∘a) - V_m(s), and in the order of these.

    With the predicted tilt d' and the residual r = d - d', the tilt is min(U, d' + min(r, U_r)): that of `lazy` with a
    cap of min(U, d' + U_r) for each candidate.
    """
    cap_B1, residual_cap_B1 = steering.cap_B[:, None], steering.residual_cap_B[:, None]
    is_predicted_B = steering.is_predicted_B & steering.is_guided_B
    is_predicted_BK = is_predicted_B[:, None] & (drafts.logprobs_BK > float("-inf"))
    tilt_BK = uncapped_tilt(deltas_BKM, torch.zeros_like(steering.baseline_BM), steering.weights_BM, steering.beta_B)
    cap_BK = torch.where(is_predicted_BK, torch.minimum(tilt_BK + residual_cap_B1, cap_B1), cap_B1)
    predicted_BK = torch.where(is_predicted_BK, torch.minimum(tilt_BK, cap_B1), float("-inf"))
    order_BK = evaluation_order(drafts.logprobs_BK, drafts.phi_BK + cap_BK, drafts.is_eos_BK)
    return replace(drafts, cap_BK=cap_BK, predicted_BK=predicted_BK).reordered(order_BK)


def search(drafts: Drafts, steering: Steering, guide: Guide, numbers: Sequence[int]) -> State:
    """The whole search, in at most two calls of the guide; `numbers` are the guide's numbers of the rows."""
    state = _start(drafts, steering)
    is_first_BK = _first_chunk(drafts, steering, state)
    if drafts.predicted_BK is not None:
        is_first_BK = is_first_BK & _promising(drafts, drafts.predicted_BK, steering)
    query = _exactly(is_first_BK, numbers)
    if query.numbers:
        state = _received(state, query.index_N, ask(drafts, guide, query))
    state = _excluded(drafts, steering, _tilted(drafts, steering, state, is_first_BK))
    if state.is_open_BK.any():
        state = proceed(drafts, steering, guide, numbers, state)
    return state


def after_static_call(drafts: Drafts, steering: Steering, index_N: torch.Tensor, values_NM: torch.Tensor) -> State:
    """The search after a first call of the same shape in every step; candidates may be open. Never waits."""
    state = _received(_start(drafts, steering), index_N, values_NM)
    is_first_BK = _first_chunk(drafts, steering, state)
    return _excluded(drafts, steering, _tilted(drafts, steering, state, is_first_BK))


def proceed(
    drafts: Drafts, steering: Steering, guide: Guide, numbers: Sequence[int], state: State, num_asked: int | None = None
) -> State:
    """The second call: evaluate all candidates that may win.

    Args:
        num_asked: the first candidates of all rows whose values are known; None: those that are evaluated.
    """
    is_asked_BK = state.is_open_BK & ~state.is_evaluated_BK
    if num_asked is not None:
        # All of a row that are not known yet, so that the shapes of calls depend on the number of rows only.
        is_unknown_BK = _column_K(drafts) >= num_asked
        is_asked_BK = (is_asked_BK & is_unknown_BK).any(-1, keepdim=True) & is_unknown_BK
    query = _exactly(is_asked_BK, numbers)
    if query.numbers:
        state = _received(state, query.index_N, ask(drafts, guide, query))
    state = _tilted(drafts, steering, state, state.is_open_BK)
    return replace(state, is_open_BK=torch.zeros_like(state.is_open_BK))


def ask(drafts: Drafts, guide: Guide, query: Query) -> torch.Tensor:
    """The guide's values [N, M] of some candidates."""
    return guide.score(query.numbers, query.counts, drafts.ids_BK.flatten()[query.index_N])


def scores_of(drafts: Drafts, steering: Steering, state: State) -> Scores:
    # Without guidance the tilt is known to be 0 for all.
    delta_BK, is_known_BK = state.delta_BK, state.is_evaluated_BK | ~steering.is_guided_B[:, None]
    if drafts.predicted_BK is not None:
        # Predictions complete the distribution. Their errors put its divergence a few per cent off: too low where every
        # candidate has its own, too high where all share one. No prediction exceeds its cap, so that none of them wins.
        delta_BK = torch.where(is_known_BK, delta_BK, drafts.predicted_BK)
        is_known_BK = is_known_BK | (drafts.predicted_BK > float("-inf"))
    return Scores(
        delta_BK,
        state.values_BKM,
        state.is_evaluated_BK.sum(-1),
        state.soundness_B,
        state.is_open_BK.any(-1),
        *_reported(drafts, delta_BK, is_known_BK),
    )


def unsearched(drafts: Drafts, num_objectives: int) -> Scores:
    """The scores where no row is guided: there is no tilt."""
    none_B, none_BK = torch.zeros_like(drafts.temperature_B), torch.zeros_like(drafts.phi_BK)
    unknown_BKM = drafts.phi_BK.new_full((), float("nan")).expand(*drafts.phi_BK.shape, num_objectives)
    if drafts.preference_logratio_BK is None:
        reported = _Reported(torch.where(drafts.temperature_B > 0, 0.0, float("nan")), None, none_BK)
    else:
        reported = _reported(drafts, none_BK, torch.ones_like(drafts.is_eos_BK))
    return Scores(none_BK, unknown_BKM, none_B, none_B, none_B, *reported)


def _start(drafts: Drafts, steering: Steering) -> State:
    """Nothing is evaluated."""
    is_guided_B1 = steering.is_guided_B[:, None]
    is_open_BK = (drafts.logprobs_BK > float("-inf")) & is_guided_B1
    shape = (*drafts.ids_BK.shape, steering.weights_BM.shape[1])
    soundness_B = torch.zeros_like(steering.beta_B)
    if drafts.predicted_BK is not None:
        is_used_BK = is_open_BK & steering.is_predicted_B[:, None]
        soundness_B = torch.where(is_used_BK, drafts.predicted_BK, 0.0).sum(-1)
    return State(
        is_open_BK,
        torch.zeros_like(is_open_BK),
        torch.zeros_like(drafts.phi_BK).masked_fill(is_guided_B1, float("-inf")),
        torch.full(shape, float("nan"), device=drafts.phi_BK.device),
        soundness_B,
    )


def _first_chunk(drafts: Drafts, steering: Steering, state: State) -> torch.Tensor:
    """End-of-answer tokens, whose tilt is unbounded, and a number of others."""
    num_first_B = (state.is_open_BK & drafts.is_eos_BK).sum(-1) + steering.num_first_B
    return state.is_open_BK & (_column_K(drafts) < num_first_B[:, None])


def _promising(drafts: Drafts, predicted_BK: torch.Tensor, steering: Steering) -> torch.Tensor:
    """All where nothing is predicted."""
    expected_B1 = (drafts.phi_BK + predicted_BK).amax(-1, keepdim=True)
    return drafts.is_eos_BK | (drafts.phi_BK + _cap(drafts, steering) >= expected_B1 - SLACK)


def _column_K(drafts: Drafts) -> torch.Tensor:
    return torch.arange(drafts.ids_BK.shape[1], device=drafts.ids_BK.device)


def _exactly(is_queried_BK: torch.Tensor, numbers: Sequence[int]) -> Query:
    """Waits for the device."""
    counts = is_queried_BK.sum(-1).tolist()
    rows = [b for b, count in enumerate(counts) if count]
    index_N = is_queried_BK.flatten().nonzero()[:, 0]
    return Query([numbers[b] for b in rows], [counts[b] for b in rows], index_N)


def _received(state: State, index_N: torch.Tensor, values_NM: torch.Tensor) -> State:
    """Changes the values in place."""
    state.values_BKM.flatten(0, 1).index_copy_(0, index_N, values_NM.to(state.values_BKM))
    return state


def _tilted(drafts: Drafts, steering: Steering, state: State, is_queried_BK: torch.Tensor) -> State:
    """Tilt the candidates whose values are known now."""
    gain_BK = uncapped_tilt(state.values_BKM, steering.baseline_BM, steering.weights_BM, steering.beta_B)
    tilt_BK = capped(gain_BK, _cap(drafts, steering), drafts.is_eos_BK)
    return replace(
        state,
        soundness_B=state.soundness_B + torch.where(is_queried_BK, gain_BK, 0.0).sum(-1),
        delta_BK=torch.where(is_queried_BK, tilt_BK, state.delta_BK),
        is_evaluated_BK=state.is_evaluated_BK | is_queried_BK,
    )


def _excluded(drafts: Drafts, steering: Steering, state: State) -> State:
    """Exclude the candidates that cannot win any more."""
    best_B1 = (drafts.phi_BK + state.delta_BK).amax(-1, keepdim=True)
    # Including equality: among equal scores the smaller token id wins, which may be theirs.
    can_win_BK = drafts.phi_BK + _cap(drafts, steering) >= best_B1
    return replace(state, is_open_BK=state.is_open_BK & can_win_BK & ~state.is_evaluated_BK)


def _cap(drafts: Drafts, steering: Steering) -> torch.Tensor:
    """[B, K] or [B, 1]."""
    return steering.cap_B[:, None] if drafts.cap_BK is None else drafts.cap_BK


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

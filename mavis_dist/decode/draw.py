"""One token for every row of a step: candidates and noise, the guide's scores, and the choice.

Shapes: B rows, X rows with preferences, V vocabulary, K candidates, C candidates without preferences, M objectives,
Q draws.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from mavis_dist.core import noise
from mavis_dist.core.tilt import Filters, choose, evaluation_order, largest, ranking, renormalised
from mavis_dist.decode.batch import Batch
from mavis_dist.decode.guide import Guide
from mavis_dist.decode.logprobs import token_logprobs
from mavis_dist.decode.preference_step import PreferenceStep
from mavis_dist.decode.request import Alternative, TokenLogprobs
from mavis_dist.decode.scorer import (
    Drafts,
    Scores,
    State,
    Steering,
    after_static_call,
    ask,
    proceed,
    scores_of,
    search,
    unsearched,
    with_predictions,
)
from mavis_dist.models.replay import Replays, tree
from mavis_dist.native import build

NOT_FINITE = "the {} returned a number that is not finite"


@dataclass(frozen=True)
class Drawn:
    """One token for every row; lists hold one entry per row."""

    index_B: torch.Tensor  # of the token among its candidates
    tokens_B: torch.Tensor
    tokens: list[int]
    logratios: list[float]
    divergences: list[float]
    preference_divergences: list[float]  # the preferences' part of the divergences; empty where no row has any
    values: dict[str, list[float]]  # V_m(s∘a) of the tokens by objective, nan where not computed
    num_candidates: list[int]
    faults: Mapping[int, str]  # by b, of the rows that fail: the reason
    alternatives: dict[int, list[Alternative]]  # by b, of the rows that request them
    logprobs: dict[int, TokenLogprobs]  # by b, of the rows that request them
    drafts: Drafts  # the candidates and
    scores: Scores  # their tilt, for who draws from them


tree(Filters)


class DrawReplays(NamedTuple):
    """Recordings of the parts of a draw: before the guide's calls, after its predictions, and after its values."""

    drafts: Replays
    predictions: Replays
    outcome: Replays

    @classmethod
    def on(cls, device: torch.device) -> DrawReplays:
        return cls(Replays(device), Replays(device), Replays(device))


@tree
@dataclass(frozen=True)
class _Outcome:
    """What the evaluated candidates lead to."""

    index_B: torch.Tensor
    tokens_B: torch.Tensor
    baseline_BM: torch.Tensor  # the next V(s)
    columns_XB: torch.Tensor  # float64, named by `_columns`
    scores: Scores


def draw(
    batch: Batch,
    guided: Sequence[int],
    logits_BV: torch.Tensor,
    guide: Guide | None,
    replays: DrawReplays,
    preference_step: PreferenceStep | None = None,
) -> Drawn:
    """One token for every row; the batch keeps V(s∘a) as its next V(s). Changes the logits.

    Args:
        guided: the rows whose token is tilted.
        preference_step: where rows have preferences, the step that merged them into the logits.
    """
    drafts = _drafts_of(batch, logits_BV, replays, preference_step)
    if (predicted := batch.predicted(guided)) is not None:
        assert guide is not None
        deltas_BKM = guide.predict(predicted, drafts.ids_BK)
        drafts = replays.predictions(_key(batch), with_predictions, drafts, batch.steering(), deltas_BKM)
    outcome, read = _outcome_of(batch, guided, drafts, guide, replays)
    if guided:
        batch.baseline_BM = outcome.baseline_BM.clone()  # the next step's outcome may take its place
    return Drawn(
        index_B=outcome.index_B,
        tokens_B=outcome.tokens_B,
        tokens=[int(token) for token in read["token"]],
        logratios=read["logratio"],
        divergences=read["divergence"],
        preference_divergences=read.get("preference", []),
        values={name: read[f"value of {name}"] for name in batch.objectives},
        num_candidates=[int(count) for count in read["num_evaluated"]],
        faults=_faults(batch, read["soundness"], read["likeliest"]),
        alternatives=_alternatives(batch, drafts, outcome.scores) if batch.has_draws else {},
        logprobs=token_logprobs(drafts, outcome.scores, outcome.index_B, batch.top_logprobs),
        drafts=drafts,
        scores=outcome.scores,
    )


def _drafts_of(
    batch: Batch, logits_BV: torch.Tensor, replays: DrawReplays, preference_step: PreferenceStep | None
) -> Drafts:
    """The candidate sets of all rows with their noise."""
    _forbid_empty(logits_BV, batch, batch.starting)
    rows = batch.filters, batch.stream_B, batch.positions_B, batch.eos
    drafts = replays.drafts(_key(batch), _drafts, logits_BV, *rows, batch.is_ordered, batch.static_shapes)
    return drafts if preference_step is None else _with_preferences(drafts, batch, preference_step)


def _outcome_of(
    batch: Batch, guided: Sequence[int], drafts: Drafts, guide: Guide | None, replays: DrawReplays
) -> tuple[_Outcome, dict[str, list[float]]]:
    """The draws, and what the host reads of them, all at once."""
    if not guided:
        outcome = replays.outcome(_key(batch), _unguided, drafts, len(batch.objectives))
        return outcome, _read(batch, outcome)
    assert guide is not None
    steering, query = batch.steering(), batch.static_query(guided)
    if query is None:
        outcome = _drawn(drafts, steering, search(drafts, steering, guide, batch.numbers))
        return outcome, _read(batch, outcome)
    values_NM = ask(drafts, guide, query)
    state, outcome = replays.outcome(_key(batch), _guided, drafts, steering, query.index_N, values_NM)
    read = _read(batch, outcome)
    if any(read["is_open"]):
        num_asked = max(query.counts)
        outcome = _drawn(drafts, steering, proceed(drafts, steering, guide, batch.numbers, state, num_asked))
        read = _read(batch, outcome)
    return outcome, read


def _key(batch: Batch) -> Hashable:
    """None where shapes change from step to step."""
    return True if batch.static_shapes and not batch.has_preferences else None


def _unguided(drafts: Drafts, num_objectives: int) -> _Outcome:
    return _chosen(drafts, unsearched(drafts, num_objectives), None)


def _guided(
    drafts: Drafts, steering: Steering, index_N: torch.Tensor, values_NM: torch.Tensor
) -> tuple[State, _Outcome]:
    state = after_static_call(drafts, steering, index_N, values_NM)
    return state, _drawn(drafts, steering, state)


def _drawn(drafts: Drafts, steering: Steering, state: State) -> _Outcome:
    return _chosen(drafts, scores_of(drafts, steering, state), steering)


def _chosen(drafts: Drafts, scores: Scores, steering: Steering | None) -> _Outcome:
    index_B = choose(drafts.phi_BK, scores.delta_BK, drafts.ids_BK)
    index_B1 = index_B[:, None]
    tokens_B = drafts.ids_BK.gather(1, index_B1)[:, 0]
    num_objectives = scores.values_BKM.shape[-1]
    values_BM = scores.values_BKM.gather(1, index_B1[:, :, None].expand(-1, 1, num_objectives))[:, 0]
    columns = [
        tokens_B,
        scores.is_open_B,
        scores.logratio_BK.gather(1, index_B1)[:, 0],
        scores.divergence_B,
        scores.num_evaluated_B,
        scores.soundness_B,
        drafts.logprobs_BK.amax(-1),
        *values_BM.unbind(1),
    ]
    if scores.preference_divergence_B is not None:
        columns.append(scores.preference_divergence_B)
    baseline_BM = values_BM
    if steering is not None:
        baseline_BM = torch.where(steering.is_guided_B[:, None], values_BM, steering.baseline_BM)
    # float64 represents all of them exactly.
    return _Outcome(index_B, tokens_B, baseline_BM, torch.stack([column.double() for column in columns]), scores)


def _read(batch: Batch, outcome: _Outcome) -> dict[str, list[float]]:
    """The columns by name, in one transfer."""
    names = ["token", "is_open", "logratio", "divergence", "num_evaluated", "soundness", "likeliest"]
    names += [f"value of {name}" for name in batch.objectives]
    names += ["preference"] if outcome.scores.preference_divergence_B is not None else []
    return dict(zip(names, outcome.columns_XB.tolist(), strict=True))


def _drafts(
    logits_BV: torch.Tensor,
    filters: Filters,
    stream_B: torch.Tensor,
    positions_B: torch.Tensor,
    eos: torch.Tensor,
    is_ordered: bool,
    static_shapes: bool,
) -> Drafts:
    """Candidate sets with their noise, in evaluation order."""
    logits_BK, ids_BK = _largest(logits_BV, filters.num_candidates, static_shapes)
    logprobs_BK = renormalised(logits_BK, filters)
    temperature_B = filters.temperature_B
    phi_BK = logprobs_BK + temperature_B[:, None] * noise.gumbel(stream_B, positions_B, ids_BK)
    is_eos_BK = (ids_BK[:, :, None] == eos).any(-1)
    drafts = Drafts(ids_BK, logprobs_BK, phi_BK, is_eos_BK, temperature_B)
    return drafts.reordered(evaluation_order(logprobs_BK, phi_BK, is_eos_BK)) if is_ordered else drafts


def _with_preferences(drafts: Drafts, batch: Batch, preference_step: PreferenceStep) -> Drafts:
    """The candidates with the preferences' part of their log-ratios."""
    rows = preference_step.rows
    starting = [x for x, b in enumerate(rows) if b in batch.starting]
    filters, temperature_B = batch.filters.of_rows(rows), batch.filters.temperature_B
    _forbid_empty(preference_step.plain_XV, batch, starting)
    plain_XC, ids_XC = _largest(preference_step.plain_XV, filters.num_candidates, batch.static_shapes)
    logratio_BK = preference_step.logratio_BK(
        drafts.ids_BK, drafts.logprobs_BK, temperature_B, ids_XC, renormalised(plain_XC, filters)
    )
    return replace(drafts, preference_logratio_BK=logratio_BK)


def _forbid_empty(logits_BV: torch.Tensor, batch: Batch, starting: Sequence[int]) -> None:
    """An answer has at least one token: changes the logits of rows that are starting."""
    if starting:
        rows_X1 = torch.tensor(starting, device=logits_BV.device)[:, None]
        logits_BV[rows_X1, batch.eos] = float("-inf")


def _largest(logits_BV: torch.Tensor, k: int, static_shapes: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`largest` of core/tilt.py, by the fastest way there is."""
    is_supported = logits_BV.device.type == "cpu" and logits_BV.dtype in (torch.float32, torch.bfloat16)
    if is_supported and not static_shapes and build.is_loaded():
        found: tuple[torch.Tensor, torch.Tensor] = torch.ops.mavis.largest(logits_BV, min(k, logits_BV.shape[1]))
        return found
    return largest(logits_BV, k, may_wait=not static_shapes)


def _alternatives(batch: Batch, drafts: Drafts, scores: Scores) -> dict[int, list[Alternative]]:
    """As many distinct draws per row as it requests, in order; fewer where it has fewer candidates."""
    alternatives: dict[int, list[Alternative]] = {}
    order_BK = ranking(drafts.phi_BK, scores.delta_BK, drafts.ids_BK)
    for b, row in enumerate(batch.rows):
        if row.request.draws is None or batch.missing[b] is not None:
            continue
        num_drawn = min(row.request.draws, int(drafts.logprobs_BK[b].isfinite().sum()))
        drawn_Q, divergence = order_BK[b, :num_drawn], float(scores.divergence_B[b])
        logratios = scores.logratio_BK[b, drawn_Q].tolist()
        values = [dict(zip(batch.objectives, v, strict=True)) for v in scores.values_BKM[b, drawn_Q].tolist()]
        alternatives[b] = [
            Alternative(token, logratio, {name: value[name] for name in row.request.weights}, divergence)
            for token, logratio, value in zip(drafts.ids_BK[b, drawn_Q].tolist(), logratios, values, strict=True)
        ]
    return alternatives


def _faults(batch: Batch, soundness: Sequence[float], likeliest: Sequence[float]) -> dict[int, str]:
    """The reasons why rows fail."""
    faults = {}
    for b, (objective, value, logit) in enumerate(zip(batch.missing, soundness, likeliest, strict=False)):
        if objective is not None:
            faults[b] = f"the objective {objective!r} was taken away from the engine"
        elif not math.isfinite(logit):
            faults[b] = NOT_FINITE.format("base model")
        elif not math.isfinite(value):
            faults[b] = NOT_FINITE.format("value model")
    return faults

"""One token for every row of a step: candidates and noise, the guide's scores, and the choice.

Shapes: B rows, X rows with preferences, V vocabulary, K candidates, C candidates without preferences, M objectives,
Q draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mavis_dist.core import noise
from mavis_dist.core.tilt import candidates, choose, evaluation_order, ranking
from mavis_dist.decode.batch import Batch
from mavis_dist.decode.guide import Guide
from mavis_dist.decode.logprobs import token_logprobs
from mavis_dist.decode.preference_step import PreferenceStep
from mavis_dist.decode.request import Alternative, TokenLogprobs
from mavis_dist.decode.scorer import Drafts, Scores, Steering, score


@dataclass(frozen=True)
class Drawn:
    """One token for every row; lists hold one entry per row."""

    index_B: torch.Tensor  # of the token among its candidates
    tokens: list[int]
    logratios: list[float]
    divergences: list[float]
    preference_divergences: list[float]  # the preferences' part of the divergences; empty where no row has any
    values_BM: torch.Tensor  # V_m(s∘a) of the token, nan where not computed
    num_candidates: list[int]
    is_guided: list[bool]
    faults: list[str | None]
    alternatives: list[list[Alternative]]  # empty where a row does not request them
    logprobs: dict[int, TokenLogprobs]  # by b, of the rows that request them


def draw(
    batch: Batch,
    positions_B: torch.Tensor,
    steering: Steering,
    logits_BV: torch.Tensor,
    guide: Guide | None,
    eos: torch.Tensor,
    preference_step: PreferenceStep | None = None,
) -> Drawn:
    """One token for every row; the batch keeps V(s∘a) as its next V(s). Changes the logits.

    Args:
        positions_B: index in the answer of the token.
        eos: the ids of end-of-answer tokens.
        preference_step: where rows have preferences, the step that merged them into the logits.
    """
    drafts = _drafts(batch, positions_B, logits_BV, eos)
    if preference_step is not None:
        drafts = _with_preferences(drafts, batch, positions_B, eos, preference_step)
    scores = score(drafts, steering, guide)
    index_B = choose(drafts.phi_BK, scores.delta_BK, drafts.ids_BK)
    every_B = torch.arange(len(index_B), device=index_B.device)
    values_BM, preference_B = scores.values_BKM[every_B, index_B], scores.preference_divergence_B
    batch.baseline_BM = torch.where(steering.is_guided_B[:, None], values_BM, batch.baseline_BM)
    return Drawn(
        index_B=index_B,
        tokens=drafts.ids_BK[every_B, index_B].tolist(),
        logratios=scores.logratio_BK[every_B, index_B].tolist(),
        divergences=scores.divergence_B.tolist(),
        preference_divergences=[] if preference_B is None else preference_B.tolist(),
        values_BM=values_BM.cpu(),
        num_candidates=scores.num_evaluated_B.tolist(),
        is_guided=steering.is_guided_B.tolist(),
        faults=_faults(scores.is_sound_B, drafts.logprobs_BK.amax(-1).isfinite(), batch.missing),
        alternatives=_alternatives(batch, drafts, scores),
        logprobs=token_logprobs(drafts, scores, index_B, batch.top_logprobs),
    )


def _drafts(batch: Batch, positions_B: torch.Tensor, logits_BV: torch.Tensor, eos: torch.Tensor) -> Drafts:
    """The candidate sets of all rows with their noise, in evaluation order."""
    ids_BK, logprobs_BK = _cut(batch, positions_B, eos, logits_BV)
    phi_BK = logprobs_BK + batch.temperature_B[:, None] * noise.gumbel(batch.stream_B, positions_B, ids_BK)
    is_eos_BK = torch.isin(ids_BK, eos)
    order_BK = evaluation_order(logprobs_BK, phi_BK, is_eos_BK)
    ids_BK, logprobs_BK, phi_BK, is_eos_BK = (x.gather(-1, order_BK) for x in (ids_BK, logprobs_BK, phi_BK, is_eos_BK))
    return Drafts(ids_BK, logprobs_BK, phi_BK, is_eos_BK, batch.temperature_B)


def _with_preferences(
    drafts: Drafts, batch: Batch, positions_B: torch.Tensor, eos: torch.Tensor, preference_step: PreferenceStep
) -> Drafts:
    """The candidates with the preferences' part of their log-ratios."""
    plain_XC = _cut(batch, positions_B, eos, preference_step.plain_XV, preference_step.rows)
    logratio_BK = preference_step.logratio_BK(drafts.ids_BK, drafts.logprobs_BK, batch.temperature_B, *plain_XC)
    return replace(drafts, preference_logratio_BK=logratio_BK)


def _cut(
    batch: Batch,
    positions_B: torch.Tensor,
    eos: torch.Tensor,
    logits_XV: torch.Tensor,
    rows: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates and log p of these rows (None: all) under their sampling parameters; changes the logits."""
    chosen = slice(None) if rows is None else list(rows)
    logits_XV[(positions_B[chosen] == 0).nonzero(), eos] = float("-inf")  # an answer has at least one token
    columns = (batch.top_k_B, batch.top_p_B, batch.min_p_B, batch.temperature_B)
    return candidates(logits_XV, *(column[chosen] for column in columns))


def _alternatives(batch: Batch, drafts: Drafts, scores: Scores) -> list[list[Alternative]]:
    """As many distinct draws per row as it requests, in order; fewer where it has fewer candidates."""
    alternatives: list[list[Alternative]] = [[] for _ in batch.rows]
    asking = [b for b, row in enumerate(batch.rows) if row.request.draws is not None and batch.missing[b] is None]
    if not asking:
        return alternatives
    order_BK = ranking(drafts.phi_BK, scores.delta_BK, drafts.ids_BK)
    for b in asking:
        request = batch.rows[b].request
        num_drawn = min(request.draws or 0, int(drafts.logprobs_BK[b].isfinite().sum()))
        drawn_Q, divergence = order_BK[b, :num_drawn], float(scores.divergence_B[b])
        logratios = scores.logratio_BK[b, drawn_Q].tolist()
        values = [dict(zip(batch.objectives, v, strict=True)) for v in scores.values_BKM[b, drawn_Q].tolist()]
        for token, logratio, value in zip(drafts.ids_BK[b, drawn_Q].tolist(), logratios, values, strict=True):
            used = {name: value[name] for name in request.weights}
            alternatives[b].append(Alternative(token, logratio, used, divergence))
    return alternatives


def _faults(
    is_value_fine_B: torch.Tensor, is_logit_fine_B: torch.Tensor, missing: Sequence[str | None]
) -> list[str | None]:
    """The reason why a row fails, if it does."""
    not_finite, faults = "the {} returned a number that is not finite", []
    for objective, value, logit in zip(missing, is_value_fine_B.tolist(), is_logit_fine_B.tolist(), strict=True):
        gone = f"the objective {objective!r} was taken away from the engine" if objective else None
        broken = None if value and logit else not_finite.format("value model" if logit else "base model")
        faults.append(gone or broken)
    return faults

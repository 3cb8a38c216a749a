"""One token for every row of a step: candidates and noise, the guide's scores, and the choice.

Shapes: B rows, X rows with preferences, V vocabulary, K candidates, C candidates without preferences, M objectives,
Q draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from mavis_dist.core import noise
from mavis_dist.core.tilt import Filters, choose, evaluation_order, largest, ranking, renormalised
from mavis_dist.decode.batch import Batch
from mavis_dist.decode.guide import Guide
from mavis_dist.decode.logprobs import token_logprobs
from mavis_dist.decode.preference_step import PreferenceStep
from mavis_dist.decode.request import Alternative, TokenLogprobs
from mavis_dist.decode.scorer import Drafts, Scores, Search, unsearched
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


def draw(
    batch: Batch,
    guided: Sequence[int],
    logits_BV: torch.Tensor,
    guide: Guide | None,
    preference_step: PreferenceStep | None = None,
) -> Drawn:
    """One token for every row; the batch keeps V(s∘a) as its next V(s). Changes the logits.

    Args:
        guided: the rows whose token is tilted.
        preference_step: where rows have preferences, the step that merged them into the logits.
    """
    drafts, steering = _drafts(batch, logits_BV), batch.steering(guided)
    if preference_step is not None:
        drafts = _with_preferences(drafts, batch, preference_step)
    search = Search(drafts, steering, guide) if guided else None
    # All results are read at once, also whether a second call of the guide would change them.
    while True:
        scores = search.scores() if search else unsearched(drafts, len(batch.objectives))
        index_B = choose(drafts.phi_BK, scores.delta_BK, drafts.ids_BK)
        tokens_B, values_BM = drafts.ids_BK.gather(1, index_B[:, None])[:, 0], _chosen(scores.values_BKM, index_B)
        read = _read(
            {
                "token": tokens_B,
                "is_open": scores.is_open_B,
                "logratio": scores.logratio_BK.gather(1, index_B[:, None])[:, 0],
                "divergence": scores.divergence_B,
                "num_evaluated": scores.num_evaluated_B,
                "soundness": scores.soundness_B,
                "likeliest": drafts.logprobs_BK.amax(-1),
            }
            | {f"value of {name}": values_BM[:, m] for m, name in enumerate(batch.objectives)}
            | ({} if scores.preference_divergence_B is None else {"preference": scores.preference_divergence_B})
        )
        if search is None or not any(read["is_open"]):
            break
        search.proceed()
    if guided:
        batch.baseline_BM = torch.where(steering.is_guided_B[:, None], values_BM, batch.baseline_BM)
    return Drawn(
        index_B=index_B,
        tokens_B=tokens_B,
        tokens=[int(token) for token in read["token"]],
        logratios=read["logratio"],
        divergences=read["divergence"],
        preference_divergences=read.get("preference", []),
        values={name: read[f"value of {name}"] for name in batch.objectives},
        num_candidates=[int(count) for count in read["num_evaluated"]],
        faults=_faults(batch, read["soundness"], read["likeliest"]),
        alternatives=_alternatives(batch, drafts, scores) if batch.has_draws else {},
        logprobs=token_logprobs(drafts, scores, index_B, batch.top_logprobs),
    )


def _chosen(x_BKM: torch.Tensor, index_B: torch.Tensor) -> torch.Tensor:
    return x_BKM.gather(1, index_B[:, None, None].expand(-1, 1, x_BKM.shape[-1]))[:, 0]


def _read(columns: Mapping[str, torch.Tensor]) -> dict[str, list[float]]:
    """Tensors [B] of numbers that float64 represents exactly, in one transfer."""
    return dict(zip(columns, torch.stack([column.double() for column in columns.values()]).tolist(), strict=True))


def _drafts(batch: Batch, logits_BV: torch.Tensor) -> Drafts:
    """The candidate sets of all rows with their noise, in evaluation order."""
    ids_BK, logprobs_BK = _cut(batch, batch.filters, batch.starting, logits_BV)
    temperature_B = batch.filters.temperature_B
    phi_BK = logprobs_BK + temperature_B[:, None] * noise.gumbel(batch.stream_B, batch.positions_B, ids_BK)
    is_eos_BK = (ids_BK[:, :, None] == batch.eos).any(-1)
    if batch.is_ordered:
        order_BK = evaluation_order(logprobs_BK, phi_BK, is_eos_BK)
        ids_BK, logprobs_BK, phi_BK, is_eos_BK = (
            x.gather(-1, order_BK) for x in (ids_BK, logprobs_BK, phi_BK, is_eos_BK)
        )
    return Drafts(ids_BK, logprobs_BK, phi_BK, is_eos_BK, temperature_B)


def _with_preferences(drafts: Drafts, batch: Batch, preference_step: PreferenceStep) -> Drafts:
    """The candidates with the preferences' part of their log-ratios."""
    rows = preference_step.rows
    starting = [x for x, b in enumerate(rows) if b in batch.starting]
    plain_XC = _cut(batch, batch.filters.of_rows(rows), starting, preference_step.plain_XV)
    temperature_B = batch.filters.temperature_B
    logratio_BK = preference_step.logratio_BK(drafts.ids_BK, drafts.logprobs_BK, temperature_B, *plain_XC)
    return replace(drafts, preference_logratio_BK=logratio_BK)


def _cut(
    batch: Batch, filters: Filters, starting: Sequence[int], logits_BV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates and log p; changes the logits of rows that are starting."""
    if starting:
        rows_X1 = torch.tensor(starting, device=logits_BV.device)[:, None]
        logits_BV[rows_X1, batch.eos] = float("-inf")  # an answer has at least one token
    logits_BK, ids_BK = _largest(logits_BV, filters.num_candidates, batch.static_shapes)
    return ids_BK, renormalised(logits_BK, filters)


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

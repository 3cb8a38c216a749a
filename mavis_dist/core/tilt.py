"""The tilted next-token distribution (arXiv 2508.13415, value-guided decoding).

    pi(a | s)  ∝  exp( (log p(a | s) + delta_a) / T ),     a in C(s)
    delta_a    =  min( U, beta * sum_m lambda_m (V_m(s∘a) - V_m(s)) ),   end-of-answer tokens exempt from U

p is the base model's distribution at temperature 1 on the candidate set C(s). Subtracting V(s) changes no probability
as long as the cap U is infinite.

Shapes: B rows, V vocabulary, K candidates, M objectives. A row's candidates are sorted by logit (descending), then
token id. Rows with fewer than K are filled up with entries of log p = -inf.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch

TIE_ROOM = 16
LEAST_LEFT = 1e-6  # of a sample without one of its candidates, in proportion: what lies below is lost in rounding


@dataclass(frozen=True)
class Filters:
    """What limits the candidates of rows; None where it limits those of no row."""

    num_candidates: int  # of the row with most
    temperature_B: torch.Tensor  # float64; 0 filters as 1 does: the limit would leave one candidate, nothing to steer
    top_k_B: torch.Tensor | None
    top_p_B: torch.Tensor | None
    min_p_B: torch.Tensor | None

    @classmethod
    def of(
        cls,
        top_k: Sequence[int],
        top_p: Sequence[float],
        min_p: Sequence[float],
        temperature: Sequence[float],
        device: torch.device,
    ) -> Filters:
        def number(column: Sequence[float], is_used: bool = True) -> torch.Tensor | None:
            return torch.tensor(column, dtype=torch.float64, device=device) if is_used else None

        temperature_B = torch.tensor(temperature, dtype=torch.float64, device=device)
        return cls(
            max(top_k),
            temperature_B,
            number(top_k, min(top_k) < max(top_k)),
            number(top_p, min(top_p) < 1),
            number(min_p, max(min_p) > 0),
        )

    def of_rows(self, rows: Sequence[int]) -> Filters:
        """Those of some rows."""
        columns: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen: dict[str, Any] = {name: x[list(rows)] for name, x in columns.items() if isinstance(x, torch.Tensor)}
        return replace(self, **chosen)


def candidates(
    logits_BV: torch.Tensor,
    top_k_B: torch.Tensor,
    top_p_B: torch.Tensor,
    min_p_B: torch.Tensor,
    temperature_B: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The candidate sets: token ids [B, K] and log p renormalised on them [B, K], float64.

    top_k first, then top_p and min_p on softmax(log p / T).
    """
    filters = Filters(int(top_k_B.max()), temperature_B.double(), top_k_B, top_p_B, min_p_B)
    logits_BK, ids_BK = largest(logits_BV, filters.num_candidates)
    return ids_BK, renormalised(logits_BK, filters)


def largest(logits_BV: torch.Tensor, k: int, may_wait: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest logits and their ids; equal logits in the order of ids, also at the k-th place.

    Args:
        may_wait: whether the host may wait for a result, which makes it faster on a CPU.
    """
    k = min(k, logits_BV.shape[1])
    return _largest_by_topk(logits_BV, k) if may_wait else _largest_by_threshold(logits_BV, k)


def _largest_by_topk(logits_BV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    # topk may return any of the ids that share the smallest logit: fetch all of them, then sort and cut. Fetching a few
    # more than k nearly always suffices, even with the coarse steps of half precision.
    num_fetched = min(k + TIE_ROOM, logits_BV.shape[1])
    logits_BK, ids_BK = logits_BV.topk(num_fetched)
    if num_fetched < logits_BV.shape[1] and bool((logits_BK[:, -1] == logits_BK[:, k - 1]).any()):
        num_fetched = int((logits_BV >= logits_BK[:, k - 1 : k]).sum(-1).max())
        logits_BK, ids_BK = logits_BV.topk(num_fetched)
    ids_BK, order_BK = ids_BK.sort(dim=-1)
    logits_BK, order_BK = logits_BK.gather(-1, order_BK).sort(dim=-1, descending=True, stable=True)
    return logits_BK[:, :k], ids_BK.gather(-1, order_BK)[:, :k]


def _largest_by_threshold(logits_BV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Those above the k-th largest logit, then those with that logit, the smallest ids first; nan counts as above."""
    num_ids = logits_BV.shape[1]
    top_BK, top_ids_BK = logits_BV.topk(k)
    threshold_B1 = top_BK[:, -1:]
    falling_V = torch.arange(num_ids, 0, -1, device=logits_BV.device, dtype=torch.int32)
    ties_BK = torch.where(logits_BV == threshold_B1, falling_V, 0).topk(k).values  # 0: there are no more
    is_above_BK = (top_BK > threshold_B1) | top_BK.isnan()
    ids_BX = torch.cat([torch.where(is_above_BK, top_ids_BK, num_ids), num_ids - ties_BK], 1).sort(-1).values
    is_missing_BX = ids_BX == num_ids
    ids_BX = ids_BX.masked_fill(is_missing_BX, 0)
    logits_BX = logits_BV.gather(1, ids_BX).masked_fill(is_missing_BX, float("-inf"))
    logits_BX, order_BX = logits_BX.sort(dim=-1, descending=True, stable=True)
    return logits_BX[:, :k], ids_BX.gather(1, order_BX)[:, :k]


def renormalised(logits_BK: torch.Tensor, filters: Filters) -> torch.Tensor:
    """log p [B, K], float64, renormalised on the candidates that the filters leave; -inf for the others."""
    logits_BK = logits_BK.double()
    if filters.top_k_B is not None:
        column_K = torch.arange(logits_BK.shape[1], device=logits_BK.device)
        logits_BK = logits_BK.masked_fill(column_K >= filters.top_k_B[:, None], float("-inf"))
    if filters.top_p_B is not None or filters.min_p_B is not None:
        divisor_B = torch.where(filters.temperature_B > 0, filters.temperature_B, 1.0)
        probs_BK = torch.softmax(logits_BK / divisor_B[:, None], dim=-1)
        dropped_BK = torch.zeros_like(probs_BK, dtype=torch.bool)
        if filters.top_p_B is not None:
            mass_before_BK = probs_BK.cumsum(-1) - probs_BK
            dropped_BK |= (mass_before_BK >= filters.top_p_B[:, None]) & (filters.top_p_B[:, None] < 1)
        if filters.min_p_B is not None:
            dropped_BK |= probs_BK < filters.min_p_B[:, None] * probs_BK[:, :1]
        dropped_BK[:, 0] = False
        logits_BK = logits_BK.masked_fill(dropped_BK, float("-inf"))
    return torch.log_softmax(logits_BK, dim=-1)


def tilt(
    values_BKM: torch.Tensor,
    baseline_BM: torch.Tensor,
    weights_BM: torch.Tensor,
    beta_B: torch.Tensor,
    cap_B: torch.Tensor,
    uncapped_BK: torch.Tensor,
) -> torch.Tensor:
    """delta [B, K] in nats, float64.

    `values_BKM` holds V_m(s∘a) and `baseline_BM` holds V_m(s), both in standard deviations of the reward; entries of
    objectives with weight 0 are ignored (they may be nan). `uncapped_BK` marks end-of-answer tokens.
    """
    return capped(uncapped_tilt(values_BKM, baseline_BM, weights_BM, beta_B), cap_B[:, None], uncapped_BK)


def uncapped_tilt(
    values_BKM: torch.Tensor, baseline_BM: torch.Tensor, weights_BM: torch.Tensor, beta_B: torch.Tensor
) -> torch.Tensor:
    """delta [B, K] without a cap: not finite where a value that counts is not."""
    gain_BKM = values_BKM.double() - baseline_BM.double()[:, None]
    used_B1M = (weights_BM != 0)[:, None]
    gain_BK = (torch.where(used_B1M, gain_BKM, 0.0) * weights_BM.double()[:, None]).sum(-1)
    return beta_B.double()[:, None] * gain_BK


def capped(delta_BK: torch.Tensor, cap_BK: torch.Tensor, uncapped_BK: torch.Tensor) -> torch.Tensor:
    """`cap_BK` may have one column for all candidates."""
    return torch.where(uncapped_BK, delta_BK, torch.minimum(delta_BK, cap_BK.double()))


def choose(phi_BK: torch.Tensor, delta_BK: torch.Tensor, ids_BK: torch.Tensor) -> torch.Tensor:
    """Index [B] of one draw from softmax((log p + delta) / T), or of its mode where T = 0.

    The Gumbel-max trick (Maddison et al. 2014): argmax of phi + delta with phi = log p + T * G. Ties go to the smaller
    token id.
    """
    total_BK = phi_BK + delta_BK
    is_best_BK = total_BK == total_BK.max(-1, keepdim=True).values
    return torch.where(is_best_BK, ids_BK, torch.iinfo(ids_BK.dtype).max).argmin(-1)


def ranking(phi_BK: torch.Tensor, delta_BK: torch.Tensor, ids_BK: torch.Tensor) -> torch.Tensor:
    """Indices [B, K], starting with that of `choose`: the first q are q draws without replacement, in order, or the
    q most likely where T = 0 (Gumbel-top-k, arXiv 1903.06059).
    """
    by_id_BK = ids_BK.argsort(dim=-1)
    total_BK = (phi_BK + delta_BK).gather(-1, by_id_BK)
    return by_id_BK.gather(-1, total_BK.argsort(dim=-1, descending=True, stable=True))


def evaluation_order(logprobs_BK: torch.Tensor, bound_BK: torch.Tensor, uncapped_BK: torch.Tensor) -> torch.Tensor:
    """Indices [B, K] of the candidates, most promising first while no tilt is known: end-of-answer tokens, whose tilt
    is unbounded, then by the bound on phi + delta (by phi = log p + T * G, where one cap holds for all); the candidates
    that a row does not have are last.
    """
    is_present_BK = logprobs_BK > float("-inf")
    key_BK = torch.where(uncapped_BK, float("inf"), bound_BK)
    return torch.where(is_present_BK, key_BK, float("-inf")).argsort(dim=-1, descending=True, stable=True)


class Distribution(NamedTuple):
    """The tilted distribution of one step, or an estimate of it."""

    pi_BK: torch.Tensor  # 0 outside the sample
    divergence_B: torch.Tensor  # KL(pi || p_T), nats; nan where T = 0
    log_partition_B: torch.Tensor  # log Z of pi = p_T exp(delta / T) / Z; 0 where T = 0


def estimate_distribution(
    logprobs_BK: torch.Tensor,
    phi_BK: torch.Tensor,
    delta_BK: torch.Tensor,
    sample_BK: torch.Tensor,
    temperature_B: torch.Tensor,
    uncapped_BK: torch.Tensor,
) -> Distribution:
    """Estimate pi from the tilts of a sample of candidates.

    The sample consists of end-of-answer tokens (weight p) and of the candidates with the largest phi, which are a
    sample without replacement. Its weights are p / q with q = 1 - exp(-p exp(-kappa)) and kappa the next phi
    (Gumbel-top-k, arXiv 1903.06059), self-normalised, and the bias of small samples is taken off divergence and log Z
    (`_corrections`). Exact where the sample is all of C.
    """
    temperature_B1 = temperature_B.double()[:, None]
    is_drawn_B1 = temperature_B1 > 0
    divisor_B1 = torch.where(is_drawn_B1, temperature_B1, 1.0)
    log_p_BK = torch.log_softmax(logprobs_BK / divisor_B1, -1)
    scaled_BK = torch.where(sample_BK, delta_BK, 0.0) / divisor_B1
    # phi / T = log p / T + G, whose log p / T differs from log p_T by the normaliser.
    shift_B1 = (log_p_BK - logprobs_BK / divisor_B1)[:, :1]
    kappa_B1 = phi_BK.masked_fill(sample_BK, float("-inf")).amax(-1, keepdim=True) / divisor_B1 + shift_B1
    log_omission_BK = -torch.exp(log_p_BK - kappa_B1)  # the probability to be left out is its exponential
    is_weighted_BK = sample_BK & ~uncapped_BK & (kappa_B1 > float("-inf"))
    log_w_BK = log_p_BK - torch.where(is_weighted_BK, torch.log(-torch.expm1(log_omission_BK)), 0.0)
    log_w_BK = log_w_BK.masked_fill(~sample_BK, float("-inf"))
    log_tilted_BK = log_w_BK + scaled_BK
    log_z_B = torch.logsumexp(log_tilted_BK, -1) - torch.logsumexp(log_w_BK, -1)
    pi_BK = torch.softmax(log_tilted_BK, -1)
    tilt_BK = torch.where(pi_BK > 0, scaled_BK, 0.0)
    mean_tilt_B = (pi_BK * tilt_BK).sum(-1)
    omission_BK = torch.where(is_weighted_BK, log_omission_BK.exp(), 0.0)
    more_tilt_B, more_log_z_B = _corrections(pi_BK, torch.softmax(log_w_BK, -1), tilt_BK, mean_tilt_B, omission_BK)
    is_drawn_B = is_drawn_B1[:, 0]
    log_z_B = log_z_B + more_log_z_B
    divergence_B = (mean_tilt_B + more_tilt_B - log_z_B).clamp(min=0.0)
    return Distribution(
        pi_BK, torch.where(is_drawn_B, divergence_B, float("nan")), torch.where(is_drawn_B, log_z_B, 0.0)
    )


def _corrections(
    pi_BK: torch.Tensor, p_BK: torch.Tensor, tilt_BK: torch.Tensor, mean_tilt_B: torch.Tensor, omission_BK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What to add to the mean tilt and to log Z of a sample, which are nonlinear in its sums and so biased.

    A jackknife for samples of unequal probabilities: candidate i is left out with probability `omission`, and what that
    changes beyond first order, known in closed form, is in expectation what the sample lacks.

    Args:
        pi_BK, p_BK: the tilted and the plain distribution on the sample.
        tilt_BK: finite.
    """
    left_BK = (1 - pi_BK).clamp(min=LEAST_LEFT)
    more_tilt_BK = pi_BK**2 * (tilt_BK - mean_tilt_B[:, None]) / left_BK
    more_log_z_BK = _beyond_first_order(pi_BK) - _beyond_first_order(p_BK)
    return (omission_BK * more_tilt_BK).sum(-1), (omission_BK * more_log_z_BK).sum(-1)


def _beyond_first_order(share_BK: torch.Tensor) -> torch.Tensor:
    """-log(1 - x) - x."""
    return -torch.log1p(-share_BK.clamp(max=1 - LEAST_LEFT)) - share_BK

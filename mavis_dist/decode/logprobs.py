"""The distribution that a token was drawn from, as far as its scorer evaluated it; reported on request.

Shapes: B rows, K candidates in evaluation order.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mavis_dist.core.tilt import estimate_distribution
from mavis_dist.decode.request import Candidate, TokenLogprobs
from mavis_dist.decode.scorer import Drafts, Scores


def token_logprobs(
    drafts: Drafts, scores: Scores, index_B: torch.Tensor, counts: Mapping[int, int]
) -> dict[int, TokenLogprobs]:
    """By row, for those in `counts`: the chosen token and that many of the most likely ones.

    Exact where all candidates were evaluated; otherwise the normaliser of pi is an estimate, and candidates that were
    not evaluated are omitted, or listed as predicted. Rows at temperature 0 report the distribution of temperature 1.
    """
    if not counts:
        return {}
    temperature_B = torch.where(drafts.temperature_B > 0, drafts.temperature_B, 1.0)
    temperature_B1 = temperature_B[:, None]
    is_known_BK = scores.delta_BK > float("-inf")
    distribution = estimate_distribution(
        drafts.logprobs_BK, drafts.phi_BK, scores.delta_BK, is_known_BK, temperature_B, drafts.is_eos_BK
    )
    gain_BK = scores.delta_BK / temperature_B1 - distribution.log_partition_B[:, None]
    log_p_BK = torch.log_softmax(drafts.logprobs_BK / temperature_B1, -1)
    log_pi_BK = (log_p_BK + gain_BK).clamp(max=0.0)  # the estimated normaliser may be too small
    logratio_BK, divergence_B = gain_BK, distribution.divergence_B
    if drafts.preference_logratio_BK is not None:
        logratio_BK = logratio_BK + drafts.preference_logratio_BK
        divergence_B = divergence_B + (distribution.pi_BK * drafts.preference_logratio_BK).sum(-1)
    order_BK = log_pi_BK.argsort(dim=-1, descending=True, stable=True)
    num_known_B = (log_pi_BK > float("-inf")).sum(-1).tolist()

    def listed(b: int, indices: torch.Tensor) -> list[Candidate]:
        columns = (x[b, indices].tolist() for x in (drafts.ids_BK, log_pi_BK, logratio_BK))
        return [Candidate(*numbers) for numbers in zip(*columns, strict=True)]

    logprobs = {}
    for b, count in counts.items():
        [chosen] = listed(b, index_B[b : b + 1])
        top = listed(b, order_BK[b, : min(count, num_known_B[b])])
        logprobs[b] = TokenLogprobs(chosen, float(divergence_B[b]), tuple(top))
    return logprobs

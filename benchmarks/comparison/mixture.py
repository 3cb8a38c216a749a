"""The next-token distribution of a mixture of policies, and its divergence from the base model.

    log pi(a | s)  =  log p(a | s) + strength * sum_m w_m (log pi_m(a | s) - log p(a | s)) + const,     a in C(s)

C(s) is the base model's truncated support (top-k, top-p, min-p), on which p and pi are renormalised, as in the engine.
A policy can thus never draw a token that the base model cannot, and KL(pi || p) is finite. Weights that sum to 1 at
strength 1 are MOD (arXiv 2406.18853, reverse KL); a single policy is itself; strength 0 is the base model, and other
strengths are decoding-time realignment (arXiv 2402.02992).

Shapes: B rows, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from mavis_dist.core.tilt import Filters, largest, renormalised


class Mixture(NamedTuple):
    """A mixture on the candidates of every row, sorted by the base model's logit; log-probabilities are -inf where a
    row has fewer candidates.
    """

    ids_BK: torch.Tensor
    base_logprobs_BK: torch.Tensor  # float64
    logprobs_BK: torch.Tensor  # float64
    divergence_B: torch.Tensor  # KL(pi || p), nats


def mix(
    base_logits_BV: torch.Tensor,
    policy_logits: Sequence[torch.Tensor],
    weights: Sequence[float],
    strength: float,
    filters: Filters,
) -> Mixture:
    """The mixture of all rows.

    Args:
        policy_logits: [B, V] of every policy; a constant per row changes nothing.
        weights: of the policies.
    """
    base_logits_BK, ids_BK = largest(base_logits_BV, filters.num_candidates)
    base_BK = renormalised(base_logits_BK, filters)
    is_present_BK = base_BK > float("-inf")
    tilt_BK = torch.zeros_like(base_BK)
    for logits_BV, weight in zip(policy_logits, weights, strict=True):
        logits_BK = logits_BV.gather(-1, ids_BK).double().masked_fill(~is_present_BK, float("-inf"))
        ratio_BK = torch.log_softmax(logits_BK, -1) - base_BK
        tilt_BK += strength * weight * ratio_BK.masked_fill(~is_present_BK, 0.0)
    mixed_BK = torch.log_softmax(base_BK + tilt_BK, -1)
    terms_BK = mixed_BK.exp() * (mixed_BK - base_BK).masked_fill(~is_present_BK, 0.0)
    return Mixture(ids_BK, base_BK, mixed_BK, terms_BK.sum(-1))

"""The distribution that a base model and its sentences make together (MATO, arXiv 2605.25342).

    g_k(a)  =  log p(a | s, c_k) - log p(a | s)              what sentence c_k makes of a token
    log p'  =  log p + c * sum_k w_k g_k                     not normalised

Shapes: V vocabulary, K sentences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

NUCLEUS = (64, 1024)  # most likely tokens among which a top-p set is looked for first


def worded_shift(
    plain_V: torch.Tensor,
    views_KV: torch.Tensor,
    log_normalisers: Sequence[float],
    weights_K: Sequence[float],
    c: float,
    top_p: float,
) -> torch.Tensor:
    """c sum_k w_k g_k [V], in nats.

    Tokens that are likely neither in the plain distribution nor in the merged one at c = 1 get no bonus: c would
    multiply what is improbable with every sentence and without one. They may still lose, and none is removed.

    Args:
        plain_V: logits without a sentence; `views_KV`: with each of them.
        log_normalisers: of the plain logits, then of each view's.
        top_p: likely are the tokens of the smallest set of at least this probability; 1: all are.
    """
    anchor_V = torch.zeros_like(plain_V)
    for view_V, weight in zip(views_KV, weights_K, strict=True):
        anchor_V.add_(view_V - plain_V, alpha=weight)
    anchor_V += sum(w * (log_normalisers[0] - z) for w, z in zip(weights_K, log_normalisers[1:], strict=True))
    if top_p >= 1:
        return c * anchor_V
    merged_V = plain_V + anchor_V
    is_likely_V = nucleus(plain_V, log_normalisers[0], top_p) | nucleus(merged_V, float(merged_V.logsumexp(-1)), top_p)
    return c * torch.where(is_likely_V, anchor_V, anchor_V.clamp(max=0))


def nucleus(logits_V: torch.Tensor, log_normaliser: float, top_p: float) -> torch.Tensor:
    """The most likely tokens [V] whose probabilities sum to at least `top_p`, and those as likely as the last one."""
    for size in (*NUCLEUS, len(logits_V)):
        largest = logits_V.topk(min(size, len(logits_V))).values
        mass = (largest - log_normaliser).exp().cumsum(-1)
        if mass[-1] >= top_p:
            break
    last = min(int((mass < top_p).sum()), len(largest) - 1)
    return logits_V >= largest[last]

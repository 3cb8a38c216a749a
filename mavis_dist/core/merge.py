"""The distribution that a base model and its sentences make together (MATO, arXiv 2605.25342).

    g_k(a)  =  log p(a | s, c_k) - log p(a | s)              what sentence c_k makes of a token
    log p'  =  log p + c * sum_k w_k g_k                     not normalised

Shapes: X rows, V vocabulary, K sentences of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

NUCLEUS = (64, 1024)  # most likely tokens among which a top-p set is looked for first


def anchor(
    plain_V: torch.Tensor, views_KV: torch.Tensor, log_normalisers: Sequence[float], weights_K: Sequence[float]
) -> torch.Tensor:
    """sum_k w_k g_k [V], in nats, from logits without a sentence and with each; `log_normalisers` are in this order."""
    anchor_V = plain_V * -sum(weights_K)
    for view_V, weight in zip(views_KV, weights_K, strict=True):
        anchor_V.add_(view_V, alpha=weight)
    # Not math.fsum, which raises where infinities meet: what is not a number shall stay one.
    return anchor_V.add_(sum(w * (log_normalisers[0] - z) for w, z in zip(weights_K, log_normalisers[1:], strict=True)))


def guarded(
    plain_XV: torch.Tensor, log_z_X: torch.Tensor, anchor_XV: torch.Tensor, c_X: torch.Tensor, top_p_X: torch.Tensor
) -> torch.Tensor:
    """c sum_k w_k g_k [X, V], without a bonus for tokens that are likely neither in the plain distribution nor in the
    merged one at c = 1: c would multiply what is improbable with every sentence and without one. They may still lose,
    and none is removed. Likely are the tokens of the smallest set of at least probability `top_p`; 1: all are.
    `log_z_X` normalises the plain logits.
    """
    merged_XV = plain_XV + anchor_XV
    is_likely_XV = is_in_nucleus(plain_XV, log_z_X, top_p_X)
    is_likely_XV |= is_in_nucleus(merged_XV, merged_XV.logsumexp(-1), top_p_X)
    return c_X[:, None] * torch.where(is_likely_XV, anchor_XV, anchor_XV.clamp(max=0))


def is_in_nucleus(logits_XV: torch.Tensor, log_z_X: torch.Tensor, top_p_X: torch.Tensor) -> torch.Tensor:
    """The most likely tokens [X, V] whose probabilities sum to at least `top_p`, and those as likely as the last one;
    all where it is 1. `log_z_X` normalises the logits.
    """
    log_z_X1, num_tokens = log_z_X[:, None], logits_XV.shape[1]
    least_X = torch.full_like(top_p_X, float("-inf"), dtype=logits_XV.dtype)
    left = (top_p_X < 1).nonzero()[:, 0]
    for size in (*NUCLEUS, num_tokens):
        if not len(left):
            break
        largest = logits_XV[left].topk(min(size, num_tokens)).values
        mass = (largest - log_z_X1[left]).exp().cumsum(-1)
        last = (mass < top_p_X[left, None]).sum(-1, keepdim=True).clamp(max=largest.shape[1] - 1)
        least_X[left] = largest.gather(1, last)[:, 0]
        left = left[mass[:, -1] < top_p_X[left]]
    return logits_XV >= least_X[:, None]

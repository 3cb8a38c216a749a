"""The distribution of a base model merged with preferences (MATO, arXiv 2605.25342).

    g_k(a)  =  log p(a | s, c_k) - log p(a | s)              reward of a token under preference c_k
    log p'  =  log p + c * sum_k w_k g_k                     not normalised

All functions take normalised log-probabilities. Shapes: X rows, V vocabulary, K preferences of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

NUCLEUS = (128, 768, 6144)  # sizes of topk in which a top-p set is sought before all tokens are sorted


def anchor(plain_V: torch.Tensor, preference_KV: torch.Tensor, weights_K: Sequence[float]) -> torch.Tensor:
    """sum_k w_k g_k [V], in nats, from log p without a preference and with each."""
    anchor_V = plain_V * -sum(weights_K)
    for preference_V, weight in zip(preference_KV, weights_K, strict=True):
        anchor_V.add_(preference_V, alpha=weight)
    return anchor_V


def guarded(plain_XV: torch.Tensor, anchor_XV: torch.Tensor, c_X: torch.Tensor, top_p_X: torch.Tensor) -> torch.Tensor:
    """c sum_k w_k g_k [X, V], clamped to <= 0 for tokens outside the top-p sets of both the plain distribution and the
    merged one at c = 1: c would amplify tokens that are improbable with and without preferences. No token is removed.
    A top-p set is the smallest set with a probability of at least `top_p`; 1: all tokens.
    """
    merged_XV = (plain_XV + anchor_XV).log_softmax(-1)
    is_likely_XV = is_in_nucleus(plain_XV, top_p_X) | is_in_nucleus(merged_XV, top_p_X)
    return c_X[:, None] * torch.where(is_likely_XV, anchor_XV, anchor_XV.clamp(max=0))


def is_in_nucleus(logprobs_XV: torch.Tensor, top_p_X: torch.Tensor) -> torch.Tensor:
    """The most likely tokens [X, V] whose probabilities sum to at least `top_p`, ties with the last one included; all
    where it is 1.
    """
    num_tokens = logprobs_XV.shape[1]
    least_X = torch.full_like(top_p_X, float("-inf"), dtype=logprobs_XV.dtype)
    left = (top_p_X < 1).nonzero()[:, 0]
    for size in (*NUCLEUS, num_tokens):
        if not len(left):
            break
        largest = logprobs_XV[left].topk(min(size, num_tokens)).values
        mass = largest.exp().cumsum(-1)
        last = (mass < top_p_X[left, None]).sum(-1, keepdim=True).clamp(max=largest.shape[1] - 1)
        least_X[left] = largest.gather(1, last)[:, 0]
        left = left[mass[:, -1] < top_p_X[left]]
    return logprobs_XV >= least_X[:, None]

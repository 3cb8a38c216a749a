"""The distribution that a base model and its sentences make together (MATO, arXiv 2605.25342).

    g_k(a)  =  log p(a | s, c_k) - log p(a | s)              what sentence c_k makes of a token
    log p'  =  log p + c * sum_k w_k g_k                     not normalised

Everything here takes log-probabilities, normalised. Shapes: X rows, V vocabulary, K sentences of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

NUCLEUS = (128, 768, 6144)  # most likely tokens among which a top-p set is looked for before all are sorted


def anchor(plain_V: torch.Tensor, preference_KV: torch.Tensor, weights_K: Sequence[float]) -> torch.Tensor:
    """sum_k w_k g_k [V], in nats, from log p without a sentence and with each."""
    anchor_V = plain_V * -sum(weights_K)
    for preference_V, weight in zip(preference_KV, weights_K, strict=True):
        anchor_V.add_(preference_V, alpha=weight)
    return anchor_V


def guarded(plain_XV: torch.Tensor, anchor_XV: torch.Tensor, c_X: torch.Tensor, top_p_X: torch.Tensor) -> torch.Tensor:
    """c sum_k w_k g_k [X, V], without a bonus for tokens that are likely neither in the plain distribution nor in the
    merged one at c = 1: c would multiply what is improbable with every sentence and without one. They may still lose,
    and none is removed. Likely are the tokens of the smallest set of at least probability `top_p`; 1: all are.
    """
    merged_XV = (plain_XV + anchor_XV).log_softmax(-1)
    is_likely_XV = is_in_nucleus(plain_XV, top_p_X) | is_in_nucleus(merged_XV, top_p_X)
    return c_X[:, None] * torch.where(is_likely_XV, anchor_XV, anchor_XV.clamp(max=0))


def is_in_nucleus(logprobs_XV: torch.Tensor, top_p_X: torch.Tensor) -> torch.Tensor:
    """The most likely tokens [X, V] whose probabilities sum to at least `top_p`, and those as likely as the last one;
    all where it is 1.
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

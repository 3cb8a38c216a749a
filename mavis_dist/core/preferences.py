"""Objectives in words (MATO, arXiv 2605.25342): the base model itself says what a sentence asks for.

    g_k(a)   =  log p(a | s, c_k) - log p(a | s)                            reward of a token under sentence c_k
    w_k      ∝  w_init,k exp(-S_k / tau)                                    S_k: what the answer has earned so far
    log p'   =  log p + c * sum_k w_k g_k                                   the merged distribution, not normalised

The published method finds log p' by T steps of follow-the-regularised-leader from log p + sum_k w_k g_k. All its
iterates lie on one line, so that the loop comes down to the scalar c (`amplification`). The published scale of S_k is
1: it and tau are one number.

Shapes: V vocabulary, K sentences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

import torch

NUCLEUS = 64  # tokens among which a top-p set is looked for first


class Accumulation(str, Enum):
    """How the rewards of an answer's tokens make up S_k."""

    MEAN = "mean"  # keeps the proportions of the initial weights
    SUM = "sum"  # makes all sentences earn the same in the end, whatever the initial weights
    DECAY = "decay"  # a sum in which older tokens count less


@lru_cache
def amplification(alpha: float, lam: float, nu: float, steps: int) -> float:
    """c after `steps` steps of the online optimisation with utilities alpha (log pi - log p), pull lam to the anchor
    and learning rate nu (Amulet, arXiv 2502.19148): c_0 = 1 and

        c_t  =  (lam + alpha / t * sum_{i<t} c_i + c_{t-1} / (nu t)) / (lam + 1 / (nu t))

    May be large, or infinite, where alpha >= lam.
    """
    c, total = 1.0, 0.0
    for t in range(1, steps + 1):
        total += c
        c = (lam + alpha / t * total + c / (nu * t)) / (lam + 1 / (nu * t))
    return c


def adapted_weights(initial_K: Sequence[float], earned_K: Sequence[float], tau: float) -> list[float]:
    """argmin_w sum_k w_k S_k + tau KL(w || w_init): weight goes to the sentences that earned least. Sums to 1."""
    logs_K = [math.log(w) - s / tau if w > 0 else -math.inf for w, s in zip(initial_K, earned_K, strict=True)]
    largest = max(logs_K)
    shares_K = [math.exp(x - largest) for x in logs_K]
    total = math.fsum(shares_K)
    return [share / total for share in shares_K]


@dataclass
class Earned:
    """S_k of one answer, token by token."""

    accumulation: Accumulation
    decay: float  # what a token's reward is multiplied with at every later token
    clip: float  # largest |S_k|
    total_K: list[float]
    num_tokens: int = 0

    def add(self, rewards_K: Sequence[float]) -> None:
        kept = self.decay if self.accumulation is Accumulation.DECAY else 1.0
        self.total_K = [kept * total + reward for total, reward in zip(self.total_K, rewards_K, strict=True)]
        self.num_tokens += 1

    def amounts(self) -> list[float]:
        """S_k; 0 before the first token."""
        divisor = max(1, self.num_tokens) if self.accumulation is Accumulation.MEAN else 1
        return [max(-self.clip, min(self.clip, total / divisor)) for total in self.total_K]


def worded_shift(
    plain_V: torch.Tensor,
    views_KV: torch.Tensor,
    log_normalisers: Sequence[float],
    weights_K: Sequence[float],
    c: float,
    top_p: float,
) -> torch.Tensor:
    """c sum_k w_k g_k [V], in nats.

    Tokens that neither the plain distribution nor the merged one at c = 1 holds likely get no bonus: what is improbable
    with every sentence and without one would be noise times c. They may still lose, and none is removed.

    Args:
        plain_V: logits without a sentence; `views_KV`: with each of them.
        log_normalisers: of the plain logits, then of each view's.
        top_p: likely are the tokens of the smallest set of at least this probability; 1: all are.
    """
    anchor_V = torch.zeros_like(plain_V)
    for view_V, weight in zip(views_KV, weights_K, strict=True):
        anchor_V.add_(view_V - plain_V, alpha=weight)
    normaliser = math.fsum(w * (log_normalisers[0] - z) for w, z in zip(weights_K, log_normalisers[1:], strict=True))
    anchor_V += normaliser
    if top_p >= 1:
        return c * anchor_V
    is_likely_V = nucleus(plain_V, top_p) | nucleus(plain_V + anchor_V, top_p)
    return c * torch.where(is_likely_V, anchor_V, anchor_V.clamp(max=0))


def nucleus(logits_V: torch.Tensor, top_p: float) -> torch.Tensor:
    """The most likely tokens [V] whose probabilities sum to at least `top_p`, and those as likely as the last one."""
    log_z, size = logits_V.logsumexp(-1), min(NUCLEUS, len(logits_V))
    largest = logits_V.topk(size).values
    mass = (largest - log_z).exp().cumsum(-1)
    if mass[-1] < top_p:
        largest = logits_V.sort(descending=True).values
        mass = (largest - log_z).exp().cumsum(-1)
    last = min(int((mass < top_p).sum()), len(largest) - 1)
    return logits_V >= largest[last]

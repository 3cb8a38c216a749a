"""Weights and strength of preferences (MATO, arXiv 2605.25342). Plain numbers.

    w_k  ∝  w_init,k exp(-S_k / tau)        S_k: accumulated rewards g_k of the answer's tokens, see core.merge

The published scale of S_k is 1, because it is redundant with tau. The published method finds the merged distribution by
T steps of follow-the-regularised-leader from log p + sum_k w_k g_k. All its iterates lie on the line log p + c sum_k
w_k g_k, so the loop reduces to the scalar c.

Shapes: K preferences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache


class Accumulation(str, Enum):
    """How the rewards of an answer's tokens are accumulated into S_k."""

    MEAN = "mean"  # keeps the proportions of the initial weights
    SUM = "sum"  # equalises the total rewards of all preferences, whatever the initial weights
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


def adapted_weights(initial_K: Sequence[float], rewards_K: Sequence[float], tau: float) -> list[float]:
    """argmin_w sum_k w_k S_k + tau KL(w || w_init): the least rewarded preferences gain weight. Sums to 1."""
    least = min(rewards_K)  # subtracted first: a tiny tau makes all the others infinite
    pairs = zip(initial_K, rewards_K, strict=True)
    logs_K = [math.log(w) - (s - least) / tau if w > 0 else -math.inf for w, s in pairs]
    largest = max(logs_K)
    shares_K = [math.exp(x - largest) for x in logs_K]
    total = math.fsum(shares_K)
    return [share / total for share in shares_K]


@dataclass
class RewardTracker:
    """S_k of one answer, token by token."""

    accumulation: Accumulation
    decay: float  # factor that a token's reward is multiplied by at every later token
    clip: float  # largest |S_k|
    total_K: list[float]
    num_tokens: int = 0

    def add(self, rewards_K: Sequence[float]) -> None:
        kept = self.decay if self.accumulation is Accumulation.DECAY else 1.0
        self.total_K = [kept * total + reward for total, reward in zip(self.total_K, rewards_K, strict=True)]
        self.num_tokens += 1

    def accumulated(self) -> list[float]:
        """S_k; 0 before the first token."""
        divisor = max(1, self.num_tokens) if self.accumulation is Accumulation.MEAN else 1
        return [max(-self.clip, min(self.clip, total / divisor)) for total in self.total_K]

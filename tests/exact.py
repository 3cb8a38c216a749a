"""Exact log-ratios and divergences of one step, from the tilts of all candidates.

Shapes: B rows, K candidates.
"""

from __future__ import annotations

import torch


def log_partition(logprobs_BK: torch.Tensor, delta_BK: torch.Tensor, temperature_B: torch.Tensor) -> torch.Tensor:
    """log Z [B] of the tilt: log sum p_T exp(delta / T), with p_T ∝ p^(1/T); 0 where T = 0, which has no density."""
    temperature_B1 = temperature_B.double()[:, None]
    divisor_B1 = torch.where(temperature_B1 > 0, temperature_B1, 1.0)
    tilted_B = torch.logsumexp((logprobs_BK + delta_BK) / divisor_B1, -1)
    return torch.where(temperature_B > 0, tilted_B - torch.logsumexp(logprobs_BK / divisor_B1, -1), 0.0)


def log_ratio(logprobs_BK: torch.Tensor, delta_BK: torch.Tensor, temperature_B: torch.Tensor) -> torch.Tensor:
    """log pi(a) - log p_T(a) [B, K]; 0 where T = 0."""
    temperature_B1 = temperature_B.double()[:, None]
    log_z_B1 = log_partition(logprobs_BK, delta_BK, temperature_B)[:, None]
    return torch.where(
        temperature_B1 > 0, delta_BK / torch.where(temperature_B1 > 0, temperature_B1, 1.0) - log_z_B1, 0.0
    )


def divergence(logprobs_BK: torch.Tensor, delta_BK: torch.Tensor, temperature_B: torch.Tensor) -> torch.Tensor:
    """KL(pi || p_T) of one step [B], in nats; exactly 0 without a tilt, nan where T = 0."""
    ratio_BK = log_ratio(logprobs_BK, delta_BK, temperature_B)
    temperature_B1 = temperature_B.double()[:, None]
    probs_BK = torch.softmax((logprobs_BK + delta_BK) / torch.where(temperature_B1 > 0, temperature_B1, 1.0), -1)
    present_BK = logprobs_BK > float("-inf")
    kl_B = torch.where(present_BK, probs_BK * ratio_BK, 0.0).sum(-1)
    return torch.where(temperature_B > 0, kl_B, float("nan"))
